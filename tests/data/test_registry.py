"""Names of data sets, class folders, the built-in sets, torchvision's, subsets, and clear errors for each."""

import io
import json
import os
import shutil
import time
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from data import (
    DATASETS,
    ArraySource,
    DatasetInfo,
    check_dataset_name,
    image_size,
    load_task,
    padding_preset,
    sources,
    watermarking_test_preset,
    watermarking_train_preset,
)
from data.class_names import CIFAR10, CIFAR100, GTSRB, clean_class_name
from data.decode import open_image
from models.torchvision_shim import ensure_torchvision
from tests.data.helpers import edit_split, encoded_image, make_class_folders, make_ilmvp, put

REAL_DATA, REFERENCE = os.environ.get("BLM_REAL_DATA"), os.environ.get("BLM_REFERENCE")


def task_of(name, data_path=None, cache_path=None, side=16, **settings):
    return load_task(name, data_path, padding_preset(side), padding_preset(side), cache_path=cache_path, **settings)


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
    with pytest.raises(ValueError, match="expected one of cifar10, .*synthetic, .*, folder:PATH$"):
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
    assert torch.equal(task.train.images, again.train.images) and torch.equal(task.test.images, again.test.images)
    assert (
        torch.bincount(task.train.labels).tolist() == [8] * 8 and torch.bincount(task.test.labels).tolist() == [4] * 8
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
    (root / "train/__MACOSX").mkdir()
    with pytest.warns(UserWarning, match="test has no images of 'Great-Dane_dog': the test accuracy") as caught:
        task = task_of(f"folder:{root}")
    assert len(caught) == 1
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
            lambda root: (root / "train/cat/a.png").write_bytes(encoded_image(0)[:99]),
            ValueError,
            "a.png: not a readable",
        ),
        (lambda root: (root / "train/cat/deeper").mkdir(), ValueError, "deeper is not an image file"),
        (
            lambda root: (root / "train/a.png").write_bytes(encoded_image(0)),
            ValueError,
            "a.png is not a class folder",
        ),
        (lambda root: (root / "train/bird").mkdir(), ValueError, "train/bird is empty; add images"),
        (
            lambda root: (root / "test").rename(root / "validation"),
            ValueError,
            "photos has no test images: .* --test-fraction 0.2 to draw that share of each class",
        ),
        (
            lambda root: (root / "train").rename(root / "training"),
            FileNotFoundError,
            "photos/train is not a folder; expected .*photos/train/<class>",
        ),
        (
            lambda root: (root / "train/cat/a.png").symlink_to("gone.png"),
            ValueError,
            "train/cat/a.png is a link to gone.png, which is not there",
        ),
        (
            lambda root: (root / "test/bird").symlink_to("/absent/birds"),
            ValueError,
            "test/bird is a link to /absent/birds, which is not there",
        ),
        (
            lambda root: make_class_folders(root, {"\x1b[31mred": 1}, {"\x1b[31mred": 1}),
            ValueError,
            r"train/\\x1b\[31mred: the name of this class folder holds control characters or is not UTF-8; rename",
        ),
        (
            lambda root: make_class_folders(root, {os.fsdecode(b"caf\xe9"): 1}, {os.fsdecode(b"caf\xe9"): 1}),
            ValueError,
            r"train/caf\\udce9: the name of this class folder",
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


def test_the_file_of_an_image_is_named_as_a_terminal_may_show_it(tmp_path):
    root = make_class_folders(tmp_path / "photos")
    (root / "train/cat/a\x1b[2J.png").write_text("no image")
    refused(ValueError, r"train/cat/a\\x1b\[2J\.png: not a readable image", f"folder:{root}")
    (root / "train/cat/a\x1b[2J.png").write_bytes(encoded_image(0))
    assert task_of(f"folder:{root}").train.names[2].endswith(r"a\x1b[2J.png")


def test_val_stands_in_for_a_missing_test_folder_and_is_left_out_beside_one(tmp_path):
    root = make_class_folders(tmp_path / "photos")
    expected = task_of(f"folder:{root}").fingerprint
    (root / "test").rename(root / "val")
    with pytest.warns(UserWarning, match="photos has no test folder: .*val is the test set"):
        assert task_of(f"folder:{root}").fingerprint == expected
    make_class_folders(root / "more", {"cat": 1}, {"cat": 1, "dog": 1})
    (root / "more" / "test").rename(root / "test")
    with pytest.warns(UserWarning, match="val is left out: .*test is the test set"):
        assert task_of(f"folder:{root}").test.names[0].startswith(str(root / "test"))


@pytest.mark.parametrize("train", ["train", ""], ids=["train alone", "class folders alone"])
def test_a_share_of_each_class_is_tested_where_there_are_no_test_images(tmp_path, train):
    photos = make_class_folders(tmp_path / "all", {"cat": 10, "dog": 4, "eel": 2, "fox": 1}) / "train"
    shutil.rmtree(photos.parent / "test")
    if not train:
        photos = photos.rename(tmp_path / "flat")
    root = photos.parent if train else photos
    (root / "__MACOSX").mkdir()
    (root / ".DS_Store").write_text("clutter")
    name = f"folder:{root}"
    refused(ValueError, "has no test images: .*--test-fraction 0.2", name)
    with pytest.warns(UserWarning, match="only one image of 'fox': it is not tested"):
        task = task_of(name, test_fraction=0.25)
    assert torch.bincount(task.test.labels).tolist() == [3, 1, 1]  # 2.5 and 0.5 are rounded up, 1 is left to train
    assert torch.bincount(task.train.labels).tolist() == [7, 3, 1, 1]
    everything = sorted(str(path) for path in photos.rglob("*.png"))
    assert sorted(task.train.names + task.test.names) == everything
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        again, other, larger = (task_of(name, test_fraction=f, seed=s) for f, s in ((0.25, 0), (0.25, 1), (0.5, 0)))
        parted = task_of(name, test_fraction=0.25, validation_fraction=0.25, shots=5)
        alone = load_task(name, None, None, padding_preset(16), cache_path=tmp_path / "cache", test_fraction=0.25)
        (tmp_path / "other").symlink_to(root)
        for data_path in (root, root.parent, tmp_path / "other"):
            moved = task_of(f"folder:/elsewhere/{root.name}", data_path, test_fraction=0.25)
            assert moved.fingerprint == task.fingerprint
    assert again.fingerprint == task.fingerprint and other.test.names != task.test.names
    assert set(task.test.names) < set(larger.test.names)
    assert parted.test.fingerprint == alone.test.fingerprint == task.test.fingerprint
    assert not set(parted.validation.names) & set(parted.test.names + parted.train.names)
    assert len(parted.train) == 4 + 2 + 1 + 1 and len(parted.validation) == 2


def test_a_share_to_test_is_for_data_without_test_images(tmp_path):
    root = make_class_folders(tmp_path / "photos", {"cat": 1, "dog": 1})
    refused(ValueError, r"has test images \(photos/test\); leave it out", f"folder:{root}", test_fraction=0.2)
    refused(ValueError, r"digits has test images \(digits/test\); leave it out", "digits", test_fraction=0.2)
    for fraction in (0, 1, -0.5, float("nan")):
        refused(ValueError, "test fraction is .*, expected above 0 and below 1", "synthetic", test_fraction=fraction)
    shutil.rmtree(root / "test")
    refused(ValueError, "needs two or more images of a class", f"folder:{root}", test_fraction=0.2)
    refused(
        FileNotFoundError, "holds no class folders with images; expected", f"folder:{root.parent}", test_fraction=0.2
    )


def test_all_faults_of_class_folders_are_gathered(tmp_path):
    root = make_class_folders(tmp_path / "photos")
    for i in range(3):
        (root / f"train/cat/a{i}.png").symlink_to("gone.png")
    (root / "test/notes.txt").write_text("hi")
    refused(ValueError, r"a0.png is a link to gone.png.* \(and 3 more; python -m tools.check_data", f"folder:{root}")
    with pytest.raises(sources.BadFolders) as caught:
        sources.class_folders(root)
    assert [fault.split(" is ")[0].split("/")[-1] for fault in caught.value.faults] == [
        "a0.png",
        "a1.png",
        "a2.png",
        "notes.txt",
    ]


def test_one_class_is_too_few(tmp_path):
    root = make_class_folders(tmp_path / "photos", {"cat": 2}, {"cat": 1})
    refused(ValueError, r"photos has the classes \['cat'\]; expected two or more", f"folder:{root}")


def test_images_in_files_are_turned_upright_and_records_are_not(tmp_path):
    root = make_class_folders(tmp_path / "photos")
    turned, exif, stream = Image.open(io.BytesIO(encoded_image(7, (40, 30)))), Image.Exif(), io.BytesIO()
    exif[0x0112] = 6
    turned.save(stream, "PNG", exif=exif)
    (root / "train/cat/0.png").write_bytes(stream.getvalue())
    stored = padding_preset(16).store(turned.transpose(Image.Transpose.ROTATE_270))
    assert np.array_equal(task_of(f"folder:{root}").train.images[0].numpy(), stored)
    folder = make_ilmvp(tmp_path / "set")
    put(folder / "train.lmdb", b"0", (stream.getvalue(), 0))
    assert np.array_equal(task_of(f"folder:{folder}").train.images[0].numpy(), padding_preset(16).store(turned))


@pytest.mark.parametrize("make", [make_class_folders, make_ilmvp])
def test_a_data_path_says_where_the_folder_has_moved(tmp_path, monkeypatch, make):
    root = make(tmp_path / "a" / "photos")
    monkeypatch.chdir(tmp_path / "a")
    expected = task_of("folder:photos").fingerprint
    for data_path in (root, tmp_path / "a", "../a"):
        for name in ("folder:photos", "folder:/elsewhere/photos", "folder:photos/"):
            assert task_of(name, data_path).fingerprint == expected
    refused(
        FileNotFoundError, "b/photos is not a folder; expected one that holds train", "folder:photos", tmp_path / "b"
    )


def test_a_folder_given_without_the_prefix_gets_a_hint(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "photos").mkdir()
    for name in ("photos", str(tmp_path), "absent/photos"):
        with pytest.raises(ValueError, match=f"images in a folder are given as folder:{name}$"):
            check_dataset_name(name)


@pytest.mark.parametrize("more", [(), (lambda split, labels: None,)])
def test_a_data_set_of_ones_own_is_one_entry(monkeypatch, more):
    images = np.random.RandomState(0).randint(0, 256, (7, 20, 30, 3), dtype=np.uint8)

    def open_mine(name, data_path):
        assert (name, data_path) == ("mine", "there")
        test = ArraySource("mine/test", images[:2], [0, 2])
        return ["Red_fox", "wolf", "dog"], ArraySource("mine/train", images, [0, 1, 2, 0, 1, 2, 0]), test, *more

    monkeypatch.setitem(DATASETS, "mine", DatasetInfo(train=7, test=None, classes=None, image_size=20, open=open_mine))
    check_dataset_name("mine")
    assert image_size("mine") == 20
    task = task_of("mine", "there", shots=2)
    assert task.class_names == ["red fox", "wolf", "dog"] and len(task.train) == 6 and task.num_target == 3
    assert np.array_equal(task.test.images[1].numpy(), padding_preset(16).store(Image.fromarray(images[1])))


@pytest.mark.parametrize(
    "images", [np.zeros((2, 8, 8, 3)), np.zeros((2, 3, 8, 8), np.uint8), np.zeros((3, 8, 8, 3), np.uint8)]
)
def test_arrays_that_are_no_images_are_refused(images):
    with pytest.raises(ValueError, match=r"mine: images of shape .*, with 2 labels; expected \(N, h, w, 3\), uint8"):
        ArraySource("mine", images, [0, 1])


@pytest.mark.parametrize("labels", [[0, 2], [-1, 1]])
def test_labels_without_a_class_name_are_refused(monkeypatch, labels):
    source = ArraySource("mine/train", np.zeros((2, 8, 8, 3), np.uint8), labels)
    info = DatasetInfo(2, 2, 2, 32, lambda name, data_path: (["a", "b"], source, source))
    monkeypatch.setitem(DATASETS, "mine", info)
    refused(ValueError, f"mine/train has labels {labels[0]} to {labels[1]}, expected 0 to 1", "mine")


def test_empty_and_missing_folders(tmp_path):
    refused(FileNotFoundError, "nowhere is not a folder", f"folder:{tmp_path}/nowhere")
    for split in ("train", "test"):
        (tmp_path / "photos" / split).mkdir(parents=True)
    refused(ValueError, "has no class folders", f"folder:{tmp_path}/photos")


def test_ilmvp_by_name_and_by_folder_warning_of_other_sizes(tmp_path):
    folder = make_ilmvp(tmp_path / "dtd")
    with pytest.warns(UserWarning, match=r"dtd has 5 training images \(published: 2820\), 3 test .* 3 classes"):
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
            lambda f: put(f / "train.lmdb", b"1", (encoded_image(1), 2)),
            ValueError,
            "2 samples of label 2 against 1|label 0",
        ),
        (
            lambda f: put(f / "test.lmdb", b"1", (encoded_image(1), 2)),
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
    refused(FileNotFoundError, "sun397 is not a folder.*train.lmdb, test.lmdb, split.json", "sun397", tmp_path)


def test_train_fraction_is_stratified_seeded_and_rounds_half_up(monkeypatch):
    source = ArraySource("mine", np.zeros((59, 8, 8, 3), np.uint8), [0] * 50 + [1] * 5 + [2] + [5] * 3)
    info = DatasetInfo(None, None, None, 16, lambda name, data_path: (list("abcdef"), source, source))
    monkeypatch.setitem(DATASETS, "mine", info)
    mine, again, other = (task_of("mine", train_fraction=0.29, seed=seed).train for seed in (0, 0, 1))
    assert torch.bincount(mine.labels).tolist() == [15, 1, 1, 0, 0, 1]  # 14.5, 1.45, 0.29, 0.87
    rows = [int(name.rpartition("/")[2]) for name in mine.names]
    assert mine.names == again.names != other.names and rows == sorted(rows)
    task = task_of("synthetic", train_fraction=0.5, seed=4)
    assert torch.bincount(task.train.labels).tolist() == [4] * 8 and len(task.test) == 32
    whole = task_of("synthetic")
    rows = torch.tensor([int(name.rpartition("/")[2]) for name in task.train.names])
    assert torch.equal(task.train.images[:], whole.train.images[rows])
    for fraction in (0, -1, 1.01, float("nan")):
        refused(ValueError, "train fraction is .*, expected above 0 and at", "synthetic", train_fraction=fraction)


def test_shots_are_drawn_per_class_with_the_seed(tmp_path):
    task = task_of("synthetic", shots=3)
    assert torch.bincount(task.train.labels).tolist() == [3] * 8 and len(task.test) == 32
    again, more = task_of("synthetic", shots=3), task_of("synthetic", shots=5)
    other = task_of("synthetic", shots=3, seed=1)
    assert task.train.names == again.train.names != other.train.names
    assert set(task.train.names) < set(more.train.names)
    assert task_of("synthetic", shots=8).train.names == task_of("synthetic").train.names
    folder = make_ilmvp(tmp_path / "set")
    with pytest.warns(UserWarning, match="fewer than 2 training images of 'tulip': all are used"):
        task = task_of(f"folder:{folder}", shots=2)
    assert torch.bincount(task.train.labels).tolist() == [2, 2, 1]
    for shots in (0, -1):
        refused(ValueError, f"shots is {shots}, expected 1 or more", "synthetic", shots=shots)
    refused(ValueError, "shots 2 and train fraction 0.5 exclude", "synthetic", shots=2, train_fraction=0.5)


@pytest.mark.parametrize(("more", "each"), [({}, 8), ({"shots": 4}, 4), ({"train_fraction": 0.5}, 4)])
def test_validation_is_a_part_of_each_class_that_training_does_not_see(more, each):
    whole, task = task_of("synthetic", **more), task_of("synthetic", validation_fraction=0.25, **more)
    assert whole.validation is None
    assert torch.bincount(task.validation.labels).tolist() == [each // 4] * 8
    assert torch.bincount(task.train.labels).tolist() == [each - each // 4] * 8
    assert sorted(task.train.names + task.validation.names) == sorted(whole.train.names)
    where = [whole.train.names.index(name) for name in task.validation.names]
    assert torch.equal(task.validation.images[:], whole.train.images[torch.tensor(where)])
    assert task.test.fingerprint == whole.test.fingerprint
    again = task_of("synthetic", validation_fraction=0.25, **more)
    other = task_of("synthetic", validation_fraction=0.25, seed=1, **more)
    assert again.fingerprint == task.fingerprint and again.fingerprint.keys() == {"train", "test", "validation"}
    assert other.validation.names != task.validation.names


def test_validation_images_are_stored_as_test_images_are(tmp_path):
    folder = make_ilmvp(tmp_path / "set", train_labels=[i % 3 for i in range(12)])
    presets = watermarking_train_preset(16), watermarking_test_preset(16)

    def load(*presets, fraction=0.25):
        return load_task(
            f"folder:{folder}", None, *presets, cache_path=tmp_path / "cache", validation_fraction=fraction
        )

    task = load(*presets)
    assert task.train.images.shape == (9, 20, 20, 3) and task.validation.images.shape == (3, 16, 16, 3)
    as_test = load(presets[1], None, fraction=0).train
    rows = torch.tensor([as_test.names.index(name) for name in task.validation.names])
    assert torch.equal(task.validation.images[:], as_test.images[rows])
    only_train = load(presets[0], None)
    assert only_train.validation is None and only_train.train.names == task.train.names
    assert load(None, presets[1]).validation is None


def test_a_class_is_never_held_out_as_a_whole(tmp_path):
    folder = make_ilmvp(tmp_path / "set")
    task = task_of(f"folder:{folder}", validation_fraction=0.9)
    assert torch.bincount(task.train.labels).tolist() == [1, 1, 1] and task.validation.labels.tolist() == [0, 1]
    refused(ValueError, "0.1 holds out no image; give a larger one", f"folder:{folder}", validation_fraction=0.1)
    for share in (-0.1, 1, float("nan")):
        refused(ValueError, "validation fraction is .*, expected 0 or", "synthetic", validation_fraction=share)


def test_class_name_tables():
    assert len(CIFAR10) == 10 and len(CIFAR100) == 100 == len(set(CIFAR100)) and len(GTSRB) == 43 == len(set(GTSRB))
    assert CIFAR100 == sorted(CIFAR100) and CIFAR10 == sorted(CIFAR10)
    assert GTSRB[14] == "stop" and clean_class_name(GTSRB[9]) == "no overtaking general"
    assert clean_class_name(CIFAR100[1]) == "aquarium fish"


@pytest.mark.skipif(not REFERENCE, reason="BLM_REFERENCE names no folder")
def test_gtsrb_is_asked_with_the_words_of_the_published_code():
    assert GTSRB == json.loads((Path(REFERENCE) / "gtsrb_names.json").read_text())["names"]


class FakeDataset:
    """Stands in for a torchvision data set of ten images."""

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
    assert np.array_equal(task.train.images.numpy(), expected) and task.train.labels.tolist() == list(range(10))
    assert task.class_names[:2] == (["airplane", "automobile"] if name == "cifar10" else ["0", "1"])


def write_gtsrb(root):
    """GTSRB as torchvision unpacks it: three training images of two classes, two test images."""
    ppm = [encoded_image(i, (20, 20), "PPM") for i in range(5)]
    for i, label in enumerate((0, 0, 1)):
        (root / f"gtsrb/GTSRB/Training/{label:05}").mkdir(parents=True, exist_ok=True)
        (root / f"gtsrb/GTSRB/Training/{label:05}/{i}.ppm").write_bytes(ppm[i])
    (root / "gtsrb/GTSRB/Final_Test/Images").mkdir(parents=True)
    for i in (3, 4):
        (root / f"gtsrb/GTSRB/Final_Test/Images/{i}.ppm").write_bytes(ppm[i])
    (root / "gtsrb/GT-final_test.csv").write_text("Filename;ClassId\n3.ppm;7\n4.ppm;42\n")


@pytest.mark.parametrize("place", ["", "gtsrb"])
def test_torchvision_sets_may_lie_in_the_data_path_or_in_a_folder_of_their_name(tmp_path, place):
    write_gtsrb(tmp_path / place)
    with pytest.warns(UserWarning, match=r"gtsrb has 3 training images \(published: 26640\)"):
        task = task_of("gtsrb", tmp_path, tmp_path / "cache")
    assert task.train.labels.tolist() == [0, 0, 1] and task.test.labels.tolist() == [7, 42]
    assert np.array_equal(
        task.test.images[1].numpy(), padding_preset(16).store(open_image(encoded_image(4, (20, 20)), ""))
    )
    (tmp_path / place / "gtsrb/GT-final_test.csv").write_text("Filename;ClassId\n3.ppm;7\n4.ppm;8\n")
    with pytest.warns(UserWarning, match="26640"):
        assert task_of("gtsrb", tmp_path, tmp_path / "cache").test.labels.tolist() == [7, 8]


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
        f"{name} is not whole in .*data.* fetch http.* unpack it to get",
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
