"""Runs compared in one setting: a column per value, and what each value adds to a baseline."""

from scipy import stats

from data.files import printable
from mapping import MAPPINGS
from models import REPROGRAMMING
from tools.report.runs import Cell, natural

OF_A_RUN = ("dataset", "backbone", "reprogramming", "script", "epochs", "data")
SIGNIFICANT = 0.05


def value_of(run, name):
    """What a run has of a setting, as text; ``pattern`` is the input VR and whether it was trained."""
    if name == "mapping":
        return run.mapping
    if name in OF_A_RUN:
        return str(getattr(run.row, name))
    if name == "pattern":
        vr = run.row.reprogramming
        if vr in REPROGRAMMING and not REPROGRAMMING[vr].trained:
            return vr
        return f"{vr}, trained" if run.row.epochs else f"{vr}, as it starts"
    return printable(str(run.distinct.get(name, "default")))


def cross(runs, rows, column):
    """Finished runs by settings.

    Parameters
    ----------
    runs : list of Run
    rows : list of str
        Settings that tell a row from the others, or ``pattern``.
    column : str
        The one that tells a column from the others.

    Returns
    -------
    values : list of str
        Of the columns.
    table : dict of tuple of str to (dict of str to Cell)
        {values of the row: {value of the column: its runs}}, all in order.

    Raises
    ------
    ValueError
        A name that is no setting of these runs, or a cell whose runs differ in more than their seed.
    """
    finished = sorted((run for run in runs if run.result is not None), key=lambda run: run.seed)
    known = dict.fromkeys(["mapping", "pattern", *OF_A_RUN, *sorted(name for run in finished for name in run.distinct)])
    for name in (*rows, column):
        if name not in known:
            raise ValueError(f"{name!r} is no setting of these runs; they have {', '.join(known)}")
    table = {}
    for run in finished:
        cells = table.setdefault(tuple(value_of(run, name) for name in rows), {})
        cells.setdefault(value_of(run, column), []).append(run)
    for row, cells in table.items():
        for value, members in cells.items():
            _check_alike(members, known, [*row, value])
    order = sorted(table, key=lambda row: [_place(name, value) for name, value in zip(rows, row, strict=True)])
    values = sorted({value for cells in table.values() for value in cells}, key=lambda value: _place(column, value))
    return values, {
        row: {value: Cell(tuple(table[row][value])) for value in values if value in table[row]} for row in order
    }


def _check_alike(runs, known, names):
    differing = [name for name in known if name != "pattern" and len({value_of(run, name) for run in runs}) > 1]
    if differing:
        raise ValueError(f"the runs of {', '.join(names)} differ in {', '.join(differing)}; name it in --rows")


def besides(columns, cells, apart_from):
    """In what else the columns of a row differ, as in "canvas size default / 128 / 128"; "" where in nothing.

    Parameters
    ----------
    columns : list of str
    cells : dict of str to Cell
        Of some of the columns.
    apart_from : set of str
        Settings that the rows and columns show.
    """
    firsts = [cell.runs[0] for cell in cells.values()]
    shown = apart_from | {"data"} | ({"reprogramming"} if "pattern" in apart_from else set())
    names = sorted({name for run in firsts for name in (*run.distinct, "mapping", *OF_A_RUN)} - shown)
    differing = [name for name in names if len({value_of(run, name) for run in firsts}) > 1]
    return "; ".join(
        f"{words(name)} {in_order(value_of(cells[v].runs[0], name) if v in cells else '–' for v in columns)}"
        for name in differing
    )


def in_order(texts):
    """What the columns have of something, in one cell."""
    return " / ".join(texts)


def words(name):
    """A setting as a table names it."""
    return {"dataset": "data set", "reprogramming": "input VR"}.get(name, printable(name.replace("_", " ")))


def _place(name, value):
    if name == "mapping":
        names = list(MAPPINGS)
        return (names.index(value) if value in names else len(names), value)
    return (value != "default", natural([value]))


def difference(cell, baseline):
    """What a cell's mean accuracy has over the baseline's, in percent, and the p-value of Welch's t-test over seeds.

    Returns
    -------
    (float, float or None)
        None for p where one has a single seed, or where neither varies from seed to seed.
    """
    pair, p = (cell, baseline), None
    if None not in (cell.std, baseline.std) and (cell.std or baseline.std):
        statistics = [value for each in pair for value in (each.mean, each.std, len(each.runs))]
        p = float(stats.ttest_ind_from_stats(*statistics, equal_var=False).pvalue)
    return cell.mean - baseline.mean, p
