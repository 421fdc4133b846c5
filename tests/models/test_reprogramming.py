"""Input VR: hand-computed canvases, gradients that stay in the border, and the linear split."""

import pytest
import torch

from models import PaddingVR, WatermarkingVR

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


@pytest.mark.parametrize("vr", [PaddingVR(9, 4, MEAN, STD), WatermarkingVR(9, 2, MEAN, STD)])
def test_split_is_the_whole(vr):
    torch.nn.init.normal_(vr.program)
    size = 4 if isinstance(vr, PaddingVR) else 9
    images = torch.rand(3, 3, size, size, requires_grad=True)
    assert torch.equal(vr(images), vr.embed(images) + vr.pattern())
    assert not vr.embed(images).requires_grad
    assert vr.pattern().shape == (1, 3, 9, 9)
    assert [name for name, _ in vr.named_parameters()] == ["program"] == list(vr.state_dict())
    assert vr.program.shape == (3, 9, 9)


@pytest.mark.parametrize(
    "build, words",
    [
        (lambda: PaddingVR(32, 32, MEAN, STD), "image 32x32, canvas 32x32"),
        (lambda: PaddingVR(32, 40, MEAN, STD), "image 40x40, canvas 32x32"),
        (lambda: PaddingVR(32, 0, MEAN, STD), "image 0x0"),
        (lambda: WatermarkingVR(0, 1, MEAN, STD), "canvas size"),
        (lambda: WatermarkingVR(32, 0, MEAN, STD), "at least 1 pixel, got 0"),
        (lambda: PaddingVR(8, 4, MEAN, STD)(torch.rand(2, 3, 5, 4)), r"\(2, 3, 5, 4\)"),
        (lambda: PaddingVR(8, 4, MEAN, STD)(torch.rand(3, 4, 4)), r"\(3, 4, 4\)"),
        (lambda: WatermarkingVR(8, 4, MEAN, STD)(torch.rand(2, 1, 8, 8)), r"\(2, 1, 8, 8\)"),
    ],
)
def test_bad_input(build, words):
    with pytest.raises(ValueError, match=words):
        build()
