"""The frozen classifier behind an input VR, run without the work that is the same for every image.

``build_network(classifier, input_vr)`` gives what ``classifier(input_vr(images))`` gives, within rounding,
and the same gradient to the program, several times faster. Each part can be left out by its name in
``switches``; without any, the network is that expression and nothing else.
"""

import difflib
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import nn

from models.fast.conv import FrozenConv2d
from models.fast.graph import fold_batchnorm, fuse, share_copy, trace
from models.fast.shared_border import SplitStem, WindowedNetwork

# name -> what it does
SWITCHES = {
    "channels-last": "maps in memory as (n, H, W, C), the layout that convolutions are fastest in",
    "fold-batchnorm": "BatchNorm absorbed into the convolution before it",
    "first-layer": "the pattern goes through the first layer once a batch, the images without a gradient",
    "shared-border": "maps around the image computed once a batch",
    "fused-ops": "ReLU and residual additions inside the convolutions; the backward pass keeps outputs alone",
    "winograd": "3 x 3 convolutions in a quarter of the multiplications (on CPUs, with fused-ops)",
}
TOLERANCES = (1e-3, 1e-3, 1e-2)  # how far logits and gradient may be from the plain path's, relative, in float32
HALF_TOLERANCE = 3  # in half precision: how many times farther from float32 than the plain path in half precision is


@dataclass(frozen=True)
class Tuning:
    """What depends on the device.

    Attributes
    ----------
    largest_window : float
        Share of a map above which pasting costs more than the border's arithmetic.
    reused_block : int or None
        Bytes of a map up to which the allocator hands the same memory out again.
    """

    largest_window: float
    reused_block: int | None


TUNING = {
    # glibc maps blocks of 32 MiB and more again every time, a page fault per 4 KiB
    "cpu": Tuning(largest_window=0.7, reused_block=28 << 20),
    # not measured: memory bounds most layers there, and a window w of a map, pasted, convolved and written, moves
    # 2w + 2w where the whole map moves 2; torch's allocator reuses blocks of all sizes
    "cuda": Tuning(largest_window=0.5, reused_block=None),
}


def build_network(classifier, input_vr, *, switches=tuple(SWITCHES), dtype=torch.float32):
    """Join a frozen classifier and an input VR.

    Parameters
    ----------
    classifier : nn.Module
        Frozen, in eval mode: normalised canvases (n, 3, C, C) to logits (n, S). It is left as it is.
    input_vr : nn.Module
        With ``forward(images) = embed(images) + pattern()``, as in `models.reprogramming`; on the classifier's
        device.
    switches : iterable of str
        Names from `SWITCHES`. One that cannot apply to this network, that fails, or whose result disagrees with the
        plain path on random images, is left out, and `Network.description` says so and why.
    dtype : torch.dtype
        What the network will be autocast to while it trains: float32 (not at all), bfloat16 or float16. The trial on
        random images is run in it as well as in float32, and its weights are cast beforehand.

    Returns
    -------
    Network

    Raises
    ------
    ValueError
        For an unknown switch, and where the network's values are beyond the range of ``dtype``.
    Exception
        Whatever the classifier raises on images of this size.
    """
    switches = tuple(switches)
    for name in switches:
        if name not in SWITCHES:
            close = difflib.get_close_matches(name, SWITCHES, n=1)
            hint = f" (did you mean {close[0]!r}?)" if close else ""
            raise ValueError(f"unknown switch {name!r}{hint}; choose from {', '.join(SWITCHES)}")
    plain = Network(classifier, input_vr, ())
    if not switches:
        return plain
    expected = _try_out(plain)
    bounds = {torch.float32: [t * e.norm() for t, e in zip(TOLERANCES, expected, strict=True)]}
    if dtype != torch.float32:
        errors = _errors(_try_out(plain, dtype), expected)
        if all(e.isfinite().all() for e in expected) and not all(map(torch.isfinite, errors)):
            name = {torch.float16: "fp16", torch.bfloat16: "bf16"}[dtype]
            raise ValueError(f"this network's values exceed the range of {name}; take --precision bf16, tf32 or fp32")
        bounds[dtype] = [b + HALF_TOLERANCE * e for b, e in zip(bounds[torch.float32], errors, strict=True)]

    def attempt(parts):
        """The network with these parts, and None; or why there is none."""
        try:
            network = Network(classifier, input_vr, parts, dtype)
            errors = {kind: _errors(_try_out(network, kind), expected) for kind in bounds}
        except Exception as error:  # a foreign network can stop the preparation or the trial in any way
            return None, f"stopped with {type(error).__name__}"
        agree = all(error <= bound for kind in bounds for error, bound in zip(errors[kind], bounds[kind], strict=True))
        return (network, None) if agree else (None, "gave other results than the plain path")

    network, _ = attempt(switches)
    if network is None:
        network, kept, reasons = plain, (), {}
        for name in (name for name in SWITCHES if name in switches):  # which of them work, one added at a time
            larger, reason = attempt((*kept, name))
            if larger is None:
                reasons.setdefault(reason, []).append(name)
            else:
                network, kept = larger, (*kept, name)
        faults = [f"{', '.join(names)} ({reason})" for reason, names in reasons.items()]
        network.description += f"; left out: {'; '.join(faults)}: same results, slower"
    return network


class Network(nn.Module):
    """Images to pretrained logits, differentiable with respect to the program alone; made by `build_network`.

    Attributes
    ----------
    description : str
        One line for the log: which path runs.
    batch_size : int or None
        On CPUs, how many images at a time run fastest: as many as keep each map in memory that the allocator hands
        out again without asking the system for pages. Make larger batches of several such parts within `accumulate`.
        None on other devices: as many as fit.
    """

    def __init__(self, classifier, input_vr, switches, dtype=torch.float32):
        super().__init__()
        self.input_vr, self.switches = input_vr, frozenset(switches)
        self.plain = (classifier,)  # in a tuple: not a submodule, whose weights would be held twice
        self.core, self._held, self.batch_size = None, None, None
        self.description = "plain path"
        if switches:
            self._prepare(classifier)
        if self.core is not None:
            if dtype != torch.float32:
                self.core.prepare(dtype)
            block = _tuning(self.black).reused_block
            if block is not None:
                self.batch_size = max(4, min(32, block // (4 * self.core.largest_map())))

    def forward(self, images):
        """Logits (n, S), or whatever else the classifier gives.

        Parameters
        ----------
        images : Tensor (n, 3, h, w), float, in [0, 1], of the size that the input VR takes
        """
        self.input_vr.check_images(images)
        if len(images) == 1 and images.device.type == "cpu" and torch.is_grad_enabled():
            # torch (2.13) reads a single image's gradient in another order than it lies in memory, where a BatchNorm
            # is followed by a reshape and a transpose; with two images it does not
            return self(torch.cat([images, images]))[:1]
        if self.core is None:
            return self.plain[0](self.input_vr(images))
        shared = self._shared() if self._held is None else self._held
        if not self.core.splits_first_layer:
            images = self.core.crop_input(self.input_vr.embed(images) + shared["pattern"])
        if "channels-last" in self.switches:
            images = images.contiguous(memory_format=torch.channels_last)
        return self.core(images, shared)

    @contextmanager
    def accumulate(self):
        """Compute what batches share once for all batches within this context, where the program must not change.

        Calls of ``backward`` inside it collect their gradients where the shared part begins; leaving the
        context takes the sum through that part to ``program.grad``. So one optimiser step may be made of many
        small batches, and an evaluation of a whole data set (under ``torch.no_grad()``) pays for the shared
        part once::

            with network.accumulate():
                for images, labels in parts_of_a_batch:
                    loss(network(images), labels).backward()
            optimizer.step()
        """
        if self.core is None or self._held is not None:
            yield
            return
        shared = self._shared()
        self._held = {key: part.detach().requires_grad_(part.requires_grad) for key, part in shared.items()}
        try:
            yield
            pairs = [(shared[key], leaf.grad) for key, leaf in self._held.items() if leaf.grad is not None]
        finally:
            self._held = None
        if pairs:
            torch.autograd.backward(*zip(*pairs, strict=True))

    def _prepare(self, classifier):
        black, window, scale = _probe(self.input_vr)
        if "channels-last" in self.switches:
            black = black.contiguous(memory_format=torch.channels_last)
        self.register_buffer("black", black, persistent=False)
        try:
            graph = trace(classifier, black)
        except Exception as error:  # a network's control flow can stop the tracer in any way
            self._prepare_untraced(classifier, window, scale, error)
            return
        if "fold-batchnorm" in self.switches:
            fold_batchnorm(graph)
        if "fused-ops" in self.switches:
            fuse(graph, "winograd" in self.switches)
        if "channels-last" in self.switches:
            _channels_last(graph)
        self.core = WindowedNetwork(
            graph, window, scale, first_layer="first-layer" in self.switches,
            largest_window=_tuning(black).largest_window if "shared-border" in self.switches else 0.0,
        )  # fmt: skip
        fast = sum(isinstance(layer, FrozenConv2d) and layer.may_use_winograd for layer in graph.modules())
        notes = {name: name for name in SWITCHES}
        notes["winograd"] = f"winograd in {fast} layers" if fast else "no winograd (no layer that it can speed up)"
        notes["shared-border"] = f"shared-border over {self.core.windowed} layers"
        if not self.core.splits_first_layer:
            notes["first-layer"] = "no first-layer (it is not a plain convolution)"
        if not self.core.windowed:
            notes["shared-border"] = "no shared-border (the images reach all of the maps)"
        self.description = "fast path: " + ", ".join(notes[name] for name in SWITCHES if name in self.switches)

    def _prepare_untraced(self, classifier, window, scale, error):
        reason = f"as the code of this network cannot be recorded ahead ({type(error).__name__}): same results, slower"
        self.description = f"plain path, {reason}"
        if "first-layer" in self.switches:
            core = SplitStem(share_copy(classifier), self.black, window, scale)
            if core.splits_first_layer:
                if "channels-last" in self.switches:
                    _channels_last(core)
                self.core = core
                self.description = f"fast path: first-layer alone, {reason}"

    def _shared(self):
        # in float32 also under autocast: its gradient is a sum over all images, beyond the range of half precision
        with torch.autocast(self.black.device.type, enabled=False):
            pattern = self.input_vr.pattern()
            shared = self.core.shared(self.black + pattern)
            if not self.core.splits_first_layer:
                shared["pattern"] = pattern
            return shared


def _probe(input_vr):
    """Canvas of a black image, the image's window on it, and the factor on its pixels."""
    pixels = input_vr.program.detach().new_zeros(1, 3, input_vr.image_size, input_vr.image_size)
    black, white = input_vr.embed(pixels), input_vr.embed(pixels + 1)
    touched = (white != black).flatten(0, 1).any(0)
    rows, columns = touched.any(1).nonzero().flatten().tolist(), touched.any(0).nonzero().flatten().tolist()
    window = (rows[0], rows[-1] + 1), (columns[0], columns[-1] + 1)
    return black, window, 1 / input_vr.std


def _tuning(tensor):
    return TUNING["cpu" if tensor.device.type == "cpu" else "cuda"]


def _try_out(network, dtype=torch.float32):
    """Logits of one and of two random images, and the latter's gradient of the program, under a random program."""
    program, size, generator = network.input_vr.program, network.input_vr.image_size, torch.Generator().manual_seed(0)
    images = torch.rand(2, 3, size, size, generator=generator).to(program)
    noise = torch.randn(program.shape, generator=generator).to(program)
    start = program.detach().clone()
    # a fresh program is constant: its maps are full of ties, which a max-pooling may break either way
    program.data.add_(noise)
    try:
        with _strict_float32(), torch.autocast(program.device.type, dtype, enabled=dtype != torch.float32):
            with torch.inference_mode():
                first = network(images[:1]).to(program)
            with torch.enable_grad():
                logits = network(images).to(program)
                weights = torch.randn(logits.shape, generator=generator).to(logits)
                loss = (logits * weights).sum()
                gradient = torch.autograd.grad(loss, program)[0] if loss.requires_grad else start
    finally:
        program.data.copy_(start)
    return first, logits.detach(), gradient


@contextmanager
def _strict_float32():
    """Without TF32, whose rounding turns ReLUs over, and without timing algorithms for sizes that never come again."""
    cudnn, matmul = torch.backends.cudnn, torch.backends.cuda.matmul
    kept = cudnn.allow_tf32, matmul.allow_tf32, cudnn.benchmark
    cudnn.allow_tf32 = matmul.allow_tf32 = cudnn.benchmark = False
    try:
        yield
    finally:
        cudnn.allow_tf32, matmul.allow_tf32, cudnn.benchmark = kept


def _channels_last(module):
    for layer in module.modules():
        if isinstance(layer, FrozenConv2d):
            layer.weight = layer.weight.contiguous(memory_format=torch.channels_last)
        elif isinstance(layer, nn.Conv2d):
            weight = layer.weight.contiguous(memory_format=torch.channels_last)
            layer.weight = nn.Parameter(weight, requires_grad=False)


def _errors(got, expected):
    return [(g - e).norm() for g, e in zip(got, expected, strict=True)]
