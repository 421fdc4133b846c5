"""Where images come from: files in class folders, arrays, and two data sets that are made on the spot.

Every source has ``title``, ``labels`` ((N,) int64 array), ``names``, ``len``, ``image(i)`` (PIL, mode RGB),
``where(i)`` (for messages), ``place`` (tells sources apart), ``fingerprint()`` (changes when the images
may have) and ``close()``, as :class:`data.ilmvp.LmdbSource` has.
"""

import hashlib
import json
import os
import warnings
from pathlib import Path

import numpy as np
from PIL import Image

from data.decode import open_image, upright
from data.files import printable

MAX_FILE_BYTES = 256 << 20
IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".pgm", ".avif")
_CLUTTER = ("thumbs.db", "desktop.ini", "__macosx")  # left by file managers and archives, as are hidden files


def file_stamp(path):
    """[absolute path, size in bytes, modification time in ns]: what a cache remembers of a file."""
    status = os.stat(path)
    return [os.path.abspath(path), status.st_size, status.st_mtime_ns]


class Source:
    """What sources share: a sample is named by the file or key that it comes from, and there is nothing to close."""

    def __len__(self):
        return len(self.names)

    def where(self, i):
        return self.names[i]

    def close(self):
        pass


class FileSource(Source):
    """Image files of one split, turned upright as their EXIF orientation says.

    Parameters
    ----------
    title : str
        Names the split in messages.
    place : str or Path
        Folder that holds all the files.
    paths : list of str or Path
    labels : array-like
        (N,) int.
    """

    def __init__(self, title, place, paths, labels):
        self.title, self.place, self._paths = title, os.path.abspath(place), [Path(path) for path in paths]
        self.labels = np.array(labels, dtype=np.int64)
        self.names = [printable(path) for path in paths]

    def image(self, i):
        path, where = self._paths[i], self.where(i)
        try:
            size = path.stat().st_size
            if size > MAX_FILE_BYTES:
                raise ValueError(f"{where}: {size:,} bytes; at most {MAX_FILE_BYTES:,} are read; store a smaller one")
            return upright(open_image(path.read_bytes(), where))
        except OSError as error:
            raise ValueError(f"{where}: {error.strerror}; restore or remove this image") from error

    def fingerprint(self):
        stamps = json.dumps([file_stamp(path) for path in self._paths] + self.labels.tolist())
        return hashlib.sha256(stamps.encode()).hexdigest()


class ArraySource(Source):
    """Images that lie in memory already.

    Parameters
    ----------
    title : str
    images : numpy.ndarray
        (N, h, w, 3) uint8.
    labels : array-like
        (N,) int.

    Raises
    ------
    ValueError
        Other shapes or types.
    """

    def __init__(self, title, images, labels):
        if images.dtype != np.uint8 or images.ndim != 4 or images.shape[3] != 3 or len(images) != len(labels):
            raise ValueError(
                f"{title}: images of shape {images.shape}, {images.dtype}, with {len(labels)} labels; expected "
                "(N, h, w, 3), uint8, with N"
            )
        self.title = self.place = title
        self._images = images
        self.labels = np.asarray(labels, dtype=np.int64)
        self.names = [f"{title}/{i}" for i in range(len(images))]

    def image(self, i):
        return Image.fromarray(self._images[i])

    def fingerprint(self):
        return hashlib.sha256(self._images.tobytes() + self.labels.tobytes()).hexdigest()


class BadFolders(ValueError):
    """What is wrong with class folders; ``faults`` is the list, its first one the message."""

    def __init__(self, faults):
        more = f" (and {len(faults) - 1} more; python -m tools.check_data lists them)" if len(faults) > 1 else ""
        super().__init__(faults[0] + more)
        self.faults = faults


def holds_classes(root):
    """Whether there are image files in the folders of ``root``."""
    return any(path.suffix.lower() in IMAGE_SUFFIXES for path in root.glob("*/*"))


def class_folders(root):
    """Sources of ``root/train/<class>/*`` and ``root/test/<class>/*``, and the names of the class folders.

    Without ``train`` and ``test``, the class folders may lie in ``root`` itself. Hidden files and what archives and
    file managers leave behind are passed over; anything else that is no image file is an error, so that no image is
    dropped unnoticed for its suffix.

    Parameters
    ----------
    root : Path

    Returns
    -------
    train, test : FileSource
        ``test`` is None where there is no such folder.
    class_names : list of str
        Folder names in sorted order.

    Raises
    ------
    FileNotFoundError
        There are no images, or none for training.
    BadFolders
        A class folder is empty, is found in "test" only or has a name that can't be printed, a file is no image, or a
        link leads nowhere.

    Warns
    -----
    UserWarning
        A class has no test image; ``val`` is used as the test set, where there is no ``test``, or is left out.
    """
    there = [split for split in ("train", "test", "val") if (root / split).is_dir()]
    if "train" not in there and there:
        raise FileNotFoundError(f"{root / 'train'} is not a folder; expected {root}/train/<class>/* and test/<class>/*")
    if not there and not holds_classes(root):
        raise FileNotFoundError(
            f"{root} holds no class folders with images; expected {root}/train/<class>/* and {root}/test/<class>/*, "
            f"or {root}/<class>/*"
        )
    if {"test", "val"} <= set(there):
        warnings.warn(f"{root / 'val'} is left out: {root / 'test'} is the test set", stacklevel=2)
    elif "val" in there:
        warnings.warn(f"{root} has no test folder: {root / 'val'} is the test set", stacklevel=2)
    folders = [root / split for split in there[:2]] or [root]
    faults = []
    found = [_classes(folder, faults) for folder in folders]
    names = sorted(found[0])
    untrained = [name for name in sorted(found[-1]) if name not in names]
    if untrained:
        faults.append(
            f"{folders[-1] / untrained[0]} has no counterpart in {folders[0]}; a class that is tested needs training "
            "images, add them or rename the folder"
        )
    if faults:
        raise BadFolders(faults)
    untested = [name for name in names if name not in found[-1]]
    if untested:
        warnings.warn(
            f"{folders[-1]} has no images of {listed(untested)}: the test accuracy does not tell about them",
            stacklevel=2,
        )
    sources = []
    for folder, classes in zip(folders, found, strict=True):
        pairs = [(path, label) for label, name in enumerate(names) for path in classes.get(name, [])]
        sources.append(FileSource(str(folder.relative_to(root.parent)), folder, *map(list, zip(*pairs, strict=True))))
    return sources[0], sources[1] if len(sources) > 1 else None, names


def _classes(folder, faults):
    """Class folders of one split, name to image files; what is wrong is added to ``faults``."""
    classes = {}
    for entry in _entries(folder, faults):
        if not entry.is_dir():
            faults.append(f"{printable(entry)} is not a class folder; expected {folder}/<class>/*, move or remove it")
        elif not entry.name.isprintable():
            faults.append(
                f"{printable(entry)}: the name of this class folder holds control characters or is not UTF-8; rename it"
            )
        else:
            classes[entry.name] = _image_files(entry, faults)
    if not classes and not faults:
        faults.append(f"{folder} has no class folders; expected {folder}/<class>/*")
    return classes


def _image_files(folder, faults):
    before, files = len(faults), []
    for path in _entries(folder, faults):
        if path.suffix.lower() in IMAGE_SUFFIXES and path.is_file():
            files.append(path)
        else:
            faults.append(
                f"{printable(path)} is not an image file; allowed are {' '.join(IMAGE_SUFFIXES)}; move or remove it"
            )
    if not files and len(faults) == before:
        faults.append(f"{folder} is empty; add images of this class or remove the folder")
    return files


def _entries(folder, faults):
    """What lies in a folder, sorted, without clutter and links that lead nowhere."""
    for path in sorted(folder.iterdir()):
        if path.name.lower() in _CLUTTER or path.name[0] == ".":
            continue
        if path.exists():
            yield path
        else:
            faults.append(
                f"{printable(path)} is a link to {printable(os.readlink(path))}, which is not there; restore that or "
                "remove the link"
            )


def listed(names, limit=5):
    """Up to `limit` names for a message, and how many more there are."""
    more = f" and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(repr(name) for name in names[:limit]) + more


def digits(split):
    """Scikit-learn's 1,797 handwritten digits, 8x8 enlarged to 32x32 RGB (bilinear).

    Within each class, samples alternate between training and test in the stored order.
    """
    from sklearn.datasets import load_digits

    bunch = load_digits()
    place = np.array([np.count_nonzero(bunch.target[:i] == label) for i, label in enumerate(bunch.target)])
    chosen = place % 2 == (0 if split == "train" else 1)
    grey = np.round(bunch.images[chosen] * (255 / 16)).astype(np.uint8)
    large = [Image.fromarray(image).convert("RGB").resize((32, 32), Image.Resampling.BILINEAR) for image in grey]
    return ArraySource(f"digits/{split}", np.stack([np.asarray(image) for image in large]), bunch.target[chosen])


SYNTHETIC_COLOURS = {
    "red": (200, 40, 40),
    "green": (40, 180, 60),
    "blue": (50, 70, 210),
    "yellow": (210, 200, 50),
}
SYNTHETIC_SHAPES = ("disc", "square")
SYNTHETIC_CLASSES = [f"{colour} {shape}" for colour in SYNTHETIC_COLOURS for shape in SYNTHETIC_SHAPES]


def synthetic(split):
    """Discs and squares in four colours at random places on noise, 32x32: 8 classes, 64 for training, 32 for
    test."""
    each, seed = (8, 0) if split == "train" else (4, 1)
    random = np.random.RandomState(seed)  # its stream is frozen across NumPy versions
    y, x = np.mgrid[:32, :32]
    images, labels = [], []
    for label in range(len(SYNTHETIC_CLASSES)):
        colour = list(SYNTHETIC_COLOURS.values())[label // len(SYNTHETIC_SHAPES)]
        for _ in range(each):
            radius, centre = random.randint(6, 11), random.randint(11, 21, 2)
            dy, dx = abs(y - centre[0]), abs(x - centre[1])
            square = SYNTHETIC_SHAPES[label % len(SYNTHETIC_SHAPES)] == "square"
            inside = np.maximum(dy, dx) <= radius if square else dy**2 + dx**2 <= radius**2
            image = random.randint(0, 80, (32, 32, 3))
            image[inside] = np.array(colour) + random.randint(-30, 31, (int(inside.sum()), 3))
            images.append(image.astype(np.uint8))
            labels.append(label)
    return ArraySource(f"synthetic/{split}", np.stack(images), labels)
