"""A split of a data set: stored uint8 images, their labels, and where they came from."""

import hashlib
import json
import zlib
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

import numpy as np
import torch

from data.memory import available_memory

_UPLOAD_BYTES = 64 << 20  # images go to the device in pieces of this size


class UnreadableImage(ValueError):
    """An image that is decoded every epoch turned out to be damaged, or its file to be gone; says which."""


def take(images, index):
    """The images at `index` ((n,) int64, on the device of `images`) as a new tensor (n, H, W, 3) uint8."""
    if isinstance(images, Rows):
        return take(images.base, images.rows[index])
    return images.index_select(0, index) if isinstance(images, torch.Tensor) else images[index]


class Rows:
    """Some images of a larger set, without a copy; indexed as a tensor of them would be."""

    def __init__(self, base, rows):
        self.base, self.rows = base, rows
        self.shape = torch.Size((len(rows), *base.shape[1:]))

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, index):
        return self.base[self.rows[index]]


def checksum(image):
    """CRC-32 of a stored image, (H, W, 3) uint8; gigabytes a second."""
    return zlib.crc32(np.ascontiguousarray(image))


class Streamed:
    """Images decoded again each time they are asked for; indexed as a tensor of them would be."""

    def __init__(self, source, preset, threads):
        self._source, self._preset, self._threads, self._pool = source, preset, threads, None
        self._checksums = {}
        self.shape = torch.Size((len(source), preset.size, preset.size, 3))

    def __len__(self):
        return self.shape[0]

    def __getitem__(self, index):
        index = torch.arange(len(self))[index]
        if index.ndim == 0:
            return torch.from_numpy(self._store(int(index)).copy())
        if self._pool is None:  # threads do not survive a fork, so none are started before they are needed
            self._pool = ThreadPoolExecutor(self._threads, thread_name_prefix="decode")
        out = torch.empty((len(index), *self.shape[1:]), dtype=torch.uint8)
        for place, stored in zip(out.numpy(), self._pool.map(self._store, index.tolist()), strict=True):
            place[...] = stored
        return out

    def checksums(self, rows):
        """`checksum` of the images at `rows` ((M,) int64), a list; decodes those that were not decoded before."""
        unseen = [i for i in rows.tolist() if i not in self._checksums]
        for start in range(0, len(unseen), 64):
            self[torch.tensor(unseen[start : start + 64])]
        return [self._checksums[i] for i in rows.tolist()]

    def _store(self, i):
        try:
            stored = self._preset.store(self._source.image(i), self._source.where(i))
        except (ValueError, OSError) as error:
            raise UnreadableImage(str(error)) from error
        if i not in self._checksums:
            self._checksums[i] = checksum(stored)
        return stored


@dataclass(frozen=True, eq=False)
class ImageSet:
    """Stored images of one split.

    Attributes
    ----------
    images : torch.Tensor, Rows or Streamed
        (N, H, W, 3) uint8, usually mapped from the cache file: to be read, never written. All three have
        ``len``, ``shape`` and take a slice or an int64 index tensor.
    labels : torch.Tensor
        (N,) int64.
    names : list of str
        Key or file of each sample.
    origin : str
        For the log: where the images are kept, and why there if not in a cache.
    checksums : list of int, optional
        `checksum` of each image; images that are streamed know their own.
    """

    images: object
    labels: torch.Tensor
    names: list[str]
    origin: str
    checksums: list[int] | None = None
    _copies: dict = field(default_factory=dict, init=False, repr=False)

    def __len__(self):
        return len(self.labels)

    def subset(self, rows):
        """The samples `rows` ((M,) int64) of this set."""
        whole, picked = self.images, rows.tolist()
        images = Rows(whole.base, whole.rows[rows]) if isinstance(whole, Rows) else Rows(whole, rows)
        checksums = self.checksums and [self.checksums[i] for i in picked]
        return ImageSet(images, self.labels[rows], [self.names[i] for i in picked], self.origin, checksums)

    @property
    def fingerprint(self):
        """Hex digest of labels and stored images, in order.

        It is the same wherever the data lie and however the images are kept; other presets store other images, and
        other versions of Pillow may. Where images are streamed, those that no epoch has decoded yet are decoded.
        """
        checksums = self.checksums
        if checksums is None:
            rows = self.images.rows if isinstance(self.images, Rows) else torch.arange(len(self))
            checksums = getattr(self.images, "base", self.images).checksums(rows)
        described = [list(self.images.shape), self.labels.tolist(), checksums]
        return hashlib.sha256(json.dumps(described).encode()).hexdigest()

    def on_device(self, device):
        """The images as one tensor or view on `device`, or None where they would take over half of what is
        free.

        Loaders of the same set share one copy. On the CPU nothing is copied: the mapped file is what is read.
        """
        base = self.images.base if isinstance(self.images, Rows) else self.images
        if isinstance(base, Streamed):
            return None
        needed = self.images.shape.numel()
        if device.type == "cpu":
            return self.images if needed <= available_memory() // 2 else None
        if device not in self._copies:
            free = torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else available_memory()
            if needed > free // 2:
                return None
            copy = torch.empty(self.images.shape, dtype=torch.uint8, device=device)
            step = max(1, _UPLOAD_BYTES // self.images.shape[1:].numel())
            for start in range(0, len(self), step):
                copy[start : start + step] = self.images[start : start + step]
            self._copies[device] = copy
        return self._copies[device]
