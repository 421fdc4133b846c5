"""Runs that are cut off at any moment end as runs that were left alone, bit for bit; and twice the same is the same."""

import os
import random
import signal
import time

import numpy as np
import pytest
from PIL import Image

import train_vlm
from data.files import read_json
from mapping import MAPPINGS
from models.clip import ClipClassifier
from tests.system.processes import PARTS, finish, folder_of, log_of, outcome, run, start
from tools.training.build import System
from tools.training.run_folder import load_checkpoint, read_config
from tools.training.session import Session

SHORT = ["--epochs", 4, "--batch-size", 32]


def kill_at_random(process, results, draw):
    """``kill -9`` at a random moment, one time in three while a file is being saved; "saving", "running" or "over"."""
    until = time.monotonic() + draw.uniform(0.3, 3.0)
    in_a_save = draw.random() < 1 / 3
    while process.is_alive() and (in_a_save or time.monotonic() < until):
        if in_a_save and time.monotonic() > until - 2 and saving(results):
            break
        time.sleep(0 if in_a_save else 0.01)
    over = not process.is_alive()
    process.kill()
    finish(process)
    if over:
        assert process.exitcode == 0, log_of(results).read_text()
        return "over"
    return "saving" if saving(results) else "running"


def saving(results):
    return any(results.glob("*/*/*/.*.tmp"))


def kill_and_restart(script, arguments, results, kills, seed):
    """Cut a run off ``kills`` times, then let it end; from scratch each time that it ends before. Counts by moment."""
    draw, moments, count, attempt = random.Random(seed), {"saving": 0, "running": 0}, 0, 0
    reference = results / "reference"
    assert run(script, reference, *arguments) == 0, log_of(reference).read_text()
    expected = outcome(reference)
    while count < kills:
        folder, attempt, cut = results / f"cut{attempt}", attempt + 1, "running"
        while count < kills and cut != "over":
            cut = kill_at_random(start(script, folder, *arguments), folder, draw)
            if cut != "over":
                moments[cut] += 1
                count += 1
        if cut != "over":
            assert run(script, folder, *arguments) == 0, log_of(folder).read_text()
        assert outcome(folder) == expected
        assert [line["epoch"] for line in expected["metrics"]] == list(range(4))
        assert not list(folder_of(folder).glob(".*.tmp"))
        assert "Traceback" not in log_of(folder).read_text()
    return moments


@pytest.mark.parametrize(
    "script, mapping, reprogramming",
    [
        ("train_vm_fast", "blmpp", "watermarking"),
        ("train_vlm", "linear", "watermarking"),
    ],
)
def test_killed_runs_end_as_runs_left_alone(tmp_path, script, mapping, reprogramming):
    arguments = [*SHORT, "--mapping", mapping, "--reprogramming", reprogramming]
    kill_and_restart(script, arguments, tmp_path, kills=3, seed=0)


@pytest.mark.soak
@pytest.mark.parametrize("mapping", MAPPINGS)
@pytest.mark.parametrize("script", ["train_vm", "train_vm_fast", "train_vlm"])
def test_killed_ten_times(tmp_path, script, mapping):
    moments = kill_and_restart(script, [*SHORT, "--mapping", mapping], tmp_path, kills=10, seed=f"{script}{mapping}")
    print(f"\n{script} {mapping}: {sum(moments.values())} kills, {moments['saving']} of them during a save")


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    results = tmp_path_factory.mktemp("alone") / "results"
    assert run("train_vm", results, *SHORT, "--mapping", "blm") == 0, log_of(results).read_text()
    return results


def wait_for_lines(results, count, timeout=600):
    """Wait until ``metrics.jsonl`` has as many lines."""
    until = time.monotonic() + timeout
    while time.monotonic() < until:
        lines = [len(path.read_text().splitlines()) for path in results.rglob("metrics.jsonl")]
        if lines and lines[0] >= count:
            return
        time.sleep(0.01)
    raise AssertionError(f"no {count} epochs after {timeout} s: {log_of(results).read_text()}")


@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGINT])
def test_signals_end_a_run_that_goes_on_later(alone, tmp_path, signum):
    results = tmp_path / "results"
    process = start("train_vm", results, *SHORT, "--mapping", "blm")
    wait_for_lines(results, 1)
    os.kill(process.pid, signum)
    assert finish(process) == 128 + signum
    log = log_of(results).read_text()
    assert f"{signal.Signals(signum).name} received: stopped after a batch; " in log and "Traceback" not in log
    assert "finished epochs are kept, the same command goes on from there" in log
    assert not (folder_of(results) / "result.json").exists()
    assert run("train_vm", results, *SHORT, "--mapping", "blm") == 0
    assert "going on after epoch" in log_of(results).read_text()
    assert outcome(results) == outcome(alone)


def test_second_process_and_damage_are_refused(tmp_path):
    results, arguments = tmp_path / "results", [*SHORT, "--mapping", "blm"]
    first = start("train_vm", results, *arguments)
    wait_for_lines(results, 1)
    os.kill(first.pid, signal.SIGSTOP)
    try:
        assert run("train_vm", results, *arguments) == 2
        assert "error: another process is at work in" in log_of(results).read_text()
    finally:
        first.kill()
        first.join()
    folder = folder_of(results)
    for name in ("last.safetensors", "previous.safetensors"):
        (folder / name).unlink(missing_ok=True)
        (folder / name).write_bytes(b"damaged")
    assert run("train_vm", results, *arguments) == 2
    last = log_of(results).read_text().splitlines()[-1]
    assert last.startswith("error: ") and "--overwrite" in last
    assert "last.safetensors" in last and "previous.safetensors" in last
    assert run("train_vm", results, *arguments, "--overwrite") == 0


def test_another_number_of_epochs_is_another_run(tmp_path):
    """A finished run is neither refused nor continued by a longer one, whose learning rates differ."""
    results = tmp_path / "results"
    for epochs in (1, 2):
        assert run("train_vm", results, "--mapping", "flm", "--batch-size", 32, "--epochs", epochs) == 0
    log = log_of(results).read_text()
    assert "going on after" not in log and "is finished" not in log
    lengths = {path.parent.name: len(path.read_text().splitlines()) for path in results.rglob("metrics.jsonl")}
    name = "efficientnet_lite0_padding_flm_seed0_canvas_size=48_epochs={}_batch_size=32"
    assert lengths == {name.format(epochs): epochs for epochs in (1, 2)}


def test_other_rounding_goes_on_with_a_warning(tmp_path):
    results = tmp_path / "results"
    arguments = [*SHORT, "--mapping", "blm"]
    process = start("train_vm", results, *arguments)
    wait_for_lines(results, 1)
    process.kill()
    finish(process)
    assert run("train_vm", results, *arguments, "--engine", "plain") == 0
    log = log_of(results).read_text()
    warning = "warning: engine was 'auto' and is 'plain': from here on the run rounds otherwise than before"
    assert "going on after epoch" in log and warning in log.splitlines()
    folder = folder_of(results)
    assert warning in (folder / "log.txt").read_text().splitlines()  # what was printed is kept, warnings too
    assert log.splitlines() == (folder / "log.txt").read_text().splitlines()
    assert [start["command"][-1] for start in read_config(folder / "config.json")["starts"]] == ["blm", "plain"]
    assert run("train_vm", results, *arguments) == 0
    assert "is finished (engine was 'plain' and is 'auto'): " in log_of(results).read_text()


def test_a_data_folder_may_move_and_its_images_may_not_change(tmp_path):
    """While the run is unfinished: what it trains on has to stay the same, wherever it is."""
    results = tmp_path / "results"
    write_images(tmp_path / "here" / "set")
    flags = ["--reprogramming", "watermarking", "--batch-size", 10, "--epochs", 2]
    assert run("train_vm", results, "--dataset", f"folder:{tmp_path}/here/set", *flags) == 0
    folder = folder_of(results)
    (folder / "result.json").unlink()
    (tmp_path / "here").rename(tmp_path / "there")
    assert run("train_vm", results, "--dataset", f"folder:{tmp_path}/there/set", *flags) == 0
    log = log_of(results).read_text()
    assert "going on after epoch 2" in log and len(read_config(folder / "config.json")["starts"]) == 2
    (tmp_path / "there/set/train/ant").rename(tmp_path / "there/set/train/asp")
    (tmp_path / "there/set/test/ant").rename(tmp_path / "there/set/test/asp")
    assert run("train_vm", results, "--dataset", f"folder:{tmp_path}/there/set", *flags) == 2
    last = log_of(results).read_text().splitlines()[-1]
    assert last.startswith("error: ") and "other class names ('ant', now 'asp')" in last
    for split in ("train", "test"):
        (tmp_path / "there/set" / split / "asp").rename(tmp_path / "there/set" / split / "ant")
    Image.new("RGB", (40, 52)).save(tmp_path / "there/set/train/ant/0.png")
    assert run("train_vm", results, "--dataset", f"folder:{tmp_path}/there/set", *flags) == 2
    assert "other train images" in log_of(results).read_text().splitlines()[-1]


def test_zero_shot_is_measured_once_and_a_signal_ends_it(tmp_path, monkeypatch):
    """In this process, where calls can be counted and the signal comes at a known batch."""
    command = [
        "--dataset",
        "synthetic",
        "--results-path",
        str(tmp_path),
        "--device",
        "cpu",
        "--mapping",
        "flm",
        "--epochs",
        "2",
        "--batch-size",
        "16",
        *PARTS["train_vlm"],
    ]
    measured, measure, logits = [], System.zero_shot_accuracy, ClipClassifier.zero_shot_logits
    monkeypatch.setattr(System, "zero_shot_accuracy", lambda *args: measured.append(1) or measure(*args))

    def stopping(*args):
        os.kill(os.getpid(), signal.SIGTERM)
        return logits(*args)

    with monkeypatch.context() as first:
        first.setattr(ClipClassifier, "zero_shot_logits", stopping)
        with pytest.raises(SystemExit) as caught:
            train_vlm.main(command)
    assert caught.value.code == 143 and measured == [1]
    end_epoch = Session.end_epoch

    def end_and_stop(self, epoch, *values):
        end_epoch(self, epoch, *values)
        os.kill(os.getpid(), signal.SIGTERM)

    with monkeypatch.context() as second:
        second.setattr(Session, "end_epoch", end_and_stop)
        with pytest.raises(SystemExit) as caught:
            train_vlm.main(command)
    assert caught.value.code == 143 and measured == [1, 1]
    train_vlm.main(command)
    assert measured == [1, 1], "it came back from the checkpoint"
    folder = folder_of(tmp_path)
    zero_shot = load_checkpoint(folder / "last.safetensors")["zero_shot"]
    assert zero_shot.keys() == {"single", "ensemble"} and read_json(folder / "result.json")["zero_shot"] == zero_shot
    assert (folder / "log.txt").read_text().count("without reprogramming: ") == 2


def test_the_same_command_twice_gives_the_same_bits(alone, tmp_path):
    assert run("train_vm", tmp_path / "again", *SHORT, "--mapping", "blm", "--deterministic") == 0
    again, first = outcome(tmp_path / "again"), outcome(alone)
    for name in ("last.safetensors", "best.safetensors"):
        assert again[name]["settings"].pop("deterministic") and not first[name]["settings"].pop("deterministic")
    assert again == first


def write_images(folder):
    pixels = np.random.default_rng(0)
    for split, name, index in [(s, n, i) for s in ("train", "test") for n in ("ant", "bee", "cat") for i in range(8)]:
        path = folder / split / name / f"{index}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels.integers(0, 256, (40, 52, 3), dtype=np.uint8)).save(path)


def test_threads_and_cache_do_not_change_the_result(tmp_path):
    source = tmp_path / "images"
    write_images(source)
    outcomes = []
    for results, workers in (("one", 1), ("three", 3), ("three", 2)):  # the last from the others' cache
        arguments = [
            "--dataset",
            f"folder:{source}",
            "--reprogramming",
            "watermarking",
            "--workers",
            workers,
            "--epochs",
            2,
            "--batch-size",
            10,
            "--overwrite",
        ]
        assert run("train_vm", tmp_path / results, *arguments) == 0, log_of(tmp_path / results).read_text()
        outcomes.append(outcome(tmp_path / results))
    assert outcomes[0] == outcomes[1] == outcomes[2]
