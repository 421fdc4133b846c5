"""Data sets that torchvision downloads and reads."""

import hashlib
import json
import os
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from data import class_names
from data.sources import ArraySource, FileSource, Source, file_stamp


@dataclass(frozen=True)
class TorchvisionSet:
    """One of torchvision's data sets; called with (name, data path), it opens it.

    Its files may lie in the data path or in a folder ``<data path>/<name>``, in torchvision's own layout.

    Attributes
    ----------
    factory : str
        Class in ``torchvision.datasets``.
    train, test : tuple of str
        Files or folders that hold each split.
    address : str
        Where they can be had by hand.
    class_names : list of str
    """

    factory: str
    train: tuple
    test: tuple
    address: str
    class_names: list

    def __call__(self, name, data_path):
        own = Path(data_path) / name
        root = own if any((own / content).exists() for content in self.train + self.test) else Path(data_path)
        return self.class_names, *(TorchvisionSource(self, name, root, split) for split in ("train", "test"))


class TorchvisionSource(Source):
    """One split of a torchvision data set, loaded (and downloaded where it is missing) when first needed.

    Parameters
    ----------
    kind : TorchvisionSet
    name : str
    root : str or Path
        Folder that holds its files, or will.
    split : {"train", "test"}

    Raises
    ------
    FileNotFoundError
        When first needed: it is not there and can't be downloaded.
    """

    def __init__(self, kind, name, root, split):
        self.title, self.place = f"{name}/{split}", os.path.abspath(root)
        self._kind, self._name, self._root, self._split = kind, name, Path(root), split
        self._content = [self._root / content for content in getattr(kind, split)]

    @cached_property
    def _source(self):
        kind = self._kind
        how = {"train": self._split == "train"} if kind.factory.startswith("CIFAR") else {"split": self._split}
        dataset = load_torchvision(kind.factory, self._root, self._content, self._name, kind.address, **how)
        if hasattr(dataset, "_samples"):  # GTSRB
            paths, labels = zip(*dataset._samples, strict=True)
            return FileSource(self.title, self._root, [Path(path) for path in paths], labels)
        if hasattr(dataset, "labels"):  # SVHN
            return ArraySource(self.title, dataset.data.transpose(0, 2, 3, 1).copy(), dataset.labels)
        return ArraySource(self.title, dataset.data, dataset.targets)

    def fingerprint(self):
        if not all(content.exists() for content in self._content):
            self._source  # noqa: B018 - downloads
        files = [path for content in self._content for path in (content, *sorted(content.rglob("*"))) if path.is_file()]
        return hashlib.sha256(json.dumps([file_stamp(path) for path in files]).encode()).hexdigest()

    @property
    def labels(self):
        return self._source.labels

    @property
    def names(self):
        return self._source.names

    def image(self, i):
        return self._source.image(i)

    def close(self):
        vars(self).pop("_source", None)


def load_torchvision(factory, root, contents, name, address, **how):
    """A data set of torchvision, downloaded where it is missing.

    Parameters
    ----------
    factory : str
        Class in ``torchvision.datasets``, called with ``how``.
    root : Path
        Folder that holds its files, or will.
    contents : list of Path
        What lies there once it is whole.
    name, address : str
        For the message: the name of the data set, and where it can be had by hand.

    Raises
    ------
    FileNotFoundError
        It is not there and can't be downloaded, or an earlier download was cut off; says what to fetch.
    """
    from models.torchvision_shim import ensure_torchvision

    ensure_torchvision()
    from torchvision import datasets

    made = [folder for folder in contents[0].parents if not folder.exists()]
    try:
        return getattr(datasets, factory)(root, download=True, **how)
    except Exception as error:  # network, archive and file system all raise their own
        for folder in made:  # nothing is left of a download that did not begin
            with suppress(OSError):
                folder.rmdir()
        reason = str(error).partition("\n")[0][:120]
        raise FileNotFoundError(
            f"{name} is not whole in {root} and could not be downloaded ({reason}); fetch {address} and unpack it to "
            f"get {' and '.join(map(str, contents))}"
        ) from None


CIFAR10 = TorchvisionSet(
    "CIFAR10",
    train=("cifar-10-batches-py",),
    test=("cifar-10-batches-py",),
    address="https://www.cs.toronto.edu/~kriz/cifar-10-python.tar.gz",
    class_names=class_names.CIFAR10,
)
CIFAR100 = TorchvisionSet(
    "CIFAR100",
    train=("cifar-100-python",),
    test=("cifar-100-python",),
    address="https://www.cs.toronto.edu/~kriz/cifar-100-python.tar.gz",
    class_names=class_names.CIFAR100,
)
SVHN = TorchvisionSet(
    "SVHN",
    train=("train_32x32.mat",),
    test=("test_32x32.mat",),
    address="http://ufldl.stanford.edu/housenumbers/ (train_32x32.mat and test_32x32.mat)",
    class_names=[str(digit) for digit in range(10)],
)
GTSRB = TorchvisionSet(
    "GTSRB",
    train=("gtsrb/GTSRB/Training",),
    test=("gtsrb/GTSRB/Final_Test/Images", "gtsrb/GT-final_test.csv"),
    address="https://sid.erda.dk/public/archives/daaeac0d7ce1152aea9b61d9f1e19370/ (GTSRB-Training_fixed.zip, "
    "GTSRB_Final_Test_Images.zip and GTSRB_Final_Test_GT.zip, into gtsrb/)",
    class_names=class_names.GTSRB,
)
