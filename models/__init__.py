"""Input VR, frozen pretrained classifiers, and the network that joins them."""

from models.classifiers import BACKBONES, Classifier, build_classifier
from models.prompts import PaddingVR, WatermarkingVR

__all__ = ["BACKBONES", "Classifier", "PaddingVR", "WatermarkingVR", "build_classifier"]
