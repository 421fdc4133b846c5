"""Output label mappings: from S pretrained logits to T downstream logits.

``statistics`` streams (logits, labels) into one (S, T) table, ``estimators`` are pure functions from such
a table to a mapping, ``label_mapping`` is the module that joins them, ``registry`` has each by its name, with the
``settings`` that it takes.
"""

from .estimators import bayesian, frequencies, one_to_one
from .label_mapping import LabelMapping, MatrixMapping
from .registry import MAPPINGS, Method, build_mapping, check_mapping_name, mapping_settings
from .settings import Setting
from .statistics import Statistics

__all__ = [
    "MAPPINGS",
    "LabelMapping",
    "MatrixMapping",
    "Method",
    "Setting",
    "Statistics",
    "bayesian",
    "build_mapping",
    "check_mapping_name",
    "frequencies",
    "mapping_settings",
    "one_to_one",
]
