"""A split of a data set: stored uint8 pictures, their labels, and where they came from."""

from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

import torch

from data.memory import available_memory

_UPLOAD_BYTES = 64 << 20  # pictures go to the device in pieces of this size


class UnreadableImage(ValueError):
    """A picture that is decoded every epoch turned out to be damaged, or its file to be gone; says which."""


def take(images, index):
    """The pictures at `index` ((n,) int64, on the device of `images`) as a new tensor (n, H, W, 3) uint8."""
    if isinstance(images, Rows):
        return take(images.base, images.rows[index])
    return images.index_select(0, index) if isinstance(images, torch.Tensor) else images[index]


class Rows:
    """Some pictures of a larger set, without a copy; indexed as a tensor of them would be."""

    def __init__(self, base, rows):
        self.base, self.rows = base, rows
        self.shape = torch.Size((len(rows), *base.shape[1:]))

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, index):
        return self.base[self.rows[index]]


class Streamed:
    """Pictures decoded anew each time they are asked for; indexed as a tensor of them would be."""

    def __init__(self, source, preset, threads):
        self._source, self._preset, self._threads, self._pool = source, preset, threads, None
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

    def _store(self, i):
        try:
            return self._preset.store(self._source.image(i), self._source.where(i))
        except (ValueError, OSError) as error:
            raise UnreadableImage(str(error)) from error


@dataclass(frozen=True, eq=False)
class ImageSet:
    """Stored pictures of one split.

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
        For the log: where the pictures are kept, and why there if not in a cache.
    """

    images: object
    labels: torch.Tensor
    names: list[str]
    origin: str
    _copies: dict = field(default_factory=dict, init=False, repr=False)

    def __len__(self):
        return len(self.labels)

    def subset(self, rows):
        """The samples `rows` ((M,) int64) of this set."""
        return ImageSet(
            Rows(self.images, rows), self.labels[rows], [self.names[i] for i in rows.tolist()], self.origin
        )

    def on_device(self, device):
        """The pictures as one tensor or view on `device`, or None where they would take over half of what is
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
