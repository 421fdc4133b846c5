"""The frozen classifier behind an input VR, run without the work that is the same for every image.

``build_network(classifier, input_vr)`` gives what ``classifier(input_vr(images))`` gives, within rounding,
and the same gradient to the program, several times faster. Each part can be left out by its name in
``switches``; without any, the network is that expression and nothing else.
"""

import difflib
from contextlib import contextmanager

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
    "winograd": "3 x 3 convolutions in a quarter of the multiplications (on CPUs, with channels-last and fused-ops)",
}
LARGEST_WINDOW = 0.7  # share of a map above which pasting costs more than the border's arithmetic
REUSED_BLOCK = 28 << 20  # bytes; glibc maps blocks of 32 MiB and more anew every time, a page fault per 4 KiB


def build_network(classifier, input_vr, *, switches=tuple(SWITCHES)):
    """Join a frozen classifier and an input VR.

    Parameters
    ----------
    classifier : nn.Module
        Frozen, in eval mode: normalised canvases (n, 3, C, C) to logits (n, S). It is left as it is.
    input_vr : nn.Module
        With ``forward(images) = embed(images) + pattern()``, as in `models.reprogramming`; on the classifier's
        device.
    switches : iterable of str
        Names from `SWITCHES`. One that cannot apply to this network, or whose result disagrees with the plain
        path on two random images, is left out, and `Network.description` says so.

    Returns
    -------
    Network

    Raises
    ------
    ValueError
        For an unknown switch.
    """
    switches = tuple(switches)
    for name in switches:
        if name not in SWITCHES:
            close = difflib.get_close_matches(name, SWITCHES, n=1)
            hint = f" (did you mean {close[0]!r}?)" if close else ""
            raise ValueError(f"unknown switch {name!r}{hint}; choose from {', '.join(SWITCHES)}")
    left_out = []
    for suspect in (None, "winograd", "fused-ops", "shared-border", "first-layer", "fold-batchnorm", "channels-last"):
        if suspect is not None:
            if suspect not in switches:
                continue
            switches = tuple(name for name in switches if name != suspect)
            left_out.append(suspect)
        network = Network(classifier, input_vr, switches)
        if not switches or network.agrees():
            break
    if left_out:
        network.description += f"; left out, as their results disagreed: {', '.join(left_out)}"
    return network


class Network(nn.Module):
    """Images to pretrained logits, differentiable with respect to the program alone. Made by `build_network`.

    Attributes
    ----------
    description : str
        One line for the log: which path runs.
    batch_size : int or None
        On CPUs, how many images at a time run fastest: as many as keep each map in memory that the allocator hands
        out again without asking the system for pages. Make larger batches of several such parts within `accumulate`.
        None on other devices: as many as fit.
    """

    def __init__(self, classifier, input_vr, switches):
        super().__init__()
        self.input_vr, self.switches = input_vr, frozenset(switches)
        self.plain = (classifier,)  # in a tuple: not a submodule, whose weights would be held twice
        self.core, self._held, self.batch_size = None, None, None
        self.description = "plain path"
        if switches:
            self._prepare(classifier)
        if self.core is not None and self.black.device.type == "cpu":
            self.batch_size = max(4, min(32, REUSED_BLOCK // (4 * self.core.largest_map())))

    def forward(self, images):
        """Logits (n, S), float32.

        Parameters
        ----------
        images : Tensor (n, 3, h, w), float, in [0, 1], of the size that the input VR takes
        """
        if self.core is None:
            return self._plain(images)
        self.input_vr.check_images(images)
        shared = self._shared() if self._held is None else self._held
        if not self.core.splits_first_layer:
            images = self.core.crop_input(self.input_vr.embed(images) + shared["pattern"])
        if "channels-last" in self.switches:
            images = images.contiguous(memory_format=torch.channels_last)
        return self.core(images, shared).float()

    @contextmanager
    def accumulate(self):
        """Within this context the program must not change, and what batches share is computed once for all of
        them.

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

    def agrees(self):
        """Whether logits and gradient equal those of the plain path, within rounding, on two random
        images."""
        program, generator = self.input_vr.program, torch.Generator().manual_seed(0)
        images = torch.rand(2, 3, self.image_size, self.image_size, generator=generator).to(program)
        noise = torch.randn(program.shape, generator=generator).to(program)
        start = program.detach().clone()
        # a fresh program is constant: its maps are full of ties, which a max-pooling may break either way
        program.data.add_(noise)
        try:
            with _strict_float32():
                results = [self._differentiate(path, images) for path in (self._plain, self)]
        finally:
            program.data.copy_(start)
        logits, gradients = zip(*results, strict=True)
        return _close(*logits, 1e-3) and _close(*gradients, 1e-2)

    def _plain(self, images):
        return self.plain[0](self.input_vr(images)).float()

    def _differentiate(self, path, images):
        with torch.enable_grad():
            logits = path(images)
            weights = torch.randn(logits.shape, generator=torch.Generator().manual_seed(1)).to(logits)
            if not logits.requires_grad:  # an input VR without a pattern
                return logits, torch.zeros(1)
            return logits.detach(), torch.autograd.grad((logits * weights).sum(), self.input_vr.program)[0]

    def _prepare(self, classifier):
        self.image_size = getattr(self.input_vr, "image_size", self.input_vr.canvas_size)
        black, window, scale = _probe(self.input_vr, self.image_size)
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
            largest_window=LARGEST_WINDOW if "shared-border" in self.switches else 0.0,
        )  # fmt: skip
        notes = [name for name in SWITCHES if name in self.switches - {"first-layer", "shared-border", "winograd"}]
        if "winograd" in self.switches:
            convolutions = [layer for layer in graph.modules() if isinstance(layer, FrozenConv2d)]
            count = sum(layer.may_use_winograd for layer in convolutions) if "channels-last" in self.switches else 0
            notes.append(f"winograd in {count} layers" if count else "no winograd (no layer that it can speed up)")
        if "first-layer" in self.switches:
            notes.append("first-layer" if self.core.splits_first_layer else "no first-layer (no convolution)")
        if "shared-border" in self.switches:
            count = self.core.windowed
            notes.append(f"shared-border over {count} layers" if count else "no shared-border (windows too large)")
        self.description = "fast path: " + ", ".join(notes)

    def _prepare_untraced(self, classifier, window, scale, error):
        self.description = f"plain path: the network cannot be traced ({type(error).__name__})"
        if "first-layer" in self.switches:
            core = SplitStem(share_copy(classifier), self.black, window, scale)
            if core.splits_first_layer:
                if "channels-last" in self.switches:
                    _channels_last(core)
                self.core = core
                self.description = f"fast path: first-layer alone, as tracing failed ({type(error).__name__})"

    def _shared(self):
        pattern = self.input_vr.pattern()
        shared = self.core.shared(self.black + pattern)
        if not self.core.splits_first_layer:
            shared["pattern"] = pattern
        return shared


def _probe(input_vr, image_size):
    """What the embedding does: the canvas of a black image, the image's window on it, the scale of its
    pixels."""
    pixels = input_vr.program.detach().new_zeros(1, 3, image_size, image_size)
    black, white = input_vr.embed(pixels), input_vr.embed(pixels + 1)
    touched = (white != black).flatten(0, 1).any(0)
    rows, columns = touched.any(1).nonzero().flatten().tolist(), touched.any(0).nonzero().flatten().tolist()
    window = (rows[0], rows[-1] + 1), (columns[0], columns[-1] + 1)
    return black, window, 1 / input_vr.std


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


def _close(expected, got, tolerance):
    return bool((got - expected).norm() <= tolerance * expected.norm())
