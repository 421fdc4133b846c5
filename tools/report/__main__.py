"""python -m tools.report results

Compare runs. Takes run folders, or folders that hold some at any depth. Three formats:

html      one page that needs no network: how far unfinished runs are; a leaderboard to sort and filter; several runs in
          one chart; of each run its curves, its pattern, and an explorer of the mapping in both directions (default,
          written to report.html; run it again to watch a sweep)
markdown  data sets × mappings, best mapping of each row in bold (written to stdout)
latex     the same, for the booktabs package (written to stdout)

Runs that differ in their seed alone are averaged; runs that differ in anything else that bears on the result are not.
"""

import sys
from pathlib import Path

from tools.console import Parser, user_errors
from tools.report.page import as_html
from tools.report.runs import find_runs, tabulate
from tools.report.tables import as_latex, as_markdown

TABLES = {"markdown": as_markdown, "latex": as_latex}


@user_errors()
def main(argv=None):
    parser = Parser(prog="python -m tools.report", description=__doc__)
    parser.add_argument("paths", nargs="+", metavar="PATH", help="run folder, or folder that holds some at any depth")
    parser.add_argument("--format", choices=("html", *TABLES), default="html", help="default: html")
    parser.add_argument("--out", metavar="FILE", help="file to write (default: report.html, or stdout for tables)")
    arguments = parser.parse_args(argv)
    runs = find_runs(arguments.paths)
    rows = tabulate(runs)
    unfinished = [run for run in runs if run.result is None]
    out = arguments.out or ("report.html" if arguments.format == "html" else None)
    if arguments.format == "html":
        text = as_html(rows, unfinished)
    elif rows:
        text = TABLES[arguments.format](rows)
    else:
        raise ValueError(f"{arguments.paths[0]} holds no finished run; --format html shows how far they are")
    if unfinished:
        print(f"{len(unfinished)} unfinished, {len(runs) - len(unfinished)} finished runs", file=sys.stderr)
    if out is None:
        print(text, end="")
    else:
        Path(out).write_text(text, encoding="utf-8")
        print(f"{out}: {len(text.encode()) / 2**20:.1f} MiB")


if __name__ == "__main__":
    main()
