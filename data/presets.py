"""Named image presets: how an image is stored once, and how a batch of stored images is varied in
training.

A preset splits a torchvision transform in two. The part that is the same every epoch (resize, centre crop)
is done once per image, in PIL, when the data set is decoded. The part that is drawn again every epoch (random
crop, flip) is done on whole batches of stored uint8 images by :class:`data.loader.BatchLoader`.
Normalisation belongs to the model.
"""

from dataclasses import dataclass

import numpy as np
from PIL import Image

from data.decode import MAX_PIXELS

_FILTERS = {"bilinear": Image.Resampling.BILINEAR, "bicubic": Image.Resampling.BICUBIC}


@dataclass(frozen=True)
class Preset:
    """How images are stored, and what varies from epoch to epoch.

    Attributes
    ----------
    size : int
        Side of the stored square image, in pixels.
    resize : {"exact", "shorter-side"}
        ``exact`` maps the whole image onto the square, as ``torchvision.transforms.Resize((size, size))``.
        ``shorter-side`` keeps the aspect ratio and cuts the centre out, as ``Resize(size)`` and
        ``CenterCrop(size)``.
    interpolation : {"bilinear", "bicubic"}
        PIL's antialiased filters, which are what torchvision uses on PIL images.
    crop : int or None
        Side of the random crop taken from the stored image in every epoch; None takes it whole.
    flip : bool
        Whether an image is mirrored left to right with probability 1/2 in every epoch.
    """

    size: int
    resize: str = "exact"
    interpolation: str = "bilinear"
    crop: int | None = None
    flip: bool = False

    def __post_init__(self):
        assert self.resize in ("exact", "shorter-side") and self.interpolation in _FILTERS
        assert self.size > 0 and (self.crop is None or 0 < self.crop <= self.size)

    @property
    def output_size(self):
        """Side of the images that a loader hands out, in pixels."""
        return self.crop or self.size

    @property
    def storage(self):
        """Names the stored form, e.g. ``"128-exact-bilinear"``; presets that store alike share a cache
        file."""
        return f"{self.size}-{self.resize}-{self.interpolation}"

    def store(self, image, where="image"):
        """Bring one image into its stored form.

        Parameters
        ----------
        image : PIL.Image.Image
            Mode RGB, any size.
        where : str
            Names the image in error messages.

        Returns
        -------
        numpy.ndarray
            Shape (size, size, 3), uint8.
        """
        width, height = image.size
        if self.resize == "exact":
            new_width = new_height = self.size
        else:
            shorter = min(width, height)
            new_width, new_height = int(self.size * width / shorter), int(self.size * height / shorter)
            if new_width * new_height > MAX_PIXELS:
                raise ValueError(
                    f"{where}: {width}x{height} pixels would become {new_width}x{new_height} when resized; "
                    f"at most {MAX_PIXELS:,} pixels are made; crop or remove this image"
                )
        if (new_width, new_height) != (width, height):
            image = image.resize((new_width, new_height), _FILTERS[self.interpolation])
        if image.size != (self.size, self.size):
            left, top = round((new_width - self.size) / 2), round((new_height - self.size) / 2)
            image = image.crop((left, top, left + self.size, top + self.size))
        return np.asarray(image)


def padding_preset(image_size):
    """Padding VR, train and test: images of `image_size` pixels, nothing random."""
    return Preset(image_size)


def watermarking_train_preset(canvas_size):
    """Watermarking VR, training: stored 4 pixels larger than the canvas, cropped and mirrored at random."""
    return Preset(canvas_size + 4, crop=canvas_size, flip=True)


def watermarking_test_preset(canvas_size):
    """Watermarking VR, test: images of the size of the canvas, nothing random."""
    return Preset(canvas_size)


def clip_preset(size, resize_mode="shortest", interpolation="bicubic"):
    """A CLIP's own preprocessing without its normalisation.

    Parameters
    ----------
    size : int
        Side of the images that the image tower takes, in pixels.
    resize_mode : {"shortest", "squash"}
        open_clip's names: the shorter side to `size` and a centre crop, or both sides to `size`.
    interpolation : {"bicubic", "bilinear"}
    """
    resize = {"shortest": "shorter-side", "squash": "exact"}[resize_mode]
    return Preset(size, resize=resize, interpolation=interpolation)
