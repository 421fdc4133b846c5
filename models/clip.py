"""Frozen vision-language models as classifiers: pretrained labels are prompts, logits are similarities.

    logits[i, s] = exp(logit_scale) * <image embedding i, text embedding s> (+ logit_bias, in SigLIP)

Both embeddings have length one. The text embeddings are computed once, kept on disk, and stay with the image
tower; the text tower is let go.

Suffixes of arrays: n images, s prompts (S), t classes (T), d embedding dimensions (D).
"""

import difflib
import importlib.util
import json
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.fx
import torch.nn.functional as F
from torch import nn

from models.classifiers import Classifier
from models.clip_weights import find_weights, import_open_clip, load_weights, read_openais
from models.text_embeddings import embed_texts
from models.weight_files import one_line

# A CLIP of open_clip's own classes for smoke tests: every part is there, nothing in it means anything.
TINY_BACKBONE = "tiny-test"
_TINY_CONFIG = {
    "embed_dim": 32,
    "vision_cfg": {"image_size": 224, "patch_size": 56, "width": 32, "head_width": 16, "layers": 1, "pool_type": "avg"},
    "text_cfg": {"context_length": 32, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 2},
}


@torch.fx.wrap  # one call for those who trace the network: its autocast context would be lost
def _scaled_cosines(images_nd, texts_sd, logit_scale, logit_bias):
    with torch.autocast(images_nd.device.type, enabled=False):
        logits_ns = (logit_scale.exp() * images_nd) @ texts_sd.T
        return logits_ns if logit_bias is None else logits_ns + logit_bias


class ImageEncoder(nn.Module):
    """Image tower: normalised images (n, 3, H, W) to embeddings (n, D) of length one, float32.

    Parameters
    ----------
    visual : nn.Module
        Images to features (n, D), or to a tuple that starts with them.
    """

    def __init__(self, visual):
        super().__init__()
        self.visual = visual

    def forward(self, images):
        features = self.visual(images)
        features = features[0] if isinstance(features, tuple) else features
        return F.normalize(features.float(), dim=-1)


class ClipNet(nn.Module):
    """Image tower and text embeddings: normalised images (n, 3, H, W) to logits (n, S), float32.

    ``net(images)`` is ``net.logits(net.image_encoder(images))``. A network built of ``image_encoder`` alone gives the
    embeddings, from which a linear mapping's T logits come without the S in between, see `fold`.

    Parameters
    ----------
    visual : nn.Module
        As in `ImageEncoder`.
    text_embeddings : Tensor, shape (S, D)
        Of length one each.
    logit_scale : Tensor
        Logarithm of the factor on the cosines. Only ever read.
    logit_bias : Tensor, optional
        Added to every logit, as SigLIP does.
    """

    def __init__(self, visual, text_embeddings, logit_scale, logit_bias=None):
        super().__init__()
        self.image_encoder, self.logit_scale, self.logit_bias = ImageEncoder(visual), logit_scale, logit_bias
        self.register_buffer("text_embeddings", text_embeddings, persistent=False)

    def similarity(self, images_nd, texts_sd):
        """Logits (n, S) of embeddings, float32 also under autocast: half-precision cosines are coarse."""
        return _scaled_cosines(images_nd, texts_sd, self.logit_scale, self.logit_bias)

    def logits(self, images_nd):
        """Logits (n, S) of image embeddings (n, D)."""
        return self.similarity(images_nd, self.text_embeddings)

    def fold(self, weights_st, bias_t=None):
        """A linear mapping of the S logits as one of the D-dimensional image embeddings.

            logits(x) @ ω + b = x @ ω' + b',   ω' = exp(logit_scale) Eᵀω,   b' = b + logit_bias · Σ_s ω[s, :],

        with E the text embeddings. Summed in float64.

        Parameters
        ----------
        weights_st : Tensor (S, T)
        bias_t : Tensor (T,), optional

        Returns
        -------
        weights_dt : Tensor (D, T), float32
        bias_t : Tensor (T,), float32; zeros where neither the mapping nor the model has one
        """
        dtype = torch.float64
        with torch.autocast(weights_st.device.type, enabled=False):
            weights_st = weights_st.to(dtype)
            weights_dt = self.logit_scale.to(dtype).exp() * (self.text_embeddings.to(dtype).T @ weights_st)
            folded_t = torch.zeros_like(weights_dt[0]) if bias_t is None else bias_t.to(dtype)
            if self.logit_bias is not None:
                folded_t = folded_t + self.logit_bias.to(dtype) * weights_st.sum(0)
            return weights_dt.float(), folded_t.float()

    def forward(self, images):
        return self.logits(self.image_encoder(images))


@dataclass(frozen=True)
class Clip:
    """A pretrained vision-language model before it is given the classes of a task.

    Attributes
    ----------
    model : nn.Module
        Of open_clip's form: ``visual``, ``encode_text(tokens)``, ``logit_scale`` and perhaps ``logit_bias``.
    tokenizer : callable
        List of str to the tokens that ``encode_text`` takes.
    name : str
    input_size : int
        Side of the images, in pixels.
    mean, std : tuple of 3 floats
        Normalisation of pixels in [0, 1].
    interpolation : {"bicubic", "bilinear"}
    resize_mode : {"shortest", "squash"}
        Shorter side, then centre crop; or both sides, whatever the aspect ratio.
    """

    model: nn.Module
    tokenizer: Callable
    name: str
    input_size: int
    mean: tuple
    std: tuple
    interpolation: str = "bicubic"
    resize_mode: str = "shortest"

    def classifier(self, prompts, cache_path=None, device="cpu", should_stop=lambda: False):
        """The `ClipClassifier` of these prompts; once, since the model's image tower goes with it."""
        return ClipClassifier(self, prompts, cache_path, device, should_stop)


class ClipClassifier(Classifier):
    """A frozen vision-language model whose S pretrained labels are the prompts of a task.

    Parameters
    ----------
    clip : Clip
    prompts : data.text.Prompts
        Kept as ``prompts``; as texts they are the ``source_names``.
    cache_path : str or Path, optional
        Folder that keeps the text embeddings, see `embed_texts`.
    device : str or torch.device
        Where the texts are embedded and the classifier stays.
    should_stop : callable, optional
        Asked now and then while the texts are embedded, see `embed_texts`.
    """

    def __init__(self, clip, prompts, cache_path=None, device="cpu", should_stop=lambda: False):
        model = clip.model.requires_grad_(False).eval().to(device)
        embeddings = embed_texts(
            model, clip.tokenizer, prompts.texts, cache_path=cache_path, device=device, should_stop=should_stop
        )
        net = ClipNet(model.visual, embeddings, model.logit_scale, getattr(model, "logit_bias", None))
        super().__init__(net, clip.name, clip.mean, clip.std, clip.input_size, len(prompts), prompts.texts)
        self.prompts = prompts

    def zero_shot_classifiers(self):
        """Class embeddings of the model as it comes, {"single", "ensemble"} to (D, T), columns of length one.

        ``single`` uses the first template alone, ``ensemble`` the normalised mean over all templates, as
        open_clip's ``build_zero_shot_classifier`` has it.
        """
        shape = len(self.prompts.templates), len(self.prompts.class_names), -1
        embeddings_mtd = self.net.text_embeddings.view(shape)
        ensemble_td = F.normalize(embeddings_mtd.mean(dim=0), dim=-1)
        return {"single": embeddings_mtd[0].T, "ensemble": ensemble_td.T}

    @torch.no_grad()
    def zero_shot_logits(self, images):
        """Logits of the model without reprogramming, from one pass of the image tower.

        Parameters
        ----------
        images : Tensor, shape (n, 3, H, W)
            Normalised, with nothing added.

        Returns
        -------
        dict of {"single", "ensemble"} to Tensor (n, T), float32
        """
        images_nd = self.net.image_encoder(images)
        return {kind: self.net.similarity(images_nd, w.T) for kind, w in self.zero_shot_classifiers().items()}


def load_clip(name, weights=None, seed=0):
    """Load a vision-language model.

    Parameters
    ----------
    name : str
        Any architecture of open_clip, or `TINY_BACKBONE`.
    weights : str or Path, optional
        A tag of open_clip (``"openai"``), a local file (open_clip's or OpenAI's own ``.pt``), or ``"none"``
        for a random initialisation drawn from ``seed``, which is for smoke tests only and leaves the global
        generator as it was. Where it is left out: ``openai``, or the only tag that there is.
    seed : int

    Returns
    -------
    Clip

    Raises
    ------
    ValueError
        Unknown name or tag, weights that do not fit, a model that needs a package that is not installed.
    FileNotFoundError
        Weights that are neither on this machine nor can be downloaded.
    """
    config = _look_up(name)
    file, published = find_weights(name, weights)
    openais = None if file is None else read_openais(file, name)
    # OpenAI's weights want QuickGELU under every architecture name; GELU would cost accuracy without a word.
    if published.get("quick_gelu") or openais is not None:
        config["quick_gelu"] = True
    model, tokenizer = _build(name, config, seed)
    if file is not None:
        load_weights(model, file, name, openais)
    return Clip(model, tokenizer, name, _input_size(name, model), **_preprocessing(name, published))


def _look_up(name):
    """open_clip's configuration of an architecture, a dict that the caller may change."""
    if name == TINY_BACKBONE:
        return json.loads(json.dumps(_TINY_CONFIG))
    open_clip = import_open_clip()
    names = open_clip.list_models()
    if name not in names:
        close = difflib.get_close_matches(name, names, n=3, cutoff=0.4)
        hint = f"; closest: {', '.join(close)}" if close else ""
        raise ValueError(f"open_clip has no model {name!r}{hint}; open_clip.list_models() names them all")
    config = open_clip.get_model_config(name)
    text = config["text_cfg"]
    foreign_text = "hf_model_name" in text or "hf_tokenizer_name" in text or "siglip" in name.lower()
    if foreign_text and importlib.util.find_spec("transformers") is None:
        raise ValueError(f"backbone {name!r} needs the package transformers: pip install transformers")
    return config


def _build(name, config, seed):
    """Randomly initialised model of open_clip's classes, and its tokenizer."""
    open_clip = import_open_clip()
    custom_text = config.pop("custom_text", False) or "hf_model_name" in config["text_cfg"]
    if "hf_model_name" in config["text_cfg"]:
        config["text_cfg"]["hf_model_pretrained"] = False
    if not custom_text:
        model_class = open_clip.CLIP
    else:
        model_class = open_clip.CoCa if "multimodal_cfg" in config else open_clip.CustomTextCLIP
    try:
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(seed)
            model = model_class(**config)
        if name == TINY_BACKBONE:
            return model, open_clip.SimpleTokenizer(context_length=config["text_cfg"]["context_length"])
        return model, open_clip.get_tokenizer(name)
    except Exception as error:  # what a model asks of timm, transformers and their hub differs a lot
        raise ValueError(f"backbone {name!r} cannot be built here: {one_line(error)}") from error


def _preprocessing(name, published):
    """The preprocessing that the weights were published with.

    A local file does not say; it gets that of the architecture's published weights where all of them agree,
    else OpenAI's, which most share.
    """
    open_clip = import_open_clip()
    defaults = {
        "mean": open_clip.OPENAI_DATASET_MEAN,
        "std": open_clip.OPENAI_DATASET_STD,
        "interpolation": "bicubic",
        "resize_mode": "shortest",
    }
    if not published:
        names = open_clip.list_pretrained_tags_by_model(name)
        tags = [open_clip.get_pretrained_cfg(name, tag) for tag in names]
        agree = all(tag.get(key) == tags[0].get(key) for tag in tags for key in defaults)
        published = tags[0] if tags and agree else {}
    return {key: published.get(key, value) for key, value in defaults.items()}


def _input_size(name, model):
    size = model.visual.image_size
    height, width = (size, size) if isinstance(size, int) else size
    if height != width:
        raise ValueError(f"backbone {name!r} takes images of {height}x{width}; input VR needs square ones")
    return height
