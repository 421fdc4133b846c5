"""A frozen classifier as a graph: BatchNorm folded into convolutions, each of them fused with what follows it.

The classifier that is passed in is never changed: the graph works on a copy that shares every tensor with it,
until one is replaced by its folded form.
"""

import copy
import itertools
import math
import operator

import torch
import torch.nn.functional as F
from torch import fx, nn

from models.fast.conv import FrozenConv2d

ADDITIONS = {operator.add, operator.iadd, torch.add, "add", "add_"}
_RELU_CALLS = {F.relu, torch.relu, F.relu_, torch.relu_, "relu", "relu_"}
_RELU6_CALLS = {F.relu6}
_MATRIX_PRODUCTS = {operator.matmul, torch.matmul, torch.mm}
_AUTOCAST_LAYERS = (FrozenConv2d, nn.Conv2d, nn.Linear, nn.MultiheadAttention)
_PASSING = (nn.Identity, nn.Dropout, nn.Dropout2d)  # layers that do nothing in eval mode


class _LayerTracer(fx.Tracer):
    """Keeps every torch.nn layer whole, subclasses from other libraries included."""

    def is_leaf_module(self, module, qualified_name):
        bases = (base for base in type(module).__mro__ if base not in (nn.Module, object))
        containers = (nn.Sequential, nn.ModuleList, nn.ModuleDict)
        return not isinstance(module, containers) and any(b.__module__.startswith("torch.nn") for b in bases)


class _OneInput(nn.Module):
    """Leaves a network's optional arguments at their defaults, where a tracer would take them for inputs."""

    def __init__(self, net):
        super().__init__()
        self.net = net

    def forward(self, images):
        return self.net(images)


def share_copy(module):
    """A copy of ``module`` with its own structure and the same tensors."""
    tensors = [*module.parameters(), *module.buffers()]
    copied = copy.deepcopy(module, {id(tensor): tensor for tensor in tensors}).eval()
    for layer in copied.modules():
        if getattr(layer, "inplace", None) is True:
            layer.inplace = False  # an output that another layer keeps for its backward pass must not be overwritten
    return copied


def cast_weights(module, dtype):
    """A copy for use under autocast to ``dtype``: the weights that autocast would cast in every pass are cast once.

    They are those of convolutions and matrix products; all others keep their type, as autocast leaves them.
    """
    copied = share_copy(module)
    for layer in copied.modules():
        if any(type(layer).forward is kind.forward for kind in _AUTOCAST_LAYERS):
            _replace_tensors(layer, [*layer._parameters, *layer._buffers], dtype)
        elif isinstance(layer, fx.GraphModule):
            for node in layer.graph.nodes:
                if node.op == "get_attr" and all(user.target in _MATRIX_PRODUCTS for user in node.users):
                    owner, _, name = node.target.rpartition(".")
                    _replace_tensors(layer.get_submodule(owner), [name], dtype)
    return copied


def _replace_tensors(layer, names, dtype):
    for held in (layer._parameters, layer._buffers):
        for name in set(names) & held.keys():
            if held[name] is not None and held[name].dtype == torch.float32:
                cast = held[name].detach().to(dtype)
                held[name] = nn.Parameter(cast, requires_grad=False) if held is layer._parameters else cast


def trace(classifier, example):
    """The classifier as an `fx.GraphModule` whose nodes know the shape of their values, ``node.meta["shape"]``.

    Convolutions are `FrozenConv2d` layers, still unfused; layers that do nothing are dropped. Raises whatever tracing
    raises for a network whose control flow depends on its input.

    Parameters
    ----------
    classifier : nn.Module
    example : Tensor (1, 3, H, W)
        An input of the size that the graph will be used with.
    """
    root = _OneInput(share_copy(classifier))
    graph = fx.GraphModule(root, _LayerTracer().trace(root))
    _record_shapes(graph, example)
    for node in list(graph.graph.nodes):
        layer = _layer(graph, node)
        if type(layer) in _PASSING:  # between a convolution and its ReLU it would keep the two apart
            node.replace_all_uses_with(node.args[0])
            graph.graph.erase_node(node)
        elif isinstance(layer, nn.Conv2d) and "shape" in node.args[0].meta:
            frozen = freeze(layer, node.args[0].meta["shape"][2:])
            if frozen is not None:
                _insert_layer(graph, node, frozen)
    return graph


def freeze(conv, size):
    """`FrozenConv2d` of a plain or TensorFlow-"same" convolution on an H x W ``size`` input; else None."""
    if conv.padding_mode != "zeros":
        return None
    spans = [d * (k - 1) + 1 for d, k in zip(conv.dilation, conv.kernel_size, strict=True)]
    if type(conv).__name__ in ("Conv2dSame", "Conv2dSameExport"):
        totals = [
            max((math.ceil(n / s) - 1) * s + span - n, 0) for n, s, span in zip(size, conv.stride, spans, strict=True)
        ]
        padding = tuple((total // 2, total - total // 2) for total in totals)
    elif type(conv) is not nn.Conv2d:
        return None
    elif conv.padding == "same":
        padding = tuple(((span - 1) // 2, span - 1 - (span - 1) // 2) for span in spans)
    elif conv.padding == "valid":
        padding = ((0, 0), (0, 0))
    else:
        padding = tuple((p, p) for p in conv.padding)
    return FrozenConv2d(conv.weight, conv.bias, conv.stride, padding, conv.dilation, conv.groups)


def fold_batchnorm(graph):
    """Absorb every BatchNorm that directly follows a convolution: y·γ/√(σ²+ε) + (β − μ·γ/√(σ²+ε))."""
    for node in list(graph.graph.nodes):
        norm = _layer(graph, node)
        if not isinstance(norm, nn.BatchNorm2d) or norm.running_mean is None:
            continue
        conv = _layer(graph, node.args[0])
        plain = type(norm) is nn.BatchNorm2d or type(norm).__name__ == "BatchNormAct2d"
        if not isinstance(conv, FrozenConv2d) or len(node.args[0].users) > 1 or not plain:
            continue
        factor = (norm.running_var.double() + norm.eps).rsqrt()
        factor = factor if norm.weight is None else factor * norm.weight.detach().double()
        shift = -norm.running_mean.double() * factor
        conv.scale_output(factor, shift if norm.bias is None else shift + norm.bias.detach().double())
        value = node.args[0]
        for part in (getattr(norm, "drop", None), getattr(norm, "act", None)):  # of timm's BatchNormAct2d
            if part is not None and type(part) not in _PASSING:
                with graph.graph.inserting_before(node):
                    name = _free_name(graph)
                    graph.add_submodule(name, part)
                    value = graph.graph.call_module(name, (value,))
                    value.meta["shape"] = node.meta["shape"]
        node.replace_all_uses_with(value)
        graph.graph.erase_node(node)


def fuse(graph, winograd=False):
    """Move residual additions and ReLUs into the convolutions that feed them, and ReLUs behind max-pooling."""
    for node in list(graph.graph.nodes):
        if _is_addition(node):
            _fuse_addition(graph, node)
        elif activation_of(graph, node) is not None:
            _fuse_activation(graph, node)
    for conv in graph.modules():
        if isinstance(conv, FrozenConv2d):
            conv.fused, conv.winograd = True, winograd


def _is_addition(node):
    tensors = [arg for arg in node.args if isinstance(arg, fx.Node) and "shape" in arg.meta]
    if node.op not in ("call_function", "call_method") or node.target not in ADDITIONS or node.kwargs:
        return False
    return len(node.args) == len(tensors) == 2 and tensors[0].meta["shape"] == tensors[1].meta["shape"]


def _fuse_addition(graph, node):
    for value, other in (node.args, node.args[::-1]):
        conv = _layer(graph, value)
        if isinstance(conv, FrozenConv2d) and conv.activation is None and len(value.args) == len(value.users) == 1:
            # a step can ask one map for one patch only, where the convolution wants more of it than the addition
            if other not in (value, value.args[0]):
                node.op, node.target = "call_module", value.target
                node.args = (value.args[0], other)
                graph.graph.erase_node(value)
                return


def _fuse_activation(graph, node):
    value, name = node.args[0], activation_of(graph, node)
    conv = _layer(graph, value)
    if not isinstance(conv, FrozenConv2d) or conv.activation is not None or len(value.users) > 1:
        return
    if name == "relu6" and len(value.args) > 1:  # oneDNN has no kernel for an addition and a ReLU6
        return
    pool = next(iter(node.users))
    layer = _layer(graph, pool)
    if len(node.users) == 1 and isinstance(layer, nn.MaxPool2d) and not layer.return_indices:
        # max and ReLU commute, and behind the pooling there is less to do
        pool.args = (value,)
        pool.replace_all_uses_with(node, delete_user_cb=lambda user: user is not node)
        node.args = (pool,)
        pool.append(node)
        node.meta["shape"] = pool.meta["shape"]
        return
    conv.activation = name
    node.replace_all_uses_with(value)
    graph.graph.erase_node(node)


def activation_of(graph, node):
    """ "relu" or "relu6" where that is what the node computes, else None."""
    layer = _layer(graph, node)
    if type(layer) is nn.ReLU or (node.op in ("call_function", "call_method") and node.target in _RELU_CALLS):
        return "relu"
    if type(layer) is nn.ReLU6 or (node.op == "call_function" and node.target in _RELU6_CALLS):
        return "relu6"
    if type(layer) is nn.Hardtanh and (layer.min_val, layer.max_val) == (0, 6):
        return "relu6"
    return None


def _layer(graph, node):
    return graph.get_submodule(node.target) if isinstance(node, fx.Node) and node.op == "call_module" else None


def _free_name(graph):
    return next(name for name in map("frozen_{}".format, itertools.count()) if not hasattr(graph, name))


def _insert_layer(graph, node, layer):
    """Point one node at a layer of its own, so that a layer called twice can be folded twice."""
    name = _free_name(graph)
    graph.add_submodule(name, layer)
    node.target = name


def _record_shapes(graph, example):
    class Recorder(fx.Interpreter):
        def run_node(self, node):
            value = super().run_node(node)
            if isinstance(value, torch.Tensor):
                node.meta["shape"] = tuple(value.shape)
            return value

    with torch.no_grad():
        Recorder(graph).run(example)
