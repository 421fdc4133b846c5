"""A convolution whose weights never change: packed once, fused with what follows, differentiated to its input only.

Shapes: n samples, C channels, H x W map; all maps are (n, C, H, W).

Three things are cheaper when the weights are frozen. The weights are laid out once in the order the kernels
want. The residual addition and the ReLU run inside the convolution (oneDNN on CPUs), so that a map is written
once instead of three times. And the backward pass needs neither the input (it would only serve the weights'
gradient) nor the map before the ReLU: the output's sign says where the gradient passes.
"""

import torch
import torch.nn.functional as F
from torch import nn

from models.fast import winograd

_FUSED_ACTIVATIONS = {None: ("none", []), "relu": ("relu", []), "relu6": ("hardtanh", [0.0, 6.0])}
NO_PADDING = ((0, 0), (0, 0))


def activate(y, name, inplace=False):
    """``y`` through the activation ``name``: None, "relu" or "relu6"."""
    if name is None:
        return y
    if name == "relu":
        return y.relu_() if inplace else y.relu()
    return F.hardtanh(y, 0.0, 6.0, inplace)


def activation_gradient(g, y, name):
    """Gradient at the activation's input from that at its output, g, and its output y, which shows where it is flat."""
    if name is None:
        return g
    if name == "relu":
        return torch.ops.aten.threshold_backward(g, y, 0)
    return torch.ops.aten.hardtanh_backward(g, y, 0, 6)


def _onednn_operators():
    """The fused CPU operators (pack, convolve, convolve_add), or None where this build of torch lacks them."""
    try:
        operator = torch.ops.mkldnn._convolution_pointwise
        pack = torch._C._nn.mkldnn_reorder_conv2d_weight
        return (pack, operator.default, operator.binary) if torch.backends.mkldnn.is_available() else None
    except (AttributeError, RuntimeError):
        return None


def _flipped(weight, groups):
    """Weights of the stride-1 convolution that maps an output gradient to the input gradient.

    ``weight`` is (O, I/g, kh, kw); the result, (I, O/g, kh, kw), has both kernel axes reversed and the roles
    of input and output channels exchanged within each group.
    """
    out_channels, in_per_group, kh, kw = weight.shape
    grouped = weight.reshape(groups, out_channels // groups, in_per_group, kh, kw)
    return grouped.transpose(1, 2).reshape(groups * in_per_group, out_channels // groups, kh, kw).flip(2, 3)


class FrozenConv2d(nn.Module):
    """``activation(conv(x) + bias + other)`` with constant weights; gradients reach ``x`` and ``other`` only.

    Parameters
    ----------
    weight : Tensor (O, I/groups, kh, kw)
    bias : Tensor (O,) or None
    stride, dilation : (int, int)
    padding : ((top, bottom), (left, right))
        Zeros put around the input; the two ends may differ, as in TensorFlow's "same".
    groups : int
    """

    def __init__(self, weight, bias, stride, padding, dilation, groups):
        super().__init__()
        self.register_buffer("weight", weight.detach())
        self.register_buffer("bias", None if bias is None else bias.detach())
        self.stride, self.padding, self.dilation, self.groups = stride, padding, dilation, groups
        self.activation = None
        self.fused = self.winograd = False
        self._prepared = {}  # weights packed for the CPU's kernels, made when first needed

    @property
    def kernel_size(self):
        return tuple(self.weight.shape[2:])

    def _apply(self, fn, *args, **kwargs):
        self._prepared.clear()
        return super()._apply(fn, *args, **kwargs)

    def scale_input(self, factor):
        """Absorb a factor per input channel, (I,), into the weights (groups = 1)."""
        self.weight = self.weight * factor.view(1, -1, 1, 1)
        self._prepared.clear()

    def scale_output(self, factor, shift):
        """Absorb ``y * factor + shift``, both (O,), into weight and bias, in float64 before rounding once."""
        bias = torch.zeros_like(factor) if self.bias is None else self.bias.double()
        self.weight = (self.weight.double() * factor.view(-1, 1, 1, 1)).to(self.weight.dtype)
        self.bias = (bias * factor + shift).to(self.weight.dtype)
        self._prepared.clear()

    def forward(self, x, other=None, padding=None):
        """Convolve ``x``; ``padding`` replaces the layer's own, for a patch that already holds its surroundings."""
        (top, bottom), (left, right) = self.padding if padding is None else padding
        if top != bottom or left != right:
            x, top, left = F.pad(x, (left, right, top, bottom)), 0, 0
        if torch.is_grad_enabled() and (x.requires_grad or (other is not None and other.requires_grad)):
            if self.fused:
                return _FrozenConvolution.apply(x, other, self, (top, left))
            y = F.conv2d(x, self.weight, self.bias, self.stride, (top, left), self.dilation, self.groups)
            return activate(y if other is None else y + other, self.activation)
        return self.compute(x, other, (top, left))

    def compute(self, x, other, padding):
        """The value alone, through the fused kernel where there is one."""
        dtype = autocast_dtype(x) or x.dtype
        if self._has_kernels(dtype) and (other is None or other.dtype == dtype):
            return self._fused("forward", x.to(dtype), self.bias, padding, self.stride, self.activation, other)
        bias = None if self.bias is None else self.bias.to(dtype)
        y = F.conv2d(x.to(dtype), self.weight.to(dtype), bias, self.stride, padding, self.dilation, self.groups)
        return _finish(y, other, self.activation)

    def input_gradient(self, g, shape, padding):
        """d loss / d x, (n, I, H, W) = ``shape``, for g = d loss / d conv(x), (n, O, H', W').

        With stride 1 this is a convolution of ``g`` with the flipped kernels, padded by what the kernel overhangs.
        """
        overhang = tuple(d * (k - 1) - p for d, k, p in zip(self.dilation, self.kernel_size, padding, strict=True))
        if self._has_kernels(g.dtype) and self.stride == (1, 1) and min(overhang) >= 0:
            return self._fused("backward", g, None, overhang, (1, 1))
        if self.groups > 1 and self._has_kernels(torch.bfloat16):  # oneDNN takes six times as long for it in bfloat16
            weight = self._prepare("float32", self.weight.float)
        else:
            weight = self.weight.to(g.dtype)
        x = empty_like_layout(weight, shape, weight)  # its values are never read
        operator, only_input = torch.ops.aten.convolution_backward, (True, False, False)
        geometry = (self.stride, padding, self.dilation, False, (0, 0), self.groups)
        return operator(g.to(weight.dtype), x, weight, None, *geometry, only_input)[0]

    def _has_kernels(self, dtype):
        on_cpu = self.weight.device.type == "cpu" and self.weight.dtype == dtype
        if not (self.fused and on_cpu) or _onednn_operators() is None:
            return False
        return dtype == torch.float32 or (dtype == torch.bfloat16 and torch.ops.mkldnn._is_mkldnn_bf16_supported())

    def _fused(self, direction, x, bias, padding, stride, activation=None, other=None):
        """activation(conv(x) + bias + other) by oneDNN or Winograd; "backward" takes the flipped kernels."""
        if self._winograd_pays(x, padding):
            planes = self._prepare((direction, "winograd"), lambda: winograd.transform_weight(self._kernel(direction)))
            return _finish(winograd.convolve(x, planes, bias, padding), other, activation)
        pack, convolve, convolve_add = _onednn_operators()
        geometry = (list(padding), list(stride), list(self.dilation), self.groups)
        weight = self._prepare(
            direction, lambda: pack(self._kernel(direction).contiguous().to_mkldnn(), *geometry, list(x.shape))
        )
        unary, scalars = _FUSED_ACTIVATIONS[activation]
        if other is None:
            return convolve(x, weight, bias, *geometry, unary, scalars, "")
        other = other.contiguous(memory_format=torch.channels_last)
        unary = None if activation is None else unary
        return convolve_add(x, other, weight, bias, *geometry, "add", 1.0, unary, scalars, "")

    @property
    def may_use_winograd(self):
        """Whether maps that are large enough go through `winograd.convolve`."""
        plain = self.stride == self.dilation == (1, 1) and self.kernel_size == (3, 3) and self.groups == 1
        kernels = self.winograd and plain and self._has_kernels(torch.float32)
        return kernels and winograd.pays(1, (256, 256), *self.weight.shape[:2])

    def _winograd_pays(self, x, padding):
        if not (self.may_use_winograd and x.is_contiguous(memory_format=torch.channels_last)):
            return False
        size = (x.shape[2] + 2 * padding[0] - 2, x.shape[3] + 2 * padding[1] - 2)
        return winograd.pays(len(x), size, *self.weight.shape[:2])

    def _kernel(self, direction):
        return self.weight if direction == "forward" else _flipped(self.weight, self.groups)

    def _prepare(self, key, make):
        if key not in self._prepared:
            with torch.inference_mode(False):
                self._prepared[key] = make()
        return self._prepared[key]


def _finish(y, other, activation):
    if other is not None:
        y = y.add_(other) if other.dtype == y.dtype else y + other
    return activate(y, activation, inplace=True)


def empty_like_layout(pattern, shape, like):
    """An uninitialised tensor of the type of ``like``, channels-last if ``pattern`` is."""
    channels_last = pattern.is_contiguous(memory_format=torch.channels_last)
    layout = torch.channels_last if channels_last else torch.contiguous_format
    return torch.empty(shape, dtype=like.dtype, device=like.device, memory_format=layout)


def autocast_dtype(x):
    """The type that autocast computes convolutions and matrix products of ``x`` in, or None where it is off."""
    kind = x.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None


class _FrozenConvolution(torch.autograd.Function):
    """Keeps the output alone, and that only where an activation needs its mask."""

    @staticmethod
    def forward(ctx, x, other, layer, padding):
        y = layer.compute(x, other, padding)
        ctx.layer, ctx.padding, ctx.shape, ctx.dtype = layer, padding, x.shape, x.dtype
        ctx.other_dtype = None if other is None else other.dtype
        ctx.conv_dtype = autocast_dtype(x) or x.dtype
        if layer.activation is not None:
            ctx.save_for_backward(y)
        return y

    @staticmethod
    def backward(ctx, g):
        if ctx.layer.activation is not None:
            g = activation_gradient(g, ctx.saved_tensors[0], ctx.layer.activation)
        gx = None
        if ctx.needs_input_grad[0]:
            gx = ctx.layer.input_gradient(g.to(ctx.conv_dtype), ctx.shape, ctx.padding).to(ctx.dtype)
        return gx, g.to(ctx.other_dtype) if ctx.needs_input_grad[1] else None, None, None
