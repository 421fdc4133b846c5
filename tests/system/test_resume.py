"""Runs that are cut off at any moment end as runs that were left alone, bit for bit; and twice the same is the same."""

import os
import random
import signal
import time

import numpy as np
import pytest
from PIL import Image

from mapping import MAPPINGS
from tests.system.processes import finish, folder_of, log_of, outcome, run, start

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
    """Cut a run off ``kills`` times, then let it end; as often anew as it gets to its end before. Counts by moment."""
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


@pytest.mark.parametrize("script, mapping, reprogramming", [
    ("train_vm_fast", "blmpp", "watermarking"), ("train_vlm", "linear", "watermarking"),
])
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


def wait_for_lines(results, count, timeout=60):
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


def test_second_process_other_settings_and_damage_are_refused(tmp_path):
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
    changed = ["--lr", 0.02, "--precision", "bf16", "--batch-size", 31, "--laplace", 0.5, "--train-fraction", 0.5]
    assert run("train_vm", results, *arguments, *changed) == 2
    last = log_of(results).read_text().splitlines()[-1]
    for difference in (
        "lr was 0.01 and is 0.02", "precision was 'fp32' and is 'bf16'", "batch_size was 32 and is 31",
        "laplace was 1.0 and is 0.5", "train_fraction was 1.0 and is 0.5", "--overwrite",
    ):
        assert difference in last
    folder = folder_of(results)
    for name in ("last.safetensors", "previous.safetensors"):
        (folder / name).unlink(missing_ok=True)
        (folder / name).write_bytes(b"damaged")
    assert run("train_vm", results, *arguments) == 2
    last = log_of(results).read_text().splitlines()[-1]
    assert last.startswith("error: ") and "last.safetensors" in last and "previous.safetensors" in last and "--overwrite" in last
    assert run("train_vm", results, *arguments, "--overwrite") == 0


def test_the_same_command_twice_gives_the_same_bits(alone, tmp_path):
    assert run("train_vm", tmp_path / "again", *SHORT, "--mapping", "blm", "--deterministic") == 0
    again, first = outcome(tmp_path / "again"), outcome(alone)
    for name in ("last.safetensors", "best.safetensors"):
        assert again[name]["settings"].pop("deterministic") and not first[name]["settings"].pop("deterministic")
    assert again == first


def test_threads_and_cache_do_not_change_the_result(tmp_path):
    source, pixels = tmp_path / "pictures", np.random.default_rng(0)
    for split, name, index in [(s, n, i) for s in ("train", "test") for n in ("ant", "bee", "cat") for i in range(8)]:
        path = source / split / name / f"{index}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels.integers(0, 256, (40, 52, 3), dtype=np.uint8)).save(path)
    outcomes = []
    for results, workers in (("one", 1), ("three", 3), ("three", 2)):  # the last from the others' cache
        arguments = ["--dataset", f"folder:{source}", "--reprogramming", "watermarking", "--workers", workers,
                     "--epochs", 2, "--batch-size", 10, "--overwrite"]
        assert run("train_vm", tmp_path / results, *arguments) == 0, log_of(tmp_path / results).read_text()
        outcomes.append(outcome(tmp_path / results))
    assert outcomes[0] == outcomes[1] == outcomes[2]
