"""BatchLoader: exact values, order as a function of seed, purpose and epoch, all ways of keeping them."""

import pytest
import torch

from data import (
    BatchLoader,
    ImageSet,
    load_task,
    padding_preset,
    watermarking_test_preset,
    watermarking_train_preset,
)
from data import image_set as image_set_module
from data.image_set import Streamed
from data.loader import _vary_at_once, epoch_generator, vary
from data.presets import Preset
from data.sources import ArraySource
from models.torchvision_shim import ensure_torchvision

CROPPED = Preset(20, crop=16, flip=True)


def make_set(count=23, side=20):
    generator = torch.Generator().manual_seed(3)
    images = torch.randint(256, (count, side, side, 3), generator=generator, dtype=torch.uint8)
    return ImageSet(images, torch.arange(count) % 5, [str(i) for i in range(count)], "made here")


def make_loader(image_set, preset=CROPPED, batch_size=8, shuffle=True, seed=0, purpose="train", **share):
    return BatchLoader(image_set, preset, batch_size, "cpu", shuffle=shuffle, seed=seed, purpose=purpose, **share)


def everything(loader, epoch=0):
    batches = list(loader.epoch(epoch))
    return torch.cat([batch.images for batch in batches]), torch.cat([batch.labels for batch in batches])


def stream(monkeypatch):
    monkeypatch.setattr(image_set_module, "available_memory", lambda: 100)


def test_all_256_values_and_their_places_are_those_of_totensor():
    ensure_torchvision()
    from torchvision.transforms.functional import to_tensor

    pixels = torch.arange(256, dtype=torch.uint8).reshape(16, 16, 1).repeat(1, 1, 3)
    pixels[..., 1] = pixels[..., 0].T
    loader = make_loader(ImageSet(pixels[None], torch.tensor([4]), ["0"], ""), padding_preset(16))
    batch = next(loader.epoch(0))
    assert torch.equal(batch.images[0], to_tensor(pixels.numpy()))
    assert batch.images.dtype == torch.float32 and batch.labels.tolist() == [4] and batch.global_size == 1
    assert batch.images.is_contiguous(memory_format=torch.channels_last)


def test_every_sample_once_and_the_last_partial_batch_kept():
    image_set = make_set()
    loader = make_loader(image_set, padding_preset(20), shuffle=False)
    batches = list(loader.epoch(0))
    assert [len(batch.labels) for batch in batches] == [8, 8, 7] == [batch.global_size for batch in batches]
    assert len(loader) == 3 and loader.num_samples == 23
    images, labels = everything(loader)
    assert torch.equal(images, image_set.images.permute(0, 3, 1, 2) / 255)
    assert torch.equal(labels, image_set.labels)
    images, labels = everything(make_loader(image_set, padding_preset(20)))
    order = epoch_generator(0, "train", 0)
    order = torch.randperm(23, generator=order)
    assert torch.equal(images, image_set.images[order].permute(0, 3, 1, 2) / 255)
    assert torch.equal(labels, image_set.labels[order]) and order.sort().values.tolist() == list(range(23))


def test_crops_and_flips_one_by_one():
    stored = make_set(6).images
    offsets = torch.tensor([[0, 0], [4, 4], [0, 4], [1, 2], [3, 0], [2, 2]])
    flips = torch.tensor([False, True, True, False, True, False])
    for chosen in (flips, None):
        for places in (offsets, None):
            varied = vary(stored, 16, places, chosen)
            for i in range(6):
                top, left = (0, 0) if places is None else offsets[i].tolist()
                expected = stored[i, top : top + 16, left : left + 16]
                if chosen is None and places is None:
                    expected = stored[i]
                elif chosen is not None and flips[i]:
                    expected = expected.flip(1)
                assert torch.equal(varied[i], expected)
            if chosen is not None or places is not None:
                assert torch.equal(_vary_at_once(stored, 16, places, chosen), varied)


def test_each_picture_is_a_crop_of_itself_and_all_crops_occur():
    image_set, loader = make_set(), make_loader(make_set())
    order = torch.randperm(23, generator=epoch_generator(0, "train", 5))
    found = set()
    for epoch in range(5, 25):
        order = torch.randperm(23, generator=epoch_generator(0, "train", epoch))
        images, _ = everything(loader, epoch)
        for image, i in zip(images, order.tolist(), strict=True):
            pixels = (image.permute(1, 2, 0) * 255).round().to(torch.uint8)
            crops = {
                (top, left, flip): crop
                for top in range(5)
                for left in range(5)
                for flip, crop in enumerate(
                    (
                        image_set.images[i, top : top + 16, left : left + 16],
                        image_set.images[i, top : top + 16, left : left + 16].flip(1),
                    )
                )
                if torch.equal(crop, pixels)
            }
            assert len(crops) == 1
            found.update(crops)
    assert len(found) == 50


def test_draws_depend_on_seed_purpose_and_epoch_alone():
    image_set = make_set()
    images, labels = everything(make_loader(image_set), 3)
    torch.manual_seed(99)
    loader = make_loader(image_set)
    for epoch in (0, 1, 7):  # history does not matter
        everything(loader, epoch)
    again, again_labels = everything(loader, 3)
    assert torch.equal(images, again) and torch.equal(labels, again_labels)
    for other in (
        everything(make_loader(image_set, seed=1), 3),
        everything(make_loader(image_set, purpose="estimate"), 3),
        everything(make_loader(image_set), 4),
    ):
        assert not torch.equal(other[1], labels)
    assert torch.equal(everything(make_loader(image_set, batch_size=23), 3)[0], images)


def test_the_draws_are_what_they_always_were():
    # A resumed run on a later version must see the same order: these numbers must not change.
    generator = epoch_generator(0, "train", 0)
    assert torch.randperm(8, generator=generator).tolist() == [4, 6, 2, 1, 3, 7, 0, 5]


@pytest.mark.parametrize("world_size", [1, 2, 3, 5])
@pytest.mark.parametrize("streamed", [False, True])
def test_ranks_share_every_batch(world_size, streamed, monkeypatch):
    image_set = make_set(21)  # batches of 8, 8, 5; and of 4 ... 1 where ranks outnumber samples
    if streamed:
        stream(monkeypatch)
    for batch_size in (8, 4):
        whole = list(make_loader(image_set, batch_size=batch_size).epoch(2))
        loaders = [
            make_loader(image_set, batch_size=batch_size, rank=rank, world_size=world_size)
            for rank in range(world_size)
        ]
        assert all(len(loader) == len(whole) for loader in loaders)
        for expected, *shares in zip(whole, *(loader.epoch(2) for loader in loaders), strict=True):
            assert torch.equal(torch.cat([share.images for share in shares]), expected.images)
            assert torch.equal(torch.cat([share.labels for share in shares]), expected.labels)
            assert {share.global_size for share in shares} == {len(expected.labels)}
            sizes = [len(share.labels) for share in shares]
            assert max(sizes) - min(sizes) <= 1


@pytest.mark.parametrize("preset", [CROPPED, Preset(20)])
def test_resident_streamed_and_decoded_every_epoch_are_equal(preset, monkeypatch):
    image_set = make_set()
    source = ArraySource("made", image_set.images.numpy(), image_set.labels)
    on_the_fly = ImageSet(Streamed(source, preset, 2), image_set.labels, image_set.names, "decoded every epoch")
    resident = make_loader(image_set, preset)
    assert resident.resident and "kept on cpu" in resident.description and "made here" in resident.description
    expected = everything(resident)
    stream(monkeypatch)
    for other in (image_set, on_the_fly):
        loader = make_loader(other, preset)
        assert not loader.resident and "streamed to cpu, one batch ahead" in loader.description
        for ours, theirs in zip(everything(loader), expected, strict=True):
            assert torch.equal(ours, theirs)


def test_a_subset_is_loaded_like_a_set_of_its_own(monkeypatch):
    image_set, rows = make_set(), torch.tensor([2, 3, 5, 7, 11, 13, 17, 19, 20])
    part = image_set.subset(rows)
    copy = ImageSet(image_set.images[rows], image_set.labels[rows], [], "")
    expected = everything(make_loader(copy))
    assert all(torch.equal(a, b) for a, b in zip(everything(make_loader(part)), expected, strict=True))
    stream(monkeypatch)
    assert all(torch.equal(a, b) for a, b in zip(everything(make_loader(part)), expected, strict=True))


def test_a_streamed_epoch_may_be_left_early_and_passes_errors_on(monkeypatch):
    class Broken(ArraySource):
        def image(self, i):
            if i == 9:
                raise ValueError("image 9 is broken")
            return super().image(i)

    stream(monkeypatch)
    made = make_set()
    broken = Broken("made", made.images.numpy(), made.labels)
    loader = make_loader(ImageSet(Streamed(broken, Preset(20), 2), made.labels, [], ""), Preset(20), shuffle=False)
    epoch = loader.epoch(0)
    assert len(next(epoch).labels) == 8
    epoch.close()
    with pytest.raises(ValueError, match="image 9 is broken"):
        list(loader.epoch(0))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("preset", [CROPPED, Preset(20)])
def test_cuda_gives_what_the_cpu_gives(preset, monkeypatch):
    image_set = make_set()
    part = image_set.subset(torch.arange(3, 20))
    for each in (image_set, part):
        expected = everything(make_loader(each, preset))
        for resident in (True, False):
            if not resident:
                each._copies.clear()
                monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (100, 100))
            loader = BatchLoader(each, preset, 8, "cuda", shuffle=True, seed=0, purpose="train")
            assert loader.resident == resident
            images, labels = everything(loader)
            assert images.is_cuda and images.is_contiguous(memory_format=torch.channels_last)
            assert torch.equal(images.cpu(), expected[0]) and torch.equal(labels.cpu(), expected[1])
        monkeypatch.undo()


@pytest.mark.parametrize("name", ["digits", "synthetic"])
def test_built_in_sets_through_the_watermarking_presets(name):
    train_preset, test_preset = watermarking_train_preset(32), watermarking_test_preset(32)
    task = load_task(name, "unused", train_preset, test_preset, cache_path=None)
    loader = BatchLoader(task.train, train_preset, 64, "cpu", shuffle=True, seed=0, purpose="train")
    images, labels = everything(loader)
    assert images.shape == (len(task.train), 3, 32, 32) and 0 <= images.min() < images.max() <= 1
    assert torch.equal(labels.sort().values, task.train.labels.sort().values)
