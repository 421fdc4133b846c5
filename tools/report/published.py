"""What papers report for runs like ours, from published.json."""

from pathlib import Path

from data.files import read_json
from tools.report.runs import SCRIPTS


def published_tables():
    """The tables of published.json."""
    return read_json(Path(__file__).with_name("published.json"))["tables"]


def published(run, mappings):
    """What was published for runs like this one.

    Parameters
    ----------
    run : Run
    mappings : collection of str
        Of which figures are wanted; those of methods that are no mapping of ours are given always.

    Returns
    -------
    dict of str to (float, float or None, str)
        {mapping or method: mean and deviation in percent, source}: of the same data set, backbone and number of shots,
        and for a vision model of the same input VR.
    """
    row, found = run.row, {}
    is_clip = row.script == SCRIPTS["vlm"]
    for table in published_tables():
        alike = (
            ("method" in table) == is_clip
            and table["backbone"] == row.backbone.removesuffix("-quickgelu" * is_clip)
            and table.get("reprogramming") in (None, row.reprogramming)
            and table.get("mapping") in (None, *mappings)
            and table.get("shots") == run.distinct.get("shots")
            and not (is_clip and "weights" in run.distinct)
        )
        if alike and row.dataset in table["accuracy"]:
            name = table.get("method") or table["mapping"]
            found[name] = *table["accuracy"][row.dataset], table["source"]
    return found
