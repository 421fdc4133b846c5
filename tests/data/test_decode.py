"""Images as files hold them: deep grey, turned, animated, of formats that this Pillow may lack."""

import io
import random

import numpy as np
import pytest
from PIL import Image, features

from data import decode
from data.decode import FORMATS, open_image, upright
from tests.data.helpers import encoded_image


def encode(image, format="PNG", **options):
    stream = io.BytesIO()
    image.save(stream, format, **options)
    return stream.getvalue()


def pixels(image):
    return np.asarray(open_image(encode(image, "TIFF"), "here"))


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "RGBA", "CMYK", "YCbCr", "LAB"])
def test_images_of_8_bit_are_what_pillow_makes_of_them(mode):
    image = Image.open(io.BytesIO(encoded_image(3)))
    image = image.convert(mode) if mode != "LAB" else Image.merge("LAB", image.split())
    format = "PNG" if mode in ("LA", "P", "RGBA") else "TIFF"
    expected = Image.open(io.BytesIO(encode(image, format))).convert("RGB")
    assert np.array_equal(np.asarray(open_image(encode(image, format), "here")), np.asarray(expected))


@pytest.mark.parametrize(("low", "high"), [(0, 65535), (100, 4195), (40_000, 40_255)])
@pytest.mark.parametrize("format", ["PNG", "TIFF", "PPM"])
def test_grey_of_16_bit_is_scaled_by_its_range(low, high, format):
    values = np.linspace(low, high, 256).round().astype(np.uint16).reshape(16, 16)
    image = np.asarray(open_image(encode(Image.fromarray(values), format), "here"))
    expected = np.round((values - float(low)) * 255 / (high - low))
    assert image.shape == (16, 16, 3) and np.array_equal(image, np.repeat(expected[..., None], 3, 2))
    assert image[0, 0, 0] == 0 and image[-1, -1, 0] == 255 and len(np.unique(image)) > 200


def test_grey_of_32_bit_is_scaled_by_its_range():
    ramp = np.linspace(0, 1, 256).reshape(16, 16)
    expected = np.repeat(np.round(ramp * 255)[..., None], 3, 2)
    assert np.array_equal(pixels(Image.fromarray(ramp.astype(np.float32))), expected)
    assert np.array_equal(pixels(Image.fromarray((ramp * 3e38 - 1e38).astype(np.float32))), expected)
    assert np.array_equal(pixels(Image.fromarray((ramp * 255_000 - 70_000).astype(np.int32))), expected)
    assert (pixels(Image.fromarray(np.full((4, 4), 7.5, np.float32))) == 0).all()


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_values_that_are_not_finite_are_refused(value):
    values = np.ones((4, 4), np.float32)
    values[1, 1] = value
    with pytest.raises(ValueError, match=r"here: not a readable image \(ValueError: values that are not finite\)"):
        pixels(Image.fromarray(values))


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("format", ["JPEG", "PNG", "WEBP"])
def test_exif_orientation_is_honoured_where_it_is_asked_for(orientation, format):
    upside = Image.open(io.BytesIO(encoded_image(0, (6, 4))))
    exif = Image.Exif()
    exif[0x0112] = orientation
    encoded = encode(upside, format, exif=exif)
    plain = encode(upside, format)
    stored = open_image(encoded, "here")
    assert np.array_equal(np.asarray(stored), np.asarray(open_image(plain, "here")))
    turn = {
        1: lambda a: a,
        2: np.fliplr,
        3: lambda a: np.rot90(a, 2),
        4: np.flipud,
        5: lambda a: a.swapaxes(0, 1),
        6: lambda a: np.rot90(a, -1),
        7: lambda a: np.rot90(a, 2).swapaxes(0, 1),
        8: np.rot90,
    }[orientation]
    assert np.array_equal(np.asarray(upright(stored)), turn(np.asarray(stored)))
    assert (upright(stored) is stored) == (orientation == 1)


def test_a_damaged_orientation_is_passed_over():
    encoded = encode(Image.open(io.BytesIO(encoded_image(0))), "JPEG", exif=b"Exif\0\0II*\0" + b"\xff" * 40)
    image = open_image(encoded, "here")
    assert upright(image) is image


@pytest.mark.parametrize("format", ["GIF", "WEBP", "PNG", "TIFF", "AVIF"])
def test_the_first_frame_of_an_animated_image(format):
    if format not in FORMATS:
        pytest.skip(f"this Pillow has no {format}")
    frames = [Image.new("RGB", (16, 16), colour) for colour in ("red", "lime", "blue")]
    image = open_image(encode(frames[0], format, save_all=True, append_images=frames[1:]), "here")
    assert np.abs(np.asarray(image).astype(int) - [255, 0, 0]).max() < 10


@pytest.mark.skipif(not features.check("avif"), reason="this Pillow has no AVIF")
def test_avif():
    image = Image.open(io.BytesIO(encoded_image(0, (32, 24)))).resize((8, 8)).resize((32, 24))
    encoded = encode(image, "AVIF", quality=100, subsampling="4:4:4")
    assert np.abs(np.asarray(open_image(encoded, "here")).astype(int) - np.asarray(image)).max() < 4
    rng = random.Random(0)
    for _ in range(300):
        damaged = bytearray(encoded)
        for _ in range(rng.choice((1, 2, 8))):
            damaged[rng.randrange(len(damaged))] = rng.randrange(256)
        try:
            open_image(bytes(damaged[: rng.choice((len(damaged), rng.randrange(len(damaged))))]), "here")
        except ValueError as error:
            assert "\n" not in str(error) and str(error).startswith("here: ")


@pytest.mark.parametrize("brand", ["avif", "heic"])
def test_formats_of_phones_that_pillow_lacks_are_named(monkeypatch, brand):
    monkeypatch.setattr(decode, "FORMATS", tuple(format for format in FORMATS if format != "AVIF"))
    encoded = b"\0\0\0\x1cftyp" + brand.encode() + bytes(40)
    with pytest.raises(ValueError, match=rf"here: not a readable image \(of the kind '{brand}'\); allowed are"):
        open_image(encoded, "here")
