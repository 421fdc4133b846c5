"""The run folder: settings, metrics, checkpoints and result of one training run, safe against being cut off.

A folder holds ``config.json`` (every setting, and a list of starts), ``metrics.jsonl`` (a line per epoch),
``last.safetensors`` and the checkpoint before it (``previous.safetensors``), ``best.safetensors``, ``log.txt`` (what
was printed), and ``result.json`` once the run is finished. Checkpoints carry the metrics of all epochs so far, so that
the other files can always be made again from them.
"""

import fcntl
import fnmatch
import json
import math
import os
import platform
import shutil
import socket
import subprocess
import sys
import time
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

from data.files import read_json, sync_folder, write_json, write_text
from tools.training.checkpoint import read_checkpoint, write_checkpoint

FORMAT = 2  # of config.json and the checkpoints; 1 had .pt files
_LIBRARIES = ("torch", "torchvision", "timm", "open_clip_torch", "numpy", "pillow")
# what a run and the tools write into its folder, and --overwrite removes
_OURS = (
    ".lock",
    ".*.tmp",
    "config.json",
    "metrics.jsonl",
    "log.txt",
    "result.json",
    "*.safetensors",
    "evaluation*.json",
    "confusion*.csv",
    "figures",
    "model.onnx*",
    "model.pt2",
    "events.out.tfevents.*",
)


def check_writable(path, flag="--results-path"):
    """Check that the folder ``path``, which ``flag`` chooses, can be made or written to, without writing anything.

    Raises
    ------
    OSError, ValueError
        That names the path and what stands in the way.
    """
    path = Path(path).absolute()
    try:
        str(path).encode()
    except UnicodeEncodeError:  # which safetensors can't read
        raise ValueError(f"cannot write to {path}: its name is not UTF-8; choose another {flag}") from None
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
    cfg : cfg.Config
        Its settings, and which of them affect the result.
    command : list of str, optional
        What was typed. With ``--overwrite`` a run starts from scratch where the folder holds one already, unless that
        is an unfinished run which the very same command began: that one goes on.
    device, precision : str
        What this start computes on, and what ``--precision`` comes to there.

    Raises
    ------
    ValueError
        The folder holds a run with other settings (which are listed), or what is no run.
    """

    def __init__(self, cfg, command=(), device="cpu", precision="fp32"):
        self.cfg, self.folder, self.command = cfg, cfg.folder, list(command)
        self.device, self.precision = device, precision
        self.metrics = []
        self._lock = None
        self._log_lines = []
        config = self._read_config()
        begun = config["starts"][0].get("command") if config else None
        went_on = begun == self.command and not (self.folder / "result.json").exists()
        self.overwrite = cfg.overwrite and not (config and went_on)
        if not cfg.overwrite:
            self._refuse_other_settings(config)

    def _read_config(self):
        """What ``config.json`` holds; None without one, or where it is to be overwritten anyway."""
        path = self.folder / "config.json"
        if not path.exists():
            return None
        try:
            return read_config(path)
        except ValueError as error:
            if self.cfg.overwrite:
                return None
            raise ValueError(f"{error}; take another --results-path, or --overwrite to start from scratch") from error

    def _refuse_other_settings(self, config):
        if config is None:
            return
        now = self.cfg.that_affect("result")
        different = [
            f"{name} was {config['settings'].get(name)!r} and is {value!r}"
            for name, value in sorted(now.items())
            if config["settings"].get(name) != value and name != "dataset"  # whose images are compared instead
        ]
        if different:
            raise ValueError(
                f"{self.folder} holds a run with other settings ({'; '.join(different)}); "
                "take another --results-path, or --overwrite to start from scratch"
            )

    def other_rounding(self):
        """What rounds otherwise than when the run was begun, as in "engine was 'auto' and is 'plain'"; a list."""
        config = None if self.overwrite else self._read_config()
        if config is None:
            return []
        now = self.cfg.that_affect("rounding") | {"precision": self.precision}
        then = config["settings"] | {"precision": config["starts"][-1].get("precision", self.precision)}
        return [
            f"{name} was {then.get(name)!r} and is {value!r}" for name, value in now.items() if then.get(name) != value
        ]

    def refuse_other_content(self, content):
        """Check that the run was trained on what is there now.

        Parameters
        ----------
        content : dict
            Names of what a run reads to fingerprints, lists of names, …; as `open` is given it.

        Raises
        ------
        ValueError
            Something differs; the message says what.
        """
        config = None if self.overwrite else self._read_config()
        for name, now in content.items():
            then = config and config["content"].get(name)
            if then not in (None, now):
                raise ValueError(
                    f"{self.folder} holds a run with other {name}{_difference(then, now)}; give those of that time, "
                    "take another --results-path, or --overwrite to start from scratch"
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
            raise ValueError(f"{error}; delete it, and the same command writes it again from the checkpoint") from error
        return result

    def open(self, content):
        """Take hold of the folder and note this start; returns the checkpoint to go on from, or None.

        Parameters
        ----------
        content : dict
            As in `refuse_other_content`.

        Raises
        ------
        ValueError
            Another process holds the folder, or what it holds is of other settings or content or beyond reading.
        """
        flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            self._lock = os.fdopen(os.open(self.folder / ".lock", flags, 0o644), "r+")  # held until the process ends
        except OSError as error:
            raise OSError(f"cannot write to {self.folder}: {error.strerror}; choose another --results-path") from error
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            self._lock.close()
            raise ValueError(f"another process is at work in {self.folder}; wait for it or stop it") from error
        for leftover in self.folder.glob(".*.tmp"):  # of a process that was killed
            leftover.unlink()
        if self.overwrite:
            self._empty()
        try:
            config, checkpoint = self._take_up(content)
        except ValueError:
            if not self.cfg.overwrite:
                raise
            self._empty()
            config, checkpoint = None, None
        starts = config["starts"] if config and checkpoint else []
        write_json(
            self.folder / "config.json",
            {
                "format": FORMAT,
                "kind": self.cfg.kind,
                "settings": self.cfg.settings,
                "distinct": self.cfg.distinct,
                "content": content,
                "starts": [*starts, _start(self.command, self.device, self.precision)],
            },
        )
        self.metrics = checkpoint["metrics"] if checkpoint else []
        self._write_metrics()
        self._write_log()
        return checkpoint

    def _take_up(self, content):
        config = self._read_config()
        self._refuse_other_settings(config)  # again: another process may have begun and ended since
        self.refuse_other_content(content)
        return config, self._load_newest()

    def _empty(self):
        """Remove what a run and the tools wrote.

        Raises
        ------
        ValueError
            Something else is in the folder; nothing is removed then.
        """
        entries = list(self.folder.iterdir())
        foreign = [path.name for path in entries if not any(fnmatch.fnmatch(path.name, ours) for ours in _OURS)]
        if foreign:
            raise ValueError(
                f"--overwrite: {self.folder} also holds {', '.join(sorted(foreign)[:3])}, which no run wrote; move it"
            )
        # checkpoints first: cut off in between, what is left is a finished run or one without any, never one to go on
        for path in sorted(entries, key=lambda path: path.suffix != ".safetensors"):
            if path.name != ".lock":
                shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()

    def close(self):
        """Let go of the folder."""
        if self._lock is not None:
            self._lock.close()
            self._lock = None

    def log(self, line):
        """Add a line to ``log.txt``; those from before `open` wait for it."""
        self._log_lines.append(line)
        if self._lock is not None:
            self._write_log()

    def _write_log(self):
        flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC
        with os.fdopen(
            os.open(self.folder / "log.txt", flags, 0o644), "a", encoding="utf-8", errors="backslashreplace"
        ) as log:
            log.writelines(f"{line}\n" for line in self._log_lines)
        self._log_lines = []

    def _load_newest(self):
        last, previous = (checkpoint_path(self.folder, name) for name in ("last", "previous"))
        errors = []
        for path in (last, previous):
            if not path.exists():
                continue
            try:
                checkpoint = load_checkpoint(path)
            except ValueError as error:
                errors.append(str(error))
                continue
            self._refuse_other_settings(checkpoint)
            if errors:
                print(f"warning: {errors[0]}; going back to the checkpoint before it", file=sys.stderr)
                os.replace(last, checkpoint_path(self.folder, "damaged"))  # or the next save would keep it as previous
            return checkpoint
        if errors:
            raise ValueError(f"{'; '.join(errors)}; --overwrite starts from scratch")
        return None

    def save_epoch(self, metrics, state):
        """Keep one finished epoch: checkpoint first, then the line in ``metrics.jsonl``.

        Parameters
        ----------
        metrics : dict
            One epoch's line; see `score` for what decides about the best checkpoint (the first of equals stays).
        state : dict
            Tensors and plain values that `open` gives back after a restart.
        """
        best_before = max(map(score, self.metrics), default=-math.inf)
        lines = [*self.metrics, metrics]
        checkpoint = {"kind": self.cfg.kind, "settings": self.cfg.settings, "metrics": lines, **state}
        last, previous, best = (checkpoint_path(self.folder, name) for name in ("last", "previous", "best"))
        temporary = last.with_name(f".{last.name}.tmp")
        write_checkpoint(temporary, checkpoint)
        if score(metrics) > best_before:
            _link_over(temporary, best)
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
    dict; accuracies are fractions of 1, of the test set. ``best_accuracy`` is that of the first epoch which is best on
    the test set, the papers' habit, or, where ``best_on`` says so, on the images held out for validation.
    """
    scores = [score(line) for line in metrics]
    best = scores.index(max(scores))
    kept = ("dataset", "backbone", "reprogramming", "mapping", "seed", "epochs")
    result = {key: settings[key] for key in kept} | {
        "final_accuracy": metrics[-1]["test_accuracy"],
        "best_accuracy": metrics[best]["test_accuracy"],
        "best_epoch": best,
    }
    return result | ({"best_on": "validation"} if "validation_accuracy" in metrics[best] else {})


def score(line):
    """What epochs are compared by: accuracy on the images held out for validation, or else on the test set."""
    return line.get("validation_accuracy", line["test_accuracy"])


def read_config(path):
    """What a run's ``config.json`` holds: ``format, kind, settings, distinct, content, starts``.

    Raises
    ------
    ValueError
        Where that is none, or one of another version of this project.
    """
    return check_config(read_json(path), path)


def check_config(config, path):
    """`read_config` of what ``path`` was found to hold."""
    config = config if isinstance(config, dict) else {}
    number = config.get("format", 1 if isinstance(config.get("settings"), dict) else None)
    if number != FORMAT and isinstance(number, int):
        version = "an older" if number < FORMAT else "a newer"
        raise ValueError(f"{path} is of {version} version of this project (format {number}, expected {FORMAT})")
    whole = (
        number == FORMAT
        and isinstance(config.get("kind"), str)
        and all(isinstance(config.get(key), dict) for key in ("settings", "distinct", "content"))
        and isinstance(config.get("starts"), list)
        and config["starts"]
        and all(isinstance(start, dict) for start in config["starts"])
    )
    if not whole:
        raise ValueError(f"{path} is no config.json of a training run")
    return config


def checkpoint_path(folder, name="last"):
    """The file of a run's checkpoint: ``last``, ``previous`` or ``best``."""
    return Path(folder) / f"{name}.safetensors"


def load_checkpoint(path):
    """Read a checkpoint of a run folder on the CPU, checking that it is whole.

    Raises
    ------
    ValueError
        Where the file is damaged or no checkpoint of this project.
    """
    checkpoint = read_checkpoint(path)
    if not _is_checkpoint(checkpoint):
        raise ValueError(f"{path} is damaged or no checkpoint of this project")
    return checkpoint


def _is_checkpoint(value):
    if not isinstance(value, dict) or not isinstance(value.get("metrics"), list):
        return False
    lines = value["metrics"]
    return bool(
        isinstance(value.get("settings"), dict)
        and isinstance(value.get("mapping"), dict)
        and isinstance(value.get("program"), torch.Tensor)
        and isinstance(value.get("kind"), str)
        and isinstance(value.get("history", []), list)
        and lines
        and all(isinstance(line, dict) and _is_accuracy(line.get("test_accuracy")) for line in lines)
        and all(type(line.get("epoch")) is int and line["epoch"] == number for number, line in enumerate(lines))
    )


def _is_accuracy(value):
    return isinstance(value, (int, float)) and 0 <= value <= 1


def _difference(then, now):
    """The first difference of two values, as far as it can be told in a few words."""
    if not isinstance(then, list) or not isinstance(now, list):
        return "" if isinstance(now, (dict, str)) else f" ({then!r}, now {now!r})"
    if len(then) != len(now):
        return f" ({len(then)}, now {len(now)})"
    first = next(pair for pair in zip(then, now, strict=True) if pair[0] != pair[1])
    return f" ({first[0]!r}, now {first[1]!r})"


def _link_over(source, target):
    temporary = target.with_name(f".{target.name}.tmp")
    temporary.unlink(missing_ok=True)
    try:
        os.link(source, temporary)
    except OSError:  # a file system without hard links
        shutil.copyfile(source, temporary)
    os.replace(temporary, target)


def _start(command, device, precision):
    """What ``config.json`` notes of one start of a run."""
    versions = {"python": platform.python_version()}
    for library in _LIBRARIES:
        try:
            versions[library] = version(library)
        except PackageNotFoundError:
            pass
    return {
        "time": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "command": command,
        "versions": versions,
        "git_commit": _git_commit(),
        "host": socket.gethostname(),
        "device": device,
        "precision": precision,
        "threads": torch.get_num_threads(),
    }


def _git_commit():
    """The commit of this code, with ``-dirty`` where it was changed since; None where it is no git checkout."""
    command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--abbrev=40", "--dirty", "--exclude=*"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None
