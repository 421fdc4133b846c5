"""Tables for papers and READMEs: data sets × mappings, or any settings × the values of one."""

from typing import NamedTuple

from tools.report.comparison import SIGNIFICANT, besides, cross, difference, in_order, words
from tools.report.runs import Cell, best_mappings, data_notes, mapping_names, published

ACCURACY = "Test accuracy after the last epoch in %, mean ± sample standard deviation over seeds"
BOLD = "in bold the best mapping of a row among those with equally many seeds (linear, by gradient, is a reference)"


class Table(NamedTuple):
    """What is printed."""

    head: list  # of str
    body: list  # of a list of (text, whether in bold) for each line
    left: list  # names of the columns that hold words
    caption: list  # of paragraphs


def by_mapping(rows):
    """The table of `tabulate`'s rows: a column per mapping, with published figures in lines of their own."""
    mappings = mapping_names([run for cells in rows.values() for cell in cells.values() for run in cell.runs])
    known = {row: published(next(iter(cells.values())).runs[0], mappings) for row, cells in rows.items()}
    methods = list(dict.fromkeys(name for found in known.values() for name in found if name not in mappings))
    noted, of_data = {}, data_notes(rows)
    for row, cells in rows.items():
        of_cells = [f"{name}: {cell.note}" for name, cell in cells.items() if cell.note]
        noted[row] = "; ".join(filter(None, [of_data.get(row), *of_cells]))
    settings, note = ["settings"] * any(row.settings for row in rows), ["note"] * any(noted.values())
    left = ["data set", "backbone", "input VR", "script", *settings]
    head = [*left, *mappings, *methods, "seeds", "epochs", "minutes per run", *note]
    body = []
    for row, cells in rows.items():
        bold = best_mappings(cells)
        values = {
            "data set": row.dataset,
            "backbone": row.backbone,
            "input VR": row.reprogramming,
            "script": row.script,
            "settings": row.settings,
            **{name: figure(cell.mean, cell.std) for name, cell in cells.items()},
            "seeds": _range([len(cell.runs) for cell in cells.values()]),
            "epochs": str(row.epochs),
            "minutes per run": _range([_minutes(cell.minutes) for cell in cells.values()]),
            "note": noted[row],
        }
        body.append([(values.get(name, "–"), name in bold) for name in head])
        if known[row]:
            values = {
                "data set": row.dataset,
                "backbone": row.backbone,
                "input VR": row.reprogramming if row.script != "train_vlm" else "–",
                "script": "published",
                "settings": "".join(part for part in row.settings.split(", ") if part.startswith("shots ")),
                **{name: figure(*found[:2]) for name, found in known[row].items()},
                "note": "",
            }
            body.append([(values.get(name, "–"), False) for name in head])
    sources = {}
    for found in known.values():
        for name, (*_, source) in found.items():
            sources.setdefault(source, {})[name] = None
    published_in = [f"Published {', '.join(names)}: {source}." for source, names in sources.items()]
    return Table(head, body, [*left, *note], [f"{ACCURACY}; {BOLD}.", *published_in])


def by_setting(runs, rows, column, baseline=None):
    """A column per value of a setting; with a baseline, which is one of them, what the others have over it, and cost.

    Raises
    ------
    ValueError
        As `cross`, or for a baseline that is none of the values.
    """
    values, table = cross(runs, rows, column)
    if baseline not in (None, *values):
        raise ValueError(f"--baseline {baseline} is no value of {column}; these are {'; '.join(values)}")
    others = [value for value in values if value != baseline] if baseline is not None else []
    added = {value: f"{value}, over {baseline}" for value in others}
    left = [words(name) for name in rows]
    body, bold = [], []
    for row, cells in table.items():
        line = dict(zip(left, row, strict=True))
        line |= {value: figure(cell.mean, cell.std) for value, cell in cells.items()}
        for value in others:
            if value in cells and baseline in cells:
                line[added[value]] = _gain(cells[value], cells[baseline])
        line["seeds"] = _range([len(cell.runs) for cell in cells.values()])
        line["seconds per run"] = in_order(_seconds(60 * cells[v].minutes) if v in cells else "–" for v in values)
        bold.append(best_mappings(cells) if column == "mapping" else ())
        machines = Cell(tuple(run for cell in cells.values() for run in cell.runs)).note
        line["note"] = "; ".join(filter(None, [besides(values, cells, {*rows, column}), machines]))
        body.append(line)
    note = ["note"] * any(line["note"] for line in body)
    seconds = ["seconds per run"] * bool(others)  # what the gain costs
    head = [*left, *values, *added.values(), "seeds", *seconds, *note]
    caption = [f"{ACCURACY}; {BOLD}." if column == "mapping" else f"{ACCURACY}."]
    if others:
        caption.append(
            "Seconds in the order of the columns. "
            f"Over {baseline}: difference of the means, p of Welch's t-test over seeds, uncorrected; "
            f"from {SIGNIFICANT} on no difference is shown. p –: a single seed, or the same accuracy with every seed."
        )
    lines = [[(line.get(name, "–"), name in best) for name in head] for line, best in zip(body, bold, strict=True)]
    return Table(head, lines, [*left, *note], caption)


def _gain(cell, baseline):
    """The difference and its p-value as they are printed, and what they show over seeds where that is no gain."""
    points, p = difference(cell, baseline)
    sign = "+" if points > 0 else "−" if points < 0 else ""
    text = f"{sign}{abs(points):.1f} (p {'–' if p is None else '< 0.001' if p < 0.001 else f'= {p:.2g}'})"
    if None in (cell.std, baseline.std):  # single seeds show nothing
        return text
    if points == 0 or p is not None and p >= SIGNIFICANT:
        return f"{text}: no difference shown"
    return f"{text}: a loss" if points < 0 else text


def as_markdown(table):
    """The table in GitHub's Markdown."""
    head, body, left, caption = table
    texts = [[_md(text) for text in head]]
    texts += [[f"**{_md(text)}**" if bold else _md(text) for text, bold in line] for line in body]
    widths = [max(map(len, column)) for column in zip(*texts, strict=True)]
    texts.insert(1, ["-" * w if name in left else "-" * (w - 1) + ":" for name, w in zip(head, widths, strict=True)])
    lines = [
        "| "
        + " | ".join(
            cell.ljust(width) if name in left else cell.rjust(width)
            for name, cell, width in zip(head, line, widths, strict=True)
        )
        + " |"
        for line in texts
    ]
    return "\n\n".join(["\n".join(lines), *map(_md, caption)]) + "\n"


def as_latex(table):
    """The table for LaTeX with the booktabs package."""
    head, body, left, caption = table
    texts = [[rf"\textbf{{{_tex(text)}}}" if bold else _tex(text) for text, bold in line] for line in body]
    lines = [
        *(f"% {paragraph}" for paragraph in caption),
        r"\begin{tabular}{" + "".join("l" if name in left else "r" for name in head) + "}",
        r"\toprule",
        " & ".join(map(_tex, head)) + r" \\",
        r"\midrule",
        *(" & ".join(line) + r" \\" for line in texts),
        r"\bottomrule",
        r"\end{tabular}",
    ]
    return "\n".join(lines) + "\n"


def figure(mean, std):
    """An accuracy as it is printed."""
    return f"{mean:.1f}" if std is None else f"{mean:.1f} ± {std:.1f}"


def _range(values):
    low, high = min(values), max(values)
    return f"{low}" if low == high else f"{low}–{high}"


def _minutes(minutes):
    return round(minutes) if minutes >= 10 else float(f"{minutes:.2g}")


def _seconds(seconds):
    return f"{seconds:.0f}" if seconds >= 10 else f"{seconds:.2g}"


def _md(text):
    text = text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    escaped = "".join("\\" + c if c in "\\|*`[]" else c for c in text)
    return escaped if "_" not in escaped.strip("_") or not escaped.startswith("_") else "\\" + escaped


_LATEX = {
    "\\": r"\textbackslash{}",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    "±": r"$\pm$",
    "–": "--",
    "−": "$-$",
    "×": r"$\times$",
    **{c: f"${c}$" for c in "<>|"},  # other characters in TeX's own fonts
    **{c: "\\" + c for c in "&%$#_{}"},
}


def _tex(text):
    return "".join(_LATEX.get(c, c) for c in text)
