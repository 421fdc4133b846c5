"""Pictures of input VR patterns."""

import torch

from data import image_size
from models import PaddingVR


def pattern_picture(settings, program):
    """A trained pattern, to look at.

    Parameters
    ----------
    settings : dict
        With ``reprogramming`` and ``dataset``.
    program : Tensor (3, C, C)

    Returns
    -------
    picture : Tensor (C, C, 3) uint8
        Padding: the border as the backbone sees it, black where the image goes. Watermarking: grey where nothing is
        added, brighter or darker in proportion to what is; the largest 0.5 % of the values saturate.
    caption : str
        How to read it.
    """
    with torch.no_grad():
        if settings["reprogramming"] == "padding":
            vr = PaddingVR(program.shape[-1], image_size(settings["dataset"]), (0.0,) * 3, (1.0,) * 3)
            vr.program.copy_(program)
            pixels, caption = vr.pattern()[0], "sigmoid(θ) around the place of the image"
        else:
            added = program.abs()[program != 0].double()
            scale = float(added.kthvalue(max(1, round(0.995 * len(added)))).values) if len(added) else 1.0
            pixels = (0.5 + program / (2 * scale)).clamp(0, 1)
            caption = f"θ, added to the normalised image: black −{scale:.2g}, grey 0, white +{scale:.2g}"
    return (pixels.permute(1, 2, 0) * 255).round().byte(), caption
