"""Input VR: the trainable patterns that are added to an image (shapes: n images, C canvas, h×w image).

Both patterns enter linearly: ``forward(images) = embed(images) + pattern()``. ``embed`` carries no gradient and
``pattern`` is one image that the whole batch shares, so a network whose first layer is linear can treat the two apart.
"""

import torch
from torch import nn


class _InputVR(nn.Module):
    def __init__(self, canvas_size, mean, std):
        super().__init__()
        if canvas_size < 1:
            raise ValueError(f"canvas size must be at least 1 pixel, got {canvas_size}")
        self.canvas_size = self.image_size = canvas_size
        self.program = nn.Parameter(torch.zeros(3, canvas_size, canvas_size))
        self.register_buffer("mean", torch.tensor(mean, dtype=torch.float32).view(1, 3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(std, dtype=torch.float32).view(1, 3, 1, 1), persistent=False)

    def check_images(self, images):
        """Raise ValueError unless the images are of shape (n, 3, image_size, image_size)."""
        size = self.image_size
        if images.dim() != 4 or images.shape[1:] != (3, size, size):
            raise ValueError(
                f"{type(self).__name__} takes images of shape (n, 3, {size}, {size}), got {tuple(images.shape)}"
            )

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


class PaddingVR(_InputVR):
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
        super().__init__(canvas_size, mean, std)
        if not 0 < image_size < canvas_size:
            raise ValueError(
                f"padding needs an image smaller than the canvas: image {image_size}x{image_size}, "
                f"canvas {canvas_size}x{canvas_size}; take a larger --canvas-size or --reprogramming watermarking"
            )
        self.image_size = image_size
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


class WatermarkingVR(_InputVR):
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
        super().__init__(canvas_size, mean, std)
        if border < 1:
            raise ValueError(f"the watermark's border must be at least 1 pixel, got {border}")
        self.border = border
        mask = torch.ones(1, 1, canvas_size, canvas_size)
        mask[..., border : canvas_size - border, border : canvas_size - border] = 0
        self.register_buffer("mask", mask, persistent=False)

    def embed(self, images):
        """The normalised images; (n, 3, C, C), no gradient."""
        self.check_images(images)
        return (images.detach() - self.mean) / self.std

    def pattern(self):
        """What the program adds to every normalised image; (1, 3, C, C), differentiable."""
        return self.mask * self.program
