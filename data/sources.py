"""Where pictures come from: files in class folders, torchvision's data sets, and two that are made on the
spot.

Every source has ``title``, ``labels`` ((N,) int64 array), ``names``, ``len``, ``image(i)`` (PIL, mode RGB),
``where(i)`` (for messages), ``place`` (tells sources apart), ``fingerprint()`` (changes when the pictures
may have) and ``close()``, as :class:`data.ilmvp.LmdbSource` has.
"""

import hashlib
import json
import os
from pathlib import Path

import numpy as np
from PIL import Image

from data.class_names import CIFAR10, CIFAR100, GTSRB
from data.decode import open_image

MAX_FILE_BYTES = 256 << 20
IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".pgm")
_CLUTTER = ("thumbs.db", "desktop.ini")  # left in folders by file managers, as are hidden files


def file_stamp(path):
    """[absolute path, size in bytes, modification time in ns]: what a cache remembers of a file."""
    status = os.stat(path)
    return [os.path.abspath(path), status.st_size, status.st_mtime_ns]


class FileSource:
    """Image files of one split.

    Parameters
    ----------
    title : str
        Names the split in messages.
    place : str or Path
        Folder that holds all the files.
    paths : list of Path
    labels : list of int
    """

    def __init__(self, title, place, paths, labels):
        self.title, self.place, self._paths = title, os.path.abspath(place), paths
        self.labels = np.array(labels, dtype=np.int64)
        self.names = [str(path) for path in paths]

    def __len__(self):
        return len(self._paths)

    def where(self, i):
        return self.names[i]

    def image(self, i):
        size = self._paths[i].stat().st_size
        if size > MAX_FILE_BYTES:
            raise ValueError(
                f"{self.where(i)}: {size:,} bytes; at most {MAX_FILE_BYTES:,} are read; store a smaller one"
            )
        return open_image(self._paths[i].read_bytes(), self.where(i))

    def fingerprint(self):
        stamps = json.dumps([file_stamp(path) for path in self._paths] + self.labels.tolist())
        return hashlib.sha256(stamps.encode()).hexdigest()

    def close(self):
        pass


class ArraySource:
    """Pictures that lie in memory already.

    Parameters
    ----------
    title : str
    images : numpy.ndarray
        (N, h, w, 3) uint8.
    labels : array-like
        (N,) int.
    """

    def __init__(self, title, images, labels):
        self.title = self.place = title
        self._images = images
        self.labels = np.asarray(labels, dtype=np.int64)
        self.names = [f"{title}/{i}" for i in range(len(images))]

    def __len__(self):
        return len(self._images)

    def where(self, i):
        return self.names[i]

    def image(self, i):
        return Image.fromarray(self._images[i])

    def fingerprint(self):
        return hashlib.sha256(self._images.tobytes() + self.labels.tobytes()).hexdigest()

    def close(self):
        pass


class TorchvisionSource:
    """One split of a torchvision data set, loaded (and downloaded where it is missing) when first needed.

    Parameters
    ----------
    name : {"cifar10", "cifar100", "svhn", "gtsrb"}
    root : str or Path
        Folder that holds what `TORCHVISION` names, in torchvision's own layout.
    split : {"train", "test"}

    Raises
    ------
    FileNotFoundError
        When first needed: it is not there and can't be downloaded.
    """

    def __init__(self, name, root, split):
        self.title, self.place = f"{name}/{split}", os.path.abspath(root)
        self._name, self._root, self._split = name, Path(root), split
        self._loaded = None

    @property
    def _source(self):
        if self._loaded is None:
            self._loaded = self._load()
        return self._loaded

    def _load(self):
        from models.torchvision_shim import ensure_torchvision

        ensure_torchvision()
        from torchvision import datasets

        factory, content, address, _ = TORCHVISION[self._name]
        there = self._root.exists()
        how = {"train": self._split == "train"} if self._name.startswith("cifar") else {"split": self._split}
        try:
            dataset = getattr(datasets, factory)(self._root, download=True, **how)
        except Exception as error:  # network, archive and file system all raise their own
            if not there and self._root.is_dir() and not any(self._root.iterdir()):
                self._root.rmdir()
            reason = str(error).partition("\n")[0][:120]
            raise FileNotFoundError(
                f"{self._name} is not whole in {self._root} and could not be downloaded ({reason}); fetch "
                f"{address} and unpack it so that {self._root / content.format(split=self._split)} exists"
            ) from None
        if self._name == "gtsrb":
            paths, labels = zip(*dataset._samples, strict=True)
            return FileSource(self.title, self._root, [Path(path) for path in paths], labels)
        if self._name == "svhn":
            return ArraySource(self.title, dataset.data.transpose(0, 2, 3, 1).copy(), dataset.labels)
        return ArraySource(self.title, dataset.data, dataset.targets)

    def fingerprint(self):
        content = self._root / TORCHVISION[self._name][1].format(split=self._split)
        if not content.exists():
            self._source  # noqa: B018 - downloads
        files = (
            sorted(path for path in content.rglob("*") if path.is_file()) if content.is_dir() else [content]
        )
        return hashlib.sha256(json.dumps([file_stamp(path) for path in files]).encode()).hexdigest()

    @property
    def labels(self):
        return self._source.labels

    @property
    def names(self):
        return self._source.names

    def __len__(self):
        return len(self._source)

    def where(self, i):
        return self._source.where(i)

    def image(self, i):
        return self._source.image(i)

    def close(self):
        self._loaded = None


# name: class in torchvision.datasets, what it keeps under the data path, where it is from, class names
TORCHVISION = {
    "cifar10": (
        "CIFAR10",
        "cifar-10-batches-py",
        "https://www.cs.toronto.edu/~kriz/cifar-10-python.tar.gz",
        CIFAR10,
    ),
    "cifar100": (
        "CIFAR100",
        "cifar-100-python",
        "https://www.cs.toronto.edu/~kriz/cifar-100-python.tar.gz",
        CIFAR100,
    ),
    "svhn": (
        "SVHN",
        "{split}_32x32.mat",
        "http://ufldl.stanford.edu/housenumbers/ (train_32x32.mat and test_32x32.mat)",
        [str(digit) for digit in range(10)],
    ),
    "gtsrb": (
        "GTSRB",
        "gtsrb",
        "https://sid.erda.dk/public/archives/daaeac0d7ce1152aea9b61d9f1e19370/ (GTSRB-Training_fixed.zip, "
        "GTSRB_Final_Test_Images.zip and GTSRB_Final_Test_GT.zip, into gtsrb/)",
        GTSRB,
    ),
}


def class_folders(root):
    """Sources of ``root/train/<class>/*`` and ``root/test/<class>/*``, and the names of the class folders.

    Hidden files are passed over; anything else that is no image file is an error, so that no picture is
    dropped unnoticed for its suffix.

    Parameters
    ----------
    root : Path

    Returns
    -------
    train, test : FileSource
    class_names : list of str
        Folder names in sorted order.

    Raises
    ------
    FileNotFoundError, ValueError
        A split is missing, a class folder is empty or is found in "test" only, or a file is no image.
    """
    found = {}
    for split in ("train", "test"):
        folder = root / split
        if not folder.is_dir():
            raise FileNotFoundError(
                f"{folder} is not a folder; expected {root}/train/<class>/* and {root}/test/<class>/*"
            )
        found[split] = {}
        for entry in sorted(folder.iterdir()):
            if _is_clutter(entry):
                continue
            if not entry.is_dir():
                raise ValueError(
                    f"{entry} is not a class folder; expected {folder}/<class>/*, move or remove it"
                )
            found[split][entry.name] = _image_files(entry)
        if not found[split]:
            raise ValueError(f"{folder} has no class folders; expected {folder}/<class>/*")
    names = sorted(found["train"])
    unknown = sorted(found["test"].keys() - found["train"].keys())
    if unknown:
        raise ValueError(
            f"{root / 'test' / unknown[0]} has no counterpart in {root / 'train'}; a class that is tested "
            "needs training images, add them or rename the folder"
        )
    sources = []
    for split in ("train", "test"):
        pairs = [(path, label) for label, name in enumerate(names) for path in found[split].get(name, [])]
        paths, labels = zip(*pairs, strict=True)
        sources.append(FileSource(f"{root.name}/{split}", root / split, list(paths), list(labels)))
    return *sources, names


def _is_clutter(path):
    return path.name.startswith(".") or path.name.lower() in _CLUTTER


def _image_files(folder):
    files = [path for path in sorted(folder.iterdir()) if not _is_clutter(path)]
    if not files:
        raise ValueError(f"{folder} is empty; add images of this class or remove the folder")
    for path in files:
        if path.suffix.lower() not in IMAGE_SUFFIXES or not path.is_file():
            raise ValueError(
                f"{path} is not an image file; allowed are {' '.join(IMAGE_SUFFIXES)}; move or remove it"
            )
    return files


def digits(split):
    """Scikit-learn's 1,797 handwritten digits, 8x8 enlarged to 32x32 RGB (bilinear).

    Within each class, samples alternate between training and test in the stored order.
    """
    from sklearn.datasets import load_digits

    bunch = load_digits()
    place = np.array([np.count_nonzero(bunch.target[:i] == label) for i, label in enumerate(bunch.target)])
    chosen = place % 2 == (0 if split == "train" else 1)
    grey = np.round(bunch.images[chosen] * (255 / 16)).astype(np.uint8)
    large = [
        Image.fromarray(image).convert("RGB").resize((32, 32), Image.Resampling.BILINEAR) for image in grey
    ]
    return ArraySource(
        f"digits/{split}", np.stack([np.asarray(image) for image in large]), bunch.target[chosen]
    )


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
