"""The page: all that it shows is data in JSON, which the script of page.html sets as text, never as markup."""

import base64
import io
import json
import math
import time
from pathlib import Path

from PIL import Image

from tools.console import warn
from data import image_size
from data.files import printable
from models import REPROGRAMMING, build_input_vr
from tools.report.comparison import best_mappings, data_notes, tabulate
from tools.report.published import published, published_tables
from tools.report.runs import CURVES
from tools.training.run_folder import checkpoint_path, load_checkpoint


def as_html(runs):
    """The page of all runs, as one text."""
    rows, groups, name_lists = tabulate(runs), [], []
    of_data = data_notes(rows)
    for row, cells in rows.items():
        best = best_mappings(cells)
        for mapping, cell in cells.items():
            found = {
                "accuracy": cell.mean,
                "std": cell.std,
                "best": cell.best,
                "best_on": "validation" if "validation_fraction" in cell.runs[0].distinct else "test",
                "minutes": cell.minutes,
                "published": [[name, *found] for name, found in published(cell.runs[0], [mapping]).items()],
                "wins": mapping in best,
                "note": "; ".join(filter(None, (of_data.get(row), cell.note))),
            }
            groups.append(_group(cell.runs, name_lists) | found)
    groups += [_group([run], name_lists) | {"progress": _progress(run)} for run in runs if run.result is None]
    data = {"groups": groups, "names": name_lists, "published": published_tables(), "written": 1000 * time.time()}
    text = json.dumps(data, allow_nan=False, separators=(",", ":"))
    text = text.replace("<", "\\u003c")  # so that no name can end the element
    page = Path(__file__).with_name("page.html").read_text(encoding="utf-8")
    return page.replace("DATA", text, 1)


def _group(runs, name_lists):
    """What runs that differ in their seed alone have in common, and each of them."""
    row = runs[0].row
    details = [_details(run, name_lists) for run in runs]
    return row._asdict() | {"row": "|".join(map(str, row)), "mapping": runs[0].mapping, "runs": details}


def _progress(run):
    """How far an unfinished run is: epochs done, when the last one ended (Unix ms), minutes to go at this pace."""
    done = len(run.metrics)
    if not done:
        return {"done": 0, "ended": None, "to_go": None}
    ended = 1000 * (run.folder / "metrics.jsonl").stat().st_mtime
    return {"done": done, "ended": ended, "to_go": run.minutes / done * (run.row.epochs - done)}


def _details(run, name_lists):
    """What the page shows of one run; without pattern and mapping where its checkpoint does not give them."""
    details = {"pattern": None, "caption": "", "classes": None, "sources": None, "mapping": None, "measured": None}
    if not run.folder.is_dir():
        details["caption"] = "A record holds neither pattern nor mapping."
    elif run.metrics:
        try:
            details |= _of_checkpoint(run, checkpoint_path(run.folder), name_lists)
        except (ValueError, OSError) as error:
            warn(f"no pattern and mapping of this run: {error}")
            details["caption"] = "The checkpoint could not be read."
    if (measured := run.class_accuracies) is not None:
        accuracies = [_short(value) for value in measured.values()]
        details["measured"] = {"names": _shared(measured, name_lists), "accuracies": accuracies}
    return details | {
        "folder": printable(run.folder),
        "seed": run.seed,
        "minutes": run.minutes,
        "result": run.result and [100 * value for value in run.result],
        "machines": sorted(f"{device}, {threads} thread{'s' * (threads != '1')}" for device, threads in run.machines),
        "curves": {key: [_short(line.get(key)) for line in run.metrics] for key in CURVES},
    }


def _of_checkpoint(run, path, name_lists):
    if not path.is_file():
        raise FileNotFoundError(f"{path} is gone")
    checkpoint = load_checkpoint(path)
    program, classes, sources = (checkpoint.get(key) for key in ("program", "class_names", "source_names"))
    if not program.is_floating_point() or program.shape != (3, *program.shape[-1:] * 2) or not _names(classes):
        raise ValueError(f"{path} holds no pattern (3, C, C) or no class names")
    image, caption = _pattern_image(run, program)
    return {
        "pattern": None if image is None else _data_uri(image),
        "caption": caption,
        "classes": _shared(classes, name_lists),
        "sources": _shared(sources, name_lists) if _names(sources) else None,
        "mapping": _heaviest(checkpoint.get("history"), classes, sources, path),
    }


def _pattern_image(run, program):
    """As its input VR shows it; that of a plugin, whose code a report does not run, as the program alone."""
    name, size = run.settings["reprogramming"], program.shape[-1]
    if name in REPROGRAMMING and not REPROGRAMMING[name].trained:
        return None, "no pattern"
    if name in REPROGRAMMING and program.isfinite().all():
        own = {s.name: run.settings[s.name] for s in REPROGRAMMING[name].settings if s.name in run.settings}
        try:
            side = image_size(run.settings["dataset"])
        except ValueError:  # of a plugin
            side = size // 2
        vr = build_input_vr(
            name, canvas_size=size, image_size=side, border=(size + 1) // 2, mean=(0.0,) * 3, std=(1.0,) * 3, **own
        )
        vr.load_state_dict({"program": program})
        image, caption = vr.as_image()
        return image, caption.replace("the pixels", "the normalised image")  # whose deviation is not known here
    low, high = program.nan_to_num().aminmax()
    grey = (program.nan_to_num() - low) / (high - low).clamp(min=1e-12)
    return (grey.permute(1, 2, 0) * 255).round().byte(), f"θ alone: black {low:.3g}, white {high:.3g}"


def _heaviest(history, classes, sources, path):
    """[[pretrained label, weight], …] of each downstream label after the last epoch, weights of 0 left out."""
    if not history:
        return None
    limit = len(sources) if _names(sources) else math.inf
    try:
        labels, weights = history[-1]["labels"], history[-1]["weights"]
        if labels.shape != weights.shape or len(labels) != len(classes) or not ((0 <= labels) & (labels < limit)).all():
            raise ValueError("its labels are out of range")
        if not weights.isfinite().all():
            raise ValueError("a weight is not finite")
        pairs = zip(labels.tolist(), weights.tolist(), strict=True)
        return [[[s, _short(w)] for s, w in zip(*each, strict=True) if w] for each in pairs]
    except (TypeError, KeyError, AttributeError, IndexError, ValueError) as error:
        raise ValueError(f"{path} holds no readable history of the mapping ({error})") from error


def _names(value):
    return isinstance(value, (list, tuple)) and bool(value) and all(isinstance(name, str) for name in value)


def _shared(names, name_lists):
    """The place of ``names`` in the lists of the page, which holds each once."""
    names = [printable(name) for name in names]
    if names not in name_lists:
        name_lists.append(names)
    return name_lists.index(names)


def _short(value):
    return None if value is None else float(f"{value:.5g}")


def _data_uri(image):
    buffer = io.BytesIO()
    Image.fromarray(image.numpy()).save(buffer, "WEBP", quality=80)
    return "data:image/webp;base64," + base64.b64encode(buffer.getvalue()).decode()
