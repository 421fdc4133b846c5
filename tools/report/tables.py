"""Tables of data sets × mappings for papers and READMEs."""

from tools.report.runs import best_mappings, data_notes, mapping_names, published

CAPTION = (
    "Test accuracy after the last epoch in %, mean ± sample standard deviation over seeds; in bold the best mapping of "
    "a row among those with equally many seeds (linear, trained by gradient, is a reference)."
)


def as_markdown(rows):
    """The table in GitHub's Markdown."""
    head, body, left = _table(rows)
    texts = [head, *([f"**{_md(text)}**" if bold else _md(text) for text, bold in line] for line in body)]
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
    return "\n".join(lines) + f"\n\n{CAPTION}\n"


def as_latex(rows):
    """The table for LaTeX with the booktabs package."""
    head, body, left = _table(rows)
    texts = [[rf"\textbf{{{_tex(text)}}}" if bold else _tex(text) for text, bold in line] for line in body]
    lines = [
        r"\begin{tabular}{" + "".join("l" if name in left else "r" for name in head) + "}",
        r"\toprule",
        " & ".join(map(_tex, head)) + r" \\",
        r"\midrule",
        *(" & ".join(line) + r" \\" for line in texts),
        r"\bottomrule",
        r"\end{tabular}",
    ]
    return f"% {CAPTION}\n" + "\n".join(lines) + "\n"


def _table(rows):
    """Head, body of (text, whether in bold), and the names of the columns that hold words."""
    mappings = mapping_names([run for cells in rows.values() for cell in cells.values() for run in cell.runs])
    noted, of_data = {}, data_notes(rows)
    for row, cells in rows.items():
        of_cells = [f"{name}: {cell.note}" for name, cell in cells.items() if cell.note]
        noted[row] = "; ".join(filter(None, [of_data.get(row), *of_cells]))
    settings, note = ["settings"] * any(row.settings for row in rows), ["note"] * any(noted.values())
    left = ["data set", "backbone", "input VR", "script", *settings]
    head = [*left, *mappings, "seeds", "epochs", "minutes per run", *note]
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
        known = {name: found for name in mappings if (found := published(row, name))}
        if known:
            values = {
                "data set": row.dataset,
                "backbone": row.backbone,
                "input VR": row.reprogramming,
                "script": "published",
                "settings": "",
                **{name: figure(*found[:2]) for name, found in known.items()},
                "note": "",
            }
            body.append([(values.get(name, "–"), False) for name in head])
    return head, body, [*left, *note]


def figure(mean, std):
    """An accuracy as it is printed."""
    return f"{mean:.1f}" if std is None else f"{mean:.1f} ± {std:.1f}"


def _range(values):
    low, high = min(values), max(values)
    return f"{low}" if low == high else f"{low}–{high}"


def _minutes(minutes):
    return round(minutes) if minutes >= 10 else float(f"{minutes:.2g}")


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
    "×": r"$\times$",
    **{c: "\\" + c for c in "&%$#_{}"},
}


def _tex(text):
    return "".join(_LATEX.get(c, c) for c in text)
