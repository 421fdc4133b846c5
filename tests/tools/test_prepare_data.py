"""tools.prepare_data: what becomes of a split file and of torchvision's copies, cut off or tampered with."""

import errno
import io
import json
from pathlib import Path

import pytest
from PIL import Image

from data import load_task, padding_preset
from data.ilmvp import LmdbSource, read_split
from models.torchvision_shim import ensure_torchvision
from tests.data.helpers import encoded_image
from tools import prepare_data

SPLIT = {
    "train": [["a/0.png", 0, "Hard-leaved_orchid"], ["a/1.jpg", 1, "rose"], ["b/2.png", 0, "Hard-leaved_orchid"]],
    "val": [["a/9.png", 1, "rose"]],
    "test": [["b/3.png", 1, "rose"]],
}


@pytest.fixture
def coop(tmp_path):
    """An image folder (60 x 40 pixels) and a split file; returns the command line to prepare them."""
    images = tmp_path / "jpg"
    for i, entry in enumerate(entry for split in ("train", "test") for entry in SPLIT[split]):
        path = images / entry[0]
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(encoded_image(i, (60, 40), "JPEG" if path.suffix == ".jpg" else "PNG"))
    (tmp_path / "split.json").write_text(json.dumps(SPLIT))
    return [
        "flowers102",
        "--images",
        str(images),
        "--split",
        str(tmp_path / "split.json"),
        "--data-path",
        str(tmp_path / "datasets"),
    ]


def edit(coop, change):
    split = json.loads(json.dumps(SPLIT))
    change(split)
    with open(coop[4], "w") as file:
        json.dump(split, file)


def refused(capsys, *arguments):
    with pytest.raises(SystemExit) as caught:
        prepare_data.main(list(arguments))
    printed = capsys.readouterr()
    assert caught.value.code == 2 and printed.err.count("\n") == 1 and printed.err.startswith("error: ")
    return printed.err


def test_split_file_to_folder(coop, tmp_path, capsys):
    assert prepare_data.main(coop) == 0
    out = capsys.readouterr().out
    assert "3 training and 1 test images, 2 classes" in out and "3 training images (published: 4093)" in out
    folder = tmp_path / "datasets" / "flowers102"
    for split in ("train", "test"):
        source = LmdbSource(folder / f"{split}.lmdb")
        stored = [source.record(i) for i in range(len(source))]
        assert stored == [((tmp_path / "jpg" / path).read_bytes(), label) for path, label, _ in SPLIT[split]]
        source.close()
    assert read_split(folder / "split.json")[0] == ["hard leaved orchid", "rose"]
    assert json.loads((folder / "split.json").read_text()) == SPLIT | {"val": []}
    assert sorted(path.name for path in folder.parent.iterdir()) == ["flowers102"]
    preset = padding_preset(32)
    task = load_task(f"folder:{folder}", None, preset, preset, cache_path=None)
    assert task.train.labels.tolist() == [0, 1, 0] and task.class_names == ["hard leaved orchid", "rose"]

    before = (folder / "train.lmdb").stat().st_mtime_ns
    assert prepare_data.main(coop) == 0
    assert "left alone" in capsys.readouterr().out and (folder / "train.lmdb").stat().st_mtime_ns == before


def test_shorter_side(coop, tmp_path):
    assert prepare_data.main([*coop, "--shorter-side", "20"]) == 0
    source = LmdbSource(tmp_path / "datasets" / "flowers102" / "train.lmdb")
    images = [Image.open(io.BytesIO(source.record(i)[0])) for i in range(3)]
    source.close()
    assert [image.size for image in images] == [(30, 20)] * 3
    assert [image.format for image in images] == ["PNG", "JPEG", "PNG"]


def test_shorter_side_leaves_small_images_as_they_are(coop, tmp_path):
    assert prepare_data.main([*coop, "--shorter-side", "40"]) == 0
    source = LmdbSource(tmp_path / "datasets" / "flowers102" / "train.lmdb")
    assert source.record(1)[0] == (tmp_path / "jpg" / "a" / "1.jpg").read_bytes()
    source.close()


@pytest.mark.parametrize("more", [[], ["--shorter-side", "20"]])
def test_images_are_stored_upright(coop, tmp_path, more):
    """LMDB records are read without their EXIF, so that it has to be acted on here."""
    exif, stream, path = Image.Exif(), io.BytesIO(), tmp_path / "jpg/a/0.png"
    exif[0x0112] = 6
    lying = Image.open(path)
    lying.save(stream, "PNG", exif=exif)
    path.write_bytes(stream.getvalue())
    assert prepare_data.main([*coop, *more]) == 0
    source = LmdbSource(tmp_path / "datasets" / "flowers102" / "train.lmdb")
    stored = Image.open(io.BytesIO(source.record(0)[0]))
    expected = lying.transpose(Image.Transpose.ROTATE_270)
    if more:
        expected = expected.resize((20, 30), Image.Resampling.BICUBIC)
    assert stored.tobytes() == expected.tobytes() and not stored.getexif()
    assert Image.open(io.BytesIO(source.record(1)[0])).size == ((30, 20) if more else (60, 40))


def test_goes_on_where_it_was_cut_off(coop, tmp_path, monkeypatch):
    """Cut off while checking, then while writing: nothing passes for whole, no image is decoded twice."""
    decoded = []

    def open_image(encoded, where):
        if len(decoded) == 2:
            raise KeyboardInterrupt
        decoded.append(where)
        return Image.open(io.BytesIO(encoded)).convert("RGB")

    monkeypatch.setattr(prepare_data, "_CHUNK", 1)
    monkeypatch.setattr(prepare_data, "open_image", open_image)
    with pytest.raises((KeyboardInterrupt, SystemExit)):
        prepare_data.main([*coop, "--shorter-side", "20"])
    datasets = tmp_path / "datasets"
    assert [path.name for path in datasets.iterdir()] == [".flowers102.partial"]

    again = []
    monkeypatch.setattr(
        prepare_data, "open_image", lambda encoded, where: again.append(where) or Image.open(io.BytesIO(encoded))
    )
    for debris in (".whole.abcd.tmp", "whole"):  # as kill -9 leaves it
        (datasets / ".flowers102.partial" / debris).mkdir()
        (datasets / ".flowers102.partial" / debris / "train.lmdb").write_bytes(b"half")
    with monkeypatch.context() as cut:
        cut.setattr(prepare_data.os, "replace", lambda *paths: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises((KeyboardInterrupt, SystemExit)):
            prepare_data.main([*coop, "--shorter-side", "20"])
    assert not (datasets / "flowers102").exists()
    assert prepare_data.main([*coop, "--shorter-side", "20"]) == 0
    assert len(decoded) == 2 and len(again) == 2 and not set(decoded) & set(again)
    source = LmdbSource(datasets / "flowers102" / "train.lmdb")
    assert [source.record(i)[1] for i in range(len(source))] == [0, 1, 0]
    source.close()
    assert [path.name for path in datasets.iterdir()] == ["flowers102"]


def test_two_at_once(coop, tmp_path, capsys):
    with prepare_data._held(tmp_path / "datasets" / ".flowers102.partial"):
        assert "another process" in refused(capsys, *coop)


@pytest.mark.parametrize("path", ["../secret.png", "/etc/passwd", "a/../../secret.png", "a\0.png", "link.png"])
def test_paths_out_of_the_image_folder(coop, tmp_path, capsys, path):
    (tmp_path / "secret.png").write_bytes(encoded_image(0))
    (tmp_path / "jpg" / "link.png").symlink_to(tmp_path / "secret.png")
    edit(coop, lambda split: split["test"].append([path, 1, "rose"]))
    assert "leads out of" in refused(capsys, *coop)
    assert not (tmp_path / "datasets").exists()


def test_missing_and_unreadable_images_are_named(coop, tmp_path, capsys, monkeypatch):
    images, read_bytes = tmp_path / "jpg", Path.read_bytes

    def refuse(path):
        if path.name == "1.jpg":
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return read_bytes(path)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "read_bytes", refuse)
        assert "1 images can't be used: " in (message := refused(capsys, *coop)) and "1.jpg: Permission" in message
    for name in ("a/0.png", "b/3.png"):
        (images / name).write_bytes(b"no image")
    message = refused(capsys, *coop)
    assert "2 images can't be used" in message and "a/0.png" in message and "b/3.png" in message
    assert not (tmp_path / "datasets" / "flowers102").exists()
    (images / "a/1.jpg").unlink()
    message = refused(capsys, *coop)
    assert "1 images are not in" in message and "a/1.jpg" in message


BAD = [
    (["--images", "absent", "--split", "absent"], "absent is not a folder"),
    (["--images", "."], "go together"),
    (["--images", ".", "--split", "."], ". is a folder; expected a JSON file"),
    (["--data-path", "/proc/version"], "/proc/version is a file; choose another --data-path"),
    (["--shorter-side", "0"], "1 or more"),
    (["--shorter-side", "x"], "--shorter-side"),
    (["--shorter", "2"], "did you mean --shorter-side?"),
]


@pytest.mark.parametrize("arguments, words", BAD)
def test_bad_input(tmp_path, monkeypatch, capsys, arguments, words):
    monkeypatch.chdir(tmp_path)
    assert words in refused(capsys, "flowers102", *arguments)
    assert list(tmp_path.iterdir()) == []


def test_bad_names(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert "split_zhou_UCF101.json" in refused(capsys, "ucf101")
    assert "split_zhou_Caltech101.json" in refused(capsys, "caltech101")
    assert "split_zhou_Resisc45.json" in refused(capsys, "resisc45")
    assert "letters, digits" in refused(capsys, "../flowers102")
    assert "needs no preparation" in refused(capsys, "cifar10")
    (tmp_path / "datasets" / "dtd").mkdir(parents=True)
    assert "no ILM-VP folder" in refused(capsys, "dtd")


def test_class_in_val_only(coop, capsys):
    edit(coop, lambda split: split["val"].append(["a/9.png", 2, "tulip"]))
    assert "no image of class 'tulip'" in refused(capsys, *coop)


def write_images(root, *paths):
    for i, path in enumerate(paths):
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        (root / path).write_bytes(encoded_image(i, (8, 8), "JPEG"))


def expect_total(monkeypatch, name, total):
    monkeypatch.setitem(prepare_data.COPIES, name, prepare_data.COPIES[name]._replace(total=total))


def content(folder):
    """Labels of both splits, their file names, and the class names of a prepared folder."""
    names, counts = read_split(folder / "split.json")
    split = json.loads((folder / "split.json").read_text())
    return names, {key: dict(counts[key]) for key in ("train", "test")}, split


def test_eurosat_of_torchvision(tmp_path, monkeypatch, capsys):
    classes = ["AnnualCrop", "SeaLake"]
    write_images(tmp_path / "raw/eurosat/2750", *(f"{c}/{c}_{i}.jpg" for c in classes for i in range(10)))
    expect_total(monkeypatch, "eurosat", 20)
    command = ["eurosat", "--data-path", str(tmp_path), "--raw-path", str(tmp_path / "raw")]
    assert prepare_data.main(command) == 0
    assert "seed 0, 50 % of each class" in capsys.readouterr().out
    names, counts, split = content(tmp_path / "eurosat")
    assert names == ["annual crop land", "sea or lake"]
    assert counts == {"train": {0: 5, 1: 5}, "test": {0: 3, 1: 3}}
    assert not {entry[0] for entry in split["train"]} & {entry[0] for entry in split["test"]}
    assert all(entry[0].startswith(classes[entry[1]]) for entry in split["train"])

    expect_total(monkeypatch, "eurosat", 27000)  # an unpacking that was cut off
    command[2] = str(tmp_path / "other")
    message = refused(capsys, *command)
    assert "holds 20 images, expected 27000" in message and "remove" in message


def test_sun397_of_torchvision(tmp_path, monkeypatch):
    root = tmp_path / "raw/SUN397"
    write_images(root, *(f"a/{c}/sun_{i:03}.jpg" for c in ("abbey", "arch/outdoor") for i in range(95)))
    (root / "ClassName.txt").write_text("/a/abbey\n/a/arch/outdoor\n")
    expect_total(monkeypatch, "sun397", 190)
    assert prepare_data.main(["sun397", "--data-path", str(tmp_path)]) == 0
    names, counts, _ = content(tmp_path / "sun397")
    assert names == ["abbey", "outdoor arch"]
    assert counts == {"train": {0: 40, 1: 40}, "test": {0: 50, 1: 50}}


def test_dtd_of_torchvision(tmp_path, monkeypatch, capsys):
    root = tmp_path / "raw/dtd/dtd"
    write_images(root / "images", *(f"{c}/{c}_{i}.jpg" for c in ("banded", "dotted") for i in range(3)))
    (root / "labels").mkdir()
    for i, split in enumerate(("train", "val", "test")):
        (root / "labels" / f"{split}1.txt").write_text(f"banded/banded_{i}.jpg\ndotted/dotted_{i}.jpg\n")
    expect_total(monkeypatch, "dtd", 6)
    assert prepare_data.main(["dtd", "--data-path", str(tmp_path)]) == 0
    names, counts, split = content(tmp_path / "dtd")
    assert names == ["banded", "dotted"] and counts == {"train": {0: 2, 1: 2}, "test": {0: 1, 1: 1}}
    assert split["test"] == [["banded/banded_2.jpg", 0, "banded"], ["dotted/dotted_2.jpg", 1, "dotted"]]
    (root / "images/banded/banded_1.jpg").unlink()
    message = refused(capsys, "dtd", "--data-path", str(tmp_path / "other"), "--raw-path", str(tmp_path / "raw"))
    assert "banded/banded_1.jpg" in message


def test_fgvc_aircraft_of_torchvision(tmp_path, monkeypatch, capsys):
    root = tmp_path / "raw/fgvc-aircraft-2013b/data"
    write_images(root / "images", *(f"{i}.jpg" for i in range(6)))
    (root / "variants.txt").write_text("707-320\n747-100\n")
    for first, split in ((0, "train"), (2, "val"), (4, "test")):
        (root / f"images_variant_{split}.txt").write_text(f"{first} 707-320\n{first + 1} 747-100\n")
    expect_total(monkeypatch, "fgvc_aircraft", 4)
    assert prepare_data.main(["fgvc_aircraft", "--data-path", str(tmp_path)]) == 0
    printed = capsys.readouterr().out
    assert "2 test images (published: 3333)" in printed and "not the paper's" not in printed
    names, counts, split = content(tmp_path / "fgvc_aircraft")
    assert names == ["707 320", "747 100"] and counts == {"train": {0: 1, 1: 1}, "test": {0: 1, 1: 1}}
    assert [entry[0] for entry in split["test"]] == ["4.jpg", "5.jpg"]


def test_no_network(tmp_path, monkeypatch, capsys):
    ensure_torchvision()
    import torchvision.datasets.eurosat as module

    def offline(*arguments, **options):
        raise OSError("no route to host")

    monkeypatch.setattr(module, "download_and_extract_archive", offline)
    message = refused(capsys, "eurosat", "--data-path", str(tmp_path / "datasets"))
    for words in ("no route to host", "EuroSAT.zip", str(tmp_path / "datasets/raw/eurosat/2750")):
        assert words in message
    assert list(tmp_path.iterdir()) == []
