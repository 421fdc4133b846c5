"""From plain settings to the parts of a run: task, backbone, input VR, network, mapping, loaders.

Training starts here, and so does every tool that takes a finished run up again.
"""

import hashlib
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch

from data import BatchLoader, Task, image_size, load_task, open_task
from data.memory import available_memory
from data.presets import clip_preset, padding_preset, watermarking_test_preset, watermarking_train_preset
from data.text import build_prompts, read_templates
from mapping import MAPPINGS, LabelMapping, build_mapping
from models import REPROGRAMMING, SWITCHES, Classifier, InputVR, build_classifier, build_input_vr, build_network
from models.clip import load_clip
from tools.training import distributed
from tools.training.numerics import choose_precision, half_dtype
from tools.training.readout import ClipReadout, Readout

SPLITS = ("train", "test")
CLIP_BORDER = 30  # width of CLIP's watermark in pixels


@dataclass
class System:
    """The parts of a run, on their device."""

    task: Task  # a set that was not asked for is None
    classifier: Classifier
    input_vr: InputVR
    net: torch.nn.Module  # the classifier, or a CLIP's image tower
    network: torch.nn.Module  # the same behind the input VR, run fast
    mapping: LabelMapping
    readout: Readout  # from what the network gives to logits
    presets: tuple  # of training and test images
    device: torch.device
    content: dict  # what the run reads, by name: fingerprints and lists of names that tell it from something else
    source_names: list | None  # of what the mapping reads: pretrained labels, or the numbers of an embedding
    zero_shot: tuple | None = None  # test images under a CLIP's own preprocessing, and that preset

    def loaders(self, batch_size, seed, passed_at_once=0):
        """`data.BatchLoader` of each step: ``estimate``, ``train``, ``test`` and perhaps ``validation``.

        All but ``train`` take ``passed_at_once`` images a step, if that is more, or as many as the largest set has.
        """
        train, test = self.presets
        common = {
            "device": self.device,
            "seed": seed,
            "rank": distributed.rank(),
            "world_size": distributed.world_size(),
        }
        sets = {"estimate": (self.task.train, train), "train": (self.task.train, train), "test": (self.task.test, test)}
        if self.task.validation is not None:
            sets["validation"] = self.task.validation, test
        largest = max(len(images.labels) for images, _ in sets.values())
        passed = max(batch_size, min(passed_at_once, largest))
        return {
            step: BatchLoader(
                images,
                preset,
                batch_size if step == "train" else passed,
                shuffle=step == "train",
                purpose=step,
                **common,
            )
            for step, (images, preset) in sets.items()
        }

    def zero_shot_accuracy(self, batch_size, check_stop=lambda: None):
        """Accuracy of the CLIP without reprogramming; {"single", "ensemble"} to fractions of 1.

        ``single`` asks with the first template alone, ``ensemble`` with the mean embedding of all of them.
        ``check_stop()`` is called before each batch and may raise.
        """
        clip = self.classifier
        loader = BatchLoader(*self.zero_shot, batch_size, self.device, shuffle=False, seed=0, purpose="zero-shot")
        mean, std = (torch.tensor(v, device=self.device).view(1, 3, 1, 1) for v in (clip.mean, clip.std))
        correct = dict.fromkeys(("single", "ensemble"), 0)
        for images, labels, _ in loader.epoch(0):
            check_stop()
            for kind, logits in clip.zero_shot_logits((images - mean) / std).items():
                correct[kind] = correct[kind] + (logits.argmax(1) == labels).sum()
        return {kind: int(count) / loader.num_samples for kind, count in correct.items()}


def build_vision(settings, device, splits=SPLITS, class_names=None):
    """Build the parts of a run of a vision model.

    Parameters
    ----------
    settings : object
        With the scripts' settings as attributes: a config, or what `tools.training.finished` makes of ``config.json``.
    device : torch.device
    splits : collection of str
        Which of `SPLITS` to load; the task's other sets are None. Without any, no data set is needed.
    class_names : list of str, optional
        The downstream labels where they are known: needed without a data set, and compared with that of one.

    Raises
    ------
    ValueError, FileNotFoundError, OSError
        For what the user can fix, each in one line. Nothing is written before backbone and input VR are in order.
    """
    _look_at_data(settings, splits)
    classifier = build_classifier(settings.backbone, settings.weights, settings.seed, settings.canvas_size)
    size = settings.canvas_size or classifier.input_size
    kind = REPROGRAMMING[settings.reprogramming]
    if kind.images == "placed":
        presets = (padding_preset(image_size(settings.dataset)),) * 2
    else:
        test = watermarking_test_preset(size)
        presets = (watermarking_train_preset(size) if kind.augment else test), test
    input_vr = _input_vr(settings, classifier, size, border=(size + 1) // 2)
    task = _load(settings, presets, splits, class_names)
    return _join(settings, device, classifier, classifier, input_vr, presets, task, Readout)


def build_clip(settings, device, splits=SPLITS, class_names=None):
    """Build the parts of a run of a vision-language model; as `build_vision`."""
    cache_path = Path(settings.results_path) / "cache"
    templates = None if settings.templates is None else read_templates(settings.templates)
    _look_at_data(settings, splits)
    clip = load_clip(settings.backbone, settings.weights, settings.seed)
    size = clip.input_size
    if settings.canvas_size not in (None, size):
        raise ValueError(f"{settings.backbone} takes images of {size}x{size}, got --canvas-size {settings.canvas_size}")
    own = clip_preset(size, clip.resize_mode, clip.interpolation)
    placed = REPROGRAMMING[settings.reprogramming].images == "placed"
    presets = (padding_preset(image_size(settings.dataset)) if placed else own,) * 2
    input_vr = _input_vr(settings, clip, size, border=CLIP_BORDER)
    task = _load(settings, presets, splits, class_names)
    with distributed.main_process_first():
        classifier = clip.classifier(build_prompts(task.class_names, templates), cache_path, device)
    readout, embedded = partial(ClipReadout, net=classifier.net), {}
    if MAPPINGS[settings.mapping].embedded:
        # A logit_bias would add the same to all labels: nothing to a decision or a probability.
        prior = classifier.net.logit_scale.exp() * classifier.zero_shot_classifiers()["ensemble"]
        readout, embedded = Readout, {"prior": prior, "source_names": [f"embedding {d}" for d in range(len(prior))]}
    encoder = classifier.net.image_encoder
    system = _join(settings, device, classifier, encoder, input_vr, presets, task, readout, **embedded)
    system.content["prompt templates"] = list(classifier.prompts.templates)
    if task.test is not None:
        unchanged = task.test if presets[1] == own else _load(settings, (None, own), ("test",)).test
        system.zero_shot = unchanged, own
    return system


BUILDERS = {"vm": build_vision, "vm_fast": build_vision, "vlm": build_clip}


def own_settings(entry, settings):
    """The settings that an entry of a registry declares, by name."""
    return {setting.name: getattr(settings, setting.name, setting.default) for setting in entry.settings}


def _input_vr(settings, classifier, canvas_size, border):
    return build_input_vr(
        settings.reprogramming,
        canvas_size=canvas_size,
        image_size=image_size(settings.dataset),
        border=border,
        mean=classifier.mean,
        std=classifier.std,
        **own_settings(REPROGRAMMING[settings.reprogramming], settings),
    )


def _look_at_data(settings, splits):
    """Find out that a data set is not there before weights are downloaded for it."""
    if splits:
        open_task(settings.dataset, settings.data_path or None, getattr(settings, "test_fraction", None))


def _load(settings, presets, splits, class_names=None):
    if not splits:
        return Task(settings.dataset, class_names, None, None)
    presets = [preset if split in splits else None for split, preset in zip(SPLITS, presets, strict=True)]
    with distributed.main_process_first():
        task = load_task(
            settings.dataset,
            settings.data_path or None,
            *presets,
            cache_path=Path(settings.results_path) / "cache",
            workers=settings.workers,
            train_fraction=settings.train_fraction,
            shots=settings.shots,
            test_fraction=getattr(settings, "test_fraction", None),  # runs of before have no such setting
            validation_fraction=settings.validation_fraction,
            seed=settings.seed,
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


def _join(settings, device, classifier, net, input_vr, presets, task, readout, prior=None, source_names=None):
    """Build mapping and network around the given parts and put everything on ``device``.

    A mapping with a ``prior`` (D, T) reads what ``net`` gives, D numbers called ``source_names``, else the logits.
    """
    num_source = classifier.num_source if prior is None else len(prior)
    mapping = build_mapping(
        settings.mapping,
        num_source,
        task.num_target,
        seed=settings.seed,
        prior=prior,
        **own_settings(MAPPINGS[settings.mapping], settings),
    ).to(device)
    if task.train is not None:
        _check_memory(mapping, device)
    classifier, input_vr = classifier.to(device), input_vr.to(device)
    parts = {"auto": list(SWITCHES), "plain": []}
    network = build_network(
        net,
        input_vr,
        switches=parts.get(settings.engine, settings.engine.split(",")),
        dtype=half_dtype(choose_precision(settings.precision, device)),
    )
    content = {"class names": task.class_names}
    for split, fingerprint in task.fingerprint.items():
        content[f"{split} images"] = fingerprint[:16]
    if settings.weights is not None and Path(settings.weights).is_file():
        content["weights"] = _digest(settings.weights)
    names = source_names or classifier.source_names
    return System(task, classifier, input_vr, net, network, mapping, readout(mapping), presets, device, content, names)


def _check_memory(mapping, device):
    free = torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else available_memory()
    if mapping.memory_needed > free:
        raise ValueError(
            f"estimating --mapping {mapping.name} from {mapping.num_source} pretrained and {mapping.num_target} "
            f"downstream labels needs {mapping.memory_needed / 2**30:.1f} GiB of memory, {free / 2**30:.1f} GiB are "
            "free; take --mapping blmpp, or for lda a number as --shrinkage, which needs less"
        )


def _digest(path):
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()[:16]
