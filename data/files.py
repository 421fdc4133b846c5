"""Small files, written whole or not at all."""

import json
import os
from pathlib import Path


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
    """Write ``text`` to a file so that it is there whole or not at all."""
    path = Path(path)
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        with open(temporary, "w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise OSError(f"could not write {path}: {error}; what was there is untouched") from error
    os.replace(temporary, path)
    sync_folder(path.parent)


def sync_folder(path):
    """Have the names in a folder survive a loss of power, as ``os.fsync`` has the bytes of a file."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
