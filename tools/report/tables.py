"""Tables for papers and READMEs: data sets × mappings, or any settings × the values of one."""

import html
import re
from collections import Counter
from typing import NamedTuple

from tools.report.comparison import Cell, best_mappings, columns_of, cross, data_notes, difference, differing, tabulate
from tools.report.published import published
from tools.report.runs import words

SIGNIFICANT = 0.05
ACCURACY = "Test accuracy after the last epoch in %, mean ± sample standard deviation over seeds"
BOLD = "in bold the best mapping of a row among those with equally many seeds (linear, by gradient, is a reference)"


class Table(NamedTuple):
    """What is printed."""

    head: list  # of str
    body: list  # of a list of (text, whether in bold) for each line
    left: list  # names of the columns that hold words
    caption: list  # of paragraphs


def by_mapping(runs):
    """A line for all that bears on the result, a column per mapping; with published figures in lines of their own."""
    rows = tabulate(runs)
    mappings, of_data, lines, sources = columns_of(rows), data_notes(rows), [], {}
    for row, cells in rows.items():
        own = {"data set": row.dataset, "backbone": row.backbone, "input VR": row.reprogramming}
        notes = [of_data.get(row), *(cell.note and f"{name}: {cell.note}" for name, cell in cells.items())]
        line = own | {"script": row.script, "settings": row.settings, "epochs": str(row.epochs)} | _figures(cells)
        line["minutes per run"] = _range([cell.minutes for cell in cells.values()])
        line["note"] = "; ".join(filter(None, notes))
        lines.append((line, best_mappings(cells)))
        first = next(iter(cells.values())).runs[0]
        if known := published(first, mappings):
            shots = f"shots {first.distinct['shots']}" if "shots" in first.distinct else ""
            line = own | {"script": "published", "settings": shots, "note": ""}
            line |= {"input VR": "–"} if row.script == "train_vlm" else {}
            lines.append((line | {name: figure(*found[:2]) for name, found in known.items()}, ()))
            for name, (*_, source) in known.items():
                sources.setdefault(source, {})[name] = None
    lines = [line for number, line in enumerate(lines) if line not in lines[number + 1 :]]  # published for several rows
    methods = dict.fromkeys(name for names in sources.values() for name in names if name not in mappings)
    left = ["data set", "backbone", "input VR", "script", "settings"]
    caption = [
        f"{ACCURACY}; {BOLD}.",
        *(f"Published {', '.join(names)}: {source}." for source, names in sources.items()),
    ]
    return _table(left, [*mappings, *methods, "seeds", "epochs", "minutes per run"], ["note"], lines, caption)


def by_setting(runs, column, rows=None, baseline=None):
    """A column per value of a setting; with a baseline, which is one of them, what the others have over it, and cost.

    Raises
    ------
    ValueError
        As `cross`, or for a baseline that is none of the values.
    """
    rows, table = cross(runs, column, rows)
    values = columns_of(table)
    if baseline not in (None, *values):
        raise ValueError(f"--baseline {baseline} is no value of {column}; these are {'; '.join(values)}")
    added = {value: f"{value}, over {baseline}" for value in values if baseline not in (None, value)}
    finished = [run for cells in table.values() for cell in cells.values() for run in cell.runs]
    shown = {*rows, column, "data", *(["reprogramming"] if "pattern" in (*rows, column) else [])}
    others = [name for name in sorted(differing(finished)) if name not in shown]
    lines = []
    for row, cells in table.items():
        line = dict(zip(map(words, rows), row, strict=True)) | _figures(cells)
        if baseline in cells:
            line |= {name: _gain(cells[value], cells[baseline]) for value, name in added.items() if value in cells}
        line["seconds per run"] = " / ".join(_short(60 * cells[v].minutes) if v in cells else "–" for v in values)
        line["settings"] = ", ".join(filter(None, (_setting(name, cells) for name in others)))
        line["note"] = Cell([run for cell in cells.values() for run in cell.runs]).note
        lines.append((line, best_mappings(cells) if column == "mapping" else ()))
    caption = [f"{ACCURACY}; {BOLD}." if column == "mapping" else f"{ACCURACY}."]
    if alike := [name for name in finished[0].values if name not in {*shown, *others, "pattern"}]:
        caption.append(f"All runs: {', '.join(f'{words(name)} {finished[0].value(name)}' for name in alike)}.")
    if added:
        caption.append(
            "Seconds in the order of the columns. "
            f"Over {baseline}: difference of the means, p of Welch's t-test over seeds, uncorrected; "
            f"from {SIGNIFICANT} on no difference is shown. p –: a single seed, or the same accuracy with every seed."
        )
    seconds = ["seconds per run"] * bool(added)  # what the gain costs
    return _table(
        [*map(words, rows)], [*values, *added.values(), "seeds", *seconds], ["settings", "note"], lines, caption
    )


def _table(first, numbers, last, lines, caption):
    """The `Table` of lines, {name of a column: text} and the names in bold; words stand first and last."""
    head = [*first, *numbers, *last]
    unused = {name for name in ("settings", "note") if not any(line[name] for line, _ in lines if name in line)}
    head = [name for name in head if name not in unused]
    body = [[(line.get(name, "–"), name in bold) for name in head] for line, bold in lines]
    return Table(head, body, [*first, *last], caption)


def _figures(cells):
    figures = {name: figure(cell.mean, cell.std) for name, cell in cells.items()}
    return figures | {"seeds": _range([len(cell.runs) for cell in cells.values()])}


def _setting(name, cells):
    """A setting of a row, as in "canvas size 128 (none: default)": that of most columns, then others; "" by default."""
    found = {column: cell.runs[0].value(name) for column, cell in cells.items()}
    ((usual, count),) = Counter(found.values()).most_common(1)
    if (usual, count) == ("default", len(found)):
        return ""
    others = "; ".join(f"{column}: {value}" for column, value in found.items() if value != usual)
    return f"{words(name)} {usual}" + f" ({others})" * bool(others)


def _gain(cell, baseline):
    """The difference and its p-value as they are printed, and what they show over seeds where that is no gain."""
    points, p = difference(cell, baseline)
    over = f"{points:+.1f}".replace("-", "−") if points else "0.0"
    text = f"{over} (p {'–' if p is None else '< 0.001' if p < 0.001 else f'= {p:.2g}'})"
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
    cells = [f"{{:{'<' if name in left else '>'}{width}}}" for name, width in zip(head, widths, strict=True)]
    form = f"| {' | '.join(cells)} |"
    return "\n\n".join(["\n".join(form.format(*line) for line in texts), *map(_md, caption)]) + "\n"


def as_latex(table):
    """The table for LaTeX with the booktabs package."""
    head, body, left, caption = table
    texts = [[rf"\textbf{{{_tex(text)}}}" if bold else _tex(text) for text, bold in line] for line in body]
    columns = "".join("l" if name in left else "r" for name in head)
    lines = [*(f"% {paragraph}" for paragraph in caption), rf"\begin{{tabular}}{{{columns}}}", r"\toprule"]
    lines += [" & ".join(map(_tex, head)) + r" \\", r"\midrule", *(" & ".join(line) + r" \\" for line in texts)]
    return "\n".join([*lines, r"\bottomrule", r"\end{tabular}", ""])


def figure(mean, std):
    """An accuracy as it is printed."""
    return f"{mean:.1f}" if std is None else f"{mean:.1f} ± {std:.1f}"


def _range(values):
    low, high = _short(min(values)), _short(max(values))
    return low if low == high else f"{low}–{high}"


def _short(value):
    return f"{value:.0f}" if value >= 10 else f"{value:.2g}"


def _md(text):
    return re.sub(r"[\\|*`[\]]|(?<!\w)_", r"\\\g<0>", html.escape(text, quote=False))


_LATEX = {c: f"${c}$" for c in "<>|"} | {c: "\\" + c for c in "&%$#_{}"}  # <>| are other characters in TeX's own fonts
_LATEX |= {"\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}"}
_LATEX |= {"±": r"$\pm$", "–": "--", "−": "$-$", "×": r"$\times$"}


def _tex(text):
    return text.translate(str.maketrans(_LATEX))
