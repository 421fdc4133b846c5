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
from tools.report.comparison import USUAL_ROWS
from tools.report.page import as_html
from tools.report.runs import as_record, find_runs
from tools.report.tables import as_latex, as_markdown, by_mapping, by_setting

TABLES = {"markdown": as_markdown, "latex": as_latex}
HELP = {
    "paths": "run folder, record, or folder that holds some at any depth",
    "out": "file to write (default: report.html, or stdout for the others)",
    "columns": "a column per value of this setting, as of shots; pattern is the input VR, and whether it was trained",
    "rows": f"with --columns: the settings that tell rows apart (default: {','.join(USUAL_ROWS)}, and what else it "
    "takes for the runs of a cell to differ in their seed alone)",
    "baseline": "with --columns: what the other columns have over this one, with p-values, and what each takes",
}


@user_errors()
def main(argv=None):
    parser = Parser(prog="python -m tools.report", description=__doc__)
    parser.add_argument("paths", nargs="+", metavar="PATH", help=HELP["paths"])
    parser.add_argument("--format", choices=("html", *TABLES, "record"), default="html", help="default: html")
    for name, value in (("out", "FILE"), ("columns", "SETTING"), ("rows", "SETTING,…"), ("baseline", "VALUE")):
        parser.add_argument(f"--{name}", metavar=value, help=HELP[name])
    arguments = parser.parse_args(argv)
    form, out = arguments.format, arguments.out
    if arguments.columns is not None and form not in TABLES:
        raise ValueError(f"--columns makes a table, and {form} is none; add --format {' or '.join(TABLES)}")
    for flag in ("rows", "baseline"):
        if getattr(arguments, flag) is not None and arguments.columns is None:
            raise ValueError(f"--{flag} belongs to --columns; add --columns SETTING, or leave it out")
    runs = find_runs(arguments.paths)
    unfinished = sum(run.result is None for run in runs)
    if form == "html":
        text, out = as_html(runs), "report.html" if out is None else out
    elif unfinished == len(runs):
        raise ValueError(f"{arguments.paths[0]} holds no finished run; --format html shows how far they are")
    elif form == "record":
        text = as_record(runs)
    elif arguments.columns is None:
        text = TABLES[form](by_mapping(runs))
    else:
        rows = None if arguments.rows is None else arguments.rows.split(",")
        text = TABLES[form](by_setting(runs, arguments.columns, rows, arguments.baseline))
    if unfinished:
        print(f"{unfinished} unfinished, {len(runs) - unfinished} finished runs", file=sys.stderr)
    if out is None:
        print(text, end="")
    else:
        Path(out).write_text(text, encoding="utf-8")
        print(f"{out}: {len(text.encode()) / 2**20:.1f} MiB")


if __name__ == "__main__":
    main()
