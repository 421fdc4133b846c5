"""From plain settings to the parts of a run: task, backbone, input VR, network, mapping, loaders.

Training starts here, and so does every tool that takes a finished run up again.
"""

from dataclasses import dataclass
from pathlib import Path

import torch

from data import BatchLoader, Task, image_size, load_task
from data.presets import padding_preset, watermarking_test_preset, watermarking_train_preset
from mapping import LabelMapping, build_mapping
from models import Classifier, PaddingVR, WatermarkingVR, build_classifier, build_network
from tools import distributed


@dataclass
class System:
    """The parts of a run, on their device."""

    task: Task
    classifier: Classifier
    input_vr: torch.nn.Module
    network: torch.nn.Module
    mapping: LabelMapping
    presets: tuple
    device: torch.device

    def loaders(self, batch_size, seed):
        """`data.BatchLoader` of the three steps: ``estimate``, ``train``, ``test``."""
        train, test = self.presets
        common = {
            "device": self.device, "seed": seed, "rank": distributed.rank(), "world_size": distributed.world_size()
        }
        return {
            "estimate": BatchLoader(
                self.task.train, train, batch_size, shuffle=False, purpose="estimate", **common
            ),
            "train": BatchLoader(self.task.train, train, batch_size, shuffle=True, purpose="train", **common),
            "test": BatchLoader(self.task.test, test, batch_size, shuffle=False, purpose="test", **common),
        }


def assemble(settings, device):
    """Build the parts of a run of a vision model.

    Parameters
    ----------
    settings : object
        With the attributes of the scripts' settings as plain values (a config, or a namespace made from
        ``config.json``).
    device : torch.device

    Raises
    ------
    ValueError, FileNotFoundError, OSError
        For what the user can mend, each in one line. Nothing is written before backbone and input VR are in order.
    """
    classifier = build_classifier(settings.backbone, settings.weights, settings.seed, settings.canvas_size)
    size = settings.canvas_size or classifier.input_size
    if settings.reprogramming == "padding":
        input_vr, presets = _padding(settings, classifier, size)
    else:
        input_vr = WatermarkingVR(size, (size + 1) // 2, classifier.mean, classifier.std)
        presets = watermarking_train_preset(size), watermarking_test_preset(size)
    return _join(settings, device, classifier, input_vr, presets, _load(settings, presets))


def assemble_clip(settings, device):
    """Build the parts of a run of a vision-language model; as `assemble`."""
    cache_path = Path(settings.results_path) / "cache"
    templates = None if settings.templates is None else read_templates(settings.templates)
    clip = load_clip(settings.backbone, settings.weights, settings.seed)
    size = clip.input_size
    if settings.canvas_size not in (None, size):
        raise ValueError(f"{settings.backbone} takes images of {size}x{size}, got --canvas-size {settings.canvas_size}")
    if settings.reprogramming == "padding":
        input_vr, presets = _padding(settings, clip, size)
    else:
        input_vr = WatermarkingVR(size, CLIP_BORDER, clip.mean, clip.std)
        presets = (clip_preset(size, clip.resize_mode, clip.interpolation),) * 2
    task = _load(settings, presets)
    with distributed.main_process_first():
        classifier = clip.classifier(build_prompts(task.class_names, templates), cache_path, device)
    return _join(settings, device, classifier, input_vr, presets, task)


def _padding(settings, classifier, canvas_size):
    size = image_size(settings.dataset)
    input_vr = PaddingVR(canvas_size, size, classifier.mean, classifier.std)
    return input_vr, (padding_preset(size),) * 2


def _load(settings, presets):
    with distributed.main_process_first():
        return load_task(
            settings.dataset, settings.data_path, *presets, cache_path=Path(settings.results_path) / "cache",
            workers=settings.workers, train_fraction=settings.train_fraction, seed=settings.seed,
        )


def _join(settings, device, classifier, input_vr, presets, task):
    """Build mapping and network around the given parts and put everything on ``device``."""
    mapping = build_mapping(
        settings.mapping, classifier.num_source, task.num_target, laplace=settings.laplace,
        topk_ratio=settings.topk_ratio, seed=settings.seed, bayes=settings.bayes, topk=settings.topk,
        linear_variant=settings.linear_variant,
    ).to(device)
    classifier, input_vr = classifier.to(device), input_vr.to(device)
    switches = [] if settings.engine == "plain" else settings.engine.split(",")
    network = build_network(classifier, input_vr, switches=switches)
    return System(task, classifier, input_vr, network, mapping, presets, device)
