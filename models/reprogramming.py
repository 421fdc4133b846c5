"""Input VR: the trainable patterns that are added to an image (shapes: n images, C canvas, h×w image).

Every pattern enters linearly: ``forward(images) = embed(images) + pattern()``. ``embed`` carries no gradient and
``pattern`` is one image that the whole batch shares, so a network whose first layer is linear can treat the two apart.

A new input VR is a subclass of `InputVR` and an entry of `REPROGRAMMING`::

    from models import REPROGRAMMING, InputVR, Reprogramming

    REPROGRAMMING["mine"] = Reprogramming(build_mine, images="resized")
"""

import difflib
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn


class InputVR(nn.Module):
    """What all input VRs share; subclasses define ``embed`` and ``pattern``.

    Parameters
    ----------
    canvas_size : int
        Side C of the square that the backbone sees, in pixels.
    image_size : int
        Side of the images that it takes, in pixels.
    mean, std : sequence of 3 floats
        The backbone's normalisation.

    Attributes
    ----------
    program : Parameter (3, C, C), starts at 0
    trainable : bool
        Whether there is a pattern to train.
    """

    trainable = True

    def __init__(self, canvas_size, image_size, mean, std):
        super().__init__()
        if canvas_size < 1:
            raise ValueError(f"canvas size must be at least 1 pixel, got {canvas_size}")
        self.canvas_size, self.image_size = canvas_size, image_size
        self.program = nn.Parameter(torch.zeros(3, canvas_size, canvas_size), requires_grad=self.trainable)
        self.register_buffer("mean", torch.tensor(mean, dtype=torch.float32).view(1, 3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(std, dtype=torch.float32).view(1, 3, 1, 1), persistent=False)

    def check_images(self, images):
        """Raise ValueError unless the images are of shape (n, 3, image_size, image_size)."""
        size = self.image_size
        if images.dim() != 4 or images.shape[1:] != (3, size, size):
            raise ValueError(
                f"{type(self).__name__} takes images of shape (n, 3, {size}, {size}), got {tuple(images.shape)}"
            )

    def embed(self, images):
        """Normalised canvases (n, 3, C, C) with the images (n, 3, h, w) on them, no gradient."""
        self.check_images(images)
        return (images.detach() - self.mean) / self.std

    def pattern(self):
        """What the program adds to every normalised canvas; (1, 3, C, C), differentiable."""
        raise TypeError(f"{type(self).__name__} defines no pattern()")

    def forward(self, images):
        """Reprogrammed, normalised images.

        Parameters
        ----------
        images : Tensor (n, 3, h, w), float, in [0, 1]

        Returns
        -------
        Tensor (n, 3, C, C), normalised by the backbone's mean and std, differentiable with respect to ``program``.
        """
        return self.embed(images) + self.pattern()

    @torch.no_grad()
    def as_image(self):
        """The pattern as an image to look at: grey where nothing is added, its contrast stretched.

        Returns
        -------
        image : Tensor (C, C, 3) uint8, on the CPU
            The largest 0.5 % of the values saturate.
        caption : str
            How to read it, and how far the contrast is stretched.
        """
        added = (self.pattern() * self.std)[0].cpu()  # to pixels in [0, 1]
        stretched, factor, reach = _stretch(added)
        caption = f"added to the pixels, contrast ×{factor:.3g}: black −{reach:.2g}, grey 0, white +{reach:.2g}"
        return _to_bytes(stretched), caption


class PaddingVR(InputVR):
    """The image sits in the middle of a zero canvas; sigmoid(program) surrounds it; then mean/std normalisation.

    Parameters
    ----------
    canvas_size : int
        Side C of the square that the backbone sees, in pixels.
    image_size : int
        Side of the downstream image, below ``canvas_size``.
    mean, std : sequence of 3 floats
        The backbone's normalisation.

    Attributes
    ----------
    program : Parameter (3, C, C), starts at 0
    offset : int
        Left and top pad, ⌊(C − image_size + 1) / 2⌋.

    Raises
    ------
    ValueError
        Where the image leaves no border on the canvas.
    """

    def __init__(self, canvas_size, image_size, mean, std):
        super().__init__(canvas_size, image_size, mean, std)
        if not 0 < image_size < canvas_size:
            raise ValueError(
                f"padding needs an image smaller than the canvas: image {image_size}x{image_size}, "
                f"canvas {canvas_size}x{canvas_size}; take a larger --canvas-size or --reprogramming watermarking"
            )
        self.offset = (canvas_size - image_size + 1) // 2
        mask = torch.ones(1, 1, canvas_size, canvas_size)
        mask[..., self.offset : self.offset + image_size, self.offset : self.offset + image_size] = 0
        self.register_buffer("mask", mask, persistent=False)

    def embed(self, images):
        """The normalised canvas with the images on it and zero pixels around; (n, 3, C, C), no gradient."""
        self.check_images(images)
        after = self.canvas_size - self.image_size - self.offset
        canvas = nn.functional.pad(images.detach(), (self.offset, after, self.offset, after))
        return (canvas - self.mean) / self.std

    def pattern(self):
        """What the program adds to every normalised canvas; (1, 3, C, C), differentiable."""
        return self.mask * torch.sigmoid(self.program) / self.std

    @torch.no_grad()
    def as_image(self):
        """The border as the backbone sees it, its contrast stretched, black in the place of the image.

        Returns
        -------
        image : Tensor (C, C, 3) uint8, on the CPU
            Grey where the program is 0; the largest 0.5 % of the differences from grey saturate.
        caption : str
            How to read it, and how far the contrast is stretched.
        """
        mask = self.mask[0].cpu()
        stretched, factor, reach = _stretch((torch.sigmoid(self.program).cpu() - 0.5) * mask)
        caption = (
            f"sigmoid(θ) around the place of the image, contrast ×{factor:.3g}: "
            f"black 0.5 − {reach:.2g}, grey 0.5, white 0.5 + {reach:.2g}"
        )
        return _to_bytes(stretched * mask), caption


class WatermarkingVR(InputVR):
    """An unbounded program, masked to a border, is added to the normalised image.

    Parameters
    ----------
    canvas_size : int
        Side C of image and pattern, in pixels.
    border : int
        Width of the border in pixels; C/2 or more means the whole image.
    mean, std : sequence of 3 floats
        The backbone's normalisation.

    Attributes
    ----------
    program : Parameter (3, C, C), starts at 0

    Raises
    ------
    ValueError
        For a border below one pixel.
    """

    def __init__(self, canvas_size, border, mean, std):
        super().__init__(canvas_size, canvas_size, mean, std)
        if border < 1:
            raise ValueError(f"the watermark's border must be at least 1 pixel, got {border}")
        self.border = border
        mask = torch.ones(1, 1, canvas_size, canvas_size)
        mask[..., border : canvas_size - border, border : canvas_size - border] = 0
        self.register_buffer("mask", mask, persistent=False)

    def pattern(self):
        """What the program adds to every normalised image; (1, 3, C, C), differentiable."""
        return self.mask * self.program


class NoVR(InputVR):
    """The normalised image and no pattern: the baseline that shows what a pattern adds.

    Parameters
    ----------
    canvas_size : int
        Side C of the images, in pixels.
    mean, std : sequence of 3 floats
        The backbone's normalisation.

    Attributes
    ----------
    program : Parameter (3, C, C), always 0, without a gradient
    """

    trainable = False

    def __init__(self, canvas_size, mean, std):
        super().__init__(canvas_size, canvas_size, mean, std)

    def pattern(self):
        """Zeros (1, 3, C, C)."""
        return torch.zeros_like(self.program)[None]

    def as_image(self):
        """A grey image (C, C, 3) uint8, and a caption that says why."""
        return super().as_image()[0], "no pattern"


def _stretch(differences):
    """Differences from grey as values in [0, 1] around 0.5; with them the factor, and what becomes black or white."""
    sizes = differences.abs()[differences != 0].double()
    reach = float(sizes.kthvalue(max(1, round(0.995 * len(sizes)))).values) if len(sizes) else 0.5
    return (0.5 + differences / (2 * reach)).clamp(0, 1), 0.5 / reach, reach


def _to_bytes(image):
    return (image.permute(1, 2, 0) * 255).round().byte()


@dataclass(frozen=True)
class Reprogramming:
    """What is known of an input VR before it is built.

    Attributes
    ----------
    build : callable
        ``build(*, canvas_size, image_size, border, mean, std, **own settings) -> InputVR``.
    images : {"placed", "resized"}
        ``placed``: images keep the data set's own side ``image_size`` and sit on the canvas. ``resized``: they are
        resized to the canvas.
    augment : bool
        Whether a vision model's training images are cropped and flipped at random; CLIPs keep their preprocessing.
    settings : tuple of mapping.Setting
        Settings of its own, by whose names ``build`` takes their values.
    trained : bool
        Whether there is a pattern for a gradient to train.

    Raises
    ------
    ValueError
        For another word in ``images``.
    """

    build: Callable
    images: str
    augment: bool = False
    settings: tuple = ()
    trained: bool = True

    def __post_init__(self):
        if self.images not in ("placed", "resized"):
            raise ValueError(f"images of an input VR are 'placed' or 'resized', got {self.images!r}")


# Each is given every setting that all share, and takes what it needs.
def _build_padding(*, canvas_size, image_size, border, mean, std):
    return PaddingVR(canvas_size, image_size, mean, std)


def _build_watermarking(*, canvas_size, image_size, border, mean, std):
    return WatermarkingVR(canvas_size, border, mean, std)


def _build_none(*, canvas_size, image_size, border, mean, std):
    return NoVR(canvas_size, mean, std)


REPROGRAMMING = {
    "padding": Reprogramming(_build_padding, images="placed"),
    "watermarking": Reprogramming(_build_watermarking, images="resized", augment=True),
    "none": Reprogramming(_build_none, images="resized", trained=False),
}


def check_reprogramming_name(name):
    """Raise ValueError, which names the closest, unless ``name`` is in `REPROGRAMMING`."""
    if name not in REPROGRAMMING:
        close = difflib.get_close_matches(str(name).lower(), REPROGRAMMING, n=1)
        hint = f" (did you mean {close[0]!r}?)" if close else ""
        raise ValueError(f"unknown input VR {name!r}{hint}; choose from {', '.join(REPROGRAMMING)}")


def build_input_vr(name, *, canvas_size, image_size, border, mean, std, **settings):
    """Build an input VR by its name.

    Parameters
    ----------
    name : str
        A key of `REPROGRAMMING`.
    canvas_size : int
        Side C of what the backbone sees, in pixels.
    image_size : int
        Side of the data set's images, in pixels; for those that place images on the canvas.
    border : int
        Width of a watermark's border in pixels.
    mean, std : sequence of 3 floats
        The backbone's normalisation.
    **settings
        Values of the entry's own settings.

    Returns
    -------
    InputVR

    Raises
    ------
    ValueError
        For an unknown name, or sizes that leave no room for a pattern.
    """
    check_reprogramming_name(name)
    shared = {"canvas_size": canvas_size, "image_size": image_size, "border": border, "mean": mean, "std": std}
    return REPROGRAMMING[name].build(**shared, **settings)
