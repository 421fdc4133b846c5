"""Input VR: hand-computed canvases, gradients that stay in the border, the linear split, images, the registry."""

import pytest
import torch

from models import (
    REPROGRAMMING,
    InputVR,
    NoVR,
    PaddingVR,
    Reprogramming,
    WatermarkingVR,
    build_input_vr,
    check_reprogramming_name,
)

MEAN, STD = (0.5, 0.25, 0.0), (0.5, 0.25, 2.0)


@pytest.mark.parametrize(
    "canvas, image, before", [(224, 128, 48), (224, 32, 96), (7, 4, 2), (6, 3, 2), (8, 3, 3), (5, 4, 1)]
)
def test_padding_offset(canvas, image, before):
    vr = PaddingVR(canvas, image, MEAN, STD)
    assert vr.offset == before == (canvas - image + 1) // 2
    out = vr(torch.full((1, 3, image, image), 0.75))
    inside = out[0, 0, before : before + image, before : before + image]
    assert torch.equal(inside, torch.full_like(inside, 0.5))  # (0.75 - 0.5) / 0.5
    assert int((out[0, 0] == 0.5).sum()) == image * image


def test_padding_by_hand():
    vr = PaddingVR(3, 1, MEAN, STD)
    with torch.no_grad():
        vr.program[1, 0, 2] = 100.0  # sigmoid -> 1
        vr.program[1, 2, 2] = -100.0  # sigmoid -> 0
        vr.program[:, 1, 1] = 100.0  # under the image: must not show
    out = vr(torch.tensor([0.0, 1.0, 1.0]).view(1, 3, 1, 1))
    assert out.shape == (1, 3, 3, 3)
    assert out[0, 0].tolist() == [[0.0, 0.0, 0.0], [0.0, -1.0, 0.0], [0.0, 0.0, 0.0]]  # (0.5 - 0.5) / 0.5
    assert out[0, 1].tolist() == [[1.0, 1.0, 3.0], [1.0, 3.0, 1.0], [1.0, 1.0, -1.0]]  # (x - 0.25) / 0.25
    assert out[0, 2].tolist() == [[0.25, 0.25, 0.25], [0.25, 0.5, 0.25], [0.25, 0.25, 0.25]]  # x / 2


def test_padding_gradient_stays_outside_the_image():
    vr = PaddingVR(8, 3, MEAN, STD)
    vr(torch.rand(4, 3, 3, 3)).sum().backward()
    expected = torch.tensor([4 * 0.25 / std for std in STD]).view(3, 1, 1).expand(3, 8, 8).clone()
    expected[:, 3:6, 3:6] = 0
    torch.testing.assert_close(vr.program.grad, expected)


@pytest.mark.parametrize("border, free", [(1, 4 * 6 - 4), (2, 36 - 4), (3, 36), (112, 36)])
def test_watermark_border(border, free):
    vr = WatermarkingVR(6, border, MEAN, STD)
    with torch.no_grad():
        vr.program.fill_(7.0)
    out = vr(torch.full((2, 3, 6, 6), 0.5))
    assert torch.equal(out[:, 1].unique(), torch.tensor([1.0, 8.0] if free < 36 else [8.0]))
    assert int((out[0, 0] == 7.0).sum()) == free
    out.sum().backward()
    assert float(vr.program.grad.sum()) == 2 * 3 * free


@pytest.mark.parametrize("vr", [PaddingVR(9, 4, MEAN, STD), WatermarkingVR(9, 2, MEAN, STD), NoVR(9, MEAN, STD)])
def test_split_is_the_whole(vr):
    torch.nn.init.normal_(vr.program)
    assert vr.image_size == (4 if isinstance(vr, PaddingVR) else 9)
    images = torch.rand(3, 3, vr.image_size, vr.image_size, requires_grad=True)
    assert torch.equal(vr(images), vr.embed(images) + vr.pattern())
    assert not vr.embed(images).requires_grad
    assert vr.pattern().shape == (1, 3, 9, 9)
    assert [name for name, _ in vr.named_parameters()] == ["program"] == list(vr.state_dict())
    assert vr.program.shape == (3, 9, 9)


@pytest.mark.parametrize(
    "make, words",
    [
        (lambda: PaddingVR(32, 32, MEAN, STD), "image 32x32, canvas 32x32"),
        (lambda: PaddingVR(32, 40, MEAN, STD), "image 40x40, canvas 32x32"),
        (lambda: PaddingVR(32, 0, MEAN, STD), "image 0x0"),
        (lambda: WatermarkingVR(0, 1, MEAN, STD), "canvas size"),
        (lambda: WatermarkingVR(32, 0, MEAN, STD), "at least 1 pixel, got 0"),
        (lambda: PaddingVR(8, 4, MEAN, STD)(torch.rand(2, 3, 5, 4)), r"\(2, 3, 5, 4\)"),
        (lambda: PaddingVR(8, 4, MEAN, STD)(torch.rand(3, 4, 4)), r"\(3, 4, 4\)"),
        (lambda: WatermarkingVR(8, 4, MEAN, STD)(torch.rand(2, 1, 8, 8)), r"\(2, 1, 8, 8\)"),
        (lambda: NoVR(8, MEAN, STD)(torch.rand(2, 3, 8, 7)), r"\(2, 3, 8, 7\)"),
        (lambda: build("paddng"), "VR 'paddng' .did you mean 'padding'.*choose from padding, watermarking, none"),
        (lambda: check_reprogramming_name("vit"), "unknown input VR 'vit'; choose from padding"),
        (lambda: build("padding", image_size=8), "image 8x8, canvas 8x8"),
        (lambda: Reprogramming(NoVR, images="moved"), "got 'moved'"),
    ],
)
def test_bad_input(make, words):
    with pytest.raises(ValueError, match=words) as caught:
        make()
    assert "\n" not in str(caught.value)


def test_none_is_the_normalised_image_alone():
    vr = build("none")
    images = torch.rand(2, 3, 8, 8)
    mean, std = (torch.tensor(values).view(1, 3, 1, 1) for values in (MEAN, STD))
    assert torch.equal(vr(images), (images - mean) / std)
    assert not vr.trainable and not vr.program.requires_grad and not vr.program.any()
    assert torch.equal(vr.pattern(), torch.zeros(1, 3, 8, 8)) and not vr.pattern().requires_grad
    assert (vr.as_image()[0] == 128).all() and vr.as_image()[1] == "no pattern"


def test_the_registry_builds_what_the_classes_do():
    assert list(REPROGRAMMING) == ["padding", "watermarking", "none"]
    padding, watermark = build("padding"), build("watermarking")
    assert isinstance(padding, PaddingVR) and (padding.canvas_size, padding.image_size) == (8, 3)
    assert isinstance(watermark, WatermarkingVR) and (watermark.canvas_size, watermark.border) == (8, 2)
    assert torch.equal(watermark.mask, WatermarkingVR(8, 2, MEAN, STD).mask) and watermark.image_size == 8
    assert padding.trainable and watermark.trainable and padding.program.requires_grad
    assert [entry.images for entry in REPROGRAMMING.values()] == ["placed", "resized", "resized"]
    assert [name for name, entry in REPROGRAMMING.items() if entry.augment] == ["watermarking"]
    with pytest.raises(TypeError, match="depth"):
        build("padding", depth=3)


class Tint(InputVR):
    """One colour per channel, a setting of its own times as strong."""

    def __init__(self, canvas_size, mean, std, strength):
        super().__init__(canvas_size, canvas_size, mean, std)
        self.strength = strength

    def pattern(self):
        return (self.strength * self.program.mean((1, 2), keepdim=True).expand_as(self.program) / self.std[0])[None]


def test_an_input_vr_of_ones_own(monkeypatch):
    def build_tint(*, canvas_size, image_size, border, mean, std, strength):
        return Tint(canvas_size, mean, std, strength)

    monkeypatch.setitem(REPROGRAMMING, "tint", Reprogramming(build_tint, images="resized", settings=("a setting",)))
    vr = build("tint", strength=2.0)
    with torch.no_grad():
        vr.program[0], vr.program[2] = 0.1, -0.05
    out = vr(torch.full((1, 3, 8, 8), 0.25))
    torch.testing.assert_close(out[0, :, 3, 4], torch.tensor([-0.1, 0.0, 0.075]))
    image, caption = vr.as_image()
    assert image[3, 4].tolist() == [255, 128, 64] and "×2.5" in caption and "white +0.2" in caption
    assert image.shape == (8, 8, 3) and image.dtype == torch.uint8


def test_a_faint_border_is_stretched_to_the_whole_range():
    vr = build("padding")
    with torch.no_grad():
        vr.program[0, 0], vr.program[1, 7], vr.program[:, 3:6, 3:6] = 0.04, -0.04, 9.0
    image, caption = vr.as_image()
    assert image[0, 5].tolist() == [255, 128, 128] and image[7, 5].tolist() == [128, 0, 128]
    assert image[3:6, 3:6].max() == 0, "the place of the image"
    assert caption.endswith("contrast ×50: black 0.5 − 0.01, grey 0.5, white 0.5 + 0.01")


def test_the_image_of_a_pattern_that_is_not_trained_is_grey():
    assert (build("watermarking").as_image()[0] == 128).all()
    image, caption = build("padding").as_image()
    assert image.unique().tolist() == [0, 128] and "contrast ×1:" in caption


def test_one_pixel_that_stands_out_does_not_hide_the_rest():
    vr = WatermarkingVR(20, 10, (0.0,) * 3, (1.0,) * 3)
    with torch.no_grad():
        vr.program.fill_(0.5)[0, 0, 0] = 100.0
    image, caption = vr.as_image()
    assert (image == 255).all() and "white +0.5" in caption and "×1:" in caption


def build(name, **changes):
    shared = {"canvas_size": 8, "image_size": 3, "border": 2, "mean": MEAN, "std": STD}
    return build_input_vr(name, **shared | changes)
