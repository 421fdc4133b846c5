"""Image files from strangers: an RGB image or one line that says what is wrong with the file."""

import io
import re

import numpy as np
from PIL import ExifTags, Image, ImageOps, features

# Pillow's own default for an image that is no longer trusted to be one; fixed here, since that global may
# be changed.
MAX_PIXELS = 89_478_485
# What data sets are made of. Left to itself Pillow would also try formats that start other programs, such as
# EPS.
FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF", "PPM", *(["AVIF"] if features.check("avif") else ()))


def open_image(encoded, where):
    """Decode an untrusted image; of an animated one, the first frame.

    Grey images of 16 or 32 bit become 8 bit: their darkest value becomes 0, their brightest 255.

    Parameters
    ----------
    encoded : bytes
        A file in one of `FORMATS`.
    where : str
        Names the image in error messages, e.g. ``"flowers102/train.lmdb, key b'17'"``.

    Returns
    -------
    PIL.Image.Image
        Mode RGB, fully decoded, as it is stored: `upright` turns it as its EXIF orientation says.

    Raises
    ------
    ValueError
        The bytes are no image, are cut off, or hold more than `MAX_PIXELS` pixels, NaN or infinity.
    """
    try:
        image = Image.open(io.BytesIO(encoded), formats=FORMATS)
        size = image.size
        if size[0] * size[1] <= MAX_PIXELS:
            return (_to_8_bit(image) if image.mode[0] in "IF" else image).convert("RGB")
    except Image.DecompressionBombError as error:
        raise ValueError(f"{where}: {error}; remove this image or store a smaller one") from None
    except Exception as error:  # Pillow's parsers let nearly any exception out on damaged input
        reason = f"{type(error).__name__}: " + re.sub(r" <_io.BytesIO.*", "", str(error).partition("\n")[0])[:120]
        if encoded[4:8] == b"ftyp":  # phones' formats: only the brand tells which
            reason = f"of the kind {ascii(encoded[8:12].decode('latin-1'))}"
        raise ValueError(
            f"{where}: not a readable image ({reason}); "
            f"allowed are whole {', '.join(FORMATS)} files; replace or remove it"
        ) from None
    raise ValueError(
        f"{where}: image of {size[0]}x{size[1]} pixels; at most {MAX_PIXELS:,} pixels are read; "
        "remove this image or store a smaller one"
    )


def upright(image):
    """The image turned as its EXIF orientation says; itself where that says nothing, or is damaged."""
    try:
        turned = image.getexif().get(ExifTags.Base.Orientation) in range(2, 9)
        return ImageOps.exif_transpose(image) if turned else image
    except Exception:  # as above; what cameras add to a readable image need not be readable
        return image


def _to_8_bit(image):
    values = np.asarray(image).astype(np.float64)
    low, high = values.min(), values.max()
    if not np.isfinite(high - low):
        raise ValueError("values that are not finite")
    scaled = Image.fromarray(np.round((values - low) * (255 / ((high - low) or 1))).astype(np.uint8))
    scaled.info = image.info  # EXIF lies there
    return scaled
