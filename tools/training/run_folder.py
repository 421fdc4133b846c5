"""The run folder: settings, metrics, checkpoints and result of one training run, safe against being cut off.

A folder holds ``config.json`` (every setting, library versions, git commit), ``metrics.jsonl`` (a line an epoch),
``last.pt`` and the checkpoint before it (``previous.pt``), ``best.pt``, and ``result.json`` once the run is finished.
Checkpoints carry the metrics of all epochs so far, so that the other files can always be made again from them.
"""

import fcntl
import json
import math
import os
import platform
import shutil
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

from data.files import read_json, sync_folder, write_json, write_text
from models.checkpoint_file import read_checkpoint

# settings that may differ between a run and its continuation: they change where and how, not what
FREE_SETTINGS = frozenset(
    ("data_path", "results_path", "device", "workers", "overwrite", "tensorboard", "on_nonfinite")
)
_LIBRARIES = ("torch", "torchvision", "timm", "open_clip_torch", "numpy", "pillow")


def run_folder(results_path, kind, settings):
    """``<results-path>/<kind>/<dataset>/<backbone>_<reprogramming>_<mapping>_seed<seed>``, a Path.

    Parameters
    ----------
    results_path : str or Path
    kind : str
        ``vm``, ``vlm`` or ``vm_fast``.
    settings : dict
        With ``dataset, backbone, reprogramming, mapping, seed``.
    """
    kept = {key: _as_file_name(settings[key]) for key in ("dataset", "backbone", "reprogramming", "mapping")}
    leaf = "{backbone}_{reprogramming}_{mapping}_seed{seed}".format(**kept, seed=settings["seed"])
    return Path(results_path) / kind / kept["dataset"] / leaf


def _as_file_name(text):
    if text.startswith("folder:"):
        text = "folder-" + Path(text.removeprefix("folder:")).resolve().name
    return "".join(c if c.isalnum() or c in "._-" else "-" for c in text)


def check_writable(path, flag="--results-path"):
    """Check that the folder ``path``, which ``flag`` chooses, can be made or written to, without writing anything.

    Raises
    ------
    OSError
        That names the path and what stands in the way.
    """
    path = Path(path).absolute()
    existing = path
    while not existing.exists():
        existing = existing.parent
    if not existing.is_dir():
        raise NotADirectoryError(f"cannot write to {path}: {existing} is a file; choose another {flag}")
    if not os.access(existing, os.W_OK | os.X_OK) or os.statvfs(existing).f_flag & os.ST_RDONLY:
        raise PermissionError(f"cannot write to {path}: no permission in {existing}; choose another {flag}")


class Run:
    """One run folder, held by one process at a time.

    Parameters
    ----------
    folder : Path
    kind : str
        ``vm``, ``vlm`` or ``vm_fast``.
    settings : dict
        Every setting, in plain JSON values.
    overwrite : bool
        Start anew where the folder holds a run already.

    Raises
    ------
    ValueError
        Where the folder holds a run with other settings (which are listed), or another process is at work in it.
    """

    def __init__(self, folder, kind, settings, overwrite=False):
        self.folder, self.kind, self.settings, self.overwrite = Path(folder), kind, settings, overwrite
        self.metrics = []
        self._lock = None
        if not overwrite:
            self._refuse_other_config()

    def _refuse_other_config(self):
        path = self.folder / "config.json"
        if path.exists():
            config = read_json(path)
            if not isinstance(config, dict) or not isinstance(config.get("settings"), dict):
                raise ValueError(f"{path} holds no settings; take another --results-path, or --overwrite to start anew")
            self._refuse_other_settings(config["settings"])

    def _refuse_other_settings(self, earlier):
        fields = sorted((earlier.keys() | self.settings.keys()) - FREE_SETTINGS)
        different = [
            f"{field} was {earlier.get(field)!r} and is {self.settings.get(field)!r}"
            for field in fields
            if earlier.get(field) != self.settings.get(field)
        ]
        if different:
            raise ValueError(
                f"{self.folder} holds a run with other settings ({'; '.join(different)}); "
                "take another --results-path, or --overwrite to start anew"
            )

    @property
    def result(self):
        """What ``result.json`` holds where the run is finished, else None.

        Raises
        ------
        ValueError
            Where that is no result.
        """
        path = self.folder / "result.json"
        if self.overwrite or not path.exists():
            return None
        try:
            result = read_json(path)
            if not isinstance(result, dict) or not _is_accuracy(result.get("final_accuracy")):
                raise ValueError(f"{path} holds no result")
        except ValueError as error:
            raise ValueError(f"{error}; delete it, and the same command writes it anew from the checkpoint") from error
        return result

    def open(self):
        """Take hold of the folder and write ``config.json``; returns the checkpoint to go on from, or None.

        Raises
        ------
        ValueError
            Where another process holds the folder, or what it holds is of other settings or beyond reading.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC
        self._lock = os.fdopen(os.open(self.folder / ".lock", flags, 0o644), "r+")  # held until the process ends
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            self._lock.close()
            raise ValueError(f"another process is at work in {self.folder}; wait for it or stop it") from error
        for leftover in self.folder.glob(".*.tmp"):  # of a process that was killed
            leftover.unlink()
        if self.overwrite:
            for name in ("result.json", "last.pt", "previous.pt", "best.pt", "metrics.jsonl"):
                (self.folder / name).unlink(missing_ok=True)
        else:
            self._refuse_other_config()  # again: another process may have begun and ended since
        checkpoint = self._load_newest()
        if checkpoint is None or not (self.folder / "config.json").exists():
            write_json(self.folder / "config.json", {
                "kind": self.kind, "settings": self.settings, "versions": _versions(), "git_commit": _git_commit(),
            })
        self.metrics = checkpoint["metrics"] if checkpoint else []
        self._write_metrics()
        return checkpoint

    def close(self):
        """Let go of the folder."""
        if self._lock is not None:
            self._lock.close()
            self._lock = None

    def _load_newest(self):
        last, previous = self.folder / "last.pt", self.folder / "previous.pt"
        errors = []
        for path in (last, previous):
            if not path.exists():
                continue
            try:
                checkpoint = load_checkpoint(path)
            except ValueError as error:
                errors.append(str(error))
                continue
            self._refuse_other_settings(checkpoint["settings"])
            if errors:
                print(f"warning: {errors[0]}; going back to the checkpoint before it", file=sys.stderr)
                os.replace(last, self.folder / "damaged.pt")  # or the next save would make it the one before
            return checkpoint
        if errors:
            raise ValueError(f"{'; '.join(errors)}; --overwrite starts anew")
        return None

    def save_epoch(self, metrics, state):
        """Keep one finished epoch: checkpoint first, then the line in ``metrics.jsonl``.

        Parameters
        ----------
        metrics : dict
            One epoch's line; its ``test_accuracy`` decides about ``best.pt`` (the first of equals stays).
        state : dict
            Tensors and plain values that `open` gives back after a restart.
        """
        best_before = max((line["test_accuracy"] for line in self.metrics), default=-math.inf)
        lines = [*self.metrics, metrics]
        checkpoint = {"kind": self.kind, "settings": self.settings, "metrics": lines, **state}
        temporary = self.folder / ".last.pt.tmp"
        _save_durably(checkpoint, temporary)
        last, previous = self.folder / "last.pt", self.folder / "previous.pt"
        if metrics["test_accuracy"] > best_before:
            _link_over(temporary, self.folder / "best.pt")
        if last.exists():
            _link_over(last, previous)
        os.replace(temporary, last)
        self.metrics = lines
        sync_folder(self.folder)
        self._write_metrics()

    def finish(self, result):
        """Write ``result.json``: from now on the run counts as finished."""
        write_json(self.folder / "result.json", result)

    def _write_metrics(self):
        text = "".join(json.dumps(line) + "\n" for line in self.metrics)
        write_text(self.folder / "metrics.jsonl", text)


def in_use(folder):
    """Whether a process is at work in a run folder."""
    try:
        with open(Path(folder) / ".lock") as lock:
            fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except FileNotFoundError:
        return False
    except BlockingIOError:
        return True
    return False


def summarise(settings, metrics):
    """``result.json`` of a finished run.

    Parameters
    ----------
    settings : dict
    metrics : list of dict
        The lines of ``metrics.jsonl``.

    Returns
    -------
    dict; accuracies are fractions of 1, ``best_accuracy`` is best-on-test (the papers' habit), at the first such epoch.
    """
    accuracies = [line["test_accuracy"] for line in metrics]
    best = max(accuracies)
    kept = ("dataset", "backbone", "reprogramming", "mapping", "seed", "epochs")
    return {key: settings[key] for key in kept} | {
        "final_accuracy": accuracies[-1], "best_accuracy": best, "best_epoch": accuracies.index(best),
    }


def checkpoint_path(folder, name="last"):
    """The file of a run's checkpoint: ``last``, ``previous`` or ``best``."""
    return Path(folder) / f"{name}.pt"


def load_checkpoint(path):
    """Read a checkpoint of a run folder on the CPU, checking that it is whole.

    Raises
    ------
    ValueError
        Where the file is damaged or no checkpoint of this project.
    """
    checkpoint = read_checkpoint(path, archive_only=True)
    if not _is_checkpoint(checkpoint):
        raise ValueError(f"{path} is damaged or no checkpoint of this project")
    return checkpoint


def _is_checkpoint(value):
    if not isinstance(value, dict) or not isinstance(value.get("metrics"), list):
        return False
    lines = value["metrics"]
    try:
        json.dumps([lines, value.get("settings")])
    except (TypeError, ValueError, RecursionError):
        return False
    return bool(
        isinstance(value.get("settings"), dict) and isinstance(value.get("mapping"), dict)
        and isinstance(value.get("program"), torch.Tensor) and isinstance(value.get("kind"), str)
        and isinstance(value.get("history", []), list)
        and lines and all(isinstance(line, dict) and _is_accuracy(line.get("test_accuracy")) for line in lines)
        and [line.get("epoch") for line in lines] == list(range(len(lines)))
    )


def _is_accuracy(value):
    return isinstance(value, (int, float)) and 0 <= value <= 1


def _save_durably(value, path):
    try:
        with open(path, "wb") as file:
            torch.save(value, file)
            file.flush()
            os.fsync(file.fileno())
    except (OSError, RuntimeError) as error:  # torch's writer reports a full disk as RuntimeError
        path.unlink(missing_ok=True)
        size = sum(t.numel() * t.element_size() for t in _tensors(value))
        free = os.statvfs(path.parent).f_bavail * os.statvfs(path.parent).f_frsize
        raise OSError(
            f"could not save a checkpoint in {path.parent}: it needs about {size / 2**20 + 1:.0f} MiB and "
            f"{free / 2**20:.0f} MiB are free; the checkpoint before it is untouched ({error})"
        ) from error


def _tensors(value):
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, dict):
        for item in value.values():
            yield from _tensors(item)
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from _tensors(item)


def _link_over(source, target):
    temporary = target.with_name(f".{target.name}.tmp")
    temporary.unlink(missing_ok=True)
    try:
        os.link(source, temporary)
    except OSError:  # a file system without hard links
        shutil.copyfile(source, temporary)
    os.replace(temporary, target)


def _versions():
    found = {"python": platform.python_version()}
    for library in _LIBRARIES:
        try:
            found[library] = version(library)
        except PackageNotFoundError:
            pass
    return found


def _git_commit():
    command = ["git", "-C", str(Path(__file__).parent), "rev-parse", "HEAD"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None  # not every copy is a git checkout
