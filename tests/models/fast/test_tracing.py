"""That a network with its loss and gradient can be recorded as one graph, from which a compiler starts.

What would be baked into the recording, a value read on the host or a tensor computed before it, shows where it is
replayed on other images under another program.
"""

import pytest
import torch
from torch.func import functional_call
from torch.fx.experimental.proxy_tensor import make_fx

from models import PaddingVR, WatermarkingVR
from models.clip import ClipNet
from models.fast.network import build_network
from tests.models.fast.test_network import MEAN, STD, TRANSFORMER, clip_parts, resnet, timm_model

NETWORKS = {
    "resnet18": lambda: resnet("resnet18"),
    "efficientnet_lite0": lambda: timm_model("tf_efficientnet_lite0"),
    "vit": lambda: timm_model("vit_tiny_patch16_224", img_size=64, depth=2),
    "clip": lambda: ClipNet(*clip_parts(64, TRANSFORMER)),
}


@pytest.mark.parametrize(
    ("vr", "dtype"), [(PaddingVR, torch.float32), (PaddingVR, torch.bfloat16), (WatermarkingVR, torch.float32)]
)
@pytest.mark.parametrize("kind", NETWORKS)
def test_recorded_on_one_batch_and_replayed_on_another(kind, vr, dtype):
    input_vr = vr(64, 20, MEAN, STD)
    network = build_network(NETWORKS[kind](), input_vr, dtype=dtype)
    assert network.description.startswith("fast path") and "left out" not in network.description

    def step(program, images, labels):
        with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
            logits = functional_call(network, {"input_vr.program": program}, images).float()
        loss = torch.nn.functional.cross_entropy(logits, labels, reduction="sum")
        return logits.detach(), loss.detach(), *torch.autograd.grad(loss, program)

    def batch(seed):
        generator, size = torch.Generator().manual_seed(seed), input_vr.image_size
        program = torch.randn(input_vr.program.shape, generator=generator).requires_grad_()
        return program, torch.rand(3, 3, size, size, generator=generator), torch.tensor([seed, 2, 4])

    step(*batch(0))  # weights are packed at the first use
    recorded = make_fx(step)(*batch(0))
    for seed in (0, 1):
        assert all(map(torch.equal, recorded(*batch(seed)), step(*batch(seed))))
