"""The data sets that can be named, and how one becomes a task: class names, training set, test set."""

import difflib
import hashlib
import os
import re
import warnings
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

import numpy as np
import torch

from data import ilmvp, sources
from data.cache import all_or_none, stored_images
from data.class_names import clean_class_name
from data.image_set import ImageSet


@dataclass(frozen=True)
class DatasetInfo:
    """What a data set should be.

    Attributes
    ----------
    train, test : int or None
        Samples; None where the published table has no number.
    classes : int
    image_size : int
        Side in pixels of the pictures that padding VR places on its canvas.
    source : {"torchvision", "ilmvp", "built in"}
    """

    train: int | None
    test: int | None
    classes: int
    image_size: int
    source: str


# Cai et al., "Sample-specific Masks for Visual Reprogramming-based Prompting", ICML 2024, Table 6.
DATASETS = {
    "cifar10": DatasetInfo(50000, 10000, 10, 32, "torchvision"),
    "cifar100": DatasetInfo(50000, 10000, 100, 32, "torchvision"),
    "svhn": DatasetInfo(73257, 26032, 10, 32, "torchvision"),
    "gtsrb": DatasetInfo(39209, 12630, 43, 32, "torchvision"),
    "flowers102": DatasetInfo(4093, 2463, 102, 128, "ilmvp"),
    "dtd": DatasetInfo(2820, 1692, 47, 128, "ilmvp"),
    "ucf101": DatasetInfo(7639, 3783, 101, 128, "ilmvp"),
    "food101": DatasetInfo(50500, 30300, 101, 128, "ilmvp"),
    "sun397": DatasetInfo(15888, 19850, 397, 128, "ilmvp"),
    "eurosat": DatasetInfo(13500, 8100, 10, 128, "ilmvp"),
    "oxfordpets": DatasetInfo(2944, 3669, 37, 128, "ilmvp"),
    "stanfordcars": DatasetInfo(None, None, 196, 128, "ilmvp"),
    "digits": DatasetInfo(901, 896, 10, 32, "built in"),
    "synthetic": DatasetInfo(64, 32, 8, 32, "built in"),
}
FOLDER_PREFIX = "folder:"
FOLDER_IMAGE_SIZE = 128


@dataclass(frozen=True, eq=False)
class Task:
    """A downstream task.

    Attributes
    ----------
    name : str
    class_names : list of str
        Cleaned name of each label; T of them, whatever labels occur.
    train, test : ImageSet or None
    """

    name: str
    class_names: list[str]
    train: ImageSet
    test: ImageSet

    @property
    def num_target(self):
        """T, the number of downstream labels."""
        return len(self.class_names)


def check_dataset_name(name):
    """Raise a ValueError unless `name` is in `DATASETS` or of the form ``folder:PATH``."""
    if name in DATASETS or (name.startswith(FOLDER_PREFIX) and len(name) > len(FOLDER_PREFIX)):
        return
    close = difflib.get_close_matches(name.lower(), [*DATASETS, "folder:PATH"], n=1, cutoff=0.5)
    hint = f"; did you mean {close[0]!r}?" if close else ""
    raise ValueError(f"unknown data set {name!r}, expected one of {', '.join(DATASETS)}, folder:PATH{hint}")


def image_size(name):
    """Side in pixels (32 or 128) of the pictures of data set `name` under padding VR."""
    check_dataset_name(name)
    return DATASETS[name].image_size if name in DATASETS else FOLDER_IMAGE_SIZE


def load_task(
    name,
    data_path,
    train_preset,
    test_preset,
    *,
    cache_path,
    workers=0,
    train_fraction=1.0,
    seed=0,
    progress=True,
):
    """Read a data set, through the cache of decoded pictures.

    Parameters
    ----------
    name : str
        A key of `DATASETS`, or ``folder:PATH`` with ``PATH/train/<class>/*`` and ``PATH/test/<class>/*``, or
        with an ILM-VP folder as PATH.
    data_path : str or Path
        Holds the ILM-VP folder `name`, or torchvision's files.
    train_preset, test_preset : Preset or None
        How the pictures of each split are stored; None leaves a split out.
    cache_path : str, Path or None
        Folder for decoded pictures; made when first needed. None keeps no cache.
    workers : int
        Decoding threads; 0 takes one a core. The result does not depend on it.
    train_fraction : float
        In (0, 1]: the share of each class's training samples to use, rounded half up, at least one.
    seed : int
        Chooses them.
    progress : bool
        Whether to show a progress bar while decoding (on a terminal only).

    Returns
    -------
    Task

    Raises
    ------
    FileNotFoundError, ValueError
        The data set is unknown, missing, incomplete, contradicts itself, or holds an unreadable picture.

    Warns
    -----
    UserWarning
        The data set has other numbers of samples or classes than the published table.
    """
    check_dataset_name(name)
    if not 0 < train_fraction <= 1:
        raise ValueError(f"train fraction is {train_fraction}, expected above 0 and at most 1")
    if workers < 0:
        raise ValueError(f"workers is {workers}, expected 0 (one a core) or more")
    class_names, train, test, check = _open(name, Path(data_path))
    # the smaller split first: what is wrong with it shows before the larger one is decoded
    splits = {"test": (test, test_preset), "train": (train, train_preset)}
    files = dict.fromkeys(splits)
    for split, (source, preset) in splits.items():
        in_memory = isinstance(source, sources.ArraySource)  # made on the spot: nothing worth keeping on disk
        if not (preset is None or cache_path is None or in_memory):
            files[split] = Path(cache_path) / _cache_name(name, split, source, preset)
    image_sets = dict.fromkeys(splits)
    with all_or_none(file for file in files.values() if file is not None):
        for split, (source, preset) in splits.items():
            if preset is not None:
                image_sets[split] = stored_images(
                    source,
                    preset,
                    files[split],
                    threads=workers or _cores(),
                    progress=progress,
                    check=lambda labels, split=split: check(split, labels),
                )
    if None not in image_sets.values():
        _warn_if_unusual(name, image_sets, class_names)
    if train_fraction < 1 and image_sets["train"] is not None:
        rows = stratified_subset(image_sets["train"].labels, train_fraction, seed)
        image_sets["train"] = image_sets["train"].subset(rows)
    return Task(name, class_names, image_sets["train"], image_sets["test"])


def _open(name, data_path):
    """Class names, source of each split, and a check(split, labels) of what the source holds."""

    def nothing_to_check(split, labels):
        pass

    if name in ("digits", "synthetic"):
        make = getattr(sources, name)
        class_names = (
            sources.SYNTHETIC_CLASSES if name == "synthetic" else [str(digit) for digit in range(10)]
        )
        return list(class_names), make("train"), make("test"), nothing_to_check
    if name in sources.TORCHVISION:
        class_names = [clean_class_name(each) for each in sources.TORCHVISION[name][3]]
        train, test = (sources.TorchvisionSource(name, data_path, split) for split in ("train", "test"))
        return class_names, train, test, nothing_to_check

    folder = data_path / name if name in DATASETS else Path(name.removeprefix(FOLDER_PREFIX))
    if not folder.is_dir():
        raise FileNotFoundError(
            f"{folder} is not a folder; {name} is expected there"
            + (
                " as an ILM-VP folder (train.lmdb, test.lmdb, split.json): choose another --data-path, fetch the "
                "folder from https://github.com/OPTML-Group/ILM-VP, or make it with python -m tools.prepare_data"
                if name in DATASETS
                else ""
            )
        )
    if name not in DATASETS and not (folder / "train.lmdb").exists():
        train, test, names = sources.class_folders(folder)
        class_names = [clean_class_name(each) for each in names]
        double = next((i for i, each in enumerate(class_names) if each in class_names[:i]), None)
        if double is not None:
            first = names[class_names.index(class_names[double])]
            raise ValueError(
                f"{folder}: class folders {first!r} and {names[double]!r} have one name; rename one"
            )
        return class_names, train, test, nothing_to_check

    split_file = folder / "split.json"
    train, test = (ilmvp.LmdbSource(folder / f"{split}.lmdb") for split in ("train", "test"))
    for source in (train, test):
        source.require()
    class_names, counts = ilmvp.read_split(split_file)

    def check(split, labels):
        ilmvp.check_against_split(labels, counts[split], folder / f"{split}.lmdb", split_file)

    return class_names, train, test, check


def _cores():
    count = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(count, 32)


def _cache_name(name, split, source, preset):
    """File name of a cache: readable, and different for sources at different places."""
    place = hashlib.sha256(source.place.encode()).hexdigest()[:8]
    label = re.sub(r"[^A-Za-z0-9]+", "-", name.removeprefix(FOLDER_PREFIX)).strip("-")[-40:]
    return f"{label}-{split}-{preset.storage}-{place}.npy"


def _warn_if_unusual(name, image_sets, class_names):
    info = DATASETS.get(name)
    if info is None:
        return
    found = {"training images": len(image_sets["train"]), "test images": len(image_sets["test"])}
    found["classes"] = len(class_names)
    expected = dict(zip(found, (info.train, info.test, info.classes), strict=True))
    other = [
        f"{found[what]} {what} (published: {expected[what]})"
        for what in found
        if expected[what] != found[what]
    ]
    other = [text for text in other if "None" not in text]
    if other:
        warnings.warn(
            f"{name} has {', '.join(other)}; results do not compare with published ones", stacklevel=3
        )


def stratified_subset(labels, fraction, seed):
    """Choose a share of each class at random.

    Parameters
    ----------
    labels : torch.Tensor
        (N,) int64.
    fraction : float
        In (0, 1]. Of n samples of a class, n * fraction are chosen, rounded half up, at least one.
    seed : int

    Returns
    -------
    torch.Tensor
        (M,) int64, ascending positions.
    """
    share = Fraction(str(fraction))  # 0.29 * 50 is 14.5 and rounds up; in binary it is 14.499999999999998
    generator = torch.Generator().manual_seed(seed)
    chosen = []
    for label in np.unique(labels.numpy()):
        members = (labels == int(label)).nonzero().flatten()
        count = max(1, int(len(members) * share + Fraction(1, 2)))
        chosen.append(members[torch.randperm(len(members), generator=generator)[:count]])
    return torch.cat(chosen).sort().values
