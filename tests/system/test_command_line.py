"""The scripts as a user runs them: every mapping with both input VRs, and what they say to bad input."""

import itertools
import json
import math
import os
import re
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from cfg import VLMConfig, VMConfig, VMFastConfig, flags_page
from mapping import MAPPINGS, Setting
from tests.data.helpers import encoded_image, make_class_folders, make_ilmvp, put
from tests.system.processes import finish, start_module
from tools.training.command_line import build_parser, parse
from tools.training.run_folder import load_checkpoint

ROOT = Path(__file__).parents[2]
BACKBONES = {
    "train_vm.py": ["--backbone", "efficientnet_lite0", "--canvas-size", "64"],
    "train_vm_fast.py": ["--backbone", "efficientnet_lite0", "--canvas-size", "64"],
    "train_vlm.py": ["--backbone", "tiny-test", "--weights", "none"],
}
LR = {"train_vm.py": "0.003", "train_vm_fast.py": "0.003", "train_vlm.py": "1"}


def run(script, *arguments, timeout=600):
    command = [sys.executable, str(ROOT / script), *arguments]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.run(command, capture_output=True, text=True, timeout=timeout, env=environment)


def epochs_of(script, mapping):
    """Three, but for a matrix learned on logits of CLIP's size: Adam overshoots at first."""
    return 8 if (script, mapping) == ("train_vlm.py", "linear") else 3


def smoke(script, mapping, reprogramming, results):
    """What the run wrote to stderr, and its exit code."""
    given = {"mapping": mapping, "reprogramming": reprogramming, "epochs": epochs_of(script, mapping)}
    given |= {"dataset": "synthetic", "batch-size": 16, "lr": LR[script], "results-path": results}
    arguments = [text for name, value in given.items() for text in (f"--{name}", str(value))] + BACKBONES[script]
    errors = results / f"{script}_{mapping}_{reprogramming}.err"
    log = errors.with_suffix(".log")
    process = start_module(script.removesuffix(".py"), log, *arguments, errors=errors)
    return finish(process), errors.read_text()


def folder_of(script, mapping, reprogramming, results):
    """The run folder of a cell, whose name carries what differs from the defaults."""
    kind, clip = script.removeprefix("train_").removesuffix(".py"), script == "train_vlm.py"
    more = {"weights": "none"} if clip else {"canvas_size": 64}
    more |= {"epochs": epochs_of(script, mapping), "batch_size": 16, "lr": float(LR[script])}
    order = ("canvas_size", "weights", "epochs", "batch_size", "lr")
    distinct = "_".join(f"{name}={more[name]}" for name in order if name in more)
    return results / kind / "synthetic" / f"{BACKBONES[script][1]}_{reprogramming}_{mapping}_seed0_{distinct}"


CELLS = [
    *itertools.product(["train_vm.py"], MAPPINGS, ["padding", "watermarking"]),
    *itertools.product(["train_vm_fast.py"], ["flm", "blm", "blmpp", "linear"], ["padding"]),
    *itertools.product(["train_vlm.py"], MAPPINGS, ["padding", "watermarking"]),
]


@pytest.fixture(scope="module")
def smoke_runs(tmp_path_factory):
    results = tmp_path_factory.mktemp("results")
    with ThreadPoolExecutor(2) as pool:
        outcomes = list(pool.map(lambda cell: smoke(*cell, results), CELLS))
    return results, dict(zip(CELLS, outcomes, strict=True))


@pytest.mark.parametrize("script, mapping, reprogramming", CELLS)
def test_smoke(smoke_runs, script, mapping, reprogramming):
    results, outcomes = smoke_runs
    code, errors = outcomes[script, mapping, reprogramming]
    assert code == 0, errors
    told = [line for line in errors.splitlines() if "the mapping cannot tell some labels apart" not in line]
    assert told == [], "no other warning and no progress bar where the output is piped"
    kind = script.removeprefix("train_").removesuffix(".py")
    folder = folder_of(script, mapping, reprogramming, results)
    config = json.loads((folder / "config.json").read_text())
    assert config["settings"]["mapping"] == mapping and config["starts"][0]["versions"]["torch"] == torch.__version__
    metrics = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [m["epoch"] for m in metrics] == list(range(epochs_of(script, mapping)))
    losses = [m["train_loss"] for m in metrics]
    solved = mapping == "lda" and max(losses) < 0.1  # before the first step: its temperature moves the loss either way
    assert min(losses[1:]) < losses[0] or solved
    assert all(math.isfinite(m["train_loss"]) and m["seconds"]["train"] > 0 for m in metrics)
    result = json.loads((folder / "result.json").read_text())
    accuracies = [m["test_accuracy"] for m in metrics]
    assert result["final_accuracy"] == accuracies[-1] and result["best_accuracy"] == max(accuracies)
    assert result["best_epoch"] == accuracies.index(max(accuracies))
    if kind == "vlm":
        assert 0 <= result["zero_shot"]["single"] <= 1 and 0 <= result["zero_shot"]["ensemble"] <= 1
    for name in ("last.safetensors", "best.safetensors"):
        checkpoint = load_checkpoint(folder / name)
        assert checkpoint["program"].shape[0] == 3 and checkpoint["program"].abs().sum() > 0
        assert len(checkpoint["class_names"]) == 8
    assert load_checkpoint(folder / "last.safetensors")["metrics"] == metrics
    if mapping in ("rlm", "flm"):
        assert metrics[1]["mapping_change"] == metrics[2]["mapping_change"] == 0
    if mapping == "linear":
        assert metrics[1]["mapping_change"] > 0


def test_first_epoch_is_the_same_in_the_fast_script(smoke_runs):
    results, _ = smoke_runs
    lines = []
    for kind in ("vm", "vm_fast"):
        path = folder_of(f"train_{kind}.py", "blmpp", "padding", results) / "metrics.jsonl"
        lines.append(json.loads(path.read_text().splitlines()[0]))
    assert lines[0]["train_loss"] == lines[1]["train_loss"]
    assert lines[0]["test_accuracy"] == lines[1]["test_accuracy"]


def test_finished_run_is_left_alone(smoke_runs):
    results, _ = smoke_runs
    folder = folder_of("train_vm.py", "blm", "padding", results)
    before = {path.name: path.stat().st_mtime_ns for path in folder.iterdir()}
    code, _ = smoke("train_vm.py", "blm", "padding", results)
    said = (results / "train_vm.py_blm_padding.log").read_text().splitlines()[-1]
    assert code == 0 and "is finished" in said and "--overwrite" in said
    assert {path.name: path.stat().st_mtime_ns for path in folder.iterdir()} == before


BAD = [
    (["--dataset", "flower102"], ["flower102", "flowers102", "digits"]),
    (["--mapping", "bml"], ["bml", "blmpp", "closest"]),
    (["--backbone", "resnet81"], ["resnet81", "resnet18", "timm:<name>"]),
    (["--backbone", "timm:resnet18x"], ["timm:resnet18"]),
    (["--epochs", "-1"], ["--epochs must be 0 or more, got -1"]),
    (["--epochs", "-3"], ["--epochs must be 0 or more, got -3"]),
    (["--epochs", "ten"], ["--epochs", "ten"]),
    (["--topk-ratio", "0"], ["--topk-ratio must be in (0, 1], got 0"]),
    (["--topk-ratio", "1.5"], ["--topk-ratio", "1.5"]),
    (["--laplace", "-1"], ["--laplace must be 0 or more, got -1"]),
    (["--laplace", "nan"], ["--laplace", "nan"]),
    (["--lr", "0"], ["--lr must be above 0"]),
    (["--lr", "5", "--epochs", "0"], ["--lr 5.0: no pattern is trained with --reprogramming padding and 0 epochs"]),
    (
        ["--lr", "5", "--reprogramming", "none", "--mapping", "linear"],
        ["--lr 5.0: no pattern is trained with --reprogramming none"],
    ),
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
    (["--mapping", "lda", "--shrinkage", "x"], ["--shrinkage must be auto or in [0, 1], got x"]),
    (["--mapping", "lda", "--shrinkage", "2"], ["--shrinkage must be auto or in [0, 1], got 2"]),
    (["--mapping", "blm", "--shrinkage", "0.5"], ["--shrinkage is for lda, but the mapping is blm"]),
    (["--mapping", "flm", "--no-bayes"], ["--no-bayes is for blm and blmpp, but the mapping is flm"]),
    (["--mapping", "blm", "--no-topk"], ["--no-topk is for blmpp"]),
    (["--mapping", "rlm", "--no-iteration"], ["--no-iteration is for ilm and blm and blmpp"]),
    (["--epochs", "0", "--no-iteration"], ["--no-iteration: with 0 epochs", "leave it out"]),
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


@pytest.mark.parametrize("flag, value, words", [
    ("--dataset", "folder:loop", "loop is not a folder; expected one that holds train/<class>/*"),
    ("--plugin", "loop", "loop: no such file"),
])  # fmt: skip
def test_links_that_form_a_loop(flag, value, words, tmp_path, monkeypatch, capsys):
    import train_vm

    monkeypatch.chdir(tmp_path)
    (tmp_path / "loop").symlink_to("loop")
    with pytest.raises(SystemExit) as caught:
        train_vm.main(["--dataset", "synthetic", "--weights", "none", flag, value])
    error = capsys.readouterr().err
    assert caught.value.code == 2 and error.count("\n") == 1 and words in error


@pytest.mark.parametrize("more, words", [
    (["--reprogramming", "none"], r"final accuracy [\d.]+%"),
    (["--epochs", "1"], r"final accuracy [\d.]+%; best on test [\d.]+% after epoch 1"),
    (["--epochs", "1", "--validation-fraction", "0.25"],
     r"final accuracy [\d.]+%; [\d.]+% after epoch 1, the best on validation"),
])  # fmt: skip
def test_last_line(more, words, tmp_path, capsys):
    import train_vm

    smallest = ["--dataset", "synthetic", "--weights", "none", "--canvas-size", "64", "--results-path", str(tmp_path)]
    train_vm.main([*smallest, *more])
    assert re.fullmatch(words, capsys.readouterr().out.splitlines()[-1])


def test_results_path_with_a_file_in_the_way(tmp_path, capsys):
    import train_vm

    (tmp_path / "vm").write_text("mine")
    with pytest.raises(SystemExit) as caught:
        train_vm.main(["--dataset", "synthetic", "--weights", "none", "--results-path", str(tmp_path)])
    error = capsys.readouterr().err
    assert caught.value.code == 2 and error.count("\n") == 1
    assert f"{tmp_path}/vm is a file; choose another --results-path" in error
    assert [path.name for path in tmp_path.iterdir()] == ["vm"]


def test_damaged_image_of_a_set_that_fits_nowhere(tmp_path, monkeypatch, capsys):
    """It is decoded in every epoch, so that the damage shows while training."""
    import train_vm

    folder = make_ilmvp(tmp_path / "set")
    put(folder / "test.lmdb", b"1", (encoded_image(0)[:-300], 1))
    monkeypatch.setattr("data.cache.available_memory", lambda: 100)
    monkeypatch.setattr("data.cache.shutil.disk_usage", lambda path: shutil._ntuple_diskusage(100, 0, 99))
    with pytest.raises(SystemExit) as caught:
        train_vm.main(
            [
                "--dataset",
                f"folder:{folder}",
                "--weights",
                "none",
                "--backbone",
                "timm:test_resnet",
                "--canvas-size",
                "160",
                "--epochs",
                "1",
                "--results-path",
                str(tmp_path / "results"),
            ]
        )
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


# what one description of a setting says is read from it in five places, and nowhere else
WIDTH = Setting("width", 3, "width of the brush in hairs", "in [1, 9]", lambda width: 1 <= width <= 9)


@pytest.mark.parametrize(
    "change, flag, given, refused, shown, in_name",
    [
        ({}, "--width", "7", "10", "width of the brush in hairs (for blm), in [1, 9] (default: 3)", True),
        (
            {"name": "hairs"},
            "--hairs",
            "7",
            "10",
            "width of the brush in hairs (for blm), in [1, 9] (default: 3)",
            True,
        ),
        ({"default": 5}, "--width", "3", "10", "width of the brush in hairs (for blm), in [1, 9] (default: 5)", True),
        (
            {"help": "hairs", "allowed": "below 20", "valid": lambda width: width < 20},
            "--width",
            "10",
            "20",
            "hairs (for blm), below 20 (default: 3)",
            True,
        ),
        ({"affects": "rounding"}, "--width", "7", "10", "width of the brush in hairs (for blm), in [1, 9]", False),
        ({"affects": "place"}, "--width", "7", "10", "width of the brush in hairs (for blm), in [1, 9]", False),
    ],
)
def test_a_setting_is_described_once(monkeypatch, change, flag, given, refused, shown, in_name):
    setting = replace(WIDTH, **change)
    method = MAPPINGS["blm"]
    monkeypatch.setitem(MAPPINGS, "blm", method._replace(settings=(*method.settings, setting)))
    usual = parse(VMConfig, "", ["--dataset", "digits", "--mapping", "blm"])
    assert getattr(usual, setting.name) == setting.default and f"_{setting.name}=" not in str(usual.folder)
    cfg = parse(VMConfig, "", ["--dataset", "digits", "--mapping", "blm", flag, given])
    assert getattr(cfg, setting.name) == cfg.settings[setting.name] == int(given)
    assert cfg.folder.name.endswith(f"_{setting.name}={given}") == in_name
    assert setting.name in cfg.that_affect(setting.affects) and (setting.name in cfg.distinct) == in_name
    with pytest.raises(ValueError, match=f"{flag} must be {re.escape(setting.allowed)}, got {refused}"):
        parse(VMConfig, "", ["--dataset", "digits", "--mapping", "blm", flag, refused])
    with pytest.raises(ValueError, match=f"{flag} is for blm, but the mapping is ilm; leave it out"):
        parse(VMConfig, "", ["--dataset", "digits", "--mapping", "ilm", flag, given])
    assert shown in " ".join(build_parser(VMConfig, "").format_help().split())
    (row,) = [line for line in flags_page().splitlines() if line.startswith(f"| `{flag}` |")]
    cells = [cell.strip() for cell in row.strip("| ").split(" | ")]
    assert cells[1:] == [f"`{setting.default}`", f"{setting.help} (for blm)", setting.allowed, setting.affects]


def test_names_that_are_not_utf_8(tmp_path, capfd):
    """Images may lie in folders and files of any name; run folders must have names that safetensors takes."""
    import train_vm
    from tools import check_data, predict

    photos, more = tmp_path / os.fsdecode(b"caf\xe9"), ["--weights", "none", "--canvas-size", "64"]
    make_class_folders(photos)
    (photos / "train/cat/0.png").rename(photos / "train/cat" / os.fsdecode(b"\xe9.png"))
    command = ["--dataset", f"folder:{photos}", "--reprogramming", "none", "--mapping", "rlm", *more]
    train_vm.main([*command, "--results-path", str(tmp_path / "results")])
    (folder,) = (path.parent for path in tmp_path.rglob("result.json"))
    assert check_data.main([str(photos)]) == 0
    predict.main([str(folder), str(photos), "--csv"])
    printed = capfd.readouterr().out
    assert r"task: folder:" in printed and r"caf\udce9, 5 training" in printed
    assert r"caf\udce9/train/cat/\udce9.png,1," in printed
    with pytest.raises(SystemExit):
        train_vm.main([*command, "--results-path", str(photos / "results")])
    assert "its name is not UTF-8; choose another --results-path" in capfd.readouterr().err
    assert not (photos / "results").exists()


def test_parts_of_the_fast_network_are_checked_and_ordered_from_python_too():
    with pytest.raises(ValueError, match="--engine: unknown part 'warp'; choose auto, plain, or some of"):
        VMConfig.of(dataset="digits", engine="warp")
    assert VMConfig.of(dataset="digits", engine="fused-ops,channels-last").engine == "channels-last,fused-ops"


def test_two_parts_cannot_describe_one_setting_differently(monkeypatch):
    for name, setting in (("blm", WIDTH), ("ilm", replace(WIDTH, default=4))):
        method = MAPPINGS[name]
        monkeypatch.setitem(MAPPINGS, name, method._replace(settings=(*method.settings, setting)))
    with pytest.raises(ValueError, match="'width' differently"):
        VMConfig.of(dataset="digits", mapping="blm", width=5)


@pytest.mark.parametrize("config", [VMConfig, VMFastConfig, VLMConfig])
def test_every_setting_is_on_the_page_and_in_help(config):
    written = flags_page()
    text = build_parser(config, "").format_help()
    for setting in config.settings_of_all().values():
        assert f"| `{setting.flag}` |" in written and setting.flag in text


def test_the_page_of_flags_is_the_present_one():
    assert (ROOT / "docs" / "flags.md").read_text(encoding="utf-8") == flags_page(), "python cfg.py > docs/flags.md"


def test_a_data_set_that_is_not_there_costs_no_download(tmp_path, monkeypatch, capsys):
    import train_vm

    monkeypatch.setattr("tools.training.build.build_classifier", lambda *_: pytest.fail("the weights were asked for"))
    with pytest.raises(SystemExit) as caught:
        train_vm.main(["--dataset", "flowers102", "--data-path", str(tmp_path), "--results-path", str(tmp_path / "r")])
    assert caught.value.code == 2 and f"{tmp_path}/flowers102 is not a folder" in capsys.readouterr().err
