"""The data sets that can be named, and how one becomes a task: class names, training set, test set.

A data set of your own is one entry, in one file::

    from data import DATASETS, ArraySource, DatasetInfo

    def open_mine(name, data_path):
        ...
        return class_names, ArraySource("mine/train", images, labels), ArraySource("mine/test", others, their_labels)

    DATASETS["mine"] = DatasetInfo(train=500, test=100, classes=7, image_size=32, open=open_mine)
"""

import difflib
import hashlib
import os
import re
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from fractions import Fraction
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from data import ilmvp, sources, torchvision_sets
from data.cache import all_or_none, stored_images
from data.class_names import clean_class_name
from data.image_set import ImageSet
from data.memory import num_cores


class Opened(NamedTuple):
    """What a data set holds; nothing of it has been decoded yet.

    Attributes
    ----------
    class_names : list of str
        Name of each label.
    train, test : LmdbSource, FileSource, ArraySource, or what behaves like them
        ``test`` is None where the test images are to be drawn from those of ``train``.
    check : callable, optional
        Called as check("train" or "test", labels) with (N,) int64 labels; raises a ValueError where they are wrong.
    """

    class_names: list
    train: object
    test: object
    check: Callable = lambda split, labels: None


@dataclass(frozen=True)
class DatasetInfo:
    """What a data set should be, and how it is opened.

    Attributes
    ----------
    train, test : int or None
        Samples; None where there is no published number.
    classes : int or None
    image_size : int
        Side in pixels of the images that padding VR places on its canvas.
    open : callable
        Called as open(name, data_path); returns an `Opened`, or a tuple of its first three or four values.
    """

    train: int | None
    test: int | None
    classes: int | None
    image_size: int
    open: Callable

    def unlike(self, **found):
        """Which of the numbers ``train``, ``test`` and ``classes`` are not the published ones: a list of texts."""
        names = {"train": "training images", "test": "test images", "classes": "classes"}
        published = {what: getattr(self, what) for what in found}
        return [
            f"{found[what]} {names[what]} (published: {number})"
            for what, number in published.items()
            if number not in (None, found[what])
        ]


def open_ilmvp(name, data_path):
    """Open the ILM-VP folder ``<data_path>/<name>``."""
    folder = Path(data_path) / name
    if not folder.is_dir():
        raise FileNotFoundError(
            f"{folder} is not a folder; {name} is expected there as an ILM-VP folder (train.lmdb, test.lmdb, "
            "split.json): choose another --data-path, fetch the folder from https://github.com/OPTML-Group/ILM-VP, or "
            "make it with python -m tools.prepare_data"
        )
    return _open_ilmvp_folder(folder)


def _open_ilmvp_folder(folder):
    split_file = folder / "split.json"
    train, test = (ilmvp.LmdbSource(folder / f"{split}.lmdb") for split in ("train", "test"))
    for source in (train, test):
        source.require()
    class_names, counts = ilmvp.read_split(split_file)

    def check(split, labels):
        ilmvp.check_against_split(labels, counts[split], folder / f"{split}.lmdb", split_file)

    return Opened(class_names, train, test, check)


def find_folder(name, data_path=None):
    """The folder of ``folder:PATH``.

    Without a `data_path` it is PATH. With one, PATH is where the data were: they are in `data_path` itself where that
    holds ``train`` or ``train.lmdb``, in its folder of the same name, or in class folders in `data_path` itself.
    """
    folder = Path(os.path.expanduser(name.removeprefix(FOLDER_PREFIX)))  # the shell leaves a ~ behind the prefix
    if data_path:
        folder, moved = Path(data_path), folder.name
        here = any((folder / content).exists() for content in ("train", "train.lmdb"))
        if not here and ((folder / moved).is_dir() or not sources.holds_classes(folder)):
            folder /= moved
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder} is not a folder; expected one that holds train/<class>/* and test/<class>/*")
    return folder


def open_folder(name, data_path=None):
    """Open ``folder:PATH``: an ILM-VP folder, or what `data.sources.class_folders` takes; see `find_folder`."""
    folder = find_folder(name, data_path)
    if (folder / "train.lmdb").exists():
        return _open_ilmvp_folder(folder)
    train, test, names = sources.class_folders(folder)
    cleaned = [clean_class_name(each) for each in names]
    double = next((i for i, each in enumerate(cleaned) if each in cleaned[:i]), None)
    if double is not None:
        first = names[cleaned.index(cleaned[double])]
        raise ValueError(f"{folder}: class folders {first!r} and {names[double]!r} have one name; rename one")
    return Opened(cleaned, train, test)


def _open_digits(name, data_path):
    return [str(digit) for digit in range(10)], sources.digits("train"), sources.digits("test")


def _open_synthetic(name, data_path):
    return sources.SYNTHETIC_CLASSES, sources.synthetic("train"), sources.synthetic("test")


# Numbers of samples: Cai et al., "Sample-specific Masks for Visual Reprogramming-based Prompting", ICML 2024, Table 6,
# but for gtsrb: the paper counts the 39,209 images of the final benchmark, while torchvision, which its code reads,
# has the 26,640 of the online competition. The last three are not among the paper's; their numbers are those of Zhou
# et al., "Learning to Prompt for Vision-Language Models", IJCV 2022, training images without the validation ones.
DATASETS = {
    "cifar10": DatasetInfo(50000, 10000, 10, 32, torchvision_sets.CIFAR10),
    "cifar100": DatasetInfo(50000, 10000, 100, 32, torchvision_sets.CIFAR100),
    "svhn": DatasetInfo(73257, 26032, 10, 32, torchvision_sets.SVHN),
    "gtsrb": DatasetInfo(26640, 12630, 43, 32, torchvision_sets.GTSRB),
    "flowers102": DatasetInfo(4093, 2463, 102, 128, open_ilmvp),
    "dtd": DatasetInfo(2820, 1692, 47, 128, open_ilmvp),
    "ucf101": DatasetInfo(7639, 3783, 101, 128, open_ilmvp),
    "food101": DatasetInfo(50500, 30300, 101, 128, open_ilmvp),
    "sun397": DatasetInfo(15888, 19850, 397, 128, open_ilmvp),
    "eurosat": DatasetInfo(13500, 8100, 10, 128, open_ilmvp),
    "oxfordpets": DatasetInfo(2944, 3669, 37, 128, open_ilmvp),
    "stanfordcars": DatasetInfo(None, None, 196, 128, open_ilmvp),
    "digits": DatasetInfo(901, 896, 10, 32, _open_digits),
    "synthetic": DatasetInfo(64, 32, 8, 32, _open_synthetic),
    "caltech101": DatasetInfo(4128, 2465, 100, 128, open_ilmvp),
    "fgvc_aircraft": DatasetInfo(3334, 3333, 100, 128, open_ilmvp),
    "resisc45": DatasetInfo(None, None, 45, 128, open_ilmvp),
}
FOLDER_PREFIX = "folder:"
_FOLDER = DatasetInfo(None, None, None, 128, open_folder)


@dataclass(frozen=True, eq=False)
class Task:
    """A downstream task.

    Attributes
    ----------
    name : str
    class_names : list of str
        Cleaned name of each label; T of them, whatever labels occur.
    train, test : ImageSet or None
    validation : ImageSet or None
        Training images that were held out, stored as the test images are.
    """

    name: str
    class_names: list[str]
    train: ImageSet | None
    test: ImageSet | None
    validation: ImageSet | None = None

    @property
    def num_target(self):
        """T, the number of downstream labels."""
        return len(self.class_names)

    @property
    def fingerprint(self):
        """dict of str to str : `ImageSet.fingerprint` of each split that is loaded."""
        splits = {"train": self.train, "test": self.test, "validation": self.validation}
        return {split: image_set.fingerprint for split, image_set in splits.items() if image_set is not None}


def check_dataset_name(name):
    """Raise a ValueError unless `name` is in `DATASETS` or of the form ``folder:PATH``."""
    if name in DATASETS or (name.startswith(FOLDER_PREFIX) and len(name) > len(FOLDER_PREFIX)):
        return
    if "/" in name or os.path.isdir(name):
        hint = f"; images in a folder are given as {FOLDER_PREFIX}{name}"
    else:
        close = difflib.get_close_matches(name.lower(), [*DATASETS, "folder:PATH"], n=1, cutoff=0.5)
        hint = f"; did you mean {close[0]!r}?" if close else ""
    raise ValueError(f"unknown data set {name!r}, expected one of {', '.join(DATASETS)}, folder:PATH{hint}")


def dataset_info(name):
    """The `DatasetInfo` of a data set that can be named; ValueError where `check_dataset_name` raises one."""
    check_dataset_name(name)
    return DATASETS.get(name, _FOLDER)


def image_size(name):
    """Side in pixels of the images of data set `name` under padding VR."""
    return dataset_info(name).image_size


def open_task(name, data_path, test_fraction=None):
    """Open a data set and look at its folders and class names, but at no image.

    Parameters
    ----------
    name, data_path, test_fraction
        As `load_task` takes them.

    Returns
    -------
    Opened

    Raises
    ------
    FileNotFoundError, ValueError
        The data set is unknown, missing or has one class only; it has no test images and there is no `test_fraction`,
        or both. What torchvision downloads is not looked for.
    """
    opened = Opened(*dataset_info(name).open(name, data_path))
    if len(opened.class_names) < 2:
        raise ValueError(f"{name} has the classes {opened.class_names}; expected two or more to tell apart")
    if opened.test is None and test_fraction is None:
        raise ValueError(
            f"{name} has no test images: sort them into train/<class>/ and test/<class>/, or give --test-fraction 0.2 "
            "to draw that share of each class"
        )
    if opened.test is not None and test_fraction is not None:
        raise ValueError(f"--test-fraction: {name} has test images ({opened.test.title}); leave it out")
    return opened


def load_task(
    name,
    data_path,
    train_preset,
    test_preset,
    *,
    cache_path,
    workers=0,
    train_fraction=1.0,
    shots=None,
    test_fraction=None,
    validation_fraction=0.0,
    seed=0,
    progress=True,
):
    """Read a data set, through the cache of decoded images.

    Parameters
    ----------
    name : str
        A key of `DATASETS`, or ``folder:PATH`` with ``PATH/train/<class>/*`` and ``PATH/test/<class>/*``, or
        ``PATH/<class>/*``, or with an ILM-VP folder as PATH.
    data_path : str, Path or None
        Holds the ILM-VP folder `name`, or torchvision's files. For ``folder:PATH`` None takes PATH as it is; else
        the data are where `find_folder` says.
    train_preset, test_preset : Preset or None
        How the images of each split are stored; None leaves a split out.
    cache_path : str, Path or None
        Folder for decoded images; made when first needed. None keeps no cache.
    workers : int
        Decoding threads; 0 takes one per core. The result does not depend on it.
    train_fraction : float
        In (0, 1]: the share of each class's training samples to use, rounded half up, at least one.
    shots : int, optional
        Training samples of each class to use, 1 or more, or all where a class has fewer; not together with
        `train_fraction`. Fewer shots are a part of more.
    test_fraction : float, optional
        In (0, 1): the share of each class's samples to draw as the test set, rounded half up, at least one, never all;
        for a data set without one, and only there. What is left is the training set.
    validation_fraction : float
        In [0, 1): the share of each class's training samples, of those that are used, to hold out as
        ``validation``, rounded half up, never all. They are stored as `test_preset` says; without it they are left
        out.
    seed : int
        Chooses them all.
    progress : bool
        Whether to show a progress bar while decoding (on a terminal only).

    Returns
    -------
    Task

    Raises
    ------
    FileNotFoundError, ValueError
        The data set is unknown, missing, incomplete, has one class only, contradicts itself, or holds an unreadable
        image.

    Warns
    -----
    UserWarning
        The data set has other numbers of samples or classes than the published table; a class has fewer samples than
        `shots`; a class of one sample has none to test.
    """
    allowed = {
        f"train fraction is {train_fraction}, expected above 0 and at most 1": 0 < train_fraction <= 1,
        f"shots is {shots}, expected 1 or more": shots is None or shots >= 1,
        f"shots {shots} and train fraction {train_fraction} exclude each other": shots is None or train_fraction == 1,
        f"test fraction is {test_fraction}, expected above 0 and below 1": (
            test_fraction is None or 0 < test_fraction < 1
        ),
        f"validation fraction is {validation_fraction}, expected 0 or more and below 1": 0 <= validation_fraction < 1,
    }
    for message, holds in allowed.items():
        if not holds:
            raise ValueError(message)
    opened = open_task(name, data_path, test_fraction)
    class_names = [clean_class_name(each) for each in opened.class_names]
    # the smaller split first: what is wrong with it shows before the larger one is decoded
    parts = {"test": ("train" if opened.test is None else "test", test_preset), "train": ("train", train_preset)}
    if validation_fraction and None not in (train_preset, test_preset):
        parts["validation"] = ("train", test_preset)
    parts = {part: (split, preset) for part, (split, preset) in parts.items() if preset is not None}
    files = {
        (split, preset.storage): _cache_file(cache_path, name, split, getattr(opened, split), preset)
        for split, preset in parts.values()
    }
    image_sets, decoded = dict.fromkeys(("train", "test", "validation")), {}
    with all_or_none(filter(None, files.values())):
        for part, (split, preset) in parts.items():
            key = split, preset.storage
            if key not in decoded:
                how = {"threads": workers or min(num_cores(), 32), "progress": progress}
                check = partial(_check_labels, opened, split)
                decoded[key] = stored_images(getattr(opened, split), preset, files[key], check=check, **how)
            image_sets[part] = decoded[key]
    if test_fraction is not None:
        _draw_test_set(image_sets, class_names, test_fraction, seed)
    if None not in (image_sets["train"], image_sets["test"]):
        numbers = {split: len(image_sets[split]) for split in ("train", "test")} | {"classes": len(class_names)}
        if other := dataset_info(name).unlike(**numbers):
            text = f"{name} has {', '.join(other)}; results do not compare with published ones"
            warnings.warn(text, stacklevel=2)
    if image_sets["train"] is not None:
        labels = image_sets["train"].labels
        kept, held_out = _choose(labels, class_names, train_fraction, shots, validation_fraction, seed)
        if len(kept) < len(labels):  # else the set stays one piece
            image_sets["train"] = image_sets["train"].subset(kept)
        if image_sets["validation"] is not None:
            image_sets["validation"] = image_sets["validation"].subset(held_out)
    return Task(name, class_names, **image_sets)


def _check_labels(opened, split, labels):
    opened.check(split, labels)
    classes = len(opened.class_names)
    if labels.min() < 0 or labels.max() >= classes:
        raise ValueError(
            f"{getattr(opened, split).title} has labels {labels.min()} to {labels.max()}, expected 0 to {classes - 1}: "
            "one for each class name"
        )


def _cache_file(folder, name, split, source, preset):
    """Where a split is cached, under a name that can be read and differs for sources at different places, or None."""
    if folder is None or isinstance(source, sources.ArraySource):  # made on the spot: nothing worth keeping on disk
        return None
    place = hashlib.sha256(os.fsencode(source.place)).hexdigest()[:8]
    label = re.sub(r"[^A-Za-z0-9]+", "-", name.removeprefix(FOLDER_PREFIX)).strip("-")[-40:]
    return Path(folder) / f"{label}-{split}-{preset.storage}-{place}.npy"


def _draw_test_set(image_sets, class_names, test_fraction, seed):
    """Part sets of all images into those to test and the others, in place."""
    labels = next(image_set.labels for image_set in image_sets.values() if image_set is not None)
    tested = _draw(labels, seed, lambda count: min(max(1, _share(test_fraction, count)), count - 1))
    if not len(tested):
        raise ValueError("--test-fraction needs two or more images of a class; each class has one")
    single = [class_names[label] for label in (torch.bincount(labels) == 1).nonzero().flatten().tolist()]
    if single:
        warnings.warn(f"only one image of {sources.listed(single)}: it is not tested", stacklevel=3)
    for part, image_set in image_sets.items():
        if image_set is not None:
            image_sets[part] = image_set.subset(tested if part == "test" else _others(labels, tested))


def _choose(labels, class_names, train_fraction, shots, validation_fraction, seed):
    """Positions of the training samples to keep and of those to hold out."""
    kept = torch.arange(len(labels))
    if train_fraction < 1:
        kept = _draw(labels, seed, lambda count: max(1, _share(train_fraction, count)))
    if shots is not None:
        kept = _draw(labels, seed, lambda count: min(count, shots))
        counts = torch.bincount(labels, minlength=len(class_names)).tolist()
        scarce = [name for name, count in zip(class_names, counts, strict=True) if count < shots]
        if scarce:
            warnings.warn(f"fewer than {shots} training images of {sources.listed(scarce)}: all are used", stacklevel=3)
    held_out = _draw(labels[kept], seed, lambda count: min(_share(validation_fraction, count), count - 1))
    if validation_fraction and not len(held_out):
        raise ValueError(f"validation fraction {validation_fraction} holds out no image; give a larger one, or 0")
    return kept[_others(kept, held_out)], kept[held_out]


def _share(fraction, count):
    """``fraction`` of a number, rounded half up as written: 0.29 * 50 is 14.5, in binary 14.499999999999998."""
    return int(count * Fraction(str(fraction)) + Fraction(1, 2))


def _others(samples, chosen):
    """Ascending positions in ``samples`` that are not among the ``chosen`` ones."""
    rest = torch.ones(len(samples), dtype=torch.bool)
    rest[chosen] = False
    return rest.nonzero().flatten()


def _draw(labels, seed, how_many):
    """Ascending positions of how_many(count) samples of each class, at random: of fewer, always the same first ones."""
    generator = torch.Generator().manual_seed(seed)
    chosen = []
    for label in np.unique(labels.numpy()):
        members = (labels == int(label)).nonzero().flatten()
        chosen.append(members[torch.randperm(len(members), generator=generator)[: how_many(len(members))]])
    return torch.cat(chosen).sort().values
