"""Decode a split once and keep it as a file that maps into memory.

A cache file is a ``.npy`` array (N, H, W, 3) uint8 (``numpy.load`` reads it), followed by a JSON trailer with labels,
names, what the pictures were made from, and a checksum. It is written beside its place, flushed to disk and renamed,
so it is whole or absent; one that is cut off, damaged or older than its source is made again.
"""

import json
import os
import struct
import tempfile
import time
import zlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import PIL
import torch
from tqdm import tqdm

from data.image_set import ImageSet, Streamed
from data.memory import available_memory

_FOOTER = struct.Struct("<QI8s")  # length and CRC-32 of the trailer, then:
_MAGIC = b"BLMCACHE"
_VERSION = 1
_BLOCK_BYTES = 64 << 10
_MAX_CHECKED_BLOCKS = 16384  # 1 GiB: what opening a cache may cost in reading
_ABANDONED_SECONDS = 24 * 3600


class CacheError(OSError):
    """The cache file can't be written: no room, no permission."""


def stored_images(source, preset, cache_file, *, threads, progress, check):
    """Pictures of `source` as `preset` stores them: from the cache file, else decoded now.

    Where the file can't be written the pictures are kept in memory, and where they do not fit there either they are
    decoded in every epoch; ``origin`` of the result says so.

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
        reason = "no cache folder given"
    else:
        fingerprint = source.fingerprint()
        cached = _read(cache_file, fingerprint, preset)
        if cached is not None:
            check(cached.labels.numpy())
            return cached
    labels = source.labels
    check(labels)
    shape = (len(source), preset.size, preset.size, 3)
    bar = tqdm(
        total=len(source), desc=f"decoding {source.title}", unit="img", disable=None if progress else True
    )
    with bar, ThreadPoolExecutor(threads, thread_name_prefix="decode") as pool:
        chunks = _decoded(source, preset, pool, threads, bar)
        if cache_file is not None:
            try:
                _write(cache_file, fingerprint, preset, shape, labels, source.names, chunks)
                written = _read(cache_file, fingerprint, preset)
                if written is not None:
                    source.close()
                    return written
                reason = f"{cache_file} could not be read back"
            except CacheError as error:
                reason = str(error)
            bar.reset()
            chunks = _decoded(source, preset, pool, threads, bar)
        if np.prod(shape, dtype=np.int64) <= available_memory() // 2:
            images, start = torch.empty(shape, dtype=torch.uint8), 0
            for chunk in chunks:
                images[start : start + len(chunk)] = torch.from_numpy(chunk)
                start += len(chunk)
            source.close()
            return ImageSet(images, torch.from_numpy(labels), source.names, f"decoded into memory ({reason})")
    images = Streamed(source, preset, threads)
    return ImageSet(images, torch.from_numpy(labels), source.names, f"decoded in every epoch ({reason})")


def _decoded(source, preset, pool, threads, bar):
    """Stored pictures in order, in chunks, so that few wait in memory when writing is slower than decoding."""

    def store(i):
        return preset.store(source.image(i), source.where(i))

    total, step = len(source), 32 * threads
    for start in range(0, total, step):
        chunk = np.stack(list(pool.map(store, range(start, min(start + step, total)))))
        bar.update(len(chunk))
        yield chunk


def _key(fingerprint, preset):
    return {"version": _VERSION, "source": fingerprint, "storage": preset.storage, "pillow": PIL.__version__}


def _checksum(images):
    """CRC-32 over the sums of 64 KiB blocks, evenly spread ones where there are many: gigabytes a second."""
    flat = images.reshape(-1)
    whole = flat.size // _BLOCK_BYTES
    blocks = flat[: whole * _BLOCK_BYTES].view(np.int64).reshape(whole, _BLOCK_BYTES // 8)
    sums = blocks[:: max(1, -(-whole // _MAX_CHECKED_BLOCKS))].sum(axis=1)
    return zlib.crc32(flat[whole * _BLOCK_BYTES :], zlib.crc32(sums.tobytes()))


def _read(path, fingerprint, preset):
    """The cached pictures, or None where the file is absent, damaged, or made from something else."""
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
        # Copy-on-write, only because torch warns of arrays that can't be written; nobody writes.
        images = np.load(path, mmap_mode="c", allow_pickle=False)
        expected = (len(trailer["labels"]), preset.size, preset.size, 3)
        if images.dtype != np.uint8 or images.shape != expected or _checksum(images) != trailer["checksum"]:
            return None
    except (OSError, ValueError, KeyError, TypeError, struct.error):
        return None
    labels = torch.tensor(trailer["labels"], dtype=torch.int64)
    return ImageSet(torch.from_numpy(images), labels, trailer["names"], f"cache {path}")


def _write(path, fingerprint, preset, shape, labels, names, chunks):
    """Write a cache file, or raise and leave nothing behind, folders included."""
    needed = int(np.prod(shape, dtype=np.int64))
    made, draft = [], None

    def unavailable(error):
        reason = error.strerror or str(error)
        return CacheError(f"no cache at {path}: {reason}; {needed:,} bytes are needed")

    try:
        try:
            made = _make_folder(path.parent)
            _remove_abandoned(path)
            descriptor, draft = tempfile.mkstemp(prefix=f".{path.name}.", suffix=".tmp", dir=path.parent)
            file = os.fdopen(descriptor, "w+b")
        except OSError as error:
            raise unavailable(error) from None
        with file:
            try:
                _reserve(descriptor, needed)
                np.lib.format.write_array_header_1_0(
                    file, {"descr": "|u1", "fortran_order": False, "shape": tuple(shape)}
                )
                file.flush()
                offset = file.tell()
            except OSError as error:
                raise unavailable(error) from None
            for chunk in chunks:  # an OSError of the source is not one of the cache
                try:
                    file.write(chunk)
                except OSError as error:
                    raise unavailable(error) from None
            try:
                file.flush()
                images = np.memmap(draft, np.uint8, "r", offset, tuple(shape))
                trailer = {
                    "key": _key(fingerprint, preset),
                    "checksum": _checksum(images),
                    "labels": labels.tolist(),
                    "names": names,
                }
                trailer = json.dumps(trailer).encode()
                file.write(trailer + _FOOTER.pack(len(trailer), zlib.crc32(trailer), _MAGIC))
                file.truncate()
                file.flush()
                os.fsync(descriptor)
                os.replace(draft, path)
            except OSError as error:
                raise unavailable(error) from None
    except BaseException:
        if draft is not None:
            Path(draft).unlink(missing_ok=True)
        for folder in reversed(made):
            try:
                folder.rmdir()
            except OSError:
                break  # somebody else uses it by now
        raise


def _make_folder(folder):
    """Create `folder`; return the folders that were not there before, outermost first."""
    missing = [parent for parent in (folder, *folder.parents) if not parent.exists()][::-1]
    folder.mkdir(parents=True, exist_ok=True)
    return missing


def _reserve(descriptor, needed):
    """Claim the room before hours of decoding, where the file system can."""
    free = os.fstatvfs(descriptor)
    if free.f_bavail * free.f_frsize < needed:
        raise OSError(f"only {free.f_bavail * free.f_frsize:,} bytes are free")


def _remove_abandoned(path):
    """Delete the drafts that killed processes left for this file."""
    for draft in path.parent.glob(f".{path.name}.*.tmp"):
        if time.time() - draft.stat().st_mtime > _ABANDONED_SECONDS:
            draft.unlink(missing_ok=True)
