"""What run folders say of themselves, checked, since they may come from anywhere; and which of them belong together."""

import hashlib
import json
import math
import re
import statistics
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from tools.console import warn
from data.files import printable, read_json
from data.registry import FOLDER_PREFIX
from mapping import MAPPINGS
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
    settings: str  # that differ from the recipe, but the epochs, as in "lr 0.1, no bayes"
    epochs: int
    data: str  # short fingerprint of labels and images

    @property
    def name(self):
        """The row without its data: those of two rows may be equal."""
        return self[:-1]


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
    machines : frozenset of (str, int or None)
        Device and number of threads of each start.
    metrics : list of dict
        A line for each finished epoch.
    result : (float, float) or None
        Final accuracy and that of the best epoch, fractions of 1; None for a run that is not finished.
    best_on : str
        What the best epoch was chosen by: ``test`` or ``validation``.
    class_accuracies : dict of str to float or None, or None
        What `tools.evaluate` measured, fractions of 1; None for a class without test images.
    recorded : dict
        Its line of a record: what was read, without the folders and the name of the machine.
    """

    folder: Path
    row: Row
    mapping: str
    seed: int
    settings: dict
    distinct: dict
    machines: frozenset
    metrics: list
    result: tuple | None
    best_on: str
    class_accuracies: dict | None
    recorded: dict

    @property
    def minutes(self):
        """Of estimating, training and testing, over all finished epochs."""
        return sum(sum(line["seconds"].values()) for line in self.metrics) / 60


def read_run(folder):
    """Read the small files of a run folder.

    Raises
    ------
    ValueError, OSError
        Where it holds none of this version, or values that no run of this project writes.
    """
    if not (folder / "config.json").is_file():
        raise ValueError(f"{folder} is no run folder: it has no config.json")
    lines = folder / "metrics.jsonl"
    parts = {"config": read_config(folder / "config.json"), "metrics": _json_lines(lines) if lines.is_file() else []}
    for name in ("result", "evaluation"):
        if (path := folder / f"{name}.json").is_file():
            parts[name] = read_json(path)
    return _checked(parts, folder)


def read_record(path):
    """The runs of a ``runs.jsonl``, as `as_record` writes it; raises as `read_run`."""
    runs = []
    for number, parts in enumerate(_json_lines(path), 1):
        place = Path(f"{path}:{number}")
        config = check_config(_object(parts, place).get("config"), place)
        if not isinstance(parts.get("metrics"), list) or "result" not in parts:
            raise ValueError(f"{place} lacks metrics or the result")
        runs.append(_checked(parts | {"config": config}, place))
    return runs


def as_record(runs):
    """A line of JSON for each finished run: what a table, or a comparison with a later run, needs of it."""
    finished = sorted((run for run in runs if run.result is not None), key=lambda run: str(run.folder))
    return "".join(json.dumps(run.recorded) + "\n" for run in finished)


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
    words = ", ".join(_words(key, distinct[key]) for key in sorted(distinct.keys() - {*NAMES, "seed", "epochs"}))
    row = Row(
        *(printable(settings[key]) for key in NAMES[:3]),
        SCRIPTS[config["kind"]],
        printable(words),
        settings["epochs"],
        _digest({name: value for name, value in content.items() if name not in drawn})[:8],
    )
    result, outcome = None, None
    if "result" in parts:
        outcome = _object(parts["result"], place)
        result = _fraction(outcome, "final_accuracy", place), _fraction(outcome, "best_accuracy", place)
    kept = {"format": config["format"], "kind": config["kind"], "content": content}
    kept |= {"settings": {key: settings[key] for key in (*NAMES, "seed", "epochs")}, "distinct": distinct}
    kept["starts"] = [{key: start.get(key) for key in _OF_A_START} for start in config["starts"]]
    recorded = {"config": kept, "metrics": metrics}
    if result is not None:
        recorded["result"] = {key: value for key, value in outcome.items() if key not in kept["settings"]}
    accuracies = _class_accuracies(parts.get("evaluation"), metrics, place)
    if accuracies is not None:
        numbers = {key: value for key, value in parts["evaluation"].items() if type(value) in (int, float)}
        classes = [{"name": name, "accuracy": accuracy} for name, accuracy in accuracies.items()]
        recorded["evaluation"] = numbers | {"classes": classes}
    return Run(
        folder=place,
        row=row,
        mapping=printable(settings["mapping"]),
        seed=settings["seed"],
        settings=settings,
        distinct=distinct,
        machines=frozenset((printable(str(start.get("device"))), start.get("threads")) for start in config["starts"]),
        metrics=metrics,
        result=result,
        best_on="validation" if "validation_fraction" in distinct else "test",
        class_accuracies=accuracies,
        recorded=recorded,
    )


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
    wrong += ["threads"] * any(type(start.get("threads")) not in (int, type(None)) for start in config["starts"])
    if wrong:
        raise ValueError(f"{place} lacks {', '.join(wrong)}")


def _words(key, value):
    words = key.replace("_", " ")
    return f"{words} {value}" if type(value) is not bool else words if value else f"no {words}"


def _json_lines(path):
    try:
        return [json.loads(text) for text in path.read_text(encoding="utf-8").splitlines()]
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} cannot be read ({error})") from error


def _check_metrics(lines, place):
    for number, line in enumerate(lines):
        _fraction(_object(line, place), "test_accuracy", place)
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
    return {
        printable(c["name"]): None if c.get("accuracy") is None else _fraction(c, "accuracy", place) for c in classes
    }


def _object(value, place):
    if not isinstance(value, dict):
        raise ValueError(f"{place}: expected an object of names and values, got {type(value).__name__}")
    return value


def _number(values, key, place):
    value = values.get(key)
    if type(value) not in (int, float) or not abs(value) < 1e300 or math.isnan(value):  # an int may exceed all floats
        raise ValueError(f"{place}: {key} is {value!r:.40}, expected a number")
    return value


def _fraction(values, key, place):
    value = _number(values, key, place)
    if not 0 <= value <= 1:
        raise ValueError(f"{place}: {key} is {value!r:.40}, expected a number in [0, 1]")
    return value


def find_runs(paths):
    """Runs in and below ``paths``, folders of runs or of records, each once, finished or not.

    A folder that is named and holds no run is an error; one come upon below is left out with a warning, as is a run
    that repeats another's settings and seed on the same data.
    """
    runs = {}
    for path in map(Path, paths):
        if not path.is_dir():
            raise FileNotFoundError(f"{printable(str(path))} is no folder; name a run folder or one that holds some")
        if (path / "config.json").is_file():
            found = [read_run(path)]
        else:
            found = []
            for file in sorted((*path.rglob("config.json"), *path.rglob("runs.jsonl"))):
                try:
                    found += read_record(file) if file.name == "runs.jsonl" else [read_run(file.parent)]
                except (ValueError, OSError) as error:
                    warn(f"left out: {error}")
            if not found:
                raise ValueError(f"{path} holds no run; train one, or name another folder")
        for run in found:
            first = runs.setdefault((run.row, run.mapping, run.seed), run)
            if first.folder.resolve() != run.folder.resolve():
                warn(f"left out: {run.folder} repeats the settings and the seed of {first.folder}")
    return list(runs.values())


# ---- grouping ----


@dataclass(frozen=True)
class Cell:
    """Finished runs that differ in their seed alone; accuracies in percent."""

    runs: tuple

    @property
    def mean(self):
        return 100 * statistics.fmean(run.result[0] for run in self.runs)

    @property
    def std(self):
        """Sample standard deviation; None for a single run."""
        return 100 * statistics.stdev([run.result[0] for run in self.runs]) if len(self.runs) > 1 else None

    @property
    def best(self):
        """Test accuracy of the best epoch."""
        return 100 * statistics.fmean(run.result[1] for run in self.runs)

    @property
    def minutes(self):
        return statistics.fmean(run.minutes for run in self.runs)

    @property
    def note(self):
        """In what the machines of its runs differ; "" where they don't."""
        devices, threads = (sorted({m[i] for run in self.runs for m in run.machines}, key=str) for i in (0, 1))
        return ", ".join(
            [
                *[f"runs on {' and '.join(devices)}"] * (len(devices) > 1),
                *[f"runs with {' and '.join(map(str, threads))} threads"] * (len(threads) > 1),
            ]
        )


def mapping_names(runs):
    """The mappings of ``runs``: those of the project in its order, then those of plugins by name."""
    present = {run.mapping for run in runs}
    return [*(name for name in MAPPINGS if name in present), *sorted(present - MAPPINGS.keys())]


def tabulate(runs):
    """{row: {mapping: `Cell`}} of finished runs, rows in alphabetical order, mappings in that of `mapping_names`."""
    rows = {}
    finished = sorted((run for run in runs if run.result is not None), key=lambda run: run.seed)
    for row in sorted({run.row for run in finished}, key=natural):
        members = [run for run in finished if run.row == row]
        rows[row] = {
            name: Cell(tuple(run for run in members if run.mapping == name)) for name in mapping_names(members)
        }
    return rows


def natural(row):
    """Sort numbers within text by their value: epochs 5 before epochs 20."""
    parts = (re.split("([0-9]{1,9})", str(value)) for value in row)  # every second part is a number
    return [[(int(part), "") if i % 2 else (0, part) for i, part in enumerate(split)] for split in parts]


def data_notes(rows):
    """{row: a note} for rows that differ from others in their data alone."""
    names = Counter(row.name for row in rows)
    words = "rows of this name differ in labels or images"
    return {row: f"data {row.data}: {words}" for row in rows if names[row.name] > 1}


def best_mappings(cells):
    """The mappings of a row with the best accuracy as printed, a set.

    Only mappings with equal numbers of seeds are compared: of the largest number that several have. ``linear``, which
    is trained by gradient, is a reference and takes no part.
    """
    rivals = {name: cell for name, cell in cells.items() if name != "linear"}
    sizes = Counter(len(cell.runs) for cell in rivals.values())
    size = max((size for size, count in sizes.items() if count > 1), default=None)
    means = {name: round(cell.mean, 1) for name, cell in rivals.items() if len(cell.runs) == size}
    return {name for name, mean in means.items() if mean == max(means.values())}


def published_tables():
    """The tables of published.json."""
    return read_json(Path(__file__).with_name("published.json"))["tables"]


def published(run, mappings):
    """What was published for runs like this one.

    Parameters
    ----------
    run : Run
    mappings : collection of str
        Of which figures are wanted; those of methods that are no mapping of ours are given always.

    Returns
    -------
    dict of str to (float, float or None, str)
        {mapping or method: mean and deviation in percent, source}: of the same data set, backbone and number of shots,
        and for a vision model of the same input VR.
    """
    is_clip, found = run.row.script == SCRIPTS["vlm"], {}
    for table in published_tables():
        if "method" in table:
            alike = is_clip and run.row.backbone.removesuffix("-quickgelu") == table["backbone"]
            alike = alike and "weights" not in run.distinct
        else:
            alike = not is_clip and all(table[key] == run.settings[key] for key in ("backbone", "reprogramming"))
            alike = alike and table["mapping"] in mappings
        if alike and run.distinct.get("shots") == table.get("shots") and run.row.dataset in table["accuracy"]:
            name = table.get("method") or table["mapping"]
            found[name] = *table["accuracy"][run.row.dataset], table["source"]
    return found
