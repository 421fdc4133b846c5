"""Gradient-free output label mappings: from S pretrained logits to T downstream logits.

``statistics`` streams (logits, labels) into one (S, T) table, ``estimators`` are pure functions from such
a table to a mapping, ``label_mapping`` is the module that joins them.
"""

from .estimators import bayesian, frequencies, one_to_one
from .label_mapping import MAPPINGS, LabelMapping, MatrixMapping, build_mapping, check_mapping_name
from .statistics import Statistics

__all__ = [
    "MAPPINGS",
    "LabelMapping",
    "MatrixMapping",
    "Statistics",
    "bayesian",
    "build_mapping",
    "check_mapping_name",
    "frequencies",
    "one_to_one",
]
