"""Weights of vision-language models: found on this machine or downloaded, and read without running code."""

import difflib
import os
import pickle
import zipfile
from pathlib import Path

import torch

from models.hub import cached_file, file_url, is_reachable
from models.torchvision_shim import ensure_torchvision


def import_open_clip():
    ensure_torchvision()
    import open_clip

    return open_clip


def find_weights(name, weights):
    """(file, open_clip's description of the published weights); (None, {}) for random weights."""
    open_clip = import_open_clip()
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
                reason = one_line(error)
    raise FileNotFoundError(
        f"the weights {tag!r} of {name} are not on this machine and could not be downloaded ({reason}); "
        f"fetch {sources[0]} and pass --weights FILE, or for a smoke test without meaning --weights none"
    )


def load_weights(model, file, name):
    open_clip = import_open_clip()
    try:
        if is_torchscript(file):
            model.load_state_dict(read_torchscript_state_dict(file))
        else:
            open_clip.load_checkpoint(model, str(file))
    except Exception as error:  # conversion of a foreign file fails wherever its first surprise lies
        raise ValueError(
            f"--weights {file} is not a checkpoint of --backbone {name}: {one_line(error)}; "
            "name the architecture that the file was saved from"
        ) from error


def is_torchscript(file):
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


def one_line(error, limit=160):
    """The telling part of an error: load_state_dict puts a heading above its first difference."""
    lines = [" ".join(line.split()) for line in str(error).splitlines() if line.strip()] or [repr(error)]
    line = lines[1] if len(lines) > 1 and lines[0].startswith("Error(s) in loading") else lines[0]
    return line if len(line) <= limit else line[: limit - 3] + "..."
