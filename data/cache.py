"""Decode a split once and keep it as a file that maps into memory.

A cache file is a ``.npy`` array (N, H, W, 3) uint8 (``numpy.load`` reads it), followed by a JSON trailer
with labels, names, what the images were made from, and the checksum of each. It is whole or absent; one that is
cut off, damaged or older than its source is made again.
"""

import contextlib
import functools
import json
import math
import os
import shutil
import struct
import zlib
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import PIL
import torch
from tqdm import tqdm

from data.files import written_whole
from data.image_set import ImageSet, Streamed, checksum
from data.memory import available_memory

_FOOTER = struct.Struct("<QI8s")  # length and CRC-32 of the trailer, then:
_MAGIC = b"BLMCACHE"
_VERSION = 2


def stored_images(source, preset, cache_file, *, threads, progress, check):
    """Images of `source` as `preset` stores them: from the cache file, else decoded now.

    Where the file can't be written the images are kept in memory, and where they do not fit there either
    they are decoded in every epoch; ``origin`` of the result says so.

    Parameters
    ----------
    source : LmdbSource, FileSource or ArraySource
    preset : Preset
    cache_file : Path or None
        None keeps no cache.
    threads : int
        Decoding threads.
    progress : bool
        Whether to show a progress bar (on a terminal only).
    check : callable
        Called with the labels, (N,) int64 array, before anything is decoded; raises if they are wrong.

    Returns
    -------
    ImageSet
    """
    if cache_file is None:
        reason = "not cached"
    else:
        fingerprint = source.fingerprint()
        cached = _read(cache_file, fingerprint, preset)
        if cached is not None:
            check(cached.labels.numpy())
            return cached
    try:
        check(source.labels)
        bar = tqdm(total=len(source), desc=f"decoding {source.title}", unit="img", disable=None if progress else True)
        with bar, ThreadPoolExecutor(threads, thread_name_prefix="decode") as pool:
            chunks = functools.partial(_decoded, source, preset, pool, threads, bar)
            if cache_file is not None:
                try:
                    _write(cache_file, fingerprint, preset, source, chunks())
                    written = _read(cache_file, fingerprint, preset)
                    if written is not None:
                        return written
                    reason = f"{cache_file} could not be read back"
                except OSError as error:
                    reason = str(error)
                bar.reset()
            labels, names = torch.from_numpy(source.labels), source.names
            if len(source) * preset.size**2 * 3 <= available_memory() // 2:
                images, checksums = torch.empty((len(source), preset.size, preset.size, 3), dtype=torch.uint8), []
                for stored, sums in chunks():
                    images[len(checksums) : len(checksums) + len(sums)] = torch.from_numpy(stored)
                    checksums += sums
                return ImageSet(images, labels, names, f"decoded into memory ({reason})", checksums)
        return ImageSet(Streamed(source, preset, threads), labels, names, f"decoded every epoch ({reason})")
    finally:
        source.close()


@contextlib.contextmanager
def all_or_none(cache_files):
    """Where bad input ends the code within, remove those of the files, and of their folders, that it made."""
    missing = {path for file in cache_files for path in (file, *file.parents) if not path.exists()}
    try:
        yield
    except (ValueError, OSError):
        for path in sorted(missing, key=lambda path: len(path.parts), reverse=True):
            with contextlib.suppress(OSError):  # never made, or used by somebody else by now
                path.rmdir() if path.is_dir() else path.unlink()
        raise


def _decoded(source, preset, pool, threads, bar):
    """Stored images in order and their checksums, in chunks, so that few wait in memory when writing is slower than
    decoding."""

    def store(i):
        try:
            stored = preset.store(source.image(i), source.where(i))
        except OSError as error:  # of the source; others are the cache's
            raise ValueError(f"{source.where(i)}: {error.strerror or error}; restore or remove this image") from error
        return stored, checksum(stored)

    total, step = len(source), 32 * threads
    for start in range(0, total, step):
        images, checksums = zip(*pool.map(store, range(start, min(start + step, total))), strict=True)
        bar.update(len(images))
        yield np.stack(images), list(checksums)


def _key(fingerprint, preset):
    return {"version": _VERSION, "source": fingerprint, "storage": preset.storage, "pillow": PIL.__version__}


def _read(path, fingerprint, preset):
    """The cached images, or None where the file is absent, damaged, or made from something else."""
    try:
        with open(path, "rb") as file:
            file.seek(-_FOOTER.size, os.SEEK_END)
            end = file.tell()
            length, crc, magic = _FOOTER.unpack(file.read())
            if magic != _MAGIC or length > end:
                return None
            file.seek(end - length)
            trailer = file.read(length)
        if zlib.crc32(trailer) != crc:
            return None
        trailer = json.loads(trailer)
        if trailer["key"] != _key(fingerprint, preset):
            return None
        shape = (len(trailer["labels"]), preset.size, preset.size, 3)
        if end - length != trailer["offset"] + math.prod(shape):
            return None
        # Copy-on-write, only because torch warns of arrays that can't be written; nobody writes.
        images = np.memmap(path, np.uint8, "c", trailer["offset"], shape)
        if [checksum(image) for image in images] != trailer["checksums"]:
            return None
    except (OSError, ValueError, KeyError, TypeError):
        return None
    labels = torch.tensor(trailer["labels"], dtype=torch.int64)
    return ImageSet(torch.from_numpy(images), labels, trailer["names"], f"cache {path}", trailer["checksums"])


def _write(path, fingerprint, preset, source, chunks):
    """Write a cache file, or raise an OSError and leave nothing behind, folders included."""
    shape, checksums = (len(source), preset.size, preset.size, 3), []
    needed = math.prod(shape)
    with all_or_none([path]):
        path.parent.mkdir(parents=True, exist_ok=True)
        free = shutil.disk_usage(path.parent).free
        if free < needed:
            raise OSError(f"could not write {path}: {needed:,} bytes are needed, {free:,} are free")
        with written_whole(path) as draft, open(draft, "wb") as file:
            np.lib.format.write_array_header_1_0(file, {"descr": "|u1", "fortran_order": False, "shape": shape})
            for images, sums in chunks:
                file.write(images.data)
                checksums += sums
            trailer = {
                "key": _key(fingerprint, preset),
                "offset": file.tell() - needed,
                "checksums": checksums,
                "labels": source.labels.tolist(),
                "names": source.names,
            }
            trailer = json.dumps(trailer).encode()
            file.write(trailer + _FOOTER.pack(len(trailer), zlib.crc32(trailer), _MAGIC))
