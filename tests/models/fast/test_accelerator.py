"""What must not happen on a GPU, tested without one: that a step waits for the device, or mixes devices.

The meta device stands in for the GPU. Its tensors have no values, so that whatever makes the host wait for one
(``.item()``, ``.tolist()``, ``if tensor``, ``nonzero``) raises, and a spy counts the operations that take tensors
of both devices, which are copies from one to the other. On a GPU the operators are others, and so are their results.
"""

from contextlib import contextmanager, nullcontext

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from cfg import VLMConfig, VMConfig
from models import SWITCHES, PaddingVR, WatermarkingVR, build_classifier, build_network
from tests.models.fast.test_network import MEAN, STD, Casts
from tools.training import trainer as training
from tools.training.build import build_clip, build_vision

ALL, STAND_IN = ",".join(SWITCHES), torch.device("meta")


class Crossings(TorchDispatchMode):
    """Counts the operations that have tensors on both devices."""

    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        tensors = [leaf for leaf in tree_leaves((args, kwargs, out)) if isinstance(leaf, torch.Tensor)]
        self.count += len({tensor.device for tensor in tensors}) > 1
        return out


def fused_kernel(params, grads, *state, lr, found_inf, **options):
    """In place of Adam's kernel, which the meta device lacks."""
    tensors = [*params, *grads, lr, found_inf]
    assert params and all(tensor.device == STAND_IN for tensor in tensors)


@pytest.fixture
def on_the_stand_in(monkeypatch):
    """Move a system there. Autocast, which does not know the meta device, is left out."""
    monkeypatch.setattr(torch, "autocast", lambda *args, **kwargs: nullcontext())
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda *args: False)
    monkeypatch.setattr(torch, "_fused_adam_", fused_kernel)

    def move(system):
        system.classifier.to(STAND_IN)
        system.network.to(STAND_IN)
        system.network.batch_size = None  # all at once, as on a GPU
        system.readout.to(STAND_IN)  # and the mapping
        system.mapping.ready = True  # what it is estimated from has no values there
        system.device = STAND_IN
        return system

    return move


CASES = {
    "padding, cnn": (build_vision, VMConfig, {"mapping": "blmpp", "backbone": "resnet18", "canvas_size": 64}),
    "watermarking, cnn": (
        build_vision, VMConfig,
        {"mapping": "ilm", "backbone": "resnet18", "canvas_size": 64, "reprogramming": "watermarking"},
    ),
    "plain": (build_vision, VMConfig, {"mapping": "blm", "backbone": "resnet18", "canvas_size": 64, "engine": "plain"}),
    "clip": (build_clip, VLMConfig, {"mapping": "blmpp", "backbone": "tiny-test"}),
}  # fmt: skip


@pytest.mark.parametrize("precision, on_nonfinite", [("fp32", "stop"), ("fp16", "skip")])
@pytest.mark.parametrize("case", CASES)
def test_no_step_waits_for_the_device_or_mixes_devices(tmp_path, on_the_stand_in, case, precision, on_nonfinite):
    build, config, options = CASES[case]
    defaults = {"dataset": "synthetic", "weights": "none", "engine": ALL, "results_path": str(tmp_path)}
    settings = config.of(**defaults | options)
    system = on_the_stand_in(build(settings, torch.device("cpu")))

    forwards, crossings = [], {}
    system.network.register_forward_hook(lambda *_: forwards.append(1))
    for batch_size in (8, 16):
        loaders = system.loaders(batch_size, 0)
        trainer = training.Trainer(
            system.network, system.input_vr.program, system.mapping, loaders,
            torch.optim.Adam([system.input_vr.program], lr=0.01), "steps", 2, precision, on_nonfinite,
            readout=system.readout,
        )  # fmt: skip
        steps = {
            "estimate": lambda run=trainer: run.estimate(0),
            "train": lambda run=trainer: run.train(0, observe=True),
            "test": lambda run=trainer: run.evaluate(),
        }
        for name, step in steps.items():
            forwards.clear()
            crossed = Crossings()
            # totals and statistics are read once, at the very end
            with pytest.raises(RuntimeError, match="meta tensor"), crossed:
                step()
            assert len(forwards) == len(loaders[name]) > 1
            crossings.setdefault(name, []).append(crossed.count)
    # what an epoch takes to the device is its order, crops and flips, however many steps it has
    for of_many_steps, of_few_steps in crossings.values():
        assert 1 <= of_many_steps == of_few_steps <= 3


@pytest.mark.parametrize("vr", [PaddingVR, WatermarkingVR])
def test_a_network_in_half_precision_neither_waits_nor_casts_its_weights(monkeypatch, vr):
    """Convolutions alone, whose types follow without autocast from those of their weights."""
    classifier = build_classifier("resnet18", "none", canvas_size=64)
    input_vr = vr(64, 24, MEAN, STD)
    network = build_network(classifier, input_vr, dtype=torch.bfloat16).to(STAND_IN)
    types = [None]

    @contextmanager
    def autocast(device, dtype=None, enabled=True):  # torch's own does not know the meta device
        types.append(dtype if enabled else None)
        yield
        types.pop()

    monkeypatch.setattr(torch, "autocast", autocast)
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda device: types[-1] is not None)
    monkeypatch.setattr(torch, "get_autocast_dtype", lambda device: types[-1])
    images = torch.empty(8, 3, input_vr.image_size, input_vr.image_size, device=STAND_IN)
    with Crossings() as crossed, Casts([network]) as casts, network.accumulate():
        with autocast("meta", torch.bfloat16):
            logits = network(images)
        logits.float().sum().backward()
    assert logits.dtype == torch.bfloat16 and input_vr.program.grad.dtype == torch.float32
    assert not crossed.count and not casts.seen


def test_a_run_in_half_precision_has_its_weights_cast_beforehand(tmp_path):
    options = {"dataset": "synthetic", "weights": "none", "canvas_size": 64, "results_path": str(tmp_path)}
    system = build_vision(VMConfig.of(**options, backbone="resnet18", precision="bf16"), torch.device("cpu"))
    assert system.network.core.cast.dtype == torch.bfloat16
