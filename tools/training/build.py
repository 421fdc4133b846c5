"""From plain settings to the parts of a run: task, backbone, input VR, network, mapping, loaders.

Training starts here, and so does every tool that takes a finished run up again.
"""

import time
from dataclasses import dataclass
from pathlib import Path

import torch

from data import BatchLoader, Task, image_size, load_task
from data.presets import clip_preset, padding_preset, watermarking_test_preset, watermarking_train_preset
from data.text import build_prompts, read_templates
from mapping import LabelMapping, build_mapping
from models import Classifier, PaddingVR, WatermarkingVR, build_classifier, build_network
from models.clip import load_clip
from tools.training import distributed

SPLITS = ("train", "test")
CLIP_BORDER = 30  # width of CLIP's watermark in pixels


@dataclass
class System:
    """The parts of a run, on their device."""

    task: Task  # a set that was not asked for is None
    classifier: Classifier
    input_vr: torch.nn.Module
    network: torch.nn.Module
    mapping: LabelMapping
    presets: tuple  # of training and test images
    device: torch.device
    waited: dict  # what was waited for while building, to seconds
    zero_shot: tuple | None = None  # test images under a CLIP's own preprocessing, and that preset

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

    def zero_shot_accuracy(self, batch_size):
        """Accuracy of the CLIP without reprogramming; {"single", "ensemble"} to fractions of 1.

        ``single`` asks with the first template alone, ``ensemble`` with the mean embedding of all of them. Every
        process measures the whole test set: the sum is the same whatever their number.
        """
        clip = self.classifier
        loader = BatchLoader(
            *self.zero_shot, batch_size, self.device, shuffle=False, seed=0, purpose="zero-shot"
        )
        mean, std = (torch.tensor(v, device=self.device).view(1, 3, 1, 1) for v in (clip.mean, clip.std))
        correct = dict.fromkeys(("single", "ensemble"), 0)
        for images, labels, _ in loader.epoch(0):
            for kind, logits in clip.zero_shot_logits((images - mean) / std).items():
                correct[kind] = correct[kind] + (logits.argmax(1) == labels).sum()
        return {kind: int(count) / loader.num_samples for kind, count in correct.items()}


def assemble(settings, device, splits=SPLITS, class_names=None):
    """Build the parts of a run of a vision model.

    Parameters
    ----------
    settings : object
        With the attributes of the scripts' settings as plain values (a config, or a namespace made from
        ``config.json``).
    device : torch.device
    splits : collection of str
        Which of `SPLITS` to load; the task's other sets are None. Without any, no data set is needed.
    class_names : list of str, optional
        The downstream labels where they are known: needed without a data set, and compared with that of one.

    Raises
    ------
    ValueError, FileNotFoundError, OSError
        For what the user can mend, each in one line. Nothing is written before backbone and input VR are in order.
    """
    waited = _Laps()
    classifier = build_classifier(settings.backbone, settings.weights, settings.seed, settings.canvas_size)
    waited.lap("backbone")
    size = settings.canvas_size or classifier.input_size
    if settings.reprogramming == "padding":
        input_vr, presets = _padding(settings, classifier, size)
    else:
        input_vr = WatermarkingVR(size, (size + 1) // 2, classifier.mean, classifier.std)
        presets = watermarking_train_preset(size), watermarking_test_preset(size)
    task = _load(settings, presets, splits, class_names)
    waited.lap("data")
    return _join(settings, device, classifier, input_vr, presets, task, waited)


def assemble_clip(settings, device, splits=SPLITS, class_names=None):
    """Build the parts of a run of a vision-language model; as `assemble`."""
    cache_path = Path(settings.results_path) / "cache"
    templates = None if settings.templates is None else read_templates(settings.templates)
    waited = _Laps()
    clip = load_clip(settings.backbone, settings.weights, settings.seed)
    waited.lap("backbone")
    size = clip.input_size
    if settings.canvas_size not in (None, size):
        raise ValueError(f"{settings.backbone} takes images of {size}x{size}, got --canvas-size {settings.canvas_size}")
    own = clip_preset(size, clip.resize_mode, clip.interpolation)
    if settings.reprogramming == "padding":
        input_vr, presets = _padding(settings, clip, size)
    else:
        input_vr, presets = WatermarkingVR(size, CLIP_BORDER, clip.mean, clip.std), (own, own)
    task = _load(settings, presets, splits, class_names)
    waited.lap("data")
    with distributed.main_process_first():
        classifier = clip.classifier(build_prompts(task.class_names, templates), cache_path, device)
    waited.lap("texts")
    system = _join(settings, device, classifier, input_vr, presets, task, waited)
    if task.test is not None:
        unchanged = task.test if presets[1] == own else _load(settings, (None, own), ("test",)).test
        system.zero_shot = unchanged, own
    return system


def _padding(settings, classifier, canvas_size):
    size = image_size(settings.dataset)
    input_vr = PaddingVR(canvas_size, size, classifier.mean, classifier.std)
    return input_vr, (padding_preset(size),) * 2


def _load(settings, presets, splits, class_names=None):
    if not splits:
        return Task(settings.dataset, class_names, None, None)
    presets = [preset if split in splits else None for split, preset in zip(SPLITS, presets, strict=True)]
    data_path = None if settings.dataset.startswith("folder:") else settings.data_path
    with distributed.main_process_first():
        task = load_task(
            settings.dataset, data_path, *presets, cache_path=Path(settings.results_path) / "cache",
            workers=settings.workers, train_fraction=settings.train_fraction, seed=settings.seed,
        )
    if class_names not in (None, task.class_names):
        raise ValueError(
            f"{settings.dataset} has other classes than when the run was trained ({_difference(task, class_names)}); "
            "give the data set of that time with --data-path"
        )
    return task


def _difference(task, class_names):
    if task.num_target != len(class_names):
        return f"{task.num_target} instead of {len(class_names)}"
    now, then = next(pair for pair in zip(task.class_names, class_names, strict=True) if pair[0] != pair[1])
    return f"{now!r} instead of {then!r}"


def _join(settings, device, classifier, input_vr, presets, task, waited):
    """Build mapping and network around the given parts and put everything on ``device``."""
    mapping = build_mapping(
        settings.mapping, classifier.num_source, task.num_target, laplace=settings.laplace,
        topk_ratio=settings.topk_ratio, seed=settings.seed, bayes=settings.bayes, topk=settings.topk,
        linear_variant=settings.linear_variant,
    ).to(device)
    classifier, input_vr = classifier.to(device), input_vr.to(device)
    switches = [] if settings.engine == "plain" else settings.engine.split(",")
    network = build_network(classifier, input_vr, switches=switches)
    waited.lap("network")
    return System(task, classifier, input_vr, network, mapping, presets, device, waited)


class _Laps(dict):
    """Seconds since the lap before, by name."""

    def __init__(self):
        super().__init__()
        self._last = time.perf_counter()

    def lap(self, name):
        now = time.perf_counter()
        self[name], self._last = now - self._last, now
