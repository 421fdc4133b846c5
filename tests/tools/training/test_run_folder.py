"""Run folders: nothing is lost at any moment of a save, damage is noticed, other settings and owners are refused."""

import errno
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from data.files import read_json
from tools.training.run_folder import Run, check_writable, load_checkpoint, run_folder, summarise

SETTINGS = {"dataset": "digits", "backbone": "resnet18", "reprogramming": "padding", "mapping": "blm", "seed": 0,
            "epochs": 3, "device": "cpu"}


def line(epoch, accuracy):
    return {"epoch": epoch, "test_accuracy": accuracy}


def state(value):
    return {"program": torch.full((3, 4, 4), float(value)), "mapping": {"weights": torch.full((2, 2), float(value))}}


def opened(folder, **kwargs):
    run = Run(folder, "vm", SETTINGS, **kwargs)
    return run, run.open()


def test_folder_name():
    folder = run_folder("results", "vm", SETTINGS | {"dataset": "folder:/data/My Flowers", "backbone": "timm:a/b.c"})
    assert folder == Path("results/vm/folder-My-Flowers/timm-a-b.c_padding_blm_seed0")
    outside = run_folder("results", "vm", SETTINGS | {"dataset": "folder:/data/.."})
    assert ".." not in outside.parts


def test_epochs_come_back_and_best_is_the_first_of_equals(tmp_path):
    run, checkpoint = opened(tmp_path / "run")
    assert checkpoint is None
    for epoch, accuracy in enumerate((0.25, 0.5, 0.5)):
        run.save_epoch(line(epoch, accuracy), state(epoch))
    run.close()
    run, checkpoint = opened(tmp_path / "run")
    assert [m["epoch"] for m in checkpoint["metrics"]] == [0, 1, 2]
    assert torch.equal(checkpoint["program"], state(2)["program"])
    assert float(load_checkpoint(tmp_path / "run" / "best.safetensors")["program"][0, 0, 0]) == 1
    assert float(load_checkpoint(tmp_path / "run" / "previous.safetensors")["program"][0, 0, 0]) == 1
    lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(text)["test_accuracy"] for text in lines] == [0.25, 0.5, 0.5]
    result = summarise(SETTINGS, run.metrics)
    assert (result["final_accuracy"], result["best_accuracy"], result["best_epoch"]) == (0.5, 0.5, 1)
    assert not list((tmp_path / "run").glob("*.tmp")) and not list((tmp_path / "run").glob(".*.tmp"))
    run.close()


@pytest.mark.parametrize("damage", ["cut", "flip", "empty", "text"])
def test_damaged_newest_checkpoint_falls_back(tmp_path, capsys, damage):
    run, _ = opened(tmp_path / "run")
    run.save_epoch(line(0, 0.1), state(0))
    run.save_epoch(line(1, 0.2), state(1))
    run.close()
    path = tmp_path / "run" / "last.safetensors"
    content = bytearray(path.read_bytes())
    if damage == "flip":
        at = content.index(torch.full((8,), 1.0).numpy().tobytes())
        content[at] ^= 0x10
    path.unlink()  # best.pt and previous.pt may be links to the same file
    path.write_bytes({"cut": content[: len(content) // 2], "flip": content, "empty": b"", "text": b"hello"}[damage])
    run, checkpoint = opened(tmp_path / "run")
    assert [m["epoch"] for m in checkpoint["metrics"]] == [0]
    assert "going back to the checkpoint before it" in capsys.readouterr().err
    assert len((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()) == 1
    run.close()


def test_other_settings_are_refused_and_listed(tmp_path):
    opened(tmp_path / "run")[0].close()
    with pytest.raises(ValueError, match="epochs was 3 and is 5; mapping was 'blm' and is 'ilm'") as caught:
        Run(tmp_path / "run", "vm", SETTINGS | {"epochs": 5, "mapping": "ilm", "device": "cuda"})
    assert "device" not in str(caught.value) and "--overwrite" in str(caught.value)
    run = Run(tmp_path / "run", "vm", SETTINGS | {"epochs": 5}, overwrite=True)
    assert run.open() is None
    assert read_json(tmp_path / "run" / "config.json")["settings"]["epochs"] == 5
    run.close()


def test_overwrite_starts_anew(tmp_path):
    run, _ = opened(tmp_path / "run")
    run.save_epoch(line(0, 0.1), state(0))
    run.finish(summarise(SETTINGS, run.metrics))
    run.close()
    assert Run(tmp_path / "run", "vm", SETTINGS).result["final_accuracy"] == 0.1
    run, checkpoint = opened(tmp_path / "run", overwrite=True)
    assert checkpoint is None and run.metrics == []
    assert sorted(path.name for path in (tmp_path / "run").iterdir()) == [".lock", "config.json", "metrics.jsonl"]
    run.close()


def test_lock_dies_with_its_owner(tmp_path):
    program = (
        "import sys\nfrom tools.training.run_folder import Run\n"
        f"run = Run({str(tmp_path / 'run')!r}, 'vm', {SETTINGS!r}); run.open()\n"
        "print('held', flush=True); sys.stdin.read()"
    )
    owner = subprocess.Popen([sys.executable, "-c", program], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert owner.stdout.readline() == b"held\n"
    with pytest.raises(ValueError, match="another process is at work"):
        opened(tmp_path / "run")
    owner.kill()
    owner.wait()
    opened(tmp_path / "run")[0].close()


def test_full_disk_leaves_the_checkpoint_before(tmp_path, monkeypatch):
    run, _ = opened(tmp_path / "run")
    run.save_epoch(line(0, 0.1), state(0))

    def full(value, file):
        file.write(b"half")
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(OSError, match=r"needs about \d+ MiB and \d+ MiB are free; the checkpoint before it"):
        run.save_epoch(line(1, 0.2), state(1))
    run.close()
    assert len(load_checkpoint(tmp_path / "run" / "last.safetensors")["metrics"]) == 1
    assert not list((tmp_path / "run").glob(".*.tmp"))


@pytest.mark.parametrize("call", range(12))
def test_cut_off_between_any_two_file_operations(tmp_path, monkeypatch, call):
    """The process vanishes before its ``call``-th rename or link: the run goes on from one of the two epochs."""
    run, _ = opened(tmp_path / "run")
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
    run, checkpoint = opened(tmp_path / "run")
    epochs = [m["epoch"] for m in checkpoint["metrics"]]
    assert epochs in ([0, 1], [0, 1, 2])
    assert float(checkpoint["program"][0, 0, 0]) == epochs[-1]
    assert [json.loads(text)["epoch"] for text in (tmp_path / "run/metrics.jsonl").read_text().splitlines()] == epochs
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
        run, _ = opened(disk / "run")
        for epoch in range(2):
            run.save_epoch(line(epoch, 0.1), state(epoch) | {"mapping": {"weights": torch.full((75_000,), 1.0)}})
        room = os.statvfs(disk).f_bavail * os.statvfs(disk).f_frsize
        (disk / "another").write_bytes(bytes(room - 100_000))
        for _ in range(3):
            with pytest.raises(OSError, match=r"needs about 1 MiB and 0 MiB are free; the checkpoint before it is unt"):
                run.save_epoch(line(2, 0.2), state(2) | {"mapping": {"weights": torch.full((75_000,), 2.0)}})
        run.close()
        run, checkpoint = opened(disk / "run")
        assert [m["epoch"] for m in checkpoint["metrics"]] == [0, 1] and float(checkpoint["program"].max()) == 1
        (disk / "another").unlink()
        run.save_epoch(line(2, 0.2), state(2) | {"mapping": {"weights": torch.full((75_000,), 2.0)}})
        run.close()
        assert len(load_checkpoint(disk / "run" / "last.safetensors")["metrics"]) == 3
    finally:
        subprocess.run(["umount", "-l", str(disk)], check=True)
