"""python -m tools.report results

Compare runs. Takes run folders, records of runs, and folders that hold some at any depth. Four formats:

html      one page that needs no network: how far unfinished runs are; a leaderboard to sort and filter; several runs in
          one chart; of each run its curves, its pattern, and an explorer of the mapping in both directions (default,
          written to report.html; run it again to watch a sweep)
markdown  data sets × mappings, best mapping of each row in bold (written to stdout)
latex     the same, for the booktabs package (written to stdout)
record    a line of JSON per finished run with its settings, versions, commit, CPU, metrics and result, and without
          paths and names of the machine: kept as FOLDER/runs.jsonl it is read like run folders (written to stdout)

Runs that differ in their seed alone are averaged; runs that differ in anything else that bears on the result are not.

--columns makes another table: any settings × the values of one. What a pattern adds for each mapping:

    python -m tools.report results --format markdown --columns pattern --baseline none
"""

import sys
from pathlib import Path

from tools.console import Parser, user_errors
from tools.report.comparison import USUAL_ROWS, tabulate
from tools.report.page import as_html
from tools.report.runs import as_record, find_runs
from tools.report.tables import as_latex, as_markdown, by_mapping, by_setting

TABLES = {"markdown": as_markdown, "latex": as_latex}


@user_errors()
def main(argv=None):
    parser = Parser(prog="python -m tools.report", description=__doc__)
    parser.add_argument(
        "paths", nargs="+", metavar="PATH", help="run folder, record, or folder that holds some at any depth"
    )
    parser.add_argument("--format", choices=("html", *TABLES, "record"), default="html", help="default: html")
    parser.add_argument("--out", metavar="FILE", help="file to write (default: report.html, or stdout for the others)")
    parser.add_argument(
        "--columns",
        metavar="SETTING",
        help="a column per value of this setting, as in shots; or of pattern: the input VR, and whether it was trained",
    )
    parser.add_argument(
        "--rows",
        metavar="SETTING,…",
        help=f"with --columns: the settings that tell rows apart (default: {','.join(USUAL_ROWS)}, and what else must "
        "be told apart for the runs of a cell to differ in their seed alone)",
    )
    parser.add_argument(
        "--baseline",
        metavar="VALUE",
        help="with --columns: what the other columns have over this one, with p-values, and what each takes",
    )
    arguments = parser.parse_args(argv)
    _refuse_what_has_no_effect(arguments)
    runs = find_runs(arguments.paths)
    rows = tabulate(runs)
    unfinished = [run for run in runs if run.result is None]
    out = arguments.out or ("report.html" if arguments.format == "html" else None)
    if arguments.format == "html":
        text = as_html(rows, unfinished)
    elif not rows:
        raise ValueError(f"{arguments.paths[0]} holds no finished run; --format html shows how far they are")
    elif arguments.format == "record":
        text = as_record(runs)
    else:
        table = by_mapping(rows)
        if arguments.columns is not None:
            names = None if arguments.rows is None else arguments.rows.split(",")
            table = by_setting(runs, arguments.columns, names, arguments.baseline)
        text = TABLES[arguments.format](table)
    if unfinished:
        print(f"{len(unfinished)} unfinished, {len(runs) - len(unfinished)} finished runs", file=sys.stderr)
    if out is None:
        print(text, end="")
    else:
        Path(out).write_text(text, encoding="utf-8")
        print(f"{out}: {len(text.encode()) / 2**20:.1f} MiB")


def _refuse_what_has_no_effect(arguments):
    if arguments.columns is not None and arguments.format not in TABLES:
        raise ValueError(f"--columns makes a table, and {arguments.format} is none; add --format {' or '.join(TABLES)}")
    for flag in ("rows", "baseline"):
        if getattr(arguments, flag) is not None and arguments.columns is None:
            raise ValueError(f"--{flag} belongs to --columns; add --columns SETTING, or leave it out")


if __name__ == "__main__":
    main()
