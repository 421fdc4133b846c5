"""The scripts as a user runs them: every mapping with both input VRs, and what they say to bad input."""

import itertools
import json
import math
import os
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from mapping import MAPPINGS
from tests.data.helpers import make_ilmvp, picture, put
from tools.training.run_folder import load_checkpoint

ROOT = Path(__file__).parents[2]
BACKBONES = {
    "train_vm.py": ["--backbone", "efficientnet_lite0", "--canvas-size", "64"],
    "train_vm_fast.py": ["--backbone", "efficientnet_lite0", "--canvas-size", "64"],
    "train_vlm.py": ["--backbone", "tiny-test", "--weights", "none"],
}
LR = {"train_vm.py": "0.003", "train_vm_fast.py": "0.003", "train_vlm.py": "1"}


def run(script, *arguments, timeout=300):
    command = [sys.executable, str(ROOT / script), *arguments]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.run(command, capture_output=True, text=True, timeout=timeout, env=environment)


def epochs_of(script, mapping):
    """Three, but for a matrix learned on logits of CLIP's size: Adam overshoots at first."""
    return 8 if (script, mapping) == ("train_vlm.py", "linear") else 3


def smoke(script, mapping, reprogramming, results):
    return run(
        script, "--dataset", "synthetic", "--mapping", mapping, "--reprogramming", reprogramming,
        "--epochs", str(epochs_of(script, mapping)), "--batch-size", "16",
        "--lr", LR[script], "--results-path", str(results), *BACKBONES[script],
    )


CELLS = [
    *itertools.product(["train_vm.py"], MAPPINGS, ["padding", "watermarking"]),
    *itertools.product(["train_vm_fast.py"], ["flm", "blm", "blmpp", "linear"], ["padding"]),
    *itertools.product(["train_vlm.py"], MAPPINGS, ["padding", "watermarking"]),
]


@pytest.fixture(scope="module")
def smoke_runs(tmp_path_factory):
    results = tmp_path_factory.mktemp("results")
    with ThreadPoolExecutor(2) as pool:  # two processes of one thread each keep two cores busy through the imports
        outcomes = list(pool.map(lambda cell: smoke(*cell, results), CELLS))
    return results, dict(zip(CELLS, outcomes, strict=True))


@pytest.mark.parametrize("script, mapping, reprogramming", CELLS)
def test_smoke(smoke_runs, script, mapping, reprogramming):
    results, outcomes = smoke_runs
    outcome = outcomes[script, mapping, reprogramming]
    assert outcome.returncode == 0, outcome.stderr
    assert outcome.stderr == "", "no warning and no progress bar where the output is piped"
    backbone = BACKBONES[script][1]
    kind = script.removeprefix("train_").removesuffix(".py")
    folder = results / kind / "synthetic" / f"{backbone}_{reprogramming}_{mapping}_seed0"
    config = json.loads((folder / "config.json").read_text())
    assert config["settings"]["mapping"] == mapping and config["versions"]["torch"] == torch.__version__
    metrics = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [m["epoch"] for m in metrics] == list(range(epochs_of(script, mapping)))
    assert min(m["train_loss"] for m in metrics[1:]) < metrics[0]["train_loss"]
    assert all(math.isfinite(m["train_loss"]) and m["seconds"]["train"] > 0 for m in metrics)
    result = json.loads((folder / "result.json").read_text())
    accuracies = [m["test_accuracy"] for m in metrics]
    assert result["final_accuracy"] == accuracies[-1] and result["best_accuracy"] == max(accuracies)
    assert result["best_epoch"] == accuracies.index(max(accuracies))
    if kind == "vlm":
        assert 0 <= result["zero_shot"]["single"] <= 1 and 0 <= result["zero_shot"]["ensemble"] <= 1
    for name in ("last.safetensors", "best.safetensors"):
        checkpoint = torch.load(folder / name, weights_only=True)
        assert checkpoint["program"].shape[0] == 3 and checkpoint["program"].abs().sum() > 0
        assert len(checkpoint["class_names"]) == 8
    assert load_checkpoint(folder / "last.safetensors")["metrics"] == metrics
    if mapping in ("rlm", "flm"):
        assert metrics[1]["mapping_change"] == metrics[2]["mapping_change"] == 0
    if mapping == "linear":
        assert metrics[1]["mapping_change"] > 0


@pytest.mark.parametrize("script", ["train_vm.py", "train_vm_fast.py"])
def test_first_epoch_is_the_same_in_the_fast_script(smoke_runs, script):
    results, _ = smoke_runs
    lines = []
    for kind in ("vm", "vm_fast"):
        path = results / kind / "synthetic" / "efficientnet_lite0_padding_blmpp_seed0" / "metrics.jsonl"
        lines.append(json.loads(path.read_text().splitlines()[0]))
    assert lines[0]["train_loss"] == lines[1]["train_loss"]
    assert lines[0]["test_accuracy"] == lines[1]["test_accuracy"]


def test_finished_run_is_left_alone(smoke_runs):
    results, _ = smoke_runs
    folder = results / "vm" / "synthetic" / "efficientnet_lite0_padding_blm_seed0"
    before = {path.name: path.stat().st_mtime_ns for path in folder.iterdir()}
    outcome = smoke("train_vm.py", "blm", "padding", results)
    assert outcome.returncode == 0 and "is finished" in outcome.stdout and "--overwrite" in outcome.stdout
    assert {path.name: path.stat().st_mtime_ns for path in folder.iterdir()} == before


BAD = [
    (["--dataset", "flower102"], ["flower102", "flowers102", "digits"]),
    (["--mapping", "bml"], ["bml", "blmpp", "closest"]),
    (["--backbone", "resnet81"], ["resnet81", "resnet18", "timm:<name>"]),
    (["--backbone", "timm:resnet18x"], ["timm:resnet18"]),
    (["--epochs", "0"], ["--epochs must be 1 or more, got 0"]),
    (["--epochs", "-3"], ["--epochs must be 1 or more, got -3"]),
    (["--epochs", "ten"], ["--epochs", "ten"]),
    (["--topk-ratio", "0"], ["--topk-ratio must be in (0, 1], got 0"]),
    (["--topk-ratio", "1.5"], ["--topk-ratio", "1.5"]),
    (["--laplace", "-1"], ["--laplace must be 0 or more, got -1"]),
    (["--laplace", "nan"], ["--laplace", "nan"]),
    (["--lr", "0"], ["--lr must be above 0"]),
    (["--train-fraction", "0"], ["--train-fraction must be in (0, 1]"]),
    (["--batch-size", "0"], ["--batch-size"]),
    (["--device", "tpu"], ["--device tpu", "cpu, cuda"]),
    (["--precision", "fp16", "--device", "cpu"], ["--precision fp16 needs a GPU"]),
    (["--engine", "warp"], ["warp", "shared-border"]),
    (["--mappings", "blm"], ["--mappings", "did you mean --mapping?"]),
    (["--canvas-size", "32"], ["image 32x32", "canvas 32x32"]),
    (["--canvas-size", "16"], ["image 32x32", "canvas 16x16"]),
    (["--weights", "absent.pth"], ["absent.pth", "no such file"]),
    (["--dataset", "sun397"], ["sun397", "train.lmdb"]),
    (["--dataset", "folder:absent"], ["absent"]),
    (["--mapping", "flm", "--no-bayes"], ["--no-bayes is for blm and blmpp, but the mapping is flm"]),
    (["--mapping", "blm", "--no-topk"], ["--no-topk is for blmpp"]),
    (["--mapping", "rlm", "--no-iteration"], ["--no-iteration is for ilm and blm and blmpp"]),
    (["--mapping", "ilm", "--laplace", "2"], ["--laplace is for blm and blmpp"]),
    (["--mapping", "blm", "--topk-ratio", "0.5"], ["--topk-ratio is for blmpp"]),
    (["--mapping", "blmp", "--linear-variant", "nobias"], ["--linear-variant is for linear, but the mapping is blmpp"]),
    (["--results-path", "/proc/version/x"], ["/proc/version", "--results-path"]),
]


@pytest.mark.parametrize("arguments, words", BAD, ids=[" ".join(arguments) for arguments, _ in BAD])
def test_bad_input(arguments, words, tmp_path, monkeypatch, capsys):
    """In this process, which a user's is like but for the imports: one line, exit code 2, nothing written."""
    import train_vm

    monkeypatch.chdir(tmp_path)
    defaults = ["--dataset", "synthetic", "--backbone", "resnet18", "--epochs", "1"]
    if "--weights" not in arguments:
        defaults += ["--weights", "none"]
    with pytest.raises(SystemExit) as caught:
        train_vm.main([*defaults, *arguments])
    printed = capsys.readouterr()
    assert caught.value.code == 2
    assert printed.err.count("\n") == 1 and printed.err.startswith("error: ")
    for word in words:
        assert word in printed.err
    assert list(tmp_path.rglob("*")) == []


def test_results_path_with_a_file_in_the_way(tmp_path, capsys):
    import train_vm

    (tmp_path / "vm").write_text("mine")
    with pytest.raises(SystemExit) as caught:
        train_vm.main(["--dataset", "synthetic", "--weights", "none", "--results-path", str(tmp_path)])
    error = capsys.readouterr().err
    assert caught.value.code == 2 and error.count("\n") == 1
    assert f"{tmp_path}/vm is a file; choose another --results-path" in error
    assert [path.name for path in tmp_path.iterdir()] == ["vm"]


def test_damaged_picture_of_a_set_that_fits_nowhere(tmp_path, monkeypatch, capsys):
    """It is decoded in every epoch, so that the damage shows while training."""
    import train_vm

    folder = make_ilmvp(tmp_path / "set")
    put(folder / "test.lmdb", b"1", (picture(0)[:-300], 1))
    monkeypatch.setattr("data.cache.available_memory", lambda: 100)
    monkeypatch.setattr("data.cache.shutil.disk_usage", lambda path: shutil._ntuple_diskusage(100, 0, 99))
    with pytest.raises(SystemExit) as caught:
        train_vm.main([
            "--dataset", f"folder:{folder}", "--weights", "none", "--backbone", "timm:test_resnet",
            "--canvas-size", "160", "--epochs", "1", "--results-path", str(tmp_path / "results"),
        ])
    error = capsys.readouterr().err
    assert caught.value.code == 2
    assert error.count("\n") == 1 and "test.lmdb, key b'1': not a readable image" in error


def test_bad_input_from_a_shell(tmp_path):
    outcome = run("train_vm.py", "--dataset", "flower102", "--results-path", str(tmp_path / "results"))
    assert outcome.returncode == 2 and "Traceback" not in outcome.stderr
    assert outcome.stderr.count("\n") == 1 and "flowers102" in outcome.stderr
    assert not (tmp_path / "results").exists()


def test_weights_of_another_architecture(tmp_path, monkeypatch, capsys):
    import train_vm

    monkeypatch.chdir(tmp_path)
    torch.save(torch.nn.Linear(3, 2).state_dict(), "other.pth")
    with pytest.raises(SystemExit) as caught:
        train_vm.main(["--dataset", "synthetic", "--backbone", "resnet18", "--weights", "other.pth"])
    assert caught.value.code == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "belongs to another architecture" in error
    assert [path.name for path in tmp_path.rglob("*")] == ["other.pth"]


@pytest.mark.parametrize("script", ["train_vm.py", "train_vm_fast.py", "train_vlm.py"])
def test_help_names_every_flag(script):
    outcome = run(script, "--help")
    assert outcome.returncode == 0
    for flag in (
        "--dataset --data-path --results-path --mapping --laplace --topk-ratio --reprogramming --backbone --weights "
        "--canvas-size --epochs --batch-size --lr --train-fraction --seed --device --precision --workers "
        "--deterministic --overwrite"
    ).split():
        assert flag in outcome.stdout
