"""python -m tools.report results

Compare finished runs. Takes run folders, or folders that hold some at any depth. Three formats:

html      one page that needs no network: a leaderboard to sort and filter; of each run its curves, its pattern, and
          an explorer of the mapping in both directions (default, written to report.html)
markdown  data sets × mappings, best mapping of each row in bold (written to stdout)
latex     the same, for the booktabs package (written to stdout)

Runs that differ in their seed alone are averaged; runs that differ in anything else that bears on the result are not.
"""

import base64
import io
import json
import math
import statistics
import sys
from dataclasses import dataclass
from pathlib import Path

import torch
from PIL import Image

from data.files import read_json
from mapping import MAPPINGS
from tools.console import Parser, user_errors
from tools.training.pattern_image import pattern_picture
from tools.training.run_folder import FREE_SETTINGS, checkpoint_path, load_checkpoint

KINDS = {"vm": "train_vm", "vm_fast": "train_vm_fast", "vlm": "train_vlm"}

# What a setting usually is, by script where they differ. Whatever is not stands beside the run; one that is missing
# here always does.
_BY_KIND = {"vm": {"lr": 0.01, "weights": None}, "vlm": {"lr": 40.0, "weights": "openai"}}
_USUAL = {
    "train_fraction": 1.0, "canvas_size": None, "precision": "fp32", "templates": None, "laplace": 1.0,
    "topk_ratio": 0.15, "linear_variant": "none", "bayes": True, "topk": True, "iteration": True,
}
# Settings that only some mappings look at: elsewhere they make no difference.
_ONLY_FOR = {
    "laplace": ("blm", "blmpp"), "topk_ratio": ("blmpp",), "linear_variant": ("linear",), "bayes": ("blm", "blmpp"),
    "topk": ("blmpp",), "iteration": ("ilm", "blm", "blmpp"),
}
_NAMES = {"dataset": str, "backbone": str, "reprogramming": str, "mapping": str}
_COUNTS = {"seed": int, "epochs": int, "batch_size": int}
# the same result by other means
_WITHOUT_EFFECT = FREE_SETTINGS | {"seed", "engine", "deterministic"}

_CURVES = ("train_loss", "train_accuracy", "test_accuracy", "mapping_change")


# ---- reading ----


@dataclass(frozen=True)
class FinishedRun:
    """What a run folder says of itself, checked: it may come from anywhere."""

    folder: Path
    kind: str
    settings: dict
    metrics: list
    final_accuracy: float  # fraction of 1
    best_accuracy: float  # best on test

    @property
    def row(self):
        """What a row of a table stands for: all settings that bear on the result, but seed and mapping."""
        kept = tuple(self.settings[key] for key in ("dataset", "backbone", "reprogramming"))
        return *kept, KINDS[self.kind], self.settings["epochs"], self.settings["batch_size"], self.unusual

    @property
    def unusual(self):
        """Other settings that are not the usual ones, as in "lr 0.1, train fraction 0.4"; "" where there are none."""
        usual = _USUAL | _BY_KIND["vlm" if self.kind == "vlm" else "vm"]
        named = {*_NAMES, *_COUNTS} | _WITHOUT_EFFECT
        parts = []
        for key in sorted(self.settings.keys() - named):
            value = self.settings[key]
            relevant = self.settings["mapping"] in _ONLY_FOR.get(key, MAPPINGS)
            if relevant and (key not in usual or value != usual[key]):
                words = key.replace("_", " ")
                parts.append(f"{words} {value}" if type(value) is not bool else words if value else f"no {words}")
        return ", ".join(parts)

    @property
    def minutes(self):
        """Of estimating, training and testing, over all epochs."""
        return sum(sum(line["seconds"].values()) for line in self.metrics) / 60


def read_run(folder):
    """Read the small files of a run folder.

    Raises
    ------
    ValueError
        Where it is none, is unfinished, or holds values that no run of this project writes.
    """
    if not (folder / "config.json").is_file():
        raise ValueError(f"{folder} is no run folder: it has no config.json")
    config = _mapping(read_json(folder / "config.json"), folder / "config.json")
    settings = _mapping(config.get("settings"), folder / "config.json")
    wrong = [k for k, kind in (_NAMES | _COUNTS).items() if type(settings.get(k)) is not kind]
    if wrong or config.get("kind") not in KINDS or settings["mapping"] not in MAPPINGS:
        raise ValueError(f"{folder / 'config.json'} lacks {', '.join(wrong or ['a known kind or mapping'])}")
    if not (folder / "result.json").is_file():
        raise ValueError(f"{folder} is not finished; its training command goes on with it")
    result = _mapping(read_json(folder / "result.json"), folder / "result.json")
    final, best = (_number(result, key, folder / "result.json") for key in ("final_accuracy", "best_accuracy"))
    metrics = _read_metrics(folder / "metrics.jsonl")
    return FinishedRun(folder, config["kind"], settings, metrics, final, best)


def _read_metrics(path):
    try:
        lines = [_mapping(json.loads(text), path) for text in path.read_text(encoding="utf-8").splitlines()]
    except (OSError, UnicodeDecodeError, json.JSONDecodeError, RecursionError) as error:
        raise ValueError(f"{path} cannot be read ({error})") from error
    if not lines:
        raise ValueError(f"{path} has no epoch")
    for epoch, line in enumerate(lines):
        for key in _CURVES[:3]:
            _number(line, key, path)
        if line.get("mapping_change") is not None:
            _number(line, "mapping_change", path)
        seconds = _mapping(line.get("seconds"), path)
        for step in seconds:
            _number(seconds, step, path)
        if line.get("epoch") != epoch:
            raise ValueError(f"{path}: line {epoch + 1} is of epoch {line.get('epoch')!r}")
    return lines


def _mapping(value, path):
    if not isinstance(value, dict):
        raise ValueError(f"{path}: expected an object of names and values, got {type(value).__name__}")
    return value


def _number(values, key, path):
    value = values.get(key)
    if type(value) not in (int, float) or not math.isfinite(value):
        raise ValueError(f"{path}: {key} is {value!r}, expected a number")
    return value


def find_runs(paths):
    """Finished runs in and below ``paths``, each once.

    A folder that is named and holds no finished run is an error; one come upon below is left out with a warning, as
    is a run that repeats another's settings and seed.
    """
    runs = {}
    for path in map(Path, paths):
        if not path.is_dir():
            raise FileNotFoundError(f"{path} is no folder; name a run folder or one that holds some")
        if (path / "config.json").is_file():
            found = [read_run(path)]
        else:
            found = []
            for config in sorted(path.rglob("config.json")):
                try:
                    found.append(read_run(config.parent))
                except ValueError as error:
                    _warn(f"left out: {error}")
            if not found:
                raise ValueError(f"{path} holds no finished run; train one, or name another folder")
        for run in found:
            first = runs.setdefault((run.row, run.settings["mapping"], run.settings["seed"]), run)
            if first.folder.resolve() != run.folder.resolve():
                _warn(f"left out: {run.folder} repeats the settings and the seed of {first.folder}")
    return list(runs.values())


def _warn(message):
    print(f"warning: {' '.join(message.split())}", file=sys.stderr)


# ---- averaging ----


@dataclass(frozen=True)
class Cell:
    """Runs that differ in their seed alone; accuracies in percent."""

    runs: tuple

    @property
    def mean(self):
        return 100 * statistics.fmean(run.final_accuracy for run in self.runs)

    @property
    def std(self):
        """Sample standard deviation; None for a single run."""
        return 100 * statistics.stdev([run.final_accuracy for run in self.runs]) if len(self.runs) > 1 else None

    @property
    def best_on_test(self):
        return 100 * statistics.fmean(run.best_accuracy for run in self.runs)

    @property
    def minutes(self):
        return statistics.fmean(run.minutes for run in self.runs)


def tabulate(runs):
    """{row: {mapping: `Cell`}}, rows in alphabetical order, mappings in that of `MAPPINGS`."""
    rows = {}
    for row in sorted({run.row for run in runs}):
        members = {m: [r for r in runs if (r.row, r.settings["mapping"]) == (row, m)] for m in MAPPINGS}
        rows[row] = {
            mapping: Cell(tuple(sorted(cell, key=lambda run: run.settings["seed"])))
            for mapping, cell in members.items() if cell
        }
    return rows


def published(dataset, backbone, reprogramming, mapping):
    """(mean, std or None, source) of the published figure in percent, or None."""
    for table in _published_tables():
        if (table["backbone"], table["reprogramming"], table["mapping"]) == (backbone, reprogramming, mapping):
            if dataset in table["accuracy"]:
                return *table["accuracy"][dataset], table["source"]
    return None


def _published_tables():
    return read_json(Path(__file__).with_name("published.json"))["tables"]


def _figure(mean, std):
    return f"{mean:.1f}" if std is None else f"{mean:.1f} ± {std:.1f}"


def _range(values):
    low, high = min(values), max(values)
    return f"{low}" if low == high else f"{low}–{high}"


# ---- Markdown and LaTeX ----


def _table(rows):
    """Head and body of the table: cells are (text, whether in bold)."""
    mappings = [m for m in MAPPINGS if any(m in cells for cells in rows.values())]
    unusual = any(row[-1] for row in rows)
    head = ["data set", "backbone", "input VR", "script", *["settings"] * unusual, *mappings,
            "seeds", "epochs", "batch", "minutes a run"]
    body = []
    for row, cells in rows.items():
        dataset, backbone, reprogramming, script, epochs, batch, settings = row
        figures = [_figure(cells[m].mean, cells[m].std) if m in cells else "–" for m in mappings]
        body.append(_with_best(
            [dataset, backbone, reprogramming, script, *[settings] * unusual], mappings, figures,
            [_range([len(c.runs) for c in cells.values()]), str(epochs), str(batch),
             _range([_minutes(c.minutes) for c in cells.values()])],
        ))
        known = {m: published(dataset, backbone, reprogramming, m) for m in mappings}
        if script != KINDS["vlm"] and any(known.values()):
            figures = [_figure(*known[m][:2]) if known[m] else "–" for m in mappings]
            body.append(_with_best(
                [dataset, backbone, reprogramming, "published", *[""] * unusual], [], figures, ["–"] * 4
            ))
    return head, body


def _minutes(minutes):
    return round(minutes) if minutes >= 10 else float(f"{minutes:.2g}")


def _with_best(before, mappings, figures, after):
    """A row; in bold the best of its mappings but the gradient-trained reference, where there are several."""
    means = {i: float(figures[i].split()[0]) for i, m in enumerate(mappings) if m != "linear" and figures[i] != "–"}
    best = max(means.values()) if len(means) > 1 else None
    bold = [means.get(i) == best is not None for i in range(len(figures))]
    return [*((text, False) for text in before), *zip(figures, bold, strict=True), *((text, False) for text in after)]


_CAPTION = (
    "Test accuracy after the last epoch in %, mean ± sample standard deviation over seeds; in bold the best mapping of "
    "a row (linear, trained by gradient, is a reference)."
)


def as_markdown(rows):
    """The table in GitHub's Markdown."""
    head, body = _table(rows)
    texts = [head, *([f"**{_md(text)}**" if bold else _md(text) for text, bold in line] for line in body)]
    widths = [max(map(len, column)) for column in zip(*texts, strict=True)]
    numbers = head.index("script") + 1 + ("settings" in head)
    texts.insert(1, ["-" * w if i < numbers else "-" * (w - 1) + ":" for i, w in enumerate(widths)])
    lines = [
        "| " + " | ".join(
            cell.ljust(width) if i < numbers else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(line, widths, strict=True))
        ) + " |"
        for line in texts
    ]
    return "\n".join(lines) + f"\n\n{_CAPTION}\n"


def _md(text):
    text = " ".join(text.split()).replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    escaped = "".join("\\" + c if c in "\\|*`[]" else c for c in text)
    return escaped if "_" not in escaped.strip("_") or not escaped.startswith("_") else "\\" + escaped


_LATEX = {
    "\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}", "±": r"$\pm$", "–": "--",
    **{c: "\\" + c for c in "&%$#_{}"},
}


def as_latex(rows):
    """The table for LaTeX with the booktabs package."""
    head, body = _table(rows)
    numbers = head.index("script") + 1 + ("settings" in head)
    texts = [[rf"\textbf{{{_tex(text)}}}" if bold else _tex(text) for text, bold in line] for line in body]
    lines = [
        r"\begin{tabular}{" + "l" * numbers + "r" * (len(head) - numbers) + "}", r"\toprule",
        " & ".join(map(_tex, head)) + r" \\", r"\midrule", *(" & ".join(line) + r" \\" for line in texts),
        r"\bottomrule", r"\end{tabular}",
    ]
    return f"% {_CAPTION}\n" + "\n".join(lines) + "\n"


def _tex(text):
    return "".join(_LATEX.get(c, c) for c in " ".join(text.split()))


# ---- HTML ----


def as_html(rows):
    """The page: all that is shown is data in JSON, which its script sets as text, never as markup."""
    name_lists, groups, runs = [], [], []
    for row, cells in rows.items():
        dataset, backbone, reprogramming, script, epochs, batch, settings = row
        for mapping, cell in cells.items():
            known = None if script == KINDS["vlm"] else published(dataset, backbone, reprogramming, mapping)
            groups.append({
                "dataset": dataset, "backbone": backbone, "reprogramming": reprogramming, "mapping": mapping,
                "script": script, "settings": settings, "accuracy": cell.mean, "std": cell.std,
                "best": cell.best_on_test, "seeds": len(cell.runs), "epochs": epochs, "batch": batch,
                "minutes": cell.minutes, "published": known,
                "runs": list(range(len(runs), len(runs) + len(cell.runs))),
            })
            runs += [_details(run, name_lists) for run in cell.runs]
    data = {"groups": groups, "runs": runs, "names": name_lists, "published": _published_tables()}
    text = json.dumps(data, allow_nan=False, ensure_ascii=False, separators=(",", ":"))
    for character in "<>&\u2028\u2029":  # so that no name can end the script element
        text = text.replace(character, f"\\u{ord(character):04x}")
    page = Path(__file__).with_name("page.html").read_text(encoding="utf-8")
    return page.replace("/*DATA*/null", text)


def _details(run, name_lists):
    path = checkpoint_path(run.folder)
    if not path.is_file():
        raise FileNotFoundError(f"{path} is gone; the page needs it for pattern and mapping")
    checkpoint = load_checkpoint(path)
    program, classes, sources = (checkpoint.get(key) for key in ("program", "class_names", "source_names"))
    is_pattern = isinstance(program, torch.Tensor) and program.is_floating_point() and program.dim() == 3
    if not is_pattern or program.shape != (3, program.shape[-1], program.shape[-1]) or not _names(classes):
        raise ValueError(f"{path} holds no pattern (3, C, C) or no class names")
    picture, caption = pattern_picture(run.settings, program)
    return {
        "folder": str(run.folder), "seed": run.settings["seed"], "final": 100 * run.final_accuracy,
        "best": 100 * run.best_accuracy, "minutes": run.minutes, "caption": caption, "pattern": _data_uri(picture),
        "curves": {key: [_short(line.get(key)) for line in run.metrics] for key in _CURVES},
        "classes": _shared(classes, name_lists),
        "sources": _shared(sources, name_lists) if _names(sources) else None,
        "mapping": _heaviest(checkpoint.get("history"), classes, sources, path),
    }


def _heaviest(history, classes, sources, path):
    """[[pretrained label, weight], …] of each downstream label after the last epoch, weights above 0 only."""
    if not history:
        return None
    try:
        last = history[-1]
        labels, weights = last["labels"].tolist(), last["weights"].tolist()
        top = [
            [[s, _short(w)] for s, w in zip(of_label, of_weight, strict=True) if w > 0]
            for of_label, of_weight in zip(labels, weights, strict=True)
        ]
        limit = len(sources) if _names(sources) else math.inf
        if len(top) != len(classes) or any(not 0 <= s < limit for pairs in top for s, _ in pairs):
            raise ValueError("its labels are out of range")
    except (TypeError, KeyError, AttributeError, IndexError, ValueError) as error:
        raise ValueError(f"{path} holds no readable history of the mapping ({error})") from error
    return top


def _names(value):
    return isinstance(value, (list, tuple)) and bool(value) and all(isinstance(name, str) for name in value)


def _shared(names, name_lists):
    names = list(names)
    if names not in name_lists:
        name_lists.append(names)
    return name_lists.index(names)


def _short(value):
    return None if value is None else float(f"{value:.5g}")


def _data_uri(picture):
    buffer = io.BytesIO()
    Image.fromarray(picture.numpy()).save(buffer, "PNG", optimize=True)
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()


FORMATS = {"html": as_html, "markdown": as_markdown, "latex": as_latex}


@user_errors()
def main(argv=None):
    parser = Parser(prog="python -m tools.report", description=__doc__)
    parser.add_argument("paths", nargs="+", metavar="PATH", help="run folder, or folder that holds some at any depth")
    parser.add_argument("--format", choices=FORMATS, default="html", help="default: html")
    parser.add_argument("--out", metavar="FILE", help="file to write (default: report.html, or stdout for tables)")
    arguments = parser.parse_args(argv)
    with user_errors():
        text = FORMATS[arguments.format](tabulate(find_runs(arguments.paths)))
        out = arguments.out or ("report.html" if arguments.format == "html" else None)
        if out is None:
            print(text, end="")
        else:
            Path(out).write_text(text, encoding="utf-8")
            print(f"{out}: {len(text.encode()) / 2**20:.1f} MiB")


if __name__ == "__main__":
    main()
