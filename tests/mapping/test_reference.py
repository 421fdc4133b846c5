"""Outputs of the published formulas, reproduced through the public surface.

Needs the folder with ``mapping.npz``: ``BLM_REFERENCE=<folder> pytest tests/mapping/test_reference.py``.
"""

import os
from pathlib import Path

import numpy as np
import pytest
import torch

from mapping import build_mapping

pytestmark = pytest.mark.skipif(not os.environ.get("BLM_REFERENCE"), reason="BLM_REFERENCE is not set")


@pytest.fixture(scope="module")
def vectors():
    return np.load(Path(os.environ["BLM_REFERENCE"]) / "mapping.npz")


def estimate(vectors, case, name, batch_size, **options):
    logits, labels = (torch.from_numpy(vectors[f"{case}_{what}"]) for what in ("logits", "labels"))
    mapping = build_mapping(name, logits.shape[1], int(labels.max()) + 1, **options)
    for batch in zip(logits.split(batch_size), labels.split(batch_size), strict=True):
        mapping.observe(*batch)
    mapping.refresh()
    return mapping


@pytest.mark.parametrize("batch_size", [64, 1000])
@pytest.mark.parametrize("case", ["a", "c"])
def test_one_to_one(vectors, case, batch_size):
    for name in ("flm", "ilm"):
        index = estimate(vectors, case, name, batch_size).source_index
        np.testing.assert_array_equal(index.numpy(), vectors[f"{case}_ilm"])


@pytest.mark.parametrize("batch_size", [64, 1000])
@pytest.mark.parametrize("laplace", [1, 10])
@pytest.mark.parametrize("case", ["a", "c"])
def test_blm(vectors, case, laplace, batch_size):
    weights = estimate(vectors, case, "blm", batch_size, laplace=laplace).weights.numpy()
    expected = vectors[f"{case}_blm_lap{laplace}"]
    np.testing.assert_array_equal(weights == 0, expected == 0)
    np.testing.assert_allclose(weights, expected, rtol=4 * np.finfo(np.float32).eps)


@pytest.mark.parametrize("batch_size", [64, 1000])
@pytest.mark.parametrize("k", [1, 3])
@pytest.mark.parametrize("case", ["a", "c"])
def test_blmp(vectors, case, k, batch_size):
    num_target = int(vectors[f"{case}_labels"].max()) + 1
    mapping = estimate(vectors, case, "blmp", batch_size, topk_ratio=(k + 0.5) / num_target)
    assert mapping.k == k
    np.testing.assert_allclose(mapping.weights.numpy(), vectors[f"{case}_blmp_lap1_k{k}"], rtol=1e-6)
