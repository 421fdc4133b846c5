"""Decode a split once and keep it as a file that maps into memory.

A cache file is a ``.npy`` array (N, H, W, 3) uint8 (``numpy.load`` reads it), followed by a JSON trailer
with labels, names, what the pictures were made from, and a checksum. It is written beside its place, flushed
to disk and renamed, so it is whole or absent; one that is cut off, damaged or older than its source is made
again.
"""

import contextlib
import functools
import glob
import io
import json
import math
import os
import shutil
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
_ABANDONED_SECONDS = 24 * 3600


class CacheError(OSError):
    """The cache file can't be written: no room, no permission."""


def stored_images(source, preset, cache_file, *, threads, progress, check):
    """Pictures of `source` as `preset` stores them: from the cache file, else decoded now.

    Where the file can't be written the pictures are kept in memory, and where they do not fit there either
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
        bar = tqdm(
            total=len(source), desc=f"decoding {source.title}", unit="img", disable=None if progress else True
        )
        with bar, ThreadPoolExecutor(threads, thread_name_prefix="decode") as pool:
            chunks = functools.partial(_decoded, source, preset, pool, threads, bar)
            if cache_file is not None:
                try:
                    _write(cache_file, fingerprint, preset, source, chunks())
                    written = _read(cache_file, fingerprint, preset)
                    if written is not None:
                        return written
                    reason = f"{cache_file} could not be read back"
                except CacheError as error:
                    reason = str(error)
                bar.reset()
            labels, names = torch.from_numpy(source.labels), source.names
            if len(source) * preset.size**2 * 3 <= available_memory() // 2:
                images = torch.empty((len(source), preset.size, preset.size, 3), dtype=torch.uint8)
                start = 0
                for chunk in chunks():
                    images[start : start + len(chunk)] = torch.from_numpy(chunk)
                    start += len(chunk)
                return ImageSet(images, labels, names, f"decoded into memory ({reason})")
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
    """Stored pictures in order, in chunks, so that few wait in memory when writing is slower than
    decoding."""

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
    """CRC-32 over the sums of 64 KiB blocks: gigabytes a second, of what the first epoch reads anyway."""
    flat = images.reshape(-1)
    whole = flat.size // _BLOCK_BYTES
    blocks = flat[: whole * _BLOCK_BYTES].view(np.int64).reshape(whole, _BLOCK_BYTES // 8)
    return zlib.crc32(flat[whole * _BLOCK_BYTES :], zlib.crc32(blocks.sum(axis=1).tobytes()))


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
        shape = (len(trailer["labels"]), preset.size, preset.size, 3)
        if end - length != trailer["offset"] + math.prod(shape):
            return None
        # Copy-on-write, only because torch warns of arrays that can't be written; nobody writes.
        images = np.memmap(path, np.uint8, "c", trailer["offset"], shape)
        if _checksum(images) != trailer["checksum"]:
            return None
    except (OSError, ValueError, KeyError, TypeError):
        return None
    labels = torch.tensor(trailer["labels"], dtype=torch.int64)
    return ImageSet(torch.from_numpy(images), labels, trailer["names"], f"cache {path}")


def _write(path, fingerprint, preset, source, chunks):
    """Write a cache file, or raise and leave nothing behind, folders included."""
    shape = (len(source), preset.size, preset.size, 3)
    missing = [folder for folder in (path.parent, *path.parent.parents) if not folder.exists()]
    needed, draft = math.prod(shape), None

    @contextlib.contextmanager
    def of_the_cache():  # an OSError of the source is not one of the cache
        try:
            yield
        except OSError as error:
            reason = error.strerror or error
            raise CacheError(f"no cache at {path}: {reason}; {needed:,} bytes are needed") from None

    try:
        with of_the_cache():
            path.parent.mkdir(parents=True, exist_ok=True)
            _remove_abandoned(path)
            free = shutil.disk_usage(path.parent).free
            if free < needed:
                raise OSError(f"only {free:,} bytes are free")
            descriptor, draft = tempfile.mkstemp(prefix=f".{path.name}.", suffix=".tmp", dir=path.parent)
        with open(descriptor, "wb", buffering=0) as file:
            header = io.BytesIO()
            np.lib.format.write_array_header_1_0(
                header, {"descr": "|u1", "fortran_order": False, "shape": shape}
            )
            with of_the_cache():
                _write_all(file, header.getvalue())
            for chunk in chunks:
                with of_the_cache():
                    _write_all(file, chunk.data)
            with of_the_cache():
                offset = file.tell() - needed
                trailer = {
                    "key": _key(fingerprint, preset),
                    "offset": offset,
                    "checksum": _checksum(np.memmap(draft, np.uint8, "r", offset, shape)),
                    "labels": source.labels.tolist(),
                    "names": source.names,
                }
                trailer = json.dumps(trailer).encode()
                _write_all(file, trailer + _FOOTER.pack(len(trailer), zlib.crc32(trailer), _MAGIC))
                os.fsync(descriptor)
                os.replace(draft, path)
    except BaseException:
        if draft is not None:
            Path(draft).unlink(missing_ok=True)
        for folder in missing:
            with contextlib.suppress(OSError):  # never made, or used by somebody else by now
                folder.rmdir()
        raise


def _write_all(file, data):
    """Write `data` without a buffer, which would try once more, and raise once more, when it is closed."""
    data = memoryview(data).cast("B")
    while len(data):
        data = data[file.write(data) :]


def _remove_abandoned(path):
    """Delete the drafts that killed processes left for this file."""
    for draft in path.parent.glob(f".{glob.escape(path.name)}.*.tmp"):
        with contextlib.suppress(FileNotFoundError):
            if time.time() - draft.stat().st_mtime > _ABANDONED_SECONDS:
                draft.unlink()
