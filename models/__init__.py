"""Input VR, frozen pretrained classifiers, and the network that joins them."""

from models.classifiers import BACKBONES, Classifier, build_classifier
from models.fast.network import SWITCHES, Network, build_network
from models.reprogramming import (
    REPROGRAMMING,
    InputVR,
    NoVR,
    PaddingVR,
    Reprogramming,
    WatermarkingVR,
    build_input_vr,
    check_reprogramming_name,
)

__all__ = [
    "BACKBONES",
    "REPROGRAMMING",
    "SWITCHES",
    "Classifier",
    "InputVR",
    "Network",
    "NoVR",
    "PaddingVR",
    "Reprogramming",
    "WatermarkingVR",
    "build_classifier",
    "build_input_vr",
    "build_network",
    "check_reprogramming_name",
]
