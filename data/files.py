"""Files that are there whole or not at all, also after a crash or a loss of power."""

import contextlib
import glob
import json
import os
import secrets
import shutil
import time
from pathlib import Path

_ABANDONED_SECONDS = 24 * 3600


@contextlib.contextmanager
def written_whole(path, *, folder=False):
    """Have a file appear whole or not at all.

    Drafts that killed processes left for the same `path` are removed after a day.

    Parameters
    ----------
    path : str or Path
        Its folder must exist. A file of that name is replaced.
    folder : bool
        Whether it is a folder of files, which may replace an empty one only.

    Yields
    ------
    Path
        A new, empty file (or folder) beside `path`, with the mode that the umask gives, to be written by its
        name. At the end it is flushed to disk and takes the name `path`.

    Raises
    ------
    OSError
        The disk is full or refuses; names `path`. After this or any other exception nothing is left behind, and
        what was at `path` is untouched.
    """
    path = Path(path)
    draft = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
    try:
        _remove_abandoned(path)
        draft.mkdir() if folder else draft.touch(exist_ok=False)
        yield draft
        for written in (draft, *(draft.rglob("*") if folder else ())):
            sync_folder(written)
        os.replace(draft, path)
        sync_folder(path.parent)
    except BaseException as error:
        with contextlib.suppress(OSError):
            shutil.rmtree(draft) if folder else draft.unlink()
        if not isinstance(error, OSError):
            raise
        about = "" if error.filename in (None, str(draft)) else f" ({error.filename})"
        raise OSError(
            f"could not write {path}: {error.strerror or error}{about}; what was there is untouched"
        ) from error


def _remove_abandoned(path):
    for draft in path.parent.glob(f".{glob.escape(path.name)}.*.tmp"):
        with contextlib.suppress(OSError):  # another process was faster
            if time.time() - draft.stat().st_mtime > _ABANDONED_SECONDS:
                shutil.rmtree(draft) if draft.is_dir() else draft.unlink()


def sync_folder(path):
    """Have the names in a folder, or the bytes of a file, survive a loss of power."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def printable(text):
    """`text`, or where it holds control or escape characters or is no UTF-8, its escaped form."""
    text = str(text)
    return text if text.isprintable() else ascii(text)[1:-1]


def read_json(path):
    """The content of a JSON file; ValueError names the file where it holds none."""
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} holds no valid JSON ({error})") from error


def write_json(path, value):
    """Write ``value`` to a JSON file so that it is there whole or not at all."""
    write_text(path, json.dumps(value, indent=2) + "\n")


def write_text(path, text):
    """Write ``text`` to a UTF-8 file so that it is there whole or not at all."""
    with written_whole(path) as draft:
        draft.write_text(text, encoding="utf-8")
