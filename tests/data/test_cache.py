"""The decoded cache: exact values, made again when it should be, nothing left behind, and life without it."""

import concurrent.futures
import json
import multiprocessing
import os
import re
import resource
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from data import ArraySource, cache, clip_preset, load_task, padding_preset, watermarking_train_preset
from data.decode import open_image
from data.ilmvp import LmdbSource
from data.image_set import ImageSet, Rows, Streamed
from data.presets import Preset
from models.torchvision_shim import ensure_torchvision
from tests.data.helpers import encoded_image, make_class_folders, make_ilmvp, put


def task_of(folder, cache_path, preset=None, **settings):
    preset = preset or padding_preset(16)
    return load_task(f"folder:{folder}", None, preset, preset, cache_path=cache_path, **settings)


def train_file(cache_path):
    (path,) = cache_path.glob("*-train-*.npy")
    return path


def decodings(monkeypatch):
    """Count the images that are decoded from now on."""
    seen, image = [], LmdbSource.image
    monkeypatch.setattr(LmdbSource, "image", lambda self, i: (seen.append(i), image(self, i))[1])
    return seen


@pytest.mark.parametrize("size", [(40, 30), (30, 41), (128, 128), (9, 200), (33, 32)])
@pytest.mark.parametrize("stored", [32, 128, 228])
def test_stored_values_are_those_of_torchvision(size, stored):
    ensure_torchvision()
    from torchvision import transforms
    from torchvision.transforms import InterpolationMode

    image = open_image(encoded_image(7, size), "here")
    exact = transforms.Compose([transforms.Resize((stored, stored)), transforms.ToTensor()])(image)
    ours = torch.from_numpy(Preset(stored).store(image).copy()).permute(2, 0, 1).float().div_(torch.tensor(255.0))
    assert torch.equal(ours, exact)
    clip = transforms.Compose(
        [
            transforms.Resize(stored, interpolation=InterpolationMode.BICUBIC),
            transforms.CenterCrop(stored),
            transforms.PILToTensor(),
        ]
    )(image)
    assert torch.equal(torch.from_numpy(clip_preset(stored).store(image).copy()).permute(2, 0, 1), clip)


def test_a_sliver_that_would_become_huge_is_refused():
    image = open_image(encoded_image(0, (20_000, 1)), "here")
    with pytest.raises(ValueError, match="here: 20000x1 pixels would become 4480000x224"):
        clip_preset(224).store(image, "here")
    assert Preset(224).store(image).shape == (224, 224, 3)


def test_cached_images_are_the_decoded_ones(tmp_path, monkeypatch):
    folder = make_ilmvp(tmp_path / "set")
    seen = decodings(monkeypatch)
    first = task_of(folder, tmp_path / "cache").train
    assert len(seen) == 8
    again = task_of(folder, tmp_path / "cache").train
    assert len(seen) == 8 and again.origin == f"cache {train_file(tmp_path / 'cache')}"
    expected = np.stack([padding_preset(16).store(open_image(encoded_image(i), "")) for i in range(5)])
    for image_set in (first, again):
        assert isinstance(image_set.images, torch.Tensor) and image_set.images.dtype == torch.uint8
        assert np.array_equal(image_set.images.numpy(), expected)
        assert image_set.labels.tolist() == [0, 0, 1, 2, 1] and image_set.names == list("01234")
    assert np.array_equal(np.load(train_file(tmp_path / "cache"), mmap_mode="r"), expected)


def test_presets_that_store_alike_share_a_file(tmp_path):
    folder = make_ilmvp(tmp_path / "set")
    task_of(folder, tmp_path / "cache", watermarking_train_preset(12))
    task_of(folder, tmp_path / "cache", padding_preset(16))
    assert len(list((tmp_path / "cache").iterdir())) == 2
    task_of(folder, tmp_path / "cache", clip_preset(16))
    assert len(list((tmp_path / "cache").iterdir())) == 4


def damaged(path, how):
    whole = bytearray(path.read_bytes())
    if how == "cut off":
        whole = whole[: len(whole) // 2]
    elif how == "empty":
        whole = b""
    elif how == "longer":
        whole += b"\0"
    elif how == "text":
        whole = b"what is this " * 1000
    path.write_bytes(whole)


@pytest.mark.parametrize("how", ["cut off", "empty", "longer", "text"])
def test_damaged_caches_are_made_again(tmp_path, monkeypatch, how):
    folder = make_ilmvp(tmp_path / "set")
    expected = task_of(folder, tmp_path / "cache").train.images.clone()
    path = train_file(tmp_path / "cache")
    damaged(path, how)
    seen = decodings(monkeypatch)
    assert torch.equal(task_of(folder, tmp_path / "cache").train.images, expected)
    assert len(seen) == 5
    assert torch.equal(task_of(folder, tmp_path / "cache").train.images, expected)
    assert len(seen) == 5


def test_every_flipped_bit_of_the_trailer_or_of_a_pixel_is_noticed(tmp_path):
    source = LmdbSource(make_ilmvp(tmp_path / "set") / "train.lmdb")
    task_of(tmp_path / "set", tmp_path / "cache")
    path = train_file(tmp_path / "cache")
    whole = path.read_bytes()
    assert cache._read(path, source.fingerprint(), padding_preset(16)) is not None
    for at in range(128, len(whole), 7):  # the .npy header before is for other readers, ours does not use it
        path.write_bytes(whole[:at] + bytes([whole[at] ^ (1 << at % 8)]) + whole[at + 1 :])
        assert cache._read(path, source.fingerprint(), padding_preset(16)) is None, at


def test_a_changed_source_is_decoded_again_into_the_same_file(tmp_path):
    folder = make_ilmvp(tmp_path / "set")
    before = task_of(folder, tmp_path / "cache").train.images.clone()
    put(folder / "train.lmdb", b"0", (encoded_image(50), 0))
    after = task_of(folder, tmp_path / "cache").train.images
    assert not torch.equal(before[0], after[0]) and torch.equal(before[1:], after[1:])
    assert len(list((tmp_path / "cache").iterdir())) == 2

    root = make_class_folders(tmp_path / "photos")
    before = task_of(root, tmp_path / "cache").train.images.clone()
    (root / "train/cat/0.png").write_bytes(encoded_image(51))
    after = task_of(root, tmp_path / "cache").train.images
    assert not torch.equal(before[0], after[0]) and torch.equal(before[1:], after[1:])


def test_the_number_of_threads_changes_nothing(tmp_path):
    folder = make_ilmvp(tmp_path / "set", train_labels=[i % 3 for i in range(90)])
    one, three = (task_of(folder, tmp_path / f"cache{n}", workers=n).train for n in (1, 3))
    assert torch.equal(one.images, three.images) and torch.equal(one.labels, three.labels)
    contents = [train_file(tmp_path / f"cache{n}").read_bytes() for n in (1, 3)]
    assert contents[0] == contents[1]


def test_bad_input_leaves_nothing_behind(tmp_path):
    folder = make_ilmvp(tmp_path / "set")
    put(folder / "train.lmdb", b"3", (encoded_image(0)[:-300], 2))
    for cache_path in (tmp_path / "a/b/cache", None):
        with pytest.raises(ValueError, match=r"train\.lmdb, key b'3': not a readable image"):
            task_of(folder, cache_path)
    assert [path.name for path in tmp_path.iterdir()] == ["set"]


def test_read_only_data_are_fine(tmp_path):
    folder = make_ilmvp(tmp_path / "set")
    for path in folder.iterdir():
        path.chmod(0o444)
    folder.chmod(0o555)
    try:
        assert len(task_of(folder, tmp_path / "cache").train) == 5
        assert len(list(folder.iterdir())) == 3
    finally:
        folder.chmod(0o755)


@pytest.mark.parametrize("when", ["no room", "full while writing", "full at the end", "a file in its place"])
def test_without_room_for_a_cache_images_are_kept_in_memory(tmp_path, monkeypatch, when):
    folder, preset = make_ilmvp(tmp_path / "set"), padding_preset(16)
    expected = task_of(folder, tmp_path / "fine").train
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    if when == "no room":
        monkeypatch.setattr(cache.shutil, "disk_usage", lambda path: cache.shutil._ntuple_diskusage(100, 0, 99))
    elif when == "a file in its place":
        (tmp_path / "cache").write_text("mine")
    else:
        size = 200 if when == "full while writing" else 4000
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, limits[1]))
    try:
        train = load_task(f"folder:{folder}", None, preset, None, cache_path=tmp_path / "cache").train
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert torch.equal(train.images, expected.images) and torch.equal(train.labels, expected.labels)
    reason = {"no room": "3,840 bytes are needed, 99 are free", "a file in its place": "File exists"}
    assert re.fullmatch(r"decoded into memory \(.*\)", train.origin)
    assert str(tmp_path / "cache") in train.origin and reason.get(when, "File too large") in train.origin
    if when == "a file in its place":
        assert (tmp_path / "cache").read_text() == "mine"
    else:
        assert not (tmp_path / "cache").exists()


def test_without_room_anywhere_images_are_streamed(tmp_path, monkeypatch):
    folder = make_ilmvp(tmp_path / "set")
    expected = task_of(folder, tmp_path / "fine").train
    monkeypatch.setattr(cache, "available_memory", lambda: 100)
    train = task_of(folder, None).train
    assert isinstance(train.images, Streamed) and train.origin == "decoded every epoch (not cached)"
    assert len(train.images) == 5 and train.images.shape == (5, 16, 16, 3)
    index = torch.tensor([4, 0, 0, 2])
    assert torch.equal(train.images[index], expected.images[index])
    assert torch.equal(train.images[1:3], expected.images[1:3])
    assert torch.equal(train.images[2], expected.images[2])
    assert train.labels.tolist() == expected.labels.tolist()


def test_a_source_that_vanishes_is_no_fault_of_the_cache(tmp_path, monkeypatch):
    root = make_class_folders(tmp_path / "photos")
    read_bytes = Path.read_bytes

    def vanishing(path):
        if path.name == "1.png":
            path.unlink()
        return read_bytes(path)

    monkeypatch.setattr(Path, "read_bytes", vanishing)
    with pytest.raises(ValueError, match=r"train/cat/1\.png: No such file or directory; restore or remove"):
        task_of(root, tmp_path / "cache")
    assert [path.name for path in tmp_path.iterdir()] == ["photos"]


def test_a_source_of_ones_own_that_can_not_be_read_is_no_fault_of_the_cache(tmp_path, monkeypatch):
    class Mine(ArraySource):
        def image(self, i):
            return Image.open(tmp_path / f"{i}.png")

    source = Mine("mine/train", np.zeros((2, 8, 8, 3), np.uint8), [0, 1])
    monkeypatch.setattr(cache, "available_memory", lambda: 0)
    with pytest.raises(ValueError, match="^mine/train/0: No such file or directory; restore or remove this image$"):
        cache.stored_images(source, padding_preset(16), tmp_path / "a.npy", threads=1, progress=False, check=len)


def test_cache_files_have_the_mode_of_the_umask(tmp_path):
    before = os.umask(0o022)
    try:
        task_of(make_ilmvp(tmp_path / "set"), tmp_path / "cache")
    finally:
        os.umask(before)
    assert train_file(tmp_path / "cache").stat().st_mode & 0o777 == 0o644


def load_sum(folder, cache_path):
    images = task_of(folder, cache_path, workers=1, progress=False).train.images
    return int(images.numpy().sum())  # torch's own threads do not survive a fork


def test_processes_that_start_together_agree(tmp_path):
    folder = make_ilmvp(tmp_path / "set", train_labels=[i % 3 for i in range(60)])
    context = multiprocessing.get_context("fork")
    with concurrent.futures.ProcessPoolExecutor(4, mp_context=context) as pool:
        sums = list(pool.map(load_sum, [folder] * 8, [tmp_path / "cache"] * 8))
    assert len(set(sums)) == 1 and sums[0] == load_sum(folder, tmp_path / "cache")
    assert len(list((tmp_path / "cache").iterdir())) == 2


def test_subset_is_a_view(tmp_path):
    image_set = task_of(make_ilmvp(tmp_path / "set"), tmp_path / "cache").train
    part = image_set.subset(torch.tensor([1, 3, 4]))
    assert isinstance(part, ImageSet) and isinstance(part.images, Rows)
    assert part.labels.tolist() == [0, 2, 1] and part.names == ["1", "3", "4"] and len(part.images) == 3
    assert torch.equal(part.images[torch.tensor([2, 0])], image_set.images[torch.tensor([4, 1])])
    assert torch.equal(part.images[:2], image_set.images[torch.tensor([1, 3])])
    smaller = part.subset(torch.tensor([2, 0]))
    assert smaller.images.base is image_set.images and smaller.names == ["4", "1"]
    assert torch.equal(smaller.images[:], image_set.images[torch.tensor([4, 1])])


MODES = ("cached", "cached before", "in memory", "streamed")


def fingerprints(folder, cache_path, monkeypatch, **settings):
    """Of the same data in each way of keeping images."""
    found = {}
    for mode in MODES:
        with monkeypatch.context() as patch:
            if mode == "streamed":
                patch.setattr(cache, "available_memory", lambda: 100)
            task = task_of(folder, cache_path if "cached" in mode else None, **settings)
            assert isinstance(getattr(task.train.images, "base", task.train.images), Streamed) == (mode == "streamed")
            found[mode] = task.fingerprint
    assert all(found[mode] == found["cached"] for mode in MODES)
    return found["cached"]


def test_fingerprint_is_that_of_labels_and_images_however_they_are_kept(tmp_path, monkeypatch):
    folder = make_ilmvp(tmp_path / "set")
    original = fingerprints(folder, tmp_path / "a", monkeypatch)
    assert original.keys() == {"train", "test"} and all(re.fullmatch("[0-9a-f]{64}", x) for x in original.values())
    folder.rename(tmp_path / "moved")
    folder = tmp_path / "moved"
    os.utime(folder / "train.lmdb", (0, 0))
    assert fingerprints(folder, tmp_path / "b", monkeypatch) == original
    put(folder / "test.lmdb", b"1", (encoded_image(50), 1))
    changed = fingerprints(folder, tmp_path / "b", monkeypatch)
    assert changed["train"] == original["train"] and changed["test"] != original["test"]
    put(folder / "train.lmdb", b"1", (encoded_image(1), 1))
    put(folder / "train.lmdb", b"2", (encoded_image(2), 0))
    assert fingerprints(folder, tmp_path / "b", monkeypatch)["train"] != original["train"]


def test_fingerprint_of_a_part_depends_on_the_part(tmp_path, monkeypatch):
    folder = make_ilmvp(tmp_path / "set", train_labels=[i % 3 for i in range(30)])
    whole = task_of(folder, tmp_path / "a").fingerprint
    parts = [
        fingerprints(folder, tmp_path / "a", monkeypatch, **settings)["train"]
        for settings in ({"train_fraction": 0.5}, {"train_fraction": 0.5, "seed": 1}, {"shots": 2})
    ]
    assert len({whole["train"], *parts}) == 4
    assert fingerprints(folder, tmp_path / "a", monkeypatch, shots=5, seed=0)["train"] == parts[0]
    held_out = fingerprints(folder, tmp_path / "a", monkeypatch, validation_fraction=0.2)
    assert held_out.keys() == {"train", "test", "validation"} and held_out["test"] == whole["test"]


def test_streamed_images_are_not_decoded_again_for_the_fingerprint(tmp_path, monkeypatch):
    folder = make_ilmvp(tmp_path / "set")
    monkeypatch.setattr(cache, "available_memory", lambda: 100)
    train = task_of(folder, None).train
    train.images[torch.tensor([3, 1, 0])]
    seen = decodings(monkeypatch)
    assert train.fingerprint == train.fingerprint and sorted(seen) == [2, 4]


def test_trailer_says_what_the_images_were_made_from(tmp_path):
    folder = make_ilmvp(tmp_path / "set")
    task_of(folder, tmp_path / "cache")
    content = train_file(tmp_path / "cache").read_bytes()
    length = cache._FOOTER.unpack(content[-cache._FOOTER.size :])[0]
    trailer = json.loads(content[-cache._FOOTER.size - length : -cache._FOOTER.size])
    status = (folder / "train.lmdb").stat()
    assert trailer["key"]["source"] == [str(folder / "train.lmdb"), status.st_size, status.st_mtime_ns]
    assert trailer["key"]["storage"] == "16-exact-bilinear"
