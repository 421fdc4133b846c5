"""Weights of vision-language models: found on this machine or downloaded, and read without running code."""

import difflib
import os
from contextlib import contextmanager
from pathlib import Path

from models.hub import cached_file, file_url, is_reachable
from models.torchvision_shim import ensure_torchvision
from models.weight_files import is_torchscript, one_line, read_mapping, read_torchscript_state_dict

_OPENAI_SIZES = {"input_resolution", "context_length", "vocab_size"}  # stand beside the weights


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


def read_openais(file, name):
    """OpenAI's weights as it published them: a TorchScript archive, or its state dict with the constants left in.

    Returns
    -------
    dict of str to Tensor without the constants; None for a file in another form.

    Raises
    ------
    ValueError
        For a file that cannot be read.
    """
    with _foreign(file, name):
        if is_torchscript(file):
            state = read_torchscript_state_dict(file)
        elif Path(file).suffix in (".npz", ".npy"):
            return None
        else:
            state = read_mapping(file)
            if not state.keys() & _OPENAI_SIZES:
                return None
        constants = _OPENAI_SIZES | {"attn_mask"}  # that of each block
        return {key: value for key, value in state.items() if key.rpartition(".")[2] not in constants}


def load_weights(model, file, name, openais=None):
    """Load a file into a model of open_clip's; ``openais`` is what `read_openais` made of it."""
    with _foreign(file, name):
        if openais is not None:
            model.load_state_dict(openais)
        else:
            import_open_clip().load_checkpoint(model, str(file))


@contextmanager
def _foreign(file, name):
    try:
        yield
    except Exception as error:  # conversion of a foreign file fails wherever its first surprise lies
        raise ValueError(
            f"--weights {file} is not a checkpoint of --backbone {name}: {one_line(error)}; "
            "name the architecture that the file was saved from"
        ) from error
