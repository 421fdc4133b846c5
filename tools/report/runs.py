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
from mapping import MAPPINGS
from tools.training.run_folder import read_config

SCRIPTS = {kind: f"train_{kind}" for kind in ("vm", "vm_fast", "vlm")}
NAMES = ("dataset", "backbone", "reprogramming", "mapping")
CURVES = ("train_loss", "train_accuracy", "test_accuracy", "mapping_change")


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
    row : Row
    mapping : str
    seed : int
    settings : dict
        All of them.
    machines : frozenset of (str, int or None)
        Device and number of threads of each start.
    metrics : list of dict
        A line for each finished epoch.
    result : (float, float) or None
        Final accuracy and best on test, fractions of 1; None for a run that is not finished.
    class_accuracies : dict of str to float or None, or None
        What `tools.evaluate` measured, fractions of 1; None for a class without test images.
    """

    folder: Path
    row: Row
    mapping: str
    seed: int
    settings: dict
    machines: frozenset
    metrics: list
    result: tuple | None
    class_accuracies: dict | None

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
    config = _read_config(folder / "config.json")
    settings, distinct, starts = config["settings"], config["distinct"], config["starts"]
    content = json.dumps(config["content"], sort_keys=True)
    words = ", ".join(_words(key, distinct[key]) for key in sorted(distinct.keys() - {*NAMES, "seed", "epochs"}))
    row = Row(
        *(printable(settings[key]) for key in NAMES[:3]),
        SCRIPTS[config["kind"]],
        printable(words),
        settings["epochs"],
        hashlib.sha256(content.encode()).hexdigest()[:8],
    )
    machines = frozenset((printable(str(start.get("device"))), start.get("threads")) for start in starts)
    metrics = _read_metrics(folder / "metrics.jsonl")
    result = None
    if (path := folder / "result.json").is_file():
        values = _object(read_json(path), path)
        result = _fraction(values, "final_accuracy", path), _fraction(values, "best_accuracy", path)
    return Run(
        folder,
        row,
        printable(settings["mapping"]),
        settings["seed"],
        settings,
        machines,
        metrics,
        result,
        _read_class_accuracies(folder / "evaluation.json", metrics),
    )


def _read_config(path):
    if not path.is_file():
        raise ValueError(f"{path.parent} is no run folder: it has no config.json")
    config = read_config(path)
    settings = config["settings"]
    wrong = [key for key in NAMES if type(settings.get(key)) is not str]
    wrong += [key for key in ("seed", "epochs") if type(settings.get(key)) is not int or not 0 <= settings[key] < 2**63]
    wrong += ["a known kind"] * (config["kind"] not in SCRIPTS)
    wrong += ["threads"] * any(type(start.get("threads")) not in (int, type(None)) for start in config["starts"])
    if wrong:
        raise ValueError(f"{path} lacks {', '.join(wrong)}")
    return config


def _words(key, value):
    words = key.replace("_", " ")
    return f"{words} {value}" if type(value) is not bool else words if value else f"no {words}"


def _read_metrics(path):
    try:
        lines = path.read_text(encoding="utf-8").splitlines() if path.is_file() else []
        lines = [_object(json.loads(text), path) for text in lines]
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} cannot be read ({error})") from error
    for number, line in enumerate(lines):
        _fraction(line, "test_accuracy", path)
        for key in CURVES:
            if line.get(key) is not None:
                _number(line, key, path)
        seconds = _object(line.get("seconds"), path)
        for step in seconds:
            _number(seconds, step, path)
        if line.get("epoch") != number:
            raise ValueError(f"{path}: line {number + 1} is of epoch {line.get('epoch')!r:.20}")
    return lines


def _read_class_accuracies(path, metrics):
    """Of evaluation.json where there is one of the last epoch, else None."""
    if not path.is_file():
        return None
    values = _object(read_json(path), path)
    if not metrics or values.get("epoch") != metrics[-1]["epoch"]:
        return None
    classes = values.get("classes")
    if not isinstance(classes, list) or not all(type(_object(c, path).get("name")) is str for c in classes):
        raise ValueError(f"{path} lacks classes")
    return {
        printable(c["name"]): None if c.get("accuracy") is None else _fraction(c, "accuracy", path) for c in classes
    }


def _object(value, path):
    if not isinstance(value, dict):
        raise ValueError(f"{path}: expected an object of names and values, got {type(value).__name__}")
    return value


def _number(values, key, path):
    value = values.get(key)
    if type(value) not in (int, float) or not abs(value) < 1e300 or math.isnan(value):  # an int may exceed all floats
        raise ValueError(f"{path}: {key} is {value!r:.40}, expected a number")
    return value


def _fraction(values, key, path):
    value = _number(values, key, path)
    if not 0 <= value <= 1:
        raise ValueError(f"{path}: {key} is {value!r:.40}, expected a number in [0, 1]")
    return value


def find_runs(paths):
    """Runs in and below ``paths``, each once, finished or not.

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
            for config in sorted(path.rglob("config.json")):
                try:
                    found.append(read_run(config.parent))
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
    def best_on_test(self):
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
    for row in sorted({run.row for run in finished}, key=_natural):
        members = [run for run in finished if run.row == row]
        rows[row] = {
            name: Cell(tuple(run for run in members if run.mapping == name)) for name in mapping_names(members)
        }
    return rows


def _natural(row):
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


def published(row, mapping):
    """(mean, std or None, source) of the published figure in percent for a cell, or None."""
    for table in published_tables() if row.script != SCRIPTS["vlm"] else ():
        if (table["backbone"], table["reprogramming"], table["mapping"]) == (row.backbone, row.reprogramming, mapping):
            if row.dataset in table["accuracy"]:
                return *table["accuracy"][row.dataset], table["source"]
    return None
