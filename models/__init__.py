"""Input VR, frozen pretrained classifiers, and the network that joins them."""

from models.classifiers import BACKBONES, Classifier, build_classifier
from models.fast.network import SWITCHES, Network, build_network
from models.reprogramming import PaddingVR, WatermarkingVR

__all__ = [
    "BACKBONES",
    "SWITCHES",
    "Classifier",
    "Network",
    "PaddingVR",
    "WatermarkingVR",
    "build_classifier",
    "build_network",
]
