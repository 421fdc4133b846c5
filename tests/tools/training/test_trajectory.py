"""Four epochs of padding VR beside the stored outputs of the published formulas: losses, mappings, final pattern."""

import os
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional

from mapping import build_mapping
from models import Classifier, PaddingVR, build_network

REFERENCE = os.environ.get("BLM_REFERENCE")
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


@pytest.mark.skipif(not REFERENCE, reason="BLM_REFERENCE names no folder with trajectory.npz")
@pytest.mark.parametrize("name", ["ilm", "blm"])
@pytest.mark.parametrize("engine", ["plain", "fast"])
def test_trajectory(name, engine):
    stored = np.load(Path(REFERENCE) / "trajectory.npz")
    net = nn.Sequential(
        nn.Conv2d(3, 16, 5, 4),
        nn.Tanh(),
        nn.Conv2d(16, 32, 3, 2),
        nn.Tanh(),
        nn.AdaptiveAvgPool2d(2),
        nn.Flatten(),
        nn.Linear(128, 20),
    )
    net.load_state_dict({key: torch.from_numpy(stored[f"net.{key}"]) for key in net.state_dict()})
    vr, mapping = PaddingVR(64, 16, MEAN, STD), build_mapping(name, 20, 6, laplace=1.0)
    classifier = Classifier(net, "reference", MEAN, STD, 64, 20)
    network = build_network(classifier, vr) if engine == "fast" else nn.Sequential(vr, classifier)
    optimizer = torch.optim.Adam([vr.program], lr=0.01)
    images, labels = torch.from_numpy(stored["images"]), torch.from_numpy(stored["labels"])

    losses = []
    for epoch in range(4):
        with torch.no_grad():
            for x, y in zip(images.split(20), labels.split(20), strict=True):
                mapping.observe(network(x), y)
        mapping.refresh()
        expected = torch.from_numpy(stored[f"{name}_mats"][epoch])
        if name == "ilm":
            assert torch.equal(mapping.source_index, expected)
        else:
            torch.testing.assert_close(mapping.weights, expected, rtol=1e-6, atol=1e-7)
        for x, y in zip(images.split(20), labels.split(20), strict=True):
            optimizer.zero_grad()
            loss = functional.cross_entropy(mapping(network(x)), y)
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
    np.testing.assert_allclose(losses, stored[f"{name}_losses"], rtol=1e-4)
    np.testing.assert_allclose(vr.program.detach().numpy(), stored[f"{name}_program"], atol=1e-4)
