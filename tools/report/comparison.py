"""Which runs belong together, what their accuracy is over seeds, and how that compares with others'."""

import re
import statistics
from collections import Counter
from dataclasses import dataclass

from scipy import stats

from mapping import MAPPINGS

USUAL_ROWS = ("dataset", "backbone", "mapping")


@dataclass(frozen=True)
class Cell:
    """Finished runs that differ in their seed alone; accuracies in percent."""

    runs: list

    @property
    def mean(self):
        return 100 * statistics.fmean(run.result[0] for run in self.runs)

    @property
    def std(self):
        """Sample standard deviation; None for a single run."""
        return 100 * statistics.stdev([run.result[0] for run in self.runs]) if len(self.runs) > 1 else None

    @property
    def best(self):
        """Test accuracy of the best epoch."""
        return 100 * statistics.fmean(run.result[1] for run in self.runs)

    @property
    def minutes(self):
        return statistics.fmean(run.minutes for run in self.runs)

    @property
    def note(self):
        """In what the machines of its runs differ; "" where they don't."""
        devices, threads = (sorted({m[i] for run in self.runs for m in run.machines}, key=place) for i in (0, 1))
        notes = [f"runs on {' and '.join(devices)}"] * (len(devices) > 1)
        notes += [f"runs with {' and '.join(threads)} threads"] * (len(threads) > 1)
        return ", ".join(notes)


def tabulate(runs, rows=None, column="mapping"):
    """{row: {value of ``column``: `Cell`}} of finished runs, sorted; a row is a `Row`, or values of ``rows``."""
    cells = {}
    for run in sorted((run for run in runs if run.result is not None), key=lambda run: run.seed):
        row = run.row if rows is None else tuple(map(run.value, rows))
        cells.setdefault(row, {}).setdefault(run.value(column), []).append(run)
    return {
        row: {value: Cell(cells[row][value]) for value in sorted(cells[row], key=place)}
        for row in sorted(cells, key=lambda row: [place(value) for value in row])
    }


def place(value):
    """A key to sort by: mappings of the project in its order, then ``default``, numbers within text by their value."""
    names, parts = list(MAPPINGS), re.split("([0-9]{1,9})", str(value))  # every second part is a number
    number = [(int(part), "") if i % 2 else (0, part) for i, part in enumerate(parts)]
    return names.index(value) if value in names else len(names), value != "default", number


def columns_of(table):
    """What the cells of the rows are of, sorted: the mappings of `tabulate`."""
    return sorted({value for cells in table.values() for value in cells}, key=place)


def cross(runs, column, rows=None):
    """Finished runs by settings, each named as in `Run.values`.

    Parameters
    ----------
    runs : list of Run
    column : str
        The setting that tells a column from the others.
    rows : list of str, optional
        Those that tell a row from the others; by default data set, backbone, mapping, and what else it takes to have
        the runs of a cell differ in their seed alone.

    Returns
    -------
    rows : list of str
    table : dict of tuple of str to (dict of str to Cell)
        As of `tabulate`: {values of the row: {value of the column: its runs}}.

    Raises
    ------
    ValueError
        A name that is no setting of these runs, or a cell whose runs differ in more than their seed.
    """
    known = dict.fromkeys(name for run in runs for name in run.values)
    names = [name for name in USUAL_ROWS if name != column] if rows is None else rows
    for name in (*names, column):
        if name not in known:
            raise ValueError(f"{name!r} is no setting of these runs; they have {', '.join(known)}")
    while True:
        table = tabulate(runs, names, column)
        cells = [(row, value, cell.runs) for row, cells in table.items() for value, cell in cells.items()]
        mixed = [(row, value, more) for row, value, members in cells if (more := differing(members))]
        if not mixed:
            return names, table
        row, value, more = mixed[0]
        if rows is not None:
            raise ValueError(f"the runs of {', '.join([*row, value])} differ in {', '.join(more)}; name it in --rows")
        names = [*names, *([name for name in more if name != "data"] or more)]  # which mostly differs by the others


def differing(runs):
    """The settings that some of ``runs`` differ in."""
    names = dict.fromkeys(name for run in runs for name in run.values if name != "pattern")
    return [name for name in names if len({run.value(name) for run in runs}) > 1]


def difference(cell, baseline):
    """What a cell's mean accuracy has over the baseline's, in percent, and the p-value of Welch's t-test over seeds.

    Returns
    -------
    (float, float or None)
        None for p where one has a single seed, or where neither varies from seed to seed.
    """
    pair, p = (cell, baseline), None
    if None not in (cell.std, baseline.std) and (cell.std or baseline.std):
        moments = [value for each in pair for value in (each.mean, each.std, len(each.runs))]
        p = float(stats.ttest_ind_from_stats(*moments, equal_var=False).pvalue)
    return cell.mean - baseline.mean, p


def data_notes(rows):
    """{row: a note} for rows of `tabulate` that differ from others in their data alone."""
    names = Counter(row[:-1] for row in rows)
    words = "rows of this name differ in labels or images"
    return {row: f"data {row.data}: {words}" for row in rows if names[row[:-1]] > 1}


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
