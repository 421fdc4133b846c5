"""Names of data sets, class folders, the built-in sets, torchvision's, subsets, and clear errors for each."""

import os
import time
import warnings

import numpy as np
import pytest
import torch

from data import DATASETS, check_dataset_name, image_size, load_task, padding_preset, sources
from data.class_names import CIFAR10, CIFAR100, GTSRB, clean_class_name
from data.decode import open_image
from data.registry import stratified_subset
from models.torchvision_shim import ensure_torchvision
from tests.data.helpers import edit_split, make_class_folders, make_ilmvp, picture, put

REAL_DATA = os.environ.get("BLM_REAL_DATA")


def task_of(name, data_path=None, cache_path=None, side=16, **settings):
    return load_task(
        name, data_path, padding_preset(side), padding_preset(side), cache_path=cache_path, **settings
    )


def refused(error, match, *call, **settings):
    with pytest.raises(error, match=match) as caught:
        task_of(*call, **settings)
    assert "\n" not in str(caught.value)


def test_the_twelve_data_sets_of_the_paper_and_two_more():
    assert (
        list(DATASETS)
        == (
            "cifar10 cifar100 svhn gtsrb flowers102 dtd ucf101 food101 sun397 eurosat oxfordpets "
            "stanfordcars digits synthetic caltech101 fgvc_aircraft resisc45"
        ).split()
    )
    small = {name for name in DATASETS if image_size(name) == 32}
    assert small == {"cifar10", "cifar100", "svhn", "gtsrb", "digits", "synthetic"}
    assert image_size("folder:somewhere") == image_size("sun397") == 128


@pytest.mark.parametrize(
    ("name", "hint"),
    [
        ("flower102", "'flowers102'"),
        ("CIFAR10", "'cifar10'"),
        ("pets", "'oxfordpets'"),
        ("folder:", "'folder:PATH'"),
    ],
)
def test_unknown_names_get_the_closest(name, hint):
    for refusing in (check_dataset_name, image_size, task_of):
        with pytest.raises(ValueError, match=f"unknown data set '{name}'.*did you mean {hint}") as error:
            refusing(name)
        assert all(known in str(error.value) for known in DATASETS)


def test_a_name_like_nothing_gets_the_list():
    with pytest.raises(ValueError, match="expected one of cifar10, .*synthetic, folder:PATH$"):
        check_dataset_name("qqqqqqqq")


def test_digits():
    task = task_of("digits", side=32)
    assert task.num_target == 10 and task.class_names == list("0123456789") and task.name == "digits"
    assert len(task.train) == 901 and len(task.test) == 896
    train, test = (torch.bincount(split.labels) for split in (task.train, task.test))
    assert (train + test).tolist() == [178, 182, 177, 183, 181, 182, 181, 179, 174, 180]
    assert ((train - test >= 0) & (train - test <= 1)).all()
    first = task.train.images[0]
    assert first.shape == (32, 32, 3) and torch.equal(first[..., 0], first[..., 1])
    from sklearn.datasets import load_digits

    blocks = first[..., 0].float().reshape(8, 4, 8, 4).mean((1, 3)) / 255 * 16
    assert np.abs(blocks.numpy() - load_digits().images[0]).mean() < 1.5


def test_synthetic_is_the_same_every_time_and_shows_its_classes():
    task, again = task_of("synthetic", side=32), task_of("synthetic", side=32)
    assert torch.equal(task.train.images, again.train.images) and torch.equal(
        task.test.images, again.test.images
    )
    assert (
        torch.bincount(task.train.labels).tolist() == [8] * 8
        and torch.bincount(task.test.labels).tolist() == [4] * 8
    )
    assert task.class_names[:2] == ["red disc", "red square"]
    for image, label in zip(task.test.images, task.test.labels, strict=True):
        colours = np.array(list(sources.SYNTHETIC_COLOURS.values()))
        nearest = np.abs(colours - image[16, 16].numpy()).sum(1).argmin()
        assert task.class_names[label].split()[0] == list(sources.SYNTHETIC_COLOURS)[nearest]


def test_class_folders(tmp_path):
    root = make_class_folders(tmp_path / "photos", {"Great-Dane_dog": 2, "cat": 3}, {"cat": 1})
    (root / "train/cat/.DS_Store").write_text("clutter")
    (root / "train/cat/Thumbs.db").write_text("clutter")
    task = task_of(f"folder:{root}")
    assert task.class_names == ["great dane dog", "cat"]
    assert task.train.labels.tolist() == [0, 0, 1, 1, 1] and task.test.labels.tolist() == [1]
    assert task.train.names[2] == str(root / "train/cat/0.png")
    stored = padding_preset(16).store(open_image((root / "train/cat/2.png").read_bytes(), ""))
    assert np.array_equal(task.train.images[4].numpy(), stored)


@pytest.mark.parametrize(
    ("change", "error", "match"),
    [
        (
            lambda root: (root / "train/cat/notes.txt").write_text("hi"),
            ValueError,
            "notes.txt is not an image file",
        ),
        (lambda root: (root / "train/cat/a.jpg").write_text("hi"), ValueError, "a.jpg: not a readable image"),
        (
            lambda root: (root / "train/cat/a.png").write_bytes(picture(0)[:99]),
            ValueError,
            "a.png: not a readable",
        ),
        (lambda root: (root / "train/cat/deeper").mkdir(), ValueError, "deeper is not an image file"),
        (
            lambda root: (root / "train/a.png").write_bytes(picture(0)),
            ValueError,
            "a.png is not a class folder",
        ),
        (lambda root: (root / "train/bird").mkdir(), ValueError, "train/bird is empty; add images"),
        (
            lambda root: (root / "test").rename(root / "val"),
            FileNotFoundError,
            "test is not a folder; expected",
        ),
        (lambda root: (root / "test/cat").rename(root / "test/Cat"), ValueError, "Cat has no counterpart"),
        (
            lambda root: make_class_folders(root, {"Dog": 1}, {"Dog": 1}),
            ValueError,
            "'Dog' and 'dog' have one name",
        ),
    ],
)
def test_bad_class_folders(tmp_path, change, error, match):
    root = make_class_folders(tmp_path / "photos")
    change(root)
    refused(error, match, f"folder:{root}", cache_path=tmp_path / "cache")
    assert [path.name for path in tmp_path.iterdir()] == ["photos"]


def test_empty_and_missing_folders(tmp_path):
    refused(FileNotFoundError, "nowhere is not a folder", f"folder:{tmp_path}/nowhere")
    for split in ("train", "test"):
        (tmp_path / "photos" / split).mkdir(parents=True)
    refused(ValueError, "has no class folders", f"folder:{tmp_path}/photos")


def test_ilmvp_by_name_and_by_folder_warning_of_other_sizes(tmp_path):
    folder = make_ilmvp(tmp_path / "dtd")
    with pytest.warns(
        UserWarning, match=r"dtd has 5 training images \(published: 2820\), 3 test .* 3 classes"
    ):
        named = task_of("dtd", tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        by_path = task_of(f"folder:{folder}")
    assert torch.equal(named.train.images, by_path.train.images)
    assert named.class_names == by_path.class_names == ["hard leaved orchid", "rose", "tulip"]


@pytest.mark.parametrize(
    ("change", "error", "match"),
    [
        (lambda f: (f / "test.lmdb").unlink(), FileNotFoundError, "test.lmdb does not exist"),
        (
            lambda f: (f / "train.lmdb").rename(f / "x"),
            FileNotFoundError,
            "train.lmdb does not exist|train is not",
        ),
        (lambda f: (f / "split.json").unlink(), FileNotFoundError, "split.json does not exist"),
        (
            lambda f: put(f / "train.lmdb", b"1", (picture(1), 2)),
            ValueError,
            "2 samples of label 2 against 1|label 0",
        ),
        (
            lambda f: put(f / "test.lmdb", b"1", (picture(1), 2)),
            ValueError,
            "test.lmdb disagrees with .*split.json",
        ),
        (
            lambda f: edit_split(f, lambda s: s["train"].pop()),
            ValueError,
            "5 samples against 4; take both from one",
        ),
        (
            lambda f: put(f / "test.lmdb", b"1", (b"none", 1)),
            ValueError,
            "test.lmdb, key b'1': not a readable image",
        ),
    ],
)
def test_bad_ilmvp_folders(tmp_path, change, error, match):
    folder = make_ilmvp(tmp_path / "dtd")
    change(folder)
    refused(error, match, "dtd", tmp_path)
    before = sorted(path.name for path in folder.iterdir())
    refused(error, match, "dtd", tmp_path, cache_path=tmp_path / "new/cache")
    assert sorted(path.name for path in folder.iterdir()) == before
    assert not (tmp_path / "new").exists(), "the cache of the split that is fine was left behind"


def test_split_is_compared_also_when_the_cache_is_warm(tmp_path):
    folder = make_ilmvp(tmp_path / "set")
    task_of(f"folder:{folder}", cache_path=tmp_path / "cache")
    edit_split(folder, lambda s: s["train"].pop())
    refused(ValueError, "5 samples against 4", f"folder:{folder}", cache_path=tmp_path / "cache")


def test_missing_data_set_names_the_folder_it_should_be_in(tmp_path):
    refused(
        FileNotFoundError, "sun397 is not a folder.*train.lmdb, test.lmdb, split.json", "sun397", tmp_path
    )


def test_train_fraction_is_stratified_seeded_and_rounds_half_up():
    labels = torch.tensor([0] * 50 + [1] * 5 + [2] + [5] * 3)
    rows = stratified_subset(labels, 0.29, 0)
    assert torch.bincount(labels[rows]).tolist() == [15, 1, 1, 0, 0, 1]  # 14.5, 1.45, 0.29, 0.87
    assert torch.equal(rows, stratified_subset(labels, 0.29, 0)) and torch.equal(rows, rows.sort().values)
    assert not torch.equal(rows, stratified_subset(labels, 0.29, 1))
    assert stratified_subset(labels, 1.0, 0).tolist() == list(range(59))
    task = task_of("synthetic", train_fraction=0.5, seed=4)
    assert torch.bincount(task.train.labels).tolist() == [4] * 8 and len(task.test) == 32
    whole = task_of("synthetic")
    rows = torch.tensor([int(name.rpartition("/")[2]) for name in task.train.names])
    assert torch.equal(task.train.images[:], whole.train.images[rows])
    for fraction in (0, -1, 1.01, float("nan")):
        refused(
            ValueError,
            "train fraction is .*, expected above 0 and at most 1",
            "synthetic",
            train_fraction=fraction,
        )
    refused(ValueError, "workers is -1", "synthetic", workers=-1)


def test_class_name_tables():
    assert (
        len(CIFAR10) == 10
        and len(CIFAR100) == 100 == len(set(CIFAR100))
        and len(GTSRB) == 43 == len(set(GTSRB))
    )
    assert CIFAR100 == sorted(CIFAR100) and CIFAR10 == sorted(CIFAR10)
    assert (
        GTSRB[14] == "stop" and GTSRB[17] == "no entry" and clean_class_name(CIFAR100[1]) == "aquarium fish"
    )


class FakeDataset:
    """Stands in for a torchvision data set of ten pictures."""

    built = 0

    def __init__(self, root, download, **how):
        FakeDataset.built += 1
        is_train = how.get("train", how.get("split") == "train")
        random = np.random.RandomState(int(is_train))
        self.data = random.randint(0, 256, (10, 32, 32, 3), dtype=np.uint8)
        self.targets = list(range(10))
        if "split" in how:
            self.labels = self.targets
            self.data = self.data.transpose(0, 3, 1, 2)
            (root / f"{how['split']}_32x32.mat").write_bytes(b"mat")
        else:
            folder = root / "cifar-10-batches-py"
            if not folder.exists():
                folder.mkdir()
                (folder / "data").write_bytes(b"batch")


@pytest.mark.parametrize("name", ["cifar10", "svhn"])
@pytest.mark.filterwarnings("ignore:.*published.*")
def test_torchvision_sets_are_loaded_once_and_then_come_from_the_cache(name, tmp_path, monkeypatch):
    ensure_torchvision()
    from torchvision import datasets

    monkeypatch.setattr(datasets, DATASETS[name].open.factory, FakeDataset)
    monkeypatch.setattr(FakeDataset, "built", 0)
    task = task_of(name, tmp_path, tmp_path / "cache", side=32)
    built = FakeDataset.built
    again = task_of(name, tmp_path, tmp_path / "cache", side=32)
    assert FakeDataset.built == built and torch.equal(task.train.images, again.train.images)
    expected = np.random.RandomState(1).randint(0, 256, (10, 32, 32, 3), dtype=np.uint8)
    assert np.array_equal(task.train.images.numpy(), expected) and task.train.labels.tolist() == list(
        range(10)
    )
    assert task.class_names[:2] == (["airplane", "automobile"] if name == "cifar10" else ["0", "1"])


@pytest.mark.parametrize("name", ["cifar10", "cifar100", "svhn", "gtsrb"])
def test_torchvision_sets_that_can_not_be_had_say_what_to_fetch(name, tmp_path, monkeypatch):
    ensure_torchvision()
    from torchvision import datasets

    def no_network(root, **how):
        root.mkdir(exist_ok=True)
        raise OSError("no\nnetwork")

    monkeypatch.setattr(datasets, DATASETS[name].open.factory, no_network)
    refused(
        FileNotFoundError,
        f"{name} is not whole in .*data.* fetch http.* unpack it so",
        name,
        tmp_path / "data",
    )
    assert not list(tmp_path.iterdir())


@pytest.mark.skipif(not REAL_DATA, reason="BLM_REAL_DATA names no folder with flowers102")
def test_real_flowers_start_quickly_from_a_warm_cache(tmp_path):
    with pytest.warns(UserWarning, match="89 classes"):
        cold = task_of("flowers102", REAL_DATA, tmp_path, side=128)
    start = time.perf_counter()
    with pytest.warns(UserWarning, match="1424 training images"):
        warm = task_of("flowers102", REAL_DATA, tmp_path, side=128)
    assert time.perf_counter() - start < 1
    assert torch.equal(cold.train.images, warm.train.images) and warm.num_target == 89
