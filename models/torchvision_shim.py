"""Let torchvision import beside a torch build for which its compiled operators were not made.

PyPI's torchvision is built against the CUDA build of torch; beside a CPU-only torch its extension library cannot
load and ``import torchvision`` stops at ``operator torchvision::nms does not exist``. Nothing in this project uses
those operators, so declaring the two schemas that torchvision registers fake kernels for is enough. Where the two
packages match, nothing is done.

This file can go when torch and torchvision come from one index with matching builds on every supported machine.
"""

import importlib
import sys

import torch

_SCHEMAS = ("nms", "qnms")
_kept_alive = []  # a torch.library.Library takes its schemas with it when it is collected


def ensure_torchvision():
    """Import torchvision, declaring its missing operator schemas first where that is what stops it.

    Raises
    ------
    ImportError, RuntimeError
        Whatever ``import torchvision`` raises for any other reason.
    """
    try:
        importlib.import_module("torchvision")
    except RuntimeError as error:
        if "torchvision::nms does not exist" not in str(error):
            raise
        for name in [name for name in sys.modules if name.partition(".")[0] == "torchvision"]:
            del sys.modules[name]
        library = torch.library.Library("torchvision", "FRAGMENT")
        for name in _SCHEMAS:
            library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        _kept_alive.append(library)
        importlib.import_module("torchvision")
