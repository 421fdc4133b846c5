"""Image files from strangers: an RGB image or one line that says what is wrong with the file."""

import io
import re

from PIL import Image

# Pillow's own default for a picture that is no longer trusted to be one; fixed here, since that global may
# be changed.
MAX_PIXELS = 89_478_485
# What data sets are made of. Left to itself Pillow would also try formats that start other programs, such as
# EPS.
FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF", "PPM")


def open_image(encoded, where):
    """Decode an untrusted picture.

    Parameters
    ----------
    encoded : bytes
        A file in one of `FORMATS`.
    where : str
        Names the picture in error messages, e.g. ``"flowers102/train.lmdb, key b'17'"``.

    Returns
    -------
    PIL.Image.Image
        Mode RGB, fully decoded.

    Raises
    ------
    ValueError
        The bytes are no picture, are cut off, or hold more than `MAX_PIXELS` pixels.
    """
    try:
        image = Image.open(io.BytesIO(encoded), formats=FORMATS)
        size = image.size
        if size[0] * size[1] <= MAX_PIXELS:
            return image.convert("RGB")
    except Image.DecompressionBombError as error:
        raise ValueError(f"{where}: {error}; remove this image or store a smaller one") from None
    except Exception as error:  # Pillow's parsers let nearly any exception out on damaged input
        reason = re.sub(r" <_io.BytesIO.*", "", str(error).partition("\n")[0])[:120]
        raise ValueError(
            f"{where}: not a readable image ({type(error).__name__}: {reason}); "
            f"allowed are whole {', '.join(FORMATS)} files; replace or remove it"
        ) from None
    raise ValueError(
        f"{where}: image of {size[0]}x{size[1]} pixels; at most {MAX_PIXELS:,} pixels are read; "
        "remove this image or store a smaller one"
    )
