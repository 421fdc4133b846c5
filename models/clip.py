"""Frozen vision-language models as classifiers: pretrained labels are prompts, logits are similarities.

    logits[i, s] = exp(logit_scale) * <image embedding i, text embedding s> (+ logit_bias, in SigLIP)

Both embeddings have length one. The text embeddings are computed once, kept on disk, and stay with the image
tower; the text tower is let go.

Suffixes of arrays: n images, s prompts (S), t classes (T), d embedding dimensions (D).
"""

import difflib
import hashlib
import importlib.util
import json
import os
import pickle
import tempfile
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn
from tqdm import tqdm

from models.checkpoint_file import read_checkpoint
from models.classifiers import Classifier
from models.hub import cached_file, file_url, is_reachable
from models.torchvision_shim import ensure_torchvision

DEFAULT_BACKBONE = "ViT-B-32-quickgelu"

# A CLIP of open_clip's own classes for smoke tests: every part is there, nothing in it means anything.
TINY_BACKBONE = "tiny-test"
_TINY_CONFIG = {
    "embed_dim": 32,
    "vision_cfg": {"image_size": 224, "patch_size": 56, "width": 32, "head_width": 16, "layers": 1,
                   "pool_type": "avg"},
    "text_cfg": {"context_length": 32, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 2},
}


class ClipNet(nn.Module):
    """Image tower and text embeddings: normalised images (n, 3, H, W) to logits (n, S), float32.

    Parameters
    ----------
    visual : nn.Module
        The image tower: images to features (n, D), or to a tuple that starts with them.
    text_embeddings : Tensor, shape (S, D)
        Of length one each.
    logit_scale : Tensor
        Logarithm of the factor on the cosines. Only ever read.
    logit_bias : Tensor, optional
        Added to every logit, as SigLIP does.
    """

    def __init__(self, visual, text_embeddings, logit_scale, logit_bias=None):
        super().__init__()
        self.visual, self.logit_scale, self.logit_bias = visual, logit_scale, logit_bias
        self.register_buffer("text_embeddings", text_embeddings, persistent=False)

    def encode_image(self, images):
        """Image embeddings (n, D) of length one, float32."""
        features = self.visual(images)
        features = features[0] if isinstance(features, tuple) else features
        return F.normalize(features.float(), dim=-1)

    def similarity(self, images_nd, texts_sd):
        """Logits (n, S) of embeddings, float32 also under autocast: half-precision cosines are coarse."""
        with torch.autocast(images_nd.device.type, enabled=False):
            logits_ns = (self.logit_scale.exp() * images_nd) @ texts_sd.T
            return logits_ns if self.logit_bias is None else logits_ns + self.logit_bias

    def forward(self, images):
        return self.similarity(self.encode_image(images), self.text_embeddings)


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

    def classifier(self, prompts, cache_path=None, device="cpu"):
        """The `ClipClassifier` of these prompts; once, since the model's image tower goes with it."""
        return ClipClassifier(self, prompts, cache_path, device)


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
    """

    def __init__(self, clip, prompts, cache_path=None, device="cpu"):
        model = clip.model.requires_grad_(False).eval().to(device)
        embeddings = embed_texts(model, clip.tokenizer, prompts.texts, cache_path=cache_path, device=device)
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
        images_nd = self.net.encode_image(images)
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
    file, published = _find_weights(name, weights)
    # OpenAI's weights want QuickGELU under every architecture name; GELU would cost accuracy without a word.
    if published.get("quick_gelu") or (file is not None and _is_torchscript(file)):
        config["quick_gelu"] = True
    model, tokenizer = _build(name, config, seed)
    if file is not None:
        _load_weights(model, file, name)
    return Clip(model, tokenizer, name, _input_size(name, model), **_preprocessing(name, published))


def embed_texts(model, tokenizer, texts, *, cache_path=None, device="cpu", batch_size=256):
    """Text embeddings of length one, (S, D) float32 on ``device``, computed once and then read from disk.

    Parameters
    ----------
    model, tokenizer
        As in `Clip`, the model in eval mode on ``device``.
    texts : list of str
    cache_path : str or Path, optional
        Folder for the file ``text_<key>.pt``. The key is a digest of the text side's architecture and
        weights, the tokenizer and the texts; a file that is damaged is made again.
    batch_size : int
        Texts in one pass of the text tower.
    """
    file = None if cache_path is None else Path(cache_path) / f"text_{_text_key(model, tokenizer, texts)}.pt"
    embeddings = None if file is None else _read_embeddings(file, len(texts))
    if embeddings is None:
        batches = range(0, len(texts), batch_size)
        rows = []
        with torch.no_grad():
            for start in tqdm(batches, desc="text embeddings", unit="batch", disable=None, leave=False):
                tokens = tokenizer(texts[start : start + batch_size]).to(device)
                rows.append(F.normalize(model.encode_text(tokens).float(), dim=-1).cpu())
        embeddings = torch.cat(rows)
        if file is not None:
            _write_embeddings(file, embeddings)
    return embeddings.to(device)


def _text_key(model, tokenizer, texts):
    digest = hashlib.sha256()
    # The printed model tells activations apart, which weights alone do not.
    settings = [repr(model), type(tokenizer).__name__, getattr(tokenizer, "context_length", None), texts]
    digest.update(json.dumps(settings).encode())
    for key, value in model.state_dict().items():
        if not key.startswith("visual."):
            digest.update(f"{key} {value.dtype} {tuple(value.shape)}".encode())
            digest.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()[:24]


def _checksum(embeddings):
    return hashlib.sha256(embeddings.numpy()).hexdigest()


def _read_embeddings(file, num_texts):
    try:
        stored = read_checkpoint(file)
        embeddings = stored["embeddings"]
        intact = len(embeddings) == num_texts and _checksum(embeddings) == stored["checksum"]
    except Exception:  # absent, cut off or foreign: it can fail anywhere in the reader, and is made again
        return None
    return embeddings if intact else None


def _write_embeddings(file, embeddings):
    file.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=file.parent, prefix=file.stem, suffix=".tmp")
    try:
        with os.fdopen(handle, "wb") as stream:
            torch.save({"embeddings": embeddings, "checksum": _checksum(embeddings)}, stream)
            stream.flush()
            os.fsync(stream.fileno())
        os.replace(temporary, file)
    except BaseException:
        os.unlink(temporary)
        raise


def _open_clip():
    ensure_torchvision()
    import open_clip

    return open_clip


def _look_up(name):
    """open_clip's configuration of an architecture, a dict that the caller may change."""
    if name == TINY_BACKBONE:
        return json.loads(json.dumps(_TINY_CONFIG))
    open_clip = _open_clip()
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
    open_clip = _open_clip()
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
        raise ValueError(f"backbone {name!r} cannot be built here: {_one_line(error)}") from error


def _preprocessing(name, published):
    """The preprocessing that the weights were published with.

    A local file does not say; it gets that of the architecture's published weights where all of them agree,
    else OpenAI's, which most share.
    """
    open_clip = _open_clip()
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


def _find_weights(name, weights):
    """(file, open_clip's description of the published weights); (None, {}) for random weights."""
    open_clip = _open_clip()
    tags = open_clip.list_pretrained_tags_by_model(name)
    weights = weights if weights is None else str(weights)
    if weights == "none":
        return None, {}
    if weights is None:
        if "openai" not in tags and len(tags) != 1:
            known = f"one of {', '.join(tags)}, or" if tags else "none are published, pass"
            raise ValueError(f"backbone {name!r} needs --weights: {known} a file, or none for a smoke test")
        weights = "openai" if "openai" in tags else tags[0]
    published = open_clip.get_pretrained_cfg(name, weights)
    if published:
        return _download(open_clip, name, weights, published), published
    if Path(weights).is_file():
        return Path(weights), {}
    if Path(weights).suffix or os.sep in weights:
        raise FileNotFoundError(f"--weights {weights}: no such file")
    close = difflib.get_close_matches(weights, tags, n=1)
    hint = f" (did you mean {close[0]!r}?)" if close else ""
    allowed = f"choose from {', '.join(tags)}, or" if tags else "none are published: pass"
    raise ValueError(
        f"--weights {weights!r} is neither a file nor weights of {name!r}{hint}; {allowed} a local file, or none for "
        "a smoke test"
    )


def _download(open_clip, name, tag, published):
    """File of published weights: from the hub's cache, their address (checksum tested), or the hub."""
    hub, url = published.get("hf_hub", ""), published.get("url", "")
    repository, _, file = hub.rpartition("/")
    files = [file] if file else ["open_clip_model.safetensors", "open_clip_pytorch_model.bin"]
    if hub:
        cached = cached_file(repository, files)
        if cached is not None:
            return cached
    reason = "no connection"
    hub_url = file_url(repository, files[0]) if hub else ""
    sources = [source for source in (url, hub_url) if source]
    for source in sources:
        if source == url or is_reachable(source):
            try:
                return Path(open_clip.download_pretrained(published, prefer_hf_hub=source != url))
            except Exception as error:  # the hub's client and urllib have no error in common
                reason = _one_line(error)
    raise FileNotFoundError(
        f"the weights {tag!r} of {name} are not on this machine and could not be downloaded ({reason}); "
        f"fetch {sources[0]} and pass --weights FILE, or for a smoke test without meaning --weights none"
    )


def _load_weights(model, file, name):
    open_clip = _open_clip()
    try:
        if _is_torchscript(file):
            model.load_state_dict(read_torchscript_state_dict(file))
        else:
            open_clip.load_checkpoint(model, str(file))
    except Exception as error:  # conversion of a foreign file fails wherever its first surprise lies
        raise ValueError(
            f"--weights {file} is not a checkpoint of --backbone {name}: {_one_line(error)}; "
            "name the architecture that the file was saved from"
        ) from error


def _is_torchscript(file):
    if not zipfile.is_zipfile(file):
        return False
    with zipfile.ZipFile(file) as archive:
        return any(entry.endswith("/constants.pkl") for entry in archive.namelist())


def read_torchscript_state_dict(file):
    """Tensors of a TorchScript archive, the form of OpenAI's ``.pt`` files, without running the code in it.

    Modules become plain holders of attributes; of everything else the archive's pickle may name only tensors,
    their storages and OrderedDict.

    Parameters
    ----------
    file : str or Path

    Returns
    -------
    dict of str to Tensor on the CPU, less the constants that OpenAI stores beside the weights.

    Raises
    ------
    pickle.UnpicklingError
        For an archive that names anything else.
    """
    constants = {"attn_mask", "input_resolution", "context_length", "vocab_size"}
    kinds = ("Float", "Half", "BFloat16", "Double", "Long", "Int", "Bool")
    dtypes = {f"{kind}Storage": getattr(torch, kind.lower()) for kind in kinds}

    class Module:
        pass

    def rebuild_tensor(storage, offset, size, stride, *_):
        return storage.as_strided(size, stride, offset)

    class Unpickler(pickle.Unpickler):
        def find_class(self, module, name):
            if module == "__torch__" or module.startswith("__torch__."):
                return Module
            if module == "torch" and name in dtypes:
                return dtypes[name]
            if (module, name) == ("torch._utils", "_rebuild_tensor_v2"):
                return rebuild_tensor
            if (module, name) == ("collections", "OrderedDict"):
                return dict
            raise pickle.UnpicklingError(f"the archive names {module}.{name}, which no CLIP weights need")

        def persistent_load(self, reference):
            _, dtype, key, _, _ = reference
            return torch.frombuffer(bytearray(archive.read(f"{root}/data/{key}")), dtype=dtype)

    state = {}

    def collect(module, prefix):
        for key, value in vars(module).items():
            if isinstance(value, Module):
                collect(value, f"{prefix}{key}.")
            elif isinstance(value, torch.Tensor) and key not in constants:
                state[prefix + key] = value

    with zipfile.ZipFile(file) as archive:
        pickled = next(entry for entry in archive.namelist() if entry.endswith("/data.pkl"))
        root = pickled.removesuffix("/data.pkl")
        with archive.open(pickled) as stream:
            collect(Unpickler(stream).load(), "")
    return state


def _one_line(error, limit=160):
    """The telling part of an error: load_state_dict puts a heading above its first difference."""
    lines = [" ".join(line.split()) for line in str(error).splitlines() if line.strip()] or [repr(error)]
    line = lines[1] if len(lines) > 1 and lines[0].startswith("Error(s) in loading") else lines[0]
    return line if len(line) <= limit else line[: limit - 3] + "..."
