"""tools.check_data: whole folders pass, and of broken ones every fault is listed."""

import io
import os

import numpy as np
import pytest
from PIL import Image

from data import ArraySource, DatasetInfo
from tests.data.helpers import edit_split, encoded_image, make_class_folders, make_ilmvp, put
from tools import check_data

REAL_DATA = os.environ.get("BLM_REAL_DATA")


def check(capsys, *arguments):
    """Exit code, summary and findings."""
    code = check_data.main([str(argument) for argument in arguments])
    lines = capsys.readouterr().out.splitlines()
    return code, lines[0], [line.removeprefix("- ") for line in lines[1:-1]]


def test_whole_folders(tmp_path, capsys):
    folder = make_ilmvp(tmp_path / "mine")
    assert check(capsys, folder) == (0, "mine: 5 train images, 3 test images, 3 classes", [])
    assert check(capsys, "--dataset", f"folder:{folder}")[0] == 0
    assert check(capsys, "--dataset", "folder:/elsewhere/mine", "--data-path", tmp_path)[0] == 0
    photos = make_class_folders(tmp_path / "photos")
    assert check(capsys, f"folder:{photos}") == (0, "photos: 5 train images, 2 test images, 2 classes", [])


def test_every_unreadable_image_is_listed(tmp_path, capsys):
    folder = make_ilmvp(tmp_path / "mine")
    put(folder / "train.lmdb", b"1", (b"no image", 0))
    put(folder / "train.lmdb", b"3", (encoded_image(0)[:200], 2))
    put(folder / "test.lmdb", b"2", "no record")
    code, _, findings = check(capsys, folder)
    assert code == 1 and len(findings) == 3
    for finding, (file, key) in zip(findings, [("train", "1"), ("train", "3"), ("test", "2")], strict=True):
        assert f"{file}.lmdb, key b'{key}'" in finding


def test_unreadable_file_in_class_folders(tmp_path, capsys):
    photos = make_class_folders(tmp_path / "photos")
    (photos / "train/cat/1.png").write_bytes(b"")
    code, _, findings = check(capsys, photos)
    assert code == 1 and len(findings) == 1 and "train/cat/1.png: not a readable image" in findings[0]
    (photos / "train/bird").mkdir()
    (photos / "test/cat/a.png").symlink_to("gone.png")
    findings = check(capsys, photos)[2]
    assert "bird is empty" in findings[0] and "test/cat/a.png is a link to gone.png" in findings[1]


def test_folders_without_test_images(tmp_path, capsys):
    photos = make_class_folders(tmp_path / "photos") / "train"
    assert check(capsys, photos) == (
        0,
        "train: 5 train images, 2 classes, no test images: train with --test-fraction",
        [],
    )


def test_images_of_one_colour_are_named(tmp_path, capsys):
    folder = make_ilmvp(tmp_path / "mine")
    white = io.BytesIO()
    Image.new("L", (9, 9), 255).save(white, "PNG")
    put(folder / "train.lmdb", b"1", (white.getvalue(), 0))
    (finding,) = check(capsys, folder)[2]
    assert "train.lmdb, key b'1': all pixels are (255, 255, 255)" in finding
    photos = make_class_folders(tmp_path / "photos")
    (photos / "test/cat/0.png").write_bytes(white.getvalue())
    assert "cat/0.png: all pixels are" in check(capsys, photos)[2][0]


def test_data_sets_of_ones_own_and_those_made_on_the_spot(monkeypatch, capsys):
    assert check(capsys, "--dataset", "digits") == (0, "digits: 901 train images, 896 test images, 10 classes", [])
    source = ArraySource("mine/train", np.arange(480, dtype=np.uint8).reshape(2, 8, 10, 3), [0, 0])
    info = DatasetInfo(3, 2, 2, 32, lambda name, data_path: (["a", "b"], source, source))
    monkeypatch.setitem(check_data.DATASETS, "mine", info)
    code, summary, findings = check(capsys, "--dataset", "mine")
    assert code == 1 and summary == "mine: 2 train images, 2 test images, 2 classes"
    assert findings == [
        "class 1, 'b', has no training image",
        "2 training images (published: 3); another split, or not whole",
    ]


@pytest.mark.filterwarnings("always::UserWarning")
def test_what_is_said_of_folders(tmp_path, capsys):
    photos = make_class_folders(tmp_path / "photos", {"cat": 2, "dog": 1}, {"cat": 1})
    assert check_data.main([str(photos)]) == 0
    warning = capsys.readouterr().err
    assert warning.startswith(f"warning: {photos}/test has no images of 'dog'") and warning.count("\n") == 1
    alone = make_class_folders(tmp_path / "alone", {"cat": 2}, {"cat": 1})
    assert check(capsys, alone)[2] == ["one class, 'cat'; expected two or more to tell apart"]
    (photos / "test/dog").symlink_to("absent")
    assert "test/dog is a link to absent, which is not there" in check(capsys, photos)[2][0]


def test_labels_against_split(tmp_path, capsys):
    folder = make_ilmvp(tmp_path / "mine")
    put(folder / "train.lmdb", b"1", (encoded_image(1), 2))
    assert "1 samples of label 0 against 2" in check(capsys, folder)[2][0]


def test_class_names(tmp_path, capsys):
    def rename(splits):
        for split in splits.values():
            for entry in split:
                entry[2] = {"tulip": "Rose"}.get(entry[2], entry[2])

    folder = make_ilmvp(tmp_path / "mine", test_labels=(0, 1, 2))
    edit_split(folder, rename)
    assert check(capsys, folder)[2] == ["2 classes are named 'rose'"]
    folder = make_ilmvp(tmp_path / "untrained", train_labels=(0, 0, 2))
    assert check(capsys, folder)[2] == ["class 1, 'rose', has no training image"]


def test_missing_and_damaged_files_do_not_hide_each_other(tmp_path, capsys):
    folder = make_ilmvp(tmp_path / "mine")
    (folder / "split.json").unlink()
    with open(folder / "train.lmdb", "r+b") as file:
        file.truncate(5000)
    code, summary, findings = check(capsys, folder)
    assert code == 1 and summary == "mine: 3 test images" and len(findings) == 2
    assert "split.json does not exist" in findings[0] and "train.lmdb" in findings[1]


def test_published_sizes(tmp_path, capsys):
    make_ilmvp(tmp_path / "dtd")
    expected = [
        f"{found} (published: {n}); another split, or not whole"
        for found, n in (("5 training images", 2820), ("3 test images", 1692), ("3 classes", 47))
    ]
    assert check(capsys, tmp_path / "dtd")[2] == expected
    assert check(capsys, "--dataset", "dtd", "--data-path", tmp_path)[2] == expected


BAD = [
    ([], "either PATH or --dataset"),
    (["a", "--dataset", "dtd"], "either PATH or --dataset"),
    (["absent"], "absent is not a folder; give the folder of a data set, or --dataset NAME"),
    (["loop"], "loop is not a folder"),
    (["."], "holds no class folders with images; expected"),
    (["absent", "--data-path", "datasets"], "--data-path goes with --dataset"),
    (["--dataset", "folder:absent"], "absent is not a folder"),
    (["--dataset", "flower102"], "'flowers102'"),
    (["--dataset", "dtd"], "choose another --data-path, fetch the folder"),
    (["--datasets", "dtd"], "did you mean --dataset?"),
]


@pytest.mark.parametrize("arguments, words", BAD)
def test_bad_input(tmp_path, monkeypatch, capsys, arguments, words):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "loop").symlink_to("loop")
    with pytest.raises(SystemExit) as caught:
        check_data.main(arguments)
    error = capsys.readouterr().err
    assert caught.value.code == 2 and error.count("\n") == 1 and words in error


@pytest.mark.skipif(not REAL_DATA, reason="BLM_REAL_DATA names no folder")
def test_real_flowers(capsys):
    code, summary, findings = check(capsys, f"{REAL_DATA}/flowers102")
    assert code == 1 and summary == "flowers102: 1424 train images, 890 test images, 89 classes"
    assert [finding.split(" (")[0] for finding in findings] == ["1424 training images", "890 test images", "89 classes"]
