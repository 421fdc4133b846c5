"""Reading checkpoints that strangers made: plain tensors and values or an error, whatever the bytes.

`torch.load(weights_only=True)` runs no code, but it trusts declared sizes: a few bytes may ask for terabytes, or
for more than a record holds. So the archive and its pickle are gone through first.
"""

import collections
import io
import itertools
import pickle
import zipfile
from pathlib import Path

import torch

_REBUILDERS = ("_rebuild_tensor", "_rebuild_tensor_v2")
_PLAIN = {  # these and no more are made while the pickle is gone through
    ("collections", "OrderedDict"): collections.OrderedDict,
    ("_codecs", "encode"): lambda text, encoding: text.encode("latin1"),  # how protocol 2 spells bytes
    ("builtins", "set"): set,
    ("__builtin__", "set"): set,
}


def read_checkpoint(path, *, archive_only=False):
    """Read a torch checkpoint on the CPU without running what it may carry or allocating more than it holds.

    Parameters
    ----------
    path : str or Path
    archive_only : bool
        Refuse the format of before torch 1.6 (of which the sizes are left to torch).

    Returns
    -------
    What was saved.

    Raises
    ------
    ValueError
        For a file that is damaged, or holds anything but tensors and plain values.
    OSError
        For a file that cannot be opened.
    """
    with open(path, "rb") as file:
        try:
            if archive_only or zipfile.is_zipfile(file):
                _check_archive(file)
            file.seek(0)
            return torch.load(file, map_location="cpu", weights_only=True)
        except Exception as error:  # the readers of zip and pickle fail in many ways on damaged files
            reason = " ".join(str(error).split())[:120] or type(error).__name__
            raise ValueError(f"{path} is not a readable checkpoint of plain tensors ({reason})") from error


def _check_archive(file):
    size = file.seek(0, io.SEEK_END)
    with zipfile.ZipFile(file) as archive:
        members = archive.infolist()
        names = {member.filename.lower() for member in members}
        if len(names) < len(members) or len({name.partition("/")[0] for name in names}) != 1:
            raise ValueError("its records are not one folder of distinct names")
        if any(".." in Path(name).parts for name in names):
            raise ValueError("a record's name leaves the archive")
        if any(m.compress_type != zipfile.ZIP_STORED or m.file_size != m.compress_size for m in members):
            raise ValueError("a record is compressed, which torch never does")
        if sum(member.file_size for member in members) > size:
            raise ValueError("its records claim to be larger than the file")
        damaged = archive.testzip()  # torch itself does not verify the checksums
        if damaged:
            raise ValueError(f"bad checksum in {damaged}")
        sizes = {member.filename.partition("/")[2]: member.file_size for member in members}
        root = members[0].filename.partition("/")[0]
        _Sizes(io.BytesIO(archive.read(f"{root}/data.pkl")), sizes).load()


class _Inert:
    """Stands for whatever has no size to check; torch decides whether it is allowed."""

    def __init__(self, *args):
        pass

    def __setstate__(self, state):
        pass


class _Sizes(pickle._Unpickler):  # the one in C allocates a table for the largest memo index it is given
    """Goes through a checkpoint's pickle making no tensors, and compares what each would need with what is there."""

    def __init__(self, file, sizes):
        super().__init__(file)
        self.sizes = sizes

    def find_class(self, module, name):
        if (module, name) in _PLAIN:
            return _PLAIN[module, name]
        if module == "torch._utils" and name in _REBUILDERS:
            return _check_tensor
        if module == "torch._utils" and name == "_rebuild_parameter":
            return _Inert
        if module in ("torch", "torch.storage") and name.endswith("Storage"):
            return _item_size(name)
        if module == "torch" and (name in ("Size", "device") or isinstance(getattr(torch, name, None), torch.dtype)):
            return _Inert
        raise pickle.UnpicklingError(f"refused {module}.{name}")

    def persistent_load(self, pid):
        kind, item_size, key, _, count = pid
        if kind != "storage" or self.sizes.get(f"data/{key}") != count * item_size:
            raise pickle.UnpicklingError(f"storage {str(key)[:20]} is not of the declared size")
        return item_size, count


def _item_size(name):
    if name == "UntypedStorage":
        return 1
    return getattr(torch, name)._dtype.itemsize


def _check_tensor(storage, offset, size, stride, *_):
    _, count = storage
    if len(size) != len(stride) or min(itertools.chain([offset], size, stride)) < 0:
        raise pickle.UnpicklingError("a tensor of negative extent")
    elements = 1
    for extent in size:
        elements *= extent
    reach = offset + sum((extent - 1) * step for extent, step in zip(size, stride, strict=True)) + 1
    if elements and (reach > count or elements > count):
        raise pickle.UnpicklingError("a tensor larger than its storage")
    return _Inert()
