"""What run folders and records say of themselves, checked, since they may come from anywhere."""

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from tools.console import warn
from data.files import printable, read_json
from data.registry import FOLDER_PREFIX
from models import REPROGRAMMING
from tools.training.run_folder import check_config, read_config

SCRIPTS = {kind: f"train_{kind}" for kind in ("vm", "vm_fast", "vlm")}
NAMES = ("dataset", "backbone", "reprogramming", "mapping")
CURVES = ("train_loss", "train_accuracy", "test_accuracy", "validation_accuracy", "mapping_change")


class Row(NamedTuple):
    """What a row of a table stands for: all that bears on the result, but seed and mapping."""

    dataset: str
    backbone: str
    reprogramming: str
    script: str
    settings: str  # that differ from the recipe, but the epochs, as in "lr 0.1, train fraction 0.5"
    epochs: int
    data: str  # short fingerprint of labels and images


@dataclass(frozen=True)
class Run:
    """One run.

    Attributes
    ----------
    folder : Path
        The run folder, or ``RECORD/runs.jsonl:LINE``, which is no folder.
    row : Row
    mapping : str
    seed : int
    settings : dict
        All of them, files without their folders; of a record those of every name.
    distinct : dict
        Those that bear on the result and differ from the recipe.
    values : dict of str to str
        What a table may tell runs apart by: mapping, row and what is distinct, and ``pattern``, which is the input VR
        and whether it was trained.
    machines : set of (str, str)
        Device and number of threads of each start.
    metrics : list of dict
        A line for each finished epoch.
    result : (float, float) or None
        Final accuracy and that of the best epoch, fractions of 1; None for a run that is not finished.
    class_accuracies : dict of str to float or None, or None
        What `tools.evaluate` measured, fractions of 1; None for a class without test images.
    recorded : str
        Its line of a record: what was read, without the folders and the name of the machine.
    """

    folder: Path
    row: Row
    mapping: str
    seed: int
    settings: dict
    distinct: dict
    values: dict
    machines: set
    metrics: list
    result: tuple | None
    class_accuracies: dict | None
    recorded: str

    @property
    def minutes(self):
        """Of estimating, training and testing, over all finished epochs."""
        return sum(sum(line["seconds"].values()) for line in self.metrics) / 60

    def value(self, name):
        """What it has of a setting that tells runs apart, as text."""
        return self.values.get(name, "default")


def words(name):
    """A setting as tables name it."""
    return {"dataset": "data set", "reprogramming": "input VR"}.get(name, name.replace("_", " "))


def find_runs(paths):
    """Runs in and below ``paths``, which are folders of runs or of records, or records; each once, finished ones first.

    A path that is named and holds no run is an error; a run come upon below is left out with a warning where it cannot
    be read, or repeats another's settings and seed on the same data. Of these a finished one is kept.
    """
    found = []
    for path in map(Path, paths):
        file = path / "config.json" if path.is_dir() else path
        if not path.is_dir() and not path.is_file():
            raise FileNotFoundError(
                f"{path} is no folder and no file; name a run folder, a record, or a folder of some"
            )
        runs = _read(file) if file.is_file() else _below(path)
        if not runs:
            raise ValueError(f"{path} holds no run; train one, or name another folder")
        found += runs
    kept = {}
    # of a run that is found in its folder and in a record, the folder holds more
    for run in sorted(found, key=lambda run: (run.result is None, not run.folder.is_dir())):
        first = kept.setdefault((run.row, run.mapping, run.seed), run)
        if first.recorded != run.recorded:
            warn(f"left out: {run.folder} repeats the settings and the seed of {first.folder}")
    return list(kept.values())


def _below(folder):
    runs = []
    for file in sorted((*folder.rglob("config.json"), *folder.rglob("runs.jsonl"))):
        try:
            runs += _read(file) if file.is_file() else []
        except (ValueError, OSError) as error:
            warn(f"left out: {error}")
    return runs


def _read(file):
    """The run of the folder of a ``config.json``, or the runs of a record, as `as_record` writes it.

    Raises
    ------
    ValueError, OSError
        Where it holds none of this version, or values that no run of this project writes.
    """
    if file.name == "config.json":
        parts = {"config": read_config(file), "metrics": []}
        for name, read in (("metrics.jsonl", _json_lines), ("result.json", read_json), ("evaluation.json", read_json)):
            if (path := file.with_name(name)).is_file():
                parts[path.stem] = read(path)
        return [_checked(parts, file.parent)]
    runs = []
    for number, parts in enumerate(_json_lines(file), 1):
        place = Path(f"{file}:{number}")
        config = check_config(_object(parts, place).get("config"), place)
        if not isinstance(parts.get("metrics"), list) or "result" not in parts:
            raise ValueError(f"{place} lacks metrics or the result")
        runs.append(_checked(parts | {"config": config}, place))
    return runs


def as_record(runs):
    """A line of JSON for each finished run: what a table, or a comparison with a later run, needs of it."""
    finished = sorted((run for run in runs if run.result is not None), key=lambda run: str(run.folder))
    return "".join(run.recorded + "\n" for run in finished)


def _checked(parts, place):
    """The `Run` of the parts of a run folder or of a line in a record."""
    config, metrics = parts["config"], _check_metrics(parts["metrics"], place)
    _check_settings(config, place)
    # content tells apart what lies in folders of the same name
    settings, distinct = (
        {key: _without_folder(key, value) for key, value in config[part].items()} for part in ("settings", "distinct")
    )
    content = {name: value if type(value) is str else _digest(value) for name, value in config["content"].items()}
    # where the seed draws them, images differ from seed to seed and are no reason not to average
    drawn = {f"{split} images" for setting in _DRAWING.keys() & distinct.keys() for split in _DRAWING[setting]}
    others = {printable(key): printable(distinct[key]) for key in sorted(distinct.keys() - {*NAMES, "seed", "epochs"})}
    row = Row(
        *(printable(settings[key]) for key in NAMES[:3]),
        SCRIPTS[config["kind"]],
        ", ".join(f"{words(key)} {value}" for key, value in others.items()),
        settings["epochs"],
        _digest({name: value for name, value in content.items() if name not in drawn})[:8],
    )
    own = {"mapping": printable(settings["mapping"]), "pattern": _pattern(row)}
    own |= {key: str(value) for key, value in row._asdict().items() if key != "settings"}
    kept = {"format": config["format"], "kind": config["kind"], "content": content}
    kept |= {"settings": {key: settings[key] for key in (*NAMES, "seed", "epochs")}, "distinct": distinct}
    kept["starts"] = [{key: start.get(key) for key in _OF_A_START} for start in config["starts"]]
    recorded, result = {"config": kept, "metrics": metrics}, None
    if "result" in parts:
        outcome = _object(parts["result"], place)
        result = tuple(_number(outcome, f"{which}_accuracy", place, 0, 1) for which in ("final", "best"))
        recorded["result"] = {key: value for key, value in outcome.items() if key not in kept["settings"]}
    accuracies = _class_accuracies(parts.get("evaluation"), metrics, place)
    if accuracies is not None:
        numbers = {key: value for key, value in parts["evaluation"].items() if type(value) in (int, float)}
        classes = [{"name": name, "accuracy": accuracy} for name, accuracy in accuracies.items()]
        recorded["evaluation"] = numbers | {"classes": classes}
    try:
        line = json.dumps(recorded, allow_nan=False)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{place} holds a number that is not finite, or lists too deep in each other") from error
    return Run(
        folder=place,
        row=row,
        mapping=own["mapping"],
        seed=settings["seed"],
        settings=settings,
        distinct=distinct,
        values=own | others | own,
        machines={(printable(start.get("device")), printable(start.get("threads"))) for start in config["starts"]},
        metrics=metrics,
        result=result,
        class_accuracies=accuracies,
        recorded=line,
    )


def _pattern(row):
    name = row.reprogramming
    if name in REPROGRAMMING and not REPROGRAMMING[name].trained:
        return name
    return f"{name}, trained" if row.epochs else f"{name}, as it starts"


_DRAWING = dict.fromkeys(("shots", "train_fraction", "validation_fraction"), ("train", "validation"))
_DRAWING["test_fraction"] = ("train", "validation", "test")
_OF_A_START = ("git_commit", "versions", "device", "threads")


def _digest(value):
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:16]


def _without_folder(key, value):
    """A setting without the folders of a file's path, which are of one machine; names may have a slash."""
    prefix = FOLDER_PREFIX if key == "dataset" and str(value).startswith(FOLDER_PREFIX) else ""
    if type(value) is not str or (key in NAMES and not prefix):
        return value
    return prefix + value.removeprefix(prefix).rstrip("/").rpartition("/")[2]


def _check_settings(config, place):
    settings = config["settings"]
    wrong = [key for key in NAMES if type(settings.get(key)) is not str]
    wrong += [key for key in ("seed", "epochs") if type(settings.get(key)) is not int or not 0 <= settings[key] < 2**63]
    wrong += ["a known kind"] * (config["kind"] not in SCRIPTS)
    if wrong:
        raise ValueError(f"{place} lacks {', '.join(wrong)}")


def _json_lines(path):
    try:
        return [json.loads(text) for text in path.read_text(encoding="utf-8").splitlines()]
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} holds no JSON in each line ({error})") from error


def _check_metrics(lines, place):
    for number, line in enumerate(lines):
        _number(_object(line, place), "test_accuracy", place, 0, 1)
        for key in CURVES:
            if line.get(key) is not None:
                _number(line, key, place)
        seconds = _object(line.get("seconds"), place)
        for step in seconds:
            _number(seconds, step, place)
        if line.get("epoch") != number:
            raise ValueError(f"{place}: line {number + 1} of the metrics is of epoch {line.get('epoch')!r:.20}")
    return lines


def _class_accuracies(evaluation, metrics, place):
    """Of an evaluation of the last epoch; None without one."""
    if evaluation is None or not metrics or _object(evaluation, place).get("epoch") != metrics[-1]["epoch"]:
        return None
    classes = evaluation.get("classes")
    if not isinstance(classes, list) or not all(type(_object(c, place).get("name")) is str for c in classes):
        raise ValueError(f"{place}: the evaluation lacks classes")
    measured = {printable(c["name"]): c for c in classes}
    return {n: None if c.get("accuracy") is None else _number(c, "accuracy", place, 0, 1) for n, c in measured.items()}


def _object(value, place):
    if not isinstance(value, dict):
        raise ValueError(f"{place}: expected an object of names and values, got {type(value).__name__}")
    return value


def _number(values, key, place, low=-1e300, high=1e300):
    value = values.get(key)
    if type(value) not in (int, float) or not low <= value <= high:  # also nan; an int may exceed all floats
        raise ValueError(f"{place}: {key} is {value!r:.40}, expected a number" + " in [0, 1]" * (high == 1))
    return value
