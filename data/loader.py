"""Batches from uint8 images that already lie on the device.

Legend: N samples of the set, n samples of a batch, h and w the side of an image that is handed out.

Everything random about an epoch is drawn before its first batch, from a generator that is seeded by
(seed, purpose, epoch) and nothing else: a run that is resumed, split over ranks or fed by more threads sees
the same images, crops and flips at the same positions.
"""

import hashlib
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import torch

from data.image_set import take


class Batch(NamedTuple):
    """Samples of one step.

    Attributes
    ----------
    images : torch.Tensor
        (n, 3, h, w) float32 in [0, 1], channels-last in memory, on the loader's device.
    labels : torch.Tensor
        (n,) int64, on the loader's device.
    global_size : int
        Samples in this step over all ranks; n is this rank's share of it and may be 0.
    """

    images: torch.Tensor
    labels: torch.Tensor
    global_size: int


def epoch_generator(seed, purpose, epoch):
    """CPU generator for one epoch of one purpose, independent of every other generator's history."""
    digest = hashlib.sha256(f"{seed}/{purpose}/{epoch}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1)


class BatchLoader:
    """Hands out an :class:`~data.registry.ImageSet` in batches, the last and smaller one included.

    Parameters
    ----------
    image_set : ImageSet
        Stored under a preset that stores as `preset` does.
    preset : Preset
        Its random crop and flip are applied here.
    batch_size : int
        Samples a step, over all ranks.
    device : torch.device or str
        Where batches appear. The set itself is kept there too when it takes at most half of the memory that
        is free.
    shuffle : bool
        Whether the order is drawn again in every epoch.
    seed : int
    purpose : str
        Keeps the draws of different loaders apart, e.g. ``"train"`` and ``"estimate"``.
    rank, world_size : int
        This process takes the `rank`-th of `world_size` contiguous shares of every batch.

    Attributes
    ----------
    num_samples : int
        N, over all ranks.
    resident : bool
        Whether the set is kept on the device; else batches are fetched one ahead in a thread.
    description : str
        One line for the log: how many images, of what size, kept where.
    """

    def __init__(self, image_set, preset, batch_size, device, *, shuffle, seed, purpose, rank=0, world_size=1):
        assert batch_size > 0 and 0 <= rank < world_size
        assert tuple(image_set.images.shape[1:]) == (preset.size, preset.size, 3), "stored under another preset"
        self.image_set, self.preset, self.batch_size = image_set, preset, batch_size
        self.device = torch.device(device)
        self.shuffle, self.seed, self.purpose = shuffle, seed, purpose
        self.rank, self.world_size = rank, world_size
        self.num_samples = len(image_set.labels)
        self._labels = image_set.labels.to(self.device)
        # As a tensor: by a Python number CUDA multiplies with 1/255, which is not ToTensor's value in the
        # last bit.
        self._white = torch.tensor(255.0, device=self.device)
        resident = image_set.on_device(self.device)
        self.resident = resident is not None
        self._images = resident if self.resident else image_set.images

    def __len__(self):
        """Batches an epoch."""
        return -(-self.num_samples // self.batch_size)

    @property
    def description(self):
        gigabytes = self.num_samples * self.preset.size**2 * 3 / 1e9
        where = f"kept on {self.device}" if self.resident else f"streamed to {self.device}, one batch ahead"
        return (
            f"{self.num_samples} images of {self.preset.size}x{self.preset.size} "
            f"({gigabytes:.2f} GB), {where}; {self.image_set.origin}"
        )

    def epoch(self, epoch):
        """Yield the batches of one epoch.

        Parameters
        ----------
        epoch : int
            Decides, with seed and purpose, the order and every crop and flip.

        Yields
        ------
        Batch
        """
        total, preset = self.num_samples, self.preset
        generator = epoch_generator(self.seed, self.purpose, epoch)
        order = torch.randperm(total, generator=generator) if self.shuffle else torch.arange(total)
        offsets = flips = None
        if preset.crop:
            offsets = torch.randint(preset.size - preset.crop + 1, (total, 2), generator=generator)
            offsets = offsets.to(self.device, non_blocking=True)
        if preset.flip:
            flips = torch.randint(2, (total,), generator=generator).bool().to(self.device, non_blocking=True)
        order_here = order.to(self.device, non_blocking=True)

        shares = [self._share(start) for start in range(0, total, self.batch_size)]
        if self.resident:
            pixels = (take(self._images, order_here[start:stop]) for start, stop, _ in shares)
        else:
            pixels = self._streamed(order, shares)
        for (start, stop, size), stored in zip(shares, pixels, strict=True):
            drawn = [None if draws is None else draws[start:stop] for draws in (offsets, flips)]
            images = vary(stored, preset.output_size, *drawn)
            labels = self._labels.index_select(0, order_here[start:stop])
            yield Batch(images.float().div_(self._white).permute(0, 3, 1, 2), labels, size)

    def _share(self, start):
        """This rank's positions [first, last) of the batch that begins at `start`, and the size of that
        batch."""
        size = min(self.batch_size, self.num_samples - start)
        first, last = (start + size * r // self.world_size for r in (self.rank, self.rank + 1))
        return first, last, size

    def _streamed(self, order, shares):
        def fetch(start, stop):
            stored = take(self._images, order[start:stop])
            return stored.pin_memory() if self.device.type == "cuda" else stored

        with ThreadPoolExecutor(1, thread_name_prefix="prefetch") as thread:
            ahead = None
            for start, stop, _ in shares:
                current, ahead = ahead, thread.submit(fetch, start, stop)
                if current is not None:
                    yield current.result().to(self.device, non_blocking=True)
            if ahead is not None:
                yield ahead.result().to(self.device, non_blocking=True)


def vary(stored, side, offsets=None, flips=None):
    """Crop and mirror a batch of stored images, each in its own way.

    Parameters
    ----------
    stored : torch.Tensor
        (n, H, W, 3) uint8.
    side : int
        Side of the crops, in pixels.
    offsets : torch.Tensor, optional
        (n, 2) int64, top and left corner of each crop.
    flips : torch.Tensor, optional
        (n,) bool, which crops to mirror left to right.

    Returns
    -------
    torch.Tensor
        (n, side, side, 3) uint8.
    """
    if offsets is None and flips is None:
        return stored
    if stored.device.type == "cpu" and len(stored):
        return _vary_one_by_one(stored, side, offsets, flips)
    return _vary_at_once(stored, side, offsets, flips)


def _vary_one_by_one(stored, side, offsets, flips):
    """For the CPU: slices are copied whole rows at a time, 17 times as fast there as indexing pixels."""
    corners = [(0, 0)] * len(stored) if offsets is None else offsets.tolist()
    mirrored = [False] * len(stored) if flips is None else flips.tolist()
    varied = []
    for image, (top, left), mirror in zip(stored, corners, mirrored, strict=True):
        crop = image[top : top + side, left : left + side]
        varied.append(crop.flip(1) if mirror else crop)
    return torch.stack(varied)


def _vary_at_once(stored, side, offsets, flips):
    """For accelerators: one gather, and nothing that waits for the device."""
    count = len(stored)
    across = torch.arange(side, device=stored.device)
    rows = across.expand(count, side)
    columns = rows if flips is None else torch.where(flips[:, None], side - 1 - across, across)
    if offsets is not None:
        rows, columns = rows + offsets[:, :1], columns + offsets[:, 1:]
    samples = torch.arange(count, device=stored.device)
    return stored[samples[:, None, None], rows[:, :, None], columns[:, None, :]]
