"""What a batch shares is computed once: the pattern's way through the first layer, and all maps around the images.

With a padding VR each canvas of a batch is the same outside the image, and in eval mode so is every feature
map outside the *window* that the image can reach. A map of the batch is therefore carried as one *shared*
map, (1, C, H, W), that of the canvas with a black image, and a batch of windows, (n, C, h, w), with the
window's place known beforehand. A convolution's window holds the outputs whose receptive fields touch its
input's window; their inputs are the shared map with the windows pasted in. Where a window would cover most of
the map, or at a layer that looks everywhere at once, windows are pasted into the whole shared map and all
goes on as usual.

The first layer is linear: conv(canvas) = conv(canvas with a black image) + conv(image, zeros around), the
latter without bias. The pattern enters in the first term only, one image's work; the second carries no
gradient at all.

Intervals are half-open pairs (start, stop) along one axis; a window is a pair of them, (rows, columns).
"""

import math
import operator
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import fx, nn

from models.fast.conv import (
    NO_PADDING,
    FrozenConv2d,
    activate,
    activation_gradient,
    autocast_dtype,
    empty_like_layout,
)  # fmt: skip
from models.fast.graph import ADDITIONS, cast_weights, freeze

_POINTWISE_LAYERS = (
    nn.ReLU, nn.ReLU6, nn.Hardtanh, nn.SiLU, nn.Hardswish, nn.Hardsigmoid, nn.GELU,
    nn.ELU, nn.LeakyReLU, nn.Tanh, nn.Sigmoid, nn.Softplus, nn.Mish, nn.BatchNorm2d,
)  # fmt: skip
_POINTWISE_CALLS = {
    F.relu, F.relu6, F.silu, F.hardswish, F.gelu, F.elu, F.leaky_relu, F.hardtanh, F.tanh, F.sigmoid,
    torch.relu, torch.tanh, torch.sigmoid, "relu", "tanh", "sigmoid", "contiguous", "clone",
}  # fmt: skip


@dataclass(frozen=True)
class Sliding:
    """How a sliding layer reads its input along an axis: ``span`` pixels from ``output * stride - before`` on."""

    span: int
    stride: int
    before: int

    def reach(self, window, size):
        """Outputs, of ``size`` in all, that see any of ``window``; empty where the strides step over it."""
        start = -((self.span - 1 - self.before - window[0]) // self.stride)
        stop = (window[1] - 1 + self.before) // self.stride + 1
        return max(start, 0), min(stop, size)

    def reads(self, outputs):
        """The inputs, padding included, that these outputs see."""
        return outputs[0] * self.stride - self.before, (outputs[1] - 1) * self.stride - self.before + self.span


@dataclass(frozen=True)
class Fetch:
    """An input as a node wants it: the part ``patch`` of a source's map, whose windows lie at ``window``.

    ``patch`` may reach beyond the map, which counts as ``fill`` there.
    """

    source: fx.Node
    window: tuple
    patch: tuple
    fill: float = 0.0


@dataclass
class Step:
    """One node of the windowed network: its window, how it gets its inputs, the padding left for it to add."""

    window: tuple = None
    fetches: dict = field(default_factory=dict)  # source node -> Fetch, where the source's window itself won't do
    padding: tuple = None


class _Paste(torch.autograd.Function):
    """Windows (n, C, h, w) inside surroundings (1, C, H, W) of the whole batch; either may carry a gradient."""

    @staticmethod
    def forward(ctx, surroundings, windows, top, left):
        n, (height, width) = len(windows), surroundings.shape[2:]
        bottom, right = top + windows.shape[2], left + windows.shape[3]
        ctx.place = (slice(None), slice(None), slice(top, bottom), slice(left, right))
        ctx.around = [
            (slice(None), slice(None), rows, columns)
            for rows, columns, area in (
                (slice(0, top), slice(0, width), top),
                (slice(bottom, height), slice(0, width), height - bottom),
                (slice(top, bottom), slice(0, left), left),
                (slice(top, bottom), slice(right, width), width - right),
            )
            if area > 0
        ]
        out = empty_like_layout(windows, (n, *surroundings.shape[1:]), windows)
        for part in ctx.around:
            out[part] = surroundings[part]
        out[ctx.place] = windows
        return out

    @staticmethod
    def backward(ctx, g):
        shared = None
        if ctx.needs_input_grad[0]:
            shared = torch.zeros_like(g[:1], dtype=_sum_dtype(g))
            for part in ctx.around:
                shared[part] = g[part].sum(0, keepdim=True, dtype=_sum_dtype(g))
        return shared, g[ctx.place] if ctx.needs_input_grad[1] else None, None, None


def _sum_dtype(g):
    """The type for sums over the batch: at least float32, as half precision may overflow where no sample does."""
    return torch.promote_types(g.dtype, torch.float32)


class WindowedNetwork(nn.Module):
    """A traced classifier that runs on windows, given what the batch shares.

    Parameters
    ----------
    graph : fx.GraphModule
        From `models.fast.graph`, its shapes recorded.
    window : ((int, int), (int, int))
        Rows and columns of the canvas that the image occupies.
    scale : Tensor (1, 3, 1, 1)
        What the embedding multiplies pixels in [0, 1] with.
    first_layer : bool
        Split the first convolution by linearity.
    largest_window : float
        Windows that cover more than this share of their map are merged into whole maps; 0 keeps no windows
        behind the first convolution.

    Attributes
    ----------
    windowed : int
        Number of layers, the first one included, that run on windows smaller than their maps.
    """

    def __init__(self, graph, window, scale, *, first_layer, largest_window):
        super().__init__()
        self.graph, self.cast = graph, None
        self.largest_window = largest_window
        self.input = next(node for node in graph.graph.nodes if node.op == "placeholder")
        self.steps = {}
        stems = [node for node in self.input.users if not _reads_shape(node)]
        linear = first_layer and len(stems) == 1 and isinstance(self._layer(stems[0]), FrozenConv2d)
        self.stem = stems[0] if linear and len(stems[0].args) == 1 else None
        self._plan(window)
        if self.stem is not None and self.steps[self.stem].fetches:  # its strides step over the whole image
            self.stem = None
            self._plan(window)
        self._split_stem(scale)
        self._last_uses()
        self.windowed = sum(self._partial(node) for node in self.steps if node.op == "call_module")

    @property
    def splits_first_layer(self):
        return self.stem is not None

    def largest_map(self):
        """Elements of the largest map that a sample has of its own."""
        sizes = [node.meta["shape"][1] * _area(step.window) for node, step in self.steps.items() if self._is_map(node)]
        for step in self.steps.values():
            sizes += [fetch.source.meta["shape"][1] * _area(fetch.patch) for fetch in step.fetches.values()]
        return max(sizes)

    def _plan(self, window):
        for node in self.graph.graph.nodes:
            step = self.steps[node] = Step()
            if node.op == "placeholder":
                step.window = window if self.stem is not None or self.largest_window else self._whole(node)
                continue
            if self._is_map(node):
                step.window = self._whole(node)
            if _reads_shape(node) or not any(self._partial(source) for source in node.all_input_nodes):
                continue
            planned = self._plan_windows(node, step)
            if not planned:
                for source in node.all_input_nodes:
                    if self._partial(source):
                        self._fetch(step, source, self._whole(source))

    def _plan_windows(self, node, step):
        """Let ``node`` run on windows; False where it cannot, or where whole maps are the cheaper way."""
        if not self._is_map(node):
            return False
        sizes, source = node.meta["shape"][2:], node.all_input_nodes[0]
        slide = self._sliding(node)
        if slide is not None:
            window = tuple(
                axis.reach(w, size) for axis, w, size in zip(slide, self.steps[source].window, sizes, strict=True)
            )
            if any(stop <= start for start, stop in window):
                return False
            for other in node.args[1:]:
                window = _union(window, self.steps[other].window)
        elif self._is_pointwise(node):
            window = self.steps[source].window
        elif node.op in ("call_function", "call_method") and node.target in ADDITIONS and not node.kwargs:
            if any(not isinstance(arg, fx.Node) or arg.meta.get("shape") != node.meta["shape"] for arg in node.args):
                return False
            window = _union(*(self.steps[arg].window for arg in node.args))
        else:
            return False
        if node is not self.stem and _area(window) > self.largest_window * math.prod(sizes):
            return False
        step.window = window
        if slide is None:
            for arg in node.all_input_nodes:
                self._fetch(step, arg, window)
            return True
        if node is not self.stem:
            fill = -math.inf if isinstance(self._layer(node), nn.MaxPool2d) else 0.0
            self._fetch(step, source, tuple(axis.reads(w) for axis, w in zip(slide, window, strict=True)), fill)
            for other in node.args[1:]:
                self._fetch(step, other, window)
        step.padding = NO_PADDING
        return True

    def _fetch(self, step, source, patch, fill=0.0):
        window = self.steps[source].window
        if patch != window:
            step.fetches[source] = Fetch(source, window, patch, fill)

    def _sliding(self, node):
        """The (rows, columns) `Sliding` of a convolution or pooling that can run on windows, else None."""
        layer = self._layer(node)
        if isinstance(layer, FrozenConv2d):
            before = [p for p, _ in layer.padding]
            values = layer.kernel_size, layer.stride, before, layer.dilation
        elif type(layer) is nn.MaxPool2d and not layer.ceil_mode and not layer.return_indices:
            values = layer.kernel_size, layer.stride, layer.padding, layer.dilation
        elif type(layer) is nn.AvgPool2d and not layer.ceil_mode and layer.divisor_override is None:
            if layer.padding not in (0, (0, 0)) and not layer.count_include_pad:
                return None
            values = layer.kernel_size, layer.stride, layer.padding, 1
        else:
            return None
        pairs = (value if isinstance(value, (tuple, list)) else (value, value) for value in values)
        return tuple(Sliding(d * (k - 1) + 1, s, p) for k, s, p, d in zip(*pairs, strict=True))

    def _is_pointwise(self, node):
        layer = self._layer(node)
        if layer is not None:
            plain_norm = type(layer).__name__ == "BatchNormAct2d" and isinstance(layer.drop, nn.Identity)
            return type(layer) in _POINTWISE_LAYERS or (plain_norm and type(layer.act) in _POINTWISE_LAYERS)
        called = node.op in ("call_function", "call_method") and node.target in _POINTWISE_CALLS
        return called and len(node.all_input_nodes) == 1

    def _layer(self, node, graph=None):
        return (graph or self.graph).get_submodule(node.target) if node.op == "call_module" else None

    def _is_map(self, node):
        return len(node.meta.get("shape", ())) == 4

    def _whole(self, node):
        return tuple((0, size) for size in node.meta["shape"][2:])

    def _partial(self, node):
        return self._is_map(node) and self.steps[node].window != self._whole(node)

    def _split_stem(self, scale):
        """Take the images' share of the first layer apart from the pattern's."""
        self.image_conv = self.stem_activation = None
        if self.stem is None:
            return
        layer, window = self._layer(self.stem), self.steps[self.stem].window
        self.stem_activation, layer.activation = layer.activation, None
        self.image_conv = _without_bias(layer, scale, NO_PADDING)
        reads = (axis.reads(w) for axis, w in zip(self._sliding(self.stem), window, strict=True))
        self.image_margins = [
            (w[0] - r[0], r[1] - w[1]) for w, r in zip(self.steps[self.input].window, reads, strict=True)
        ]

    def _last_uses(self):
        """Note after which node each value can go, so that a pass without gradients keeps no map too long."""
        self.releases = {node: [] for node in self.steps}
        seen = set()
        for node in reversed(self.graph.graph.nodes):
            for value in (*self.steps[node].fetches.values(), *node.all_input_nodes):
                if value not in seen:
                    seen.add(value)
                    self.releases[node].append(value)

    def prepare(self, dtype):
        """Cast the weights that `forward` needs under autocast to ``dtype``; `shared` keeps its own."""
        self.cast = _Cast(dtype, graph=self.graph, image_conv=self.image_conv)

    def shared(self, canvas):
        """All that the windows need of their surroundings.

        Parameters
        ----------
        canvas : Tensor (1, 3, C, C)
            The normalised, reprogrammed canvas with a black image.

        Returns
        -------
        dict of Tensor (1, C, H, W), differentiable with respect to ``canvas``: what each `Fetch` surrounds
        its windows with, and under the stem's node the pattern's share of the first layer within the stem's
        window.
        """
        fetches = {f for step in self.steps.values() for f in step.fetches.values() if _surrounds(f)}
        needed = {f.source for f in fetches} | ({self.stem} if self.stem is not None else set())
        for node in reversed(self.graph.graph.nodes):
            if node in needed:
                needed.update(node.all_input_nodes)
        values, parts = {}, {}
        for node in self.graph.graph.nodes:
            if node in needed:
                values[node] = canvas if node.op == "placeholder" else self._call(node, values.__getitem__)
            if node is self.stem:
                parts[node] = _crop(values[node], self.steps[node].window)
                values[node] = activate(values[node], self.stem_activation)
        for fetch in sorted(fetches, key=lambda f: list(self.steps).index(f.source)):
            parts[fetch] = _crop(values[fetch.source], fetch.patch, fetch.fill)
        return parts

    def forward(self, images, shared):
        """Logits (n, S).

        Parameters
        ----------
        images : Tensor (n, 3, h, w)
            Pixels in [0, 1] where the first layer is split, else the window of the reprogrammed canvas.
        shared : dict
            From `shared`.
        """
        values, layers = {self.input: images}, _layers_for(images, self)
        for node, step in self.steps.items():
            if node is self.stem:
                (top, bottom), (left, right) = self.image_margins
                own = layers.image_conv(F.pad(images, (left, right, top, bottom)))
                values[node] = _AddShared.apply(own, shared[node], self.stem_activation)
            elif _reads_shape(node) and self._partial(node.args[0]):
                whole = images.new_empty(()).expand(len(images), *node.args[0].meta["shape"][1:])
                values[node] = self._call(node, {node.args[0]: whole}.__getitem__)
            elif node.op != "placeholder":
                for fetch in step.fetches.values():
                    if fetch not in values:
                        values[fetch] = _paste(values[fetch.source], fetch, shared)
                value_of = lambda n, f=step.fetches: values[f.get(n, n)]  # noqa: E731
                values[node] = self._call(node, value_of, step.padding, layers.graph)
            for value in self.releases[node]:
                del values[value]
        return values[node]

    def crop_input(self, canvases):
        """What `forward` takes of whole canvases (n, 3, C, C) where the first layer is not split."""
        return _crop(canvases, self.steps[self.input].window)

    def _call(self, node, value_of, padding=None, graph=None):
        """Run one node of ``graph``; ``padding`` is given where its input already holds its surroundings."""
        if node.op == "output":
            return fx.node.map_arg(node.args[0], value_of)
        args, kwargs = fx.node.map_arg(node.args, value_of), fx.node.map_arg(node.kwargs, value_of)
        layer = self._layer(node, graph)
        if layer is None:
            if node.op == "get_attr":
                return operator.attrgetter(node.target)(graph or self.graph)
            if node.op == "call_method":
                return getattr(args[0], node.target)(*args[1:], **kwargs)
            return node.target(*args, **kwargs)
        if padding is not None and isinstance(layer, FrozenConv2d):
            return layer(*args, padding=padding)
        if padding is not None and isinstance(layer, nn.MaxPool2d):
            return F.max_pool2d(*args, layer.kernel_size, layer.stride, 0, layer.dilation)
        if padding is not None and isinstance(layer, nn.AvgPool2d):
            return F.avg_pool2d(*args, layer.kernel_size, layer.stride)
        return layer(*args, **kwargs)


class SplitStem(nn.Module):
    """A network that cannot be traced, with its first layer split; the interface of `WindowedNetwork`.

    Parameters
    ----------
    net : nn.Module
        A copy of the classifier, of which the first convolution is replaced.
    canvas, window, scale
        The example that finds it; as in `WindowedNetwork`.
    """

    def __init__(self, net, canvas, window, scale):
        super().__init__()
        self.net, self.cast, self.stem = net, None, None
        found = self._first_convolution(canvas)
        if found is not None:
            self.stem_name, layer = found
            self.stem = _SharedStem(layer, scale)
            net.set_submodule(self.stem_name, self.stem)
        (top, bottom), (left, right) = window
        self.margins = (left, canvas.shape[3] - right, top, canvas.shape[2] - bottom)

    @property
    def splits_first_layer(self):
        return self.stem is not None

    def _first_convolution(self, canvas):
        """Name and frozen form of the layer that is called on the network's very input, or None."""
        calls = []

        def note(module, args, output):
            if args[0] is canvas:
                calls.append(module)
                self.stem_size = output[0].numel()

        convolutions = {m: name for name, m in self.net.named_modules() if isinstance(m, nn.Conv2d)}
        hooks = [module.register_forward_hook(note) for module in convolutions]
        with torch.no_grad():
            self.net(canvas)
        for hook in hooks:
            hook.remove()
        layer = freeze(calls[0], canvas.shape[2:]) if len(calls) == 1 else None
        return None if layer is None else (convolutions[calls[0]], layer)

    def largest_map(self):
        return self.stem_size

    def prepare(self, dtype):
        self.cast = _Cast(dtype, net=self.net)

    def shared(self, canvas):
        return {"stem": self.stem.layer(canvas)}

    def forward(self, images, shared):
        net = _layers_for(images, self).net
        stem = net.get_submodule(self.stem_name)
        stem.shared = shared["stem"]
        try:
            return net(F.pad(images, self.margins))
        finally:
            stem.shared = None


class _Cast(nn.Module):
    """Layers with their weights cast once for passes under autocast to ``dtype``."""

    def __init__(self, dtype, **layers):
        super().__init__()
        self.dtype = dtype
        for name, layer in layers.items():
            self.add_module(name, None if layer is None else cast_weights(layer, dtype))


def _layers_for(images, core):
    """What holds the layers of a pass: the core itself, or what it cast where autocast asks for that."""
    return core if core.cast is None or autocast_dtype(images) != core.cast.dtype else core.cast


class _SharedStem(nn.Module):
    def __init__(self, layer, scale):
        super().__init__()
        self.layer, self.shared = layer, None
        self.image_conv = _without_bias(layer, scale, layer.padding)

    def forward(self, x):
        return _AddShared.apply(self.image_conv(x), self.shared, None)


def _without_bias(layer, scale, padding):
    """The images' share of a first layer: no bias, no activation, the embedding's scale within the weights."""
    conv = FrozenConv2d(layer.weight, None, layer.stride, padding, layer.dilation, layer.groups)
    conv.scale_input(scale.flatten())
    conv.fused, conv.winograd = layer.fused, layer.winograd
    return conv


class _AddShared(torch.autograd.Function):
    """activation(own + shared), written over ``own``; the gradient, summed over the batch, is that of ``shared``."""

    @staticmethod
    def forward(ctx, own, shared, activation):
        y = activate(own.add_(shared), activation, inplace=True)
        ctx.mark_dirty(own)
        ctx.activation = activation
        if activation is not None:
            ctx.save_for_backward(y)
        return y

    @staticmethod
    def backward(ctx, g):
        g = activation_gradient(g, ctx.saved_tensors[0] if ctx.saved_tensors else None, ctx.activation)
        return None, g.sum(0, keepdim=True, dtype=_sum_dtype(g)), None


def _reads_shape(node):
    """Whether a node asks a map for no more than its shape, which is that of the whole map, window or not."""
    if node.op == "call_function" and node.target is getattr:
        return "shape" in node.args[0].meta and node.args[1] in ("shape", "ndim")
    return node.op == "call_method" and node.target in ("size", "dim") and "shape" in node.args[0].meta


def _paste(windows, fetch, shared):
    """The part of the batch's maps that ``fetch`` names, (n, C, h, w)."""
    (top, bottom), (left, right) = (
        (max(w[0], p[0]), min(w[1], p[1])) for w, p in zip(fetch.window, fetch.patch, strict=True)
    )
    (row, _), (column, _) = fetch.window
    windows = windows[:, :, top - row : bottom - row, left - column : right - column]
    if fetch not in shared:
        return windows
    return _Paste.apply(shared[fetch], windows, top - fetch.patch[0][0], left - fetch.patch[1][0])


def _crop(shared, patch, fill=0.0):
    """``patch`` of a map, with ``fill`` where it reaches beyond the map."""
    (top, bottom), (left, right) = patch
    height, width = shared.shape[2:]
    margins = (max(-left, 0), max(right - width, 0), max(-top, 0), max(bottom - height, 0))
    inside = shared[:, :, max(top, 0) : min(bottom, height), max(left, 0) : min(right, width)]
    return F.pad(inside, margins, value=fill) if any(margins) else inside


def _surrounds(fetch):
    return any(p[0] < w[0] or p[1] > w[1] for w, p in zip(fetch.window, fetch.patch, strict=True))


def _union(*windows):
    """The smallest window that holds all of these."""
    return tuple((min(w[axis][0] for w in windows), max(w[axis][1] for w in windows)) for axis in (0, 1))


def _area(window):
    return math.prod(stop - start for start, stop in window)
