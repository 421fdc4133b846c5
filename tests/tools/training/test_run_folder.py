"""Run folders: names that tell runs apart, nothing lost at any moment of a save, what is refused and what goes on."""

import errno
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from cfg import VLMConfig, VMConfig, VMFastConfig
from data.files import read_json
from tools.training import checkpoint as checkpoints
from tools.training.run_folder import Run, check_writable, load_checkpoint, read_config, summarise

CONTENT = {
    "class names": ["ant", "bee"],
    "train images": "0123",
    "weights": "4567",
    "plugin": "89ab",
    "prompt templates": ["a {}.", "{}"],
}


def settings(results, **more):
    return VMConfig.of(**{"dataset": "digits", "mapping": "blm", "epochs": 3, "results_path": str(results)} | more)


def line(epoch, accuracy):
    return {"epoch": epoch, "test_accuracy": accuracy}


def state(value):
    return {"program": torch.full((3, 4, 4), float(value)), "mapping": {"weights": torch.full((2, 2), float(value))}}


def opened(results, command=(), content=CONTENT, **more):
    run = Run(settings(results, **more), command)
    return run, run.open(content)


def finished(results, command=(), **more):
    """A run that came to its end after one epoch; its folder."""
    run, _ = opened(results, command, **more)
    run.save_epoch(line(0, 0.1), state(0))
    run.finish(summarise(run.cfg.settings, run.metrics))
    run.close()
    return run.folder


# ---- names ----


@pytest.mark.parametrize(
    "given, name",
    [
        ({}, "digits/resnet18_padding_blmpp_seed0"),
        ({"epochs": 20}, "digits/resnet18_padding_blmpp_seed0_epochs=20"),
        ({"epochs": 200, "batch_size": 16, "lr": 0.01}, "digits/resnet18_padding_blmpp_seed0"),  # what the recipe says
        ({"batch_size": 256}, "digits/resnet18_padding_blmpp_seed0_batch_size=256"),  # the default, not the recipe's
        ({"lr": 1e-20, "laplace": 1e20}, "digits/resnet18_padding_blmpp_seed0_lr=1e-20_laplace=1e+20"),
        ({"mapping": "BLM+", "seed": 3, "lr": 0.5}, "digits/resnet18_padding_blmpp_seed3_lr=0.5"),
        ({"bayes": False, "laplace": 2.0}, "digits/resnet18_padding_blmpp_seed0_laplace=2.0_bayes=false"),
        (
            {"precision": "bf16", "train_fraction": 0.5},
            "digits/resnet18_padding_blmpp_seed0_train_fraction=0.5_precision=bf16",
        ),
        (
            {
                "engine": "plain",
                "deterministic": True,
                "device": "cuda",
                "workers": 2,
                "tensorboard": True,
                "overwrite": True,
                "on_nonfinite": "skip",
                "data_path": "/elsewhere",
            },
            "digits/resnet18_padding_blmpp_seed0",
        ),  # rounding and place
        ({"weights": "/lab/weights/net a.pth"}, "digits/resnet18_padding_blmpp_seed0_weights=net-a.pth"),
        (
            {"dataset": "folder:/data/My Flowers", "backbone": "timm:a/b.c"},
            "folder-My-Flowers/timm-a-b.c_padding_blmpp_seed0",
        ),
        ({"dataset": "folder:~/photos"}, "folder-photos/resnet18_padding_blmpp_seed0"),
        ({"dataset": "folder:/data/deep/.."}, "folder-data/resnet18_padding_blmpp_seed0"),
    ],
)
def test_folder_name(given, name):
    assert VMConfig.of(**{"dataset": "digits", "results_path": "results"} | given).folder == Path("results/vm") / name


def test_folder_name_of_the_other_scripts():
    assert VMFastConfig.of(dataset="digits").folder == Path("results/vm_fast/digits/resnet18_padding_blmpp_seed0")
    folder = VLMConfig.of(dataset="digits", templates="/lab/my prompts.txt", weights="none").folder
    name = "ViT-B-32-quickgelu_watermarking_blmpp_seed0_weights=none_templates=my-prompts.txt"
    assert folder == Path("results/vlm/digits") / name


@pytest.mark.parametrize(
    "given", [{"epochs": 2.5}, {"epochs": "3"}, {"seed": True}, {"canvas_size": 64.0}, {"lr": False}, {"laplace": "1"}]
)
def test_numbers_of_another_type_are_refused(given):
    with pytest.raises(ValueError, match="must be .*, got"):
        VMConfig.of(dataset="digits", **given)


def test_long_names_stay_apart_and_within_what_file_systems_take():
    names = set()
    for last in "ab":
        name = settings("results", weights="/lab/" + "ü" * 130 + last, lr=0.5).folder.name
        assert len(name.encode()) <= 200
        names.add(name)
    assert len(names) == 2 and all(name.startswith("resnet18_padding_blm_seed0_") for name in names)


def test_long_names_of_data_folders_stay_apart_and_within_what_file_systems_take():
    folders = [settings("results", dataset="folder:/data/" + "ü" * 125 + last).folder.parent.name for last in "ab"]
    assert folders[0] != folders[1] and all(len(name.encode()) <= 200 for name in folders)


# ---- saving ----


def test_epochs_come_back_and_best_is_the_first_of_equals(tmp_path):
    run, checkpoint = opened(tmp_path)
    assert checkpoint is None
    for epoch, accuracy in enumerate((0.25, 0.5, 0.5)):
        run.save_epoch(line(epoch, accuracy), state(epoch))
    run.close()
    run, checkpoint = opened(tmp_path)
    assert [m["epoch"] for m in checkpoint["metrics"]] == [0, 1, 2]
    assert torch.equal(checkpoint["program"], state(2)["program"])
    assert float(load_checkpoint(run.folder / "best.safetensors")["program"][0, 0, 0]) == 1
    assert float(load_checkpoint(run.folder / "previous.safetensors")["program"][0, 0, 0]) == 1
    lines = (run.folder / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(text)["test_accuracy"] for text in lines] == [0.25, 0.5, 0.5]
    result = summarise(run.cfg.settings, run.metrics)
    assert (result["final_accuracy"], result["best_accuracy"], result["best_epoch"]) == (0.5, 0.5, 1)
    assert not list(run.folder.glob("*.tmp")) and not list(run.folder.glob(".*.tmp"))
    run.close()


@pytest.mark.parametrize("damage", ["cut", "flip", "empty", "text"])
def test_damaged_newest_checkpoint_falls_back(tmp_path, capsys, damage):
    run, _ = opened(tmp_path)
    run.save_epoch(line(0, 0.1), state(0))
    run.save_epoch(line(1, 0.2), state(1))
    run.close()
    path = run.folder / "last.safetensors"
    content = bytearray(path.read_bytes())
    if damage == "flip":
        at = content.index(torch.full((8,), 1.0).numpy().tobytes())
        content[at] ^= 0x10
    path.unlink()  # best and previous may be links to the same file
    path.write_bytes({"cut": content[: len(content) // 2], "flip": content, "empty": b"", "text": b"hello"}[damage])
    run, checkpoint = opened(tmp_path)
    assert [m["epoch"] for m in checkpoint["metrics"]] == [0]
    assert "going back to the checkpoint before it" in capsys.readouterr().err
    assert len((run.folder / "metrics.jsonl").read_text().splitlines()) == 1
    run.close()


# ---- what is refused, and what goes on ----


def test_other_settings_are_refused_and_listed(tmp_path):
    """Names tell them apart; what is told here is a folder that was renamed or edited by hand."""
    run, _ = opened(tmp_path)
    run.close()
    config = read_json(run.folder / "config.json")
    config["settings"] |= {"epochs": 5, "laplace": 2.0, "device": "cuda", "dataset": "folder:/moved/digits"}
    (run.folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=r"\(epochs was 5 and is 3; laplace was 2.0 and is 1.0\)") as caught:
        Run(settings(tmp_path))
    assert "take another --results-path, or --overwrite to start from scratch" in str(caught.value)
    run, checkpoint = opened(tmp_path, ["--overwrite"], overwrite=True)
    run.close()
    assert checkpoint is None and read_config(run.folder / "config.json")["settings"]["epochs"] == 3


def test_rounding_settings_only_tell(tmp_path):
    opened(tmp_path)[0].close()
    run = Run(settings(tmp_path, engine="plain", deterministic=True, device="cuda", workers=3))
    assert run.other_rounding() == ["engine was 'auto' and is 'plain'", "deterministic was False and is True"]
    assert Run(settings(tmp_path)).other_rounding() == []
    assert Run(settings(tmp_path), precision="fp16").other_rounding() == ["precision was 'fp32' and is 'fp16'"]
    assert Run(settings(tmp_path, engine="plain", overwrite=True), ["--overwrite"]).other_rounding() == []


@pytest.mark.parametrize(
    "name, now, said",
    [
        ("class names", ["ant", "wasp"], r"other class names \('bee', now 'wasp'\); "),
        ("class names", ["ant"], r"other class names \(2, now 1\); "),
        ("train images", "9999", "other train images; "),
        ("weights", "9999", "other weights; "),
        ("plugin", "9999", "other plugin; "),
        ("prompt templates", ["a {}.", "an {}."], r"other prompt templates \('{}', now 'an {}.'\); "),
    ],
)
def test_other_content_is_refused_by_name(tmp_path, name, now, said):
    """While the run goes on as when it is finished."""
    run, _ = opened(tmp_path)
    run.save_epoch(line(0, 0.1), state(0))
    run.close()
    again = Run(settings(tmp_path))
    for check in (again.open, again.refuse_other_content):
        with pytest.raises(ValueError, match=said + "give those of that time"):
            check(CONTENT | {name: now})
    again.close()
    run, checkpoint = opened(tmp_path)
    run.close()
    assert checkpoint is not None
    run, checkpoint = opened(tmp_path, ["--overwrite"], overwrite=True, content=CONTENT | {name: now})
    run.close()
    assert checkpoint is None and read_config(run.folder / "config.json")["content"][name] == now


def test_every_start_is_noted(tmp_path):
    for number, device in enumerate(("cpu", "a GPU")):
        run = Run(settings(tmp_path), ["--seed", str(number)], device)
        run.open(CONTENT)
        run.save_epoch(line(number, 0.1), state(0))
        run.close()
    config = read_config(run.folder / "config.json")
    assert (config["format"], config["kind"], config["content"]) == (2, "vm", CONTENT)
    assert config["settings"] == run.cfg.settings and config["distinct"] == {"epochs": 3}
    assert [start["command"] for start in config["starts"]] == [["--seed", "0"], ["--seed", "1"]]
    assert [start["device"] for start in config["starts"]] == ["cpu", "a GPU"]
    for start in config["starts"]:
        assert start["versions"]["torch"] == torch.__version__ and start["threads"] == torch.get_num_threads()
        assert start["host"] == os.uname().nodename and len(start["time"]) == len("2026-01-31T12:00:00+0000")
        assert start["git_commit"] is None or len(start["git_commit"].removesuffix("-dirty")) == 40


EMPTY = {"format": 2, "kind": "vm", "settings": {}, "distinct": {}, "content": {}, "starts": []}


@pytest.mark.parametrize(
    "config, said",
    [
        ({"settings": {}, "versions": {}}, r"is of an older version of this project \(format 1, expected 2\)"),
        ({"format": 3}, r"is of a newer version of this project \(format 3, expected 2\)"),
        (EMPTY, "is no config.json of"),
        (EMPTY | {"starts": [3]}, "is no config.json of"),
        (EMPTY | {"settings": [], "starts": [{}]}, "is no config.json of"),
        ({"format": "2"}, "is no config.json of"),
        ([], "is no config.json of"),
        (3, "is no config.json of"),
    ],
)
def test_config_of_another_version_or_none(tmp_path, config, said):
    cfg = settings(tmp_path)
    cfg.folder.mkdir(parents=True)
    (cfg.folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=said) as caught:
        read_config(cfg.folder / "config.json")
    with pytest.raises(ValueError, match=said) as refused:
        Run(cfg)
    assert "\n" not in str(caught.value) and "--overwrite to start from scratch" in str(refused.value)
    opened(tmp_path, overwrite=True)[0].close()


# ---- --overwrite ----


def test_overwrite_removes_all_that_a_run_and_the_tools_wrote(tmp_path):
    folder = finished(tmp_path)
    assert Run(settings(tmp_path)).result["final_accuracy"] == 0.1
    old = (
        "model.pt2",
        "model.onnx",
        "model.onnx.data",
        "evaluation.json",
        "evaluation-best.json",
        "confusion.csv",
        "events.out.tfevents.1.host",
        ".x.tmp",
        "damaged.safetensors",
    )
    for name in old:
        (folder / name).write_text("of the old run")
    (folder / "figures").mkdir()
    (folder / "figures" / "weights.png").write_text("of the old run")
    run, checkpoint = opened(tmp_path, overwrite=True)
    assert checkpoint is None and run.metrics == [] and run.result is None
    names = sorted(path.name for path in folder.iterdir())
    assert names == [".lock", "config.json", "log.txt", "metrics.jsonl"]
    run.close()


def test_overwrite_refuses_what_no_run_wrote_and_removes_nothing(tmp_path):
    folder = finished(tmp_path)
    (folder / "thesis.tex").write_text("mine")
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    run = Run(settings(tmp_path, overwrite=True))
    with pytest.raises(ValueError, match="also holds thesis.tex, which no run wrote; move it"):
        run.open(CONTENT)
    run.close()
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before


def test_overwrite_where_the_run_that_the_command_began_cannot_go_on(tmp_path):
    """Its folder holds other settings by now, say of an earlier recipe: to advise --overwrite would not help."""
    command = ["--overwrite"]
    run, _ = opened(tmp_path, command, overwrite=True)
    run.save_epoch(line(0, 0.1), state(0))
    run.close()
    config = read_json(run.folder / "config.json")
    config["settings"]["lr"] = 0.5
    (run.folder / "config.json").write_text(json.dumps(config))
    run, checkpoint = opened(tmp_path, command, overwrite=True)
    assert checkpoint is None and read_json(run.folder / "config.json")["settings"]["lr"] == 0.01
    run.close()


def test_overwrite_acts_once_per_start(tmp_path):
    """The very same command goes on with the unfinished run that it began; any other starts from scratch."""
    command = ["--epochs", "3", "--overwrite"]
    folder = finished(tmp_path, ["--epochs", "3"])
    for kept in (0, 1, 2):  # over what was finished, then on and on
        run, checkpoint = opened(tmp_path, command, overwrite=True)
        assert (checkpoint is None) == (kept == 0) and len(run.metrics) == kept
        run.save_epoch(line(kept, 0.2), state(kept))
        run.close()
    assert len(read_config(folder / "config.json")["starts"]) == 3
    for more in (["--workers", "1"], []):  # unfinished, but of another command; then finished
        run, checkpoint = opened(tmp_path, [*command, *more], overwrite=True)
        assert checkpoint is None
        run.save_epoch(line(0, 0.3), state(0))
        run.close()
    run.finish(summarise(run.cfg.settings, run.metrics))
    run, checkpoint = opened(tmp_path, command, overwrite=True)
    run.close()
    assert checkpoint is None and not (folder / "result.json").exists()


@pytest.mark.parametrize("call", range(8))
def test_cut_off_while_the_old_run_is_removed(tmp_path, monkeypatch, call):
    """Before the ``call``-th file went: the same command never goes on with what is left of the finished run."""
    command = ["--overwrite"]
    finished(tmp_path, command)
    removed, unlink = [], Path.unlink

    def vanishing(path, **options):
        if path.parent == run.folder:
            if len(removed) == call:
                raise KeyboardInterrupt
            removed.append(path.name)
        unlink(path, **options)

    run = Run(settings(tmp_path, overwrite=True), command)
    with monkeypatch.context() as patched:
        patched.setattr(Path, "unlink", vanishing)
        try:
            run.open(CONTENT)
        except KeyboardInterrupt:
            pass
    run.close()
    run, checkpoint = opened(tmp_path, command, overwrite=True)
    run.close()
    assert checkpoint is None and run.metrics == []


# ---- log.txt ----


def test_log_keeps_every_line_from_before_the_folder_was_held_and_across_starts(tmp_path):
    for start in ("first", "second"):
        run = Run(settings(tmp_path))
        run.log(f"{start}: before")
        run.open(CONTENT)
        run.save_epoch(line(len(run.metrics), 0.1), state(0))
        run.log(f"{start}: after, ω")
        assert (run.folder / "log.txt").read_text(encoding="utf-8").endswith("after, ω\n")  # written at once
        run.close()
    lines = (run.folder / "log.txt").read_text(encoding="utf-8").splitlines()
    assert lines == ["first: before", "first: after, ω", "second: before", "second: after, ω"]


# ---- the lock, full disks, processes that vanish ----


def test_lock_dies_with_its_owner(tmp_path):
    program = (
        "import sys\nfrom cfg import VMConfig\nfrom tools.training.run_folder import Run\n"
        f"run = Run(VMConfig.of(dataset='digits', mapping='blm', epochs=3, results_path={str(tmp_path)!r}))\n"
        f"run.open({CONTENT!r}); print('held', flush=True); sys.stdin.read()"
    )
    owner = subprocess.Popen([sys.executable, "-c", program], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert owner.stdout.readline() == b"held\n"
    with pytest.raises(ValueError, match="another process is at work"):
        opened(tmp_path)
    owner.kill()
    owner.wait()
    opened(tmp_path)[0].close()


def test_full_disk_leaves_the_checkpoint_before(tmp_path, monkeypatch):
    run, _ = opened(tmp_path)
    run.save_epoch(line(0, 0.1), state(0))

    def full(tensors, path, metadata):
        Path(path).write_bytes(b"half")
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(checkpoints, "save_file", full)
    with pytest.raises(OSError, match=r"needs about \d+ MiB and \d+ MiB are free; the checkpoint before it"):
        run.save_epoch(line(1, 0.2), state(1))
    run.close()
    assert len(load_checkpoint(run.folder / "last.safetensors")["metrics"]) == 1
    assert not list(run.folder.glob(".*.tmp"))


@pytest.mark.parametrize("call", range(12))
def test_cut_off_between_any_two_file_operations(tmp_path, monkeypatch, call):
    """The process vanishes before its ``call``-th rename or link: the run goes on from one of the two epochs."""
    run, _ = opened(tmp_path)
    run.save_epoch(line(0, 0.1), state(0))
    run.save_epoch(line(1, 0.2), state(1))
    seen = []

    def vanishing(function):
        def wrapped(*args):
            if len(seen) == call:
                raise KeyboardInterrupt
            seen.append(function.__name__)
            return function(*args)

        return wrapped

    with monkeypatch.context() as patched:
        for name in ("replace", "link", "fsync"):
            patched.setattr(os, name, vanishing(getattr(os, name)))
        try:
            run.save_epoch(line(2, 0.3), state(2))
        except KeyboardInterrupt:
            pass
    run.close()
    run, checkpoint = opened(tmp_path)
    epochs = [m["epoch"] for m in checkpoint["metrics"]]
    assert epochs in ([0, 1], [0, 1, 2])
    assert float(checkpoint["program"][0, 0, 0]) == epochs[-1]
    assert [json.loads(text)["epoch"] for text in (run.folder / "metrics.jsonl").read_text().splitlines()] == epochs
    run.close()


def test_paths_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(NotADirectoryError, match="file is a file; choose another --results-path"):
        check_writable(tmp_path / "file" / "below")
    check_writable(tmp_path / "new" / "below")
    assert not (tmp_path / "new").exists()
    if Path("/proc/version").exists():
        with pytest.raises(OSError, match="choose another --results-path"):
            check_writable("/proc/version/results")


@pytest.mark.soak
@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() != 0, reason="mounting a small disk takes root")
def test_a_disk_that_is_full(tmp_path):
    """A file system of 1 MiB and checkpoints of 0.3: the third does not fit, and all that was saved stays."""
    disk = tmp_path / "disk"
    disk.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(disk)], check=True)
    try:
        run, _ = opened(disk)
        for epoch in range(2):
            run.save_epoch(line(epoch, 0.1), state(epoch) | {"mapping": {"weights": torch.full((75_000,), 1.0)}})
        room = os.statvfs(disk).f_bavail * os.statvfs(disk).f_frsize
        (disk / "another").write_bytes(bytes(room - 100_000))
        for _ in range(3):
            with pytest.raises(OSError, match=r"needs about 1 MiB and 0 MiB are free; the checkpoint before it is unt"):
                run.save_epoch(line(2, 0.2), state(2) | {"mapping": {"weights": torch.full((75_000,), 2.0)}})
        run.close()
        run, checkpoint = opened(disk)
        assert [m["epoch"] for m in checkpoint["metrics"]] == [0, 1] and float(checkpoint["program"].max()) == 1
        (disk / "another").unlink()
        run.save_epoch(line(2, 0.2), state(2) | {"mapping": {"weights": torch.full((75_000,), 2.0)}})
        run.close()
        assert len(load_checkpoint(run.folder / "last.safetensors")["metrics"]) == 3
    finally:
        subprocess.run(["umount", "-l", str(disk)], check=True)
