"""Checkpoints: one safetensors file with all tensors, and the plain values as JSON in its metadata.

safetensors checks that every tensor lies within the file and runs nothing. It has no checksum, hence one of ours over
all bytes: it tells a damaged file from a whole one, not a forged one from a true one.
"""

import json
import os
import zlib
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

_TENSOR = "$tensor"  # in the place of a tensor stands an object of this one key, with its name in the file


def write_checkpoint(path, values):
    """Write nested dicts and lists of tensors and plain values to ``path``, flushed to disk.

    Raises
    ------
    OSError
        The file cannot be written; none is left.
    """
    path, tensors = Path(path), {}
    content = json.dumps(_without_tensors(values, "", tensors))
    try:
        path.touch()
        mode = path.stat().st_mode
        save_file(tensors, path, {"content": content, "checksum": _checksum(content, tensors)})
        path.chmod(mode)  # which the library leaves readable by its owner alone
        with open(path, "rb") as file:
            os.fsync(file.fileno())
    except (OSError, SafetensorError) as error:
        path.unlink(missing_ok=True)
        size = sum(tensor.numel() * tensor.element_size() for tensor in tensors.values()) + len(content)
        disk = os.statvfs(path.parent)
        raise OSError(
            f"could not save a checkpoint in {path.parent}: it needs about {size / 2**20 + 1:.0f} MiB and "
            f"{disk.f_bavail * disk.f_frsize / 2**20:.0f} MiB are free; the checkpoint before it is untouched ({error})"
        ) from error


def read_checkpoint(path):
    """What `write_checkpoint` was given, its tensors on the CPU.

    Raises
    ------
    ValueError
        The file is damaged or no checkpoint of this project.
    """
    try:
        with safe_open(path, "pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name).clone() for name in file.keys()}  # else a view of the file itself
        if metadata["checksum"] != _checksum(metadata["content"], tensors):
            raise ValueError("its checksum differs")
        return _with_tensors(json.loads(metadata["content"]), tensors)
    except Exception as error:  # a damaged file can fail anywhere in the readers of safetensors and JSON
        reason = " ".join(str(error).split())[:120] or type(error).__name__
        raise ValueError(f"{path} is damaged or no checkpoint of this project ({reason})") from error


def _without_tensors(value, name, tensors):
    """``value`` with every tensor moved into ``tensors``, named after the keys that lead to it."""
    if isinstance(value, torch.Tensor):
        tensors[name] = value.detach().cpu().clone(memory_format=torch.contiguous_format)  # sharing no memory
        return {_TENSOR: name}
    if isinstance(value, dict):
        return {key: _without_tensors(item, f"{name}.{key}".lstrip("."), tensors) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_without_tensors(item, f"{name}.{i}", tensors) for i, item in enumerate(value)]
    return value


def _with_tensors(value, tensors):
    if isinstance(value, dict):
        if value.keys() == {_TENSOR}:
            return tensors[value[_TENSOR]]
        return {key: _with_tensors(item, tensors) for key, item in value.items()}
    if isinstance(value, list):
        return [_with_tensors(item, tensors) for item in value]
    return value


def _checksum(content, tensors):
    """CRC-32 of the text and of all tensors in the order of their names, as eight hexadecimal digits."""
    crc = zlib.crc32(content.encode())
    for name in sorted(tensors):
        crc = zlib.crc32(tensors[name].reshape(-1).view(torch.uint8).numpy(), zlib.crc32(name.encode(), crc))
    return f"{crc:08x}"
