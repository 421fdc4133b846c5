"""The fast network against the plain one: values, gradients, what it says it does, and what it leaves alone."""

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from models import PaddingVR, WatermarkingVR
from models import clip as clip_module
from models.clip import ClipNet
from models.clip_weights import import_open_clip
from models.fast import network as network_module
from models.fast import shared_border, winograd
from models.fast.conv import FrozenConv2d, _flipped
from models.fast.network import SWITCHES, build_network
from models.fast.shared_border import Sliding

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


class Residual(nn.Module):
    def __init__(self, body, shortcut, after):
        super().__init__()
        self.body, self.shortcut, self.after = body, shortcut, after

    def forward(self, x):
        return self.after(self.body(x) + self.shortcut(x))


class RandomNet(nn.Module):
    """A convolutional net whose layers, kernels, strides, paddings, dilations and groups come from a seed."""

    def __init__(self, seed):
        super().__init__()
        generator = torch.Generator().manual_seed(seed)

        def draw(*choices):
            return choices[torch.randint(len(choices), (), generator=generator)]

        def conv(channels, out, stride=None):
            kernel = draw(1, 2, 3, 4, (3, 1), (2, 5))
            padding = draw(0, 1, (0, 2), (2, 1))
            stride, dilation, groups = stride or draw(1, 1, 2, (2, 1), 3), draw(1, 1, 2), draw(1, 1, 2)
            groups = groups if channels % groups == 0 and out % groups == 0 else 1
            layer = nn.Conv2d(channels, out, kernel, stride, padding, dilation, groups, bias=draw(True, False))
            return nn.Sequential(layer, nn.BatchNorm2d(out)) if draw(True, True, False) else layer

        layers, channels = [conv(3, 8, draw(1, 2))], 8
        for _ in range(6):
            kind = draw("conv", "conv", "residual", "max", "average", "pointwise", "depthwise")
            if kind == "conv":
                layers.append(conv(channels, 8))
            elif kind == "residual":
                body = [nn.Conv2d(8, 8, 3, 1, 1), nn.BatchNorm2d(8), nn.ReLU(True), nn.Conv2d(8, 8, 3, 1, 1)]
                shortcut, after = draw(nn.Identity(), nn.Conv2d(8, 8, 1)), draw(nn.ReLU(), nn.Identity())
                layers.append(Residual(nn.Sequential(*body), shortcut, after))
            elif kind == "max":
                layers.append(nn.MaxPool2d(draw(2, 3), draw(1, 2), draw(0, 1), draw(1, 2)))
            elif kind == "average":
                layers.append(nn.AvgPool2d(3, draw(1, 2), draw(0, 1), count_include_pad=draw(True, False)))
            elif kind == "depthwise":
                layers.append(nn.Conv2d(8, 8, 3, draw(1, 2), 1, groups=8))
            layers.append(draw(nn.ReLU(), nn.ReLU6(), nn.SiLU(), nn.Hardtanh(), nn.Identity()))
        self.features = nn.Sequential(*layers)
        self.head = nn.Sequential(nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(32, 5))

    def forward(self, x):
        return self.head(self.features(x))


def settle(net, seed=0, dtype=torch.float32):
    """Frozen, in eval mode, with weights and BatchNorm statistics that are not those of a fresh layer."""
    generator = torch.Generator().manual_seed(seed)
    for name, tensor in net.state_dict().items():
        if tensor.is_floating_point() and tensor.dim() == 1:
            low = 0.5 if name.endswith(("running_var", "weight")) else -0.3
            tensor.copy_(low + 0.6 * torch.rand(tensor.shape, generator=generator))
    return net.requires_grad_(False).eval().to(dtype)


def random_net(seed, canvas, dtype):
    """The first net from this seed on whose maps survive all its strides."""
    while True:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            net = settle(RandomNet(seed), seed, dtype)
        try:
            net(torch.zeros(1, 3, canvas, canvas, dtype=dtype))
            return net
        except RuntimeError:
            seed += 1000


def with_random_program(input_vr, dtype=torch.float32):
    input_vr = input_vr.to(dtype)
    noise = torch.randn(input_vr.program.shape, generator=torch.Generator().manual_seed(1))
    input_vr.program.data.copy_(noise)
    return input_vr


def images_for(input_vr, n=3):
    size = getattr(input_vr, "image_size", input_vr.canvas_size)
    return torch.rand(n, 3, size, size, generator=torch.Generator().manual_seed(2)).to(input_vr.program.dtype)


def logits_and_gradient(path, input_vr, images):
    logits = path(images)
    weights = torch.randn(logits.shape, generator=torch.Generator().manual_seed(3)).to(logits.dtype)
    (gradient,) = torch.autograd.grad((logits * weights).sum(), input_vr.program)
    return logits.detach().double(), gradient.double()


def assert_same(net, network, input_vr, images, logits_tolerance=1e-5, gradient_tolerance=1e-4):
    plain = logits_and_gradient(lambda x: net(input_vr(x)), input_vr, images)
    fast = logits_and_gradient(network, input_vr, images)
    for name, expected, got, tolerance in zip(
        ("logits", "gradient"), plain, fast, (logits_tolerance, gradient_tolerance), strict=True
    ):
        error = (got - expected).norm() / expected.norm().clamp_min(1e-12)
        assert error < tolerance, f"{name} differ by {error:.1e}: {network.description}"


@pytest.mark.parametrize("seed", range(40))
def test_random_networks_in_double_precision(seed):
    canvas, image = ((48, 9), (41, 6), (64, 16), (33, 32), (50, 23), (37, 1))[seed % 6]
    net = random_net(seed, canvas, torch.float64)
    input_vr = with_random_program(PaddingVR(canvas, image, MEAN, STD), torch.float64)
    network = build_network(net, input_vr)
    assert network.description.startswith("fast path") and "left out" not in network.description
    assert_same(net, network, input_vr, images_for(input_vr), 1e-6, 1e-6)


@pytest.mark.parametrize("seed", range(100, 116))
def test_random_networks_through_the_fused_kernels(seed):
    canvas, image = ((48, 9), (64, 16), (50, 23))[seed % 3]
    net = random_net(seed, canvas, torch.float32)
    input_vr = with_random_program(PaddingVR(canvas, image, MEAN, STD))
    network = build_network(net, input_vr)
    assert "left out" not in network.description
    assert_same(net, network, input_vr, images_for(input_vr), 1e-5, 1e-3)


@pytest.mark.parametrize("name", SWITCHES)
@pytest.mark.parametrize("kept", [True, False])
def test_each_switch_alone_and_each_left_out(name, kept):
    net = random_net(7, 48, torch.float64)
    switches = [name] if kept else [other for other in SWITCHES if other != name]
    for input_vr in (PaddingVR(48, 10, MEAN, STD), WatermarkingVR(48, 8, MEAN, STD)):
        input_vr = with_random_program(input_vr, torch.float64)
        network = build_network(net, input_vr, switches=switches)
        assert network.switches == set(switches)
        assert_same(net, network, input_vr, images_for(input_vr), 1e-6, 1e-6)


def test_without_switches_the_network_is_the_plain_expression():
    net, input_vr = random_net(3, 48, torch.float32), with_random_program(PaddingVR(48, 10, MEAN, STD))
    images = images_for(input_vr)
    network = build_network(net, input_vr, switches=())
    assert torch.equal(network(images), net(input_vr(images)))
    assert network.description == "plain path"


def test_a_program_without_a_gradient():
    net, input_vr = random_net(3, 48, torch.float32), WatermarkingVR(48, 10, MEAN, STD)
    input_vr.program.requires_grad_(False)
    network = build_network(net, input_vr)
    assert network.switches == set(SWITCHES)
    torch.testing.assert_close(network(images_for(input_vr)), net(input_vr(images_for(input_vr))), rtol=1e-4, atol=1e-5)


def resnet(name):
    from models.torchvision_shim import ensure_torchvision

    ensure_torchvision()
    import torchvision

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return settle(getattr(torchvision.models, name)())


def timm_model(name, **options):
    from models.torchvision_shim import ensure_torchvision

    ensure_torchvision()
    import timm

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return settle(timm.create_model(name, **options))


@pytest.mark.parametrize("image", [8, 21, 95])
def test_resnet18(image):
    net, input_vr = resnet("resnet18"), with_random_program(PaddingVR(96, image, MEAN, STD))
    network = build_network(net, input_vr)
    assert "first-layer" in network.description
    assert ("shared-border over" in network.description) == (image < 95)
    # a rounding error may tip a single ReLU, which shows in the gradient of an untrained net
    assert_same(net, network, input_vr, images_for(input_vr), 1e-5, 5e-3)


def test_resnet18_is_windowed_from_the_first_layer_to_the_second_stage():
    # 32 pixels in the middle of 224: rows 96-127; conv1 (7, stride 2, padding 3) sees them from output 47 to 65,
    # the pooling (3, 2, 1) from 23 to 33, and each of the four convolutions of layer1 one pixel further
    network = build_network(resnet("resnet18"), PaddingVR(224, 32, MEAN, STD))
    windows = {str(node): step.window for node, step in network.core.steps.items()}
    rows = {name: window[0] for name, window in windows.items() if window is not None}
    assert rows["images"] == (96, 128)
    assert rows["net_conv1"] == (47, 66)
    assert rows["net_maxpool"] == (23, 34)
    assert rows["add"] == (21, 36) and rows["add_1"] == (19, 38)
    assert network.core.windowed >= 12


@pytest.mark.parametrize(("name", "canvas"), [("tf_efficientnet_lite0", 96), ("resnet10t", 96)])
def test_timm_networks(name, canvas):
    net, input_vr = timm_model(name), with_random_program(PaddingVR(canvas, 15, MEAN, STD))
    network = build_network(net, input_vr)
    assert "shared-border over" in network.description and "left out" not in network.description
    assert_same(net, network, input_vr, images_for(input_vr), 1e-5, 5e-3)


def test_vision_transformer_splits_its_patch_embedding():
    net = timm_model("vit_tiny_patch16_224", img_size=64, depth=2)
    for input_vr in (PaddingVR(64, 30, MEAN, STD), WatermarkingVR(64, 8, MEAN, STD)):
        input_vr = with_random_program(input_vr)
        network = build_network(net, input_vr)
        assert "first-layer" in network.description and "no first-layer" not in network.description
        assert_same(net, network, input_vr, images_for(input_vr))


class OnePatchEach(nn.Module):
    """Input and residual of one convolution are the same map, of which they need different patches."""

    def __init__(self):
        super().__init__()
        self.stem, self.body, self.head = nn.Conv2d(3, 4, 3, 1, 1), nn.Conv2d(4, 4, 3, 1, 1), nn.Linear(4, 5)

    def forward(self, x):
        x = self.stem(x)
        return self.head((x + self.body(x)).relu().mean((2, 3)))


class Partition(nn.Module):
    """Maps are cut into tiles along the first axis, whose length is asked for afterwards, as in Swin."""

    def __init__(self):
        super().__init__()
        self.stem, self.head = nn.Conv2d(3, 4, 3, 1, 1), nn.Linear(4, 5)

    def forward(self, x):
        x = self.stem(x)
        n, c, h, w = x.shape
        x = x.view(n, c, h // 4, 4, w // 4, 4).permute(0, 2, 4, 1, 3, 5).reshape(-1, c, 4, 4)
        tiles, c, _, _ = x.shape
        x = x.view(tiles, c, -1).softmax(2).amax(2)
        return self.head(x.view(n, -1, c).mean(1))


@pytest.mark.parametrize("kind", [OnePatchEach, Partition])
@pytest.mark.parametrize("image", [8, 20])
def test_maps_that_are_asked_for_in_two_ways(kind, image):
    net, input_vr = settle(kind()), with_random_program(PaddingVR(40, image, MEAN, STD))
    network = build_network(net, input_vr)
    assert network.switches == set(SWITCHES) and "fused-ops" in network.description
    assert_same(net, network, input_vr, images_for(input_vr))


@pytest.mark.parametrize("name", ["mobilenetv3_small_050", "dpn48b", "hardcorenas_a"])
def test_activations_within_batchnorm_keep_the_whole_fast_path(name):
    net, input_vr = timm_model(name), with_random_program(PaddingVR(64, 15, MEAN, STD))
    network = build_network(net, input_vr)
    assert network.switches == set(SWITCHES)
    calls = [str(node.target) for node in network.core.graph.graph.nodes if node.op == "call_module"]
    added = [name for name in calls if name.startswith("frozen_")]
    assert len(added) == len(set(added)) > 20
    assert_same(net, network, input_vr, images_for(input_vr), 1e-5, 5e-3)


def test_layers_that_do_nothing_stand_between_no_convolution_and_its_relu():
    # 8 blocks of 3 convolutions; behind the stem the ReLU goes behind the pooling
    network = build_network(timm_model("resnet26"), with_random_program(PaddingVR(64, 15, MEAN, STD)))
    convolutions = [layer for layer in network.core.graph.modules() if isinstance(layer, FrozenConv2d)]
    assert sum(layer.activation == "relu" for layer in convolutions) == 24


class Tokens(nn.Module):
    """A BatchNorm whose output is laid out as tokens: for one image torch mistakes its gradient's layout."""

    def __init__(self):
        super().__init__()
        self.stem, self.norm, self.head = nn.Conv2d(3, 8, 4, 4), nn.BatchNorm2d(8), nn.Linear(8, 5)

    def forward(self, x):
        x = self.norm(self.stem(x).relu()).flatten(2).transpose(1, 2)
        return self.head(x.tanh()).square().mean(1)


@pytest.mark.parametrize("switches", [(), ("first-layer",), ("channels-last",), tuple(SWITCHES)])
def test_gradient_of_a_single_image(switches):
    net, input_vr = settle(Tokens()), with_random_program(WatermarkingVR(32, 8, MEAN, STD))
    images, network = images_for(input_vr), build_network(net, input_vr, switches=switches)
    (expected,) = torch.autograd.grad(net(input_vr(images))[:1].sum(), input_vr.program)
    (got,) = torch.autograd.grad(network(images[:1]).sum(), input_vr.program)
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-6)


TRANSFORMER = {"patch_size": 16, "width": 64, "head_width": 32, "layers": 2}
RESNET = {"layers": [1, 1, 1, 1], "width": 16, "head_width": 16}


def clip_parts(size, tower):
    """Image tower, text embeddings and scale of a small random CLIP."""
    text = {"context_length": 8, "vocab_size": 100, "width": 32, "heads": 2, "layers": 1}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        clip = settle(import_open_clip().CLIP(32, {"image_size": size, **tower}, text))
        return clip.visual, nn.functional.normalize(torch.randn(7, 32), dim=-1), clip.logit_scale


@pytest.mark.parametrize("tower", [TRANSFORMER, RESNET], ids=["transformer", "resnet"])
def test_clip_takes_the_whole_fast_path(tower):
    net = ClipNet(*clip_parts(64, tower))
    for input_vr in (PaddingVR(64, 30, MEAN, STD), WatermarkingVR(64, 8, MEAN, STD)):
        network = build_network(net, with_random_program(input_vr))
        assert "fused-ops" in network.description and network.switches == set(SWITCHES)
        assert_same(net, network, input_vr, images_for(input_vr), 1e-5, 5e-3)
        calls = [node.target for node in network.core.graph.graph.nodes]
        assert calls[-2] is clip_module._scaled_cosines  # whole, with its own precision


class Branching(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem, self.head = nn.Conv2d(3, 4, 5, 2, 1), nn.Linear(4, 6)

    def forward(self, x):
        x = self.stem(x)
        x = x.tanh() if x.sum() > 0 else x.sin()
        return self.head(x.mean((2, 3)))


def test_an_untraceable_network_still_splits_its_first_layer():
    net, input_vr = settle(Branching()), with_random_program(PaddingVR(40, 11, MEAN, STD))
    network = build_network(net, input_vr)
    assert network.description == (
        "fast path: first-layer alone, as the code of this network cannot be recorded ahead (TraceError): "
        "same results, slower"
    )
    assert_same(net, network, input_vr, images_for(input_vr))
    network = build_network(net, input_vr, switches=["fused-ops"])
    assert network.description.startswith("plain path, as the code of this network cannot be recorded ahead")
    assert_same(net, network, input_vr, images_for(input_vr))


@pytest.mark.parametrize("switches", [(), ("shared-border",), ("first-layer",), tuple(SWITCHES)])
def test_accumulated_parts_of_a_batch_give_the_gradient_of_the_whole(switches):
    net, input_vr = random_net(5, 48, torch.float64), PaddingVR(48, 10, MEAN, STD)
    input_vr = with_random_program(input_vr, torch.float64)
    images, weights = images_for(input_vr, 5), torch.randn(5, 5, generator=torch.Generator().manual_seed(4))
    network = build_network(net, input_vr, switches=switches)
    (expected,) = torch.autograd.grad((net(input_vr(images)) * weights).sum(), input_vr.program)
    with network.accumulate():
        for part in (slice(0, 2), slice(2, 5)):
            (network(images[part]) * weights[part]).sum().backward()
    torch.testing.assert_close(input_vr.program.grad, expected, rtol=1e-5, atol=1e-8)


def test_accumulate_sees_a_changed_program_next_time_and_survives_an_error():
    net, input_vr = random_net(5, 48, torch.float64), PaddingVR(48, 10, MEAN, STD)
    input_vr = with_random_program(input_vr, torch.float64)
    images, network = images_for(input_vr), build_network(net, input_vr)
    with pytest.raises(KeyError), network.accumulate():
        network(images).sum().backward()
        raise KeyError
    assert input_vr.program.grad is None
    input_vr.program.data.neg_()
    with torch.inference_mode(), network.accumulate():
        got = network(images)
    torch.testing.assert_close(got.double(), net(input_vr(images)).detach(), rtol=1e-5, atol=1e-6)
    assert_same(net, network, input_vr, images, 1e-6, 1e-6)


def test_classifier_and_program_are_left_as_they_were():
    net, input_vr = resnet("resnet18"), PaddingVR(64, 16, MEAN, STD)
    before = {name: (tensor, tensor.clone()) for name, tensor in net.state_dict(keep_vars=True).items()}
    layers = [type(layer) for layer in net.modules()]
    network = build_network(net, with_random_program(input_vr))
    program = input_vr.program.detach().clone()
    network(images_for(input_vr)).sum().backward()
    assert torch.equal(input_vr.program, program)
    assert [type(layer) for layer in net.modules()] == layers and net.relu.inplace
    for name, tensor in net.state_dict(keep_vars=True).items():
        assert tensor is before[name][0] and torch.equal(tensor, before[name][1])


def test_the_same_batch_gives_the_same_bits():
    net, input_vr = resnet("resnet18"), with_random_program(PaddingVR(64, 16, MEAN, STD))
    images, network = images_for(input_vr), build_network(net, input_vr)
    first, second = (logits_and_gradient(network, input_vr, images) for _ in range(2))
    assert torch.equal(first[0], second[0]) and torch.equal(first[1], second[1])


def test_bfloat16_autocast():
    net, input_vr = random_net(11, 48, torch.float32), with_random_program(PaddingVR(48, 10, MEAN, STD))
    images = images_for(input_vr)
    expected, gradient = logits_and_gradient(lambda x: net(input_vr(x)), input_vr, images)
    for network in (build_network(net, input_vr), build_network(net, input_vr, dtype=torch.bfloat16)):
        with torch.autocast("cpu", torch.bfloat16):
            got, half_gradient = logits_and_gradient(network, input_vr, images)
        assert (got - expected).norm() < 0.03 * expected.norm()
        assert torch.nn.functional.cosine_similarity(gradient.flatten(), half_gradient.flatten(), 0) > 0.9
        again, _ = logits_and_gradient(network, input_vr, images)
        assert (again - expected).norm() < 1e-5 * expected.norm(), "without autocast it is float32 still"


class Casts(TorchDispatchMode):
    """Notes the names of those weights that are cast."""

    def __init__(self, modules):
        super().__init__()
        weights = [pair for module in modules for pair in (*module.named_parameters(), *module.named_buffers())]
        self.names, self.seen = {id(weight): name for name, weight in weights}, []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is torch.ops.aten._to_copy.default and id(args[0]) in self.names:
            self.seen.append(self.names[id(args[0])])
        return func(*args, **(kwargs or {}))


NETWORKS = {
    "cnn": lambda: random_net(11, 48, torch.float32),
    "vit": lambda: timm_model("vit_tiny_patch16_224", img_size=48, depth=2),
    "clip": lambda: ClipNet(*clip_parts(48, TRANSFORMER)),
    "untraceable": lambda: settle(Branching()),
}


@pytest.mark.parametrize("kind", NETWORKS)
@pytest.mark.parametrize("vr", [PaddingVR(48, 20, MEAN, STD), WatermarkingVR(48, 6, MEAN, STD)], ids=["pad", "mark"])
def test_frozen_weights_are_cast_once(kind, vr):
    net, input_vr = NETWORKS[kind](), with_random_program(vr)
    images, network = images_for(input_vr), build_network(net, input_vr, dtype=torch.bfloat16)
    assert network.description.startswith("fast path") and "left out" not in network.description
    counts = []
    for path, modules in ((network, (net, network)), (lambda x: net(input_vr(x)), (net,))):
        with Casts(modules) as casts, torch.autocast("cpu", torch.bfloat16):
            logits_and_gradient(path, input_vr, images)
        counts.append([name for name in casts.seen if "program" not in name and "embed" not in name])
    ours, plain = counts
    assert plain and not ours


def test_a_kernel_that_is_wrong_in_half_precision_alone_is_left_out(monkeypatch):
    compute = FrozenConv2d.compute
    monkeypatch.setattr(
        FrozenConv2d, "compute",
        lambda self, *args: compute(self, *args) * (2 if self.fused and self.weight.dtype == torch.bfloat16 else 1),
    )  # fmt: skip
    net, input_vr = random_net(7, 48, torch.float32), with_random_program(PaddingVR(48, 10, MEAN, STD))
    assert "fused-ops" in build_network(net, input_vr).switches
    network = build_network(net, input_vr, dtype=torch.bfloat16)
    assert "fused-ops" not in network.switches and "left out: fused-ops" in network.description


def test_values_beyond_the_range_of_half_precision():
    net, input_vr = random_net(7, 48, torch.float32), with_random_program(PaddingVR(48, 10, MEAN, STD))
    net.head[2].weight *= 1e6
    assert build_network(net, input_vr, dtype=torch.bfloat16).switches == set(SWITCHES)
    with pytest.raises(ValueError, match="exceed the range of fp16; take --precision bf16, tf32 or fp32"):
        build_network(net, input_vr, dtype=torch.float16)


def test_networks_are_compared_without_tf32_and_settings_come_back():
    cudnn, matmul, seen = torch.backends.cudnn, torch.backends.cuda.matmul, []

    def settings():
        return cudnn.allow_tf32, matmul.allow_tf32, cudnn.benchmark

    kept, (cudnn.allow_tf32, matmul.allow_tf32, cudnn.benchmark) = settings(), (True, True, True)
    try:
        net = random_net(7, 48, torch.float32)
        net.register_forward_pre_hook(lambda *_: seen.append(settings()))
        build_network(net, with_random_program(PaddingVR(48, 10, MEAN, STD), torch.float32))
        assert (False, False, False) in seen and settings() == (True, True, True)
    finally:
        cudnn.allow_tf32, matmul.allow_tf32, cudnn.benchmark = kept


def test_a_kernel_that_disagrees_is_left_out(monkeypatch):
    compute = FrozenConv2d.compute

    def broken(self, *args):
        return compute(self, *args) * (1.1 if self.fused else 1)

    monkeypatch.setattr(FrozenConv2d, "compute", broken)
    net, input_vr = random_net(7, 48, torch.float32), with_random_program(PaddingVR(48, 10, MEAN, STD))
    network = build_network(net, input_vr)
    fault = "; left out: fused-ops (gave other results than the plain path): same results, slower"
    assert network.description.endswith(fault) and "shared-border over" in network.description
    assert_same(net, network, input_vr, images_for(input_vr), 1e-5, 1e-3)


def test_a_kernel_that_is_wrong_for_one_image_is_left_out(monkeypatch):
    compute = FrozenConv2d.compute
    monkeypatch.setattr(
        FrozenConv2d, "compute",
        lambda self, x, *rest: compute(self, x, *rest) * (1.1 if self.fused and len(x) == 1 else 1),
    )  # fmt: skip
    net, input_vr = random_net(7, 48, torch.float32), with_random_program(WatermarkingVR(48, 4, MEAN, STD))
    network = build_network(net, input_vr, switches=("fold-batchnorm", "fused-ops"))
    assert network.switches == {"fold-batchnorm"} and "left out: fused-ops" in network.description


def test_what_fails_is_left_out_by_name_and_without_a_traceback(monkeypatch):
    def fail(*args):
        raise IndexError("inside a part")

    net, input_vr = random_net(7, 48, torch.float32), with_random_program(PaddingVR(48, 10, MEAN, STD))
    with monkeypatch.context() as patch:
        patch.setattr(shared_border._Paste, "forward", fail)
        network = build_network(net, input_vr)
        assert network.switches == set(SWITCHES) - {"first-layer", "shared-border"}
        fault = "; left out: first-layer, shared-border (stopped with IndexError): same results, slower"
        assert network.description.endswith(fault)
    monkeypatch.setattr(network_module, "trace", lambda *args: nn.Identity())
    network = build_network(net, input_vr)
    assert network.description.startswith(f"plain path; left out: {', '.join(SWITCHES)} (stopped with ")
    assert_same(net, network, input_vr, images_for(input_vr))


@pytest.mark.skipif(not winograd.available(), reason="this build of torch lacks the matrix products")
@pytest.mark.parametrize(("size", "padding"), [((4, 4), (1, 1)), ((7, 7), (1, 1)), ((14, 9), (0, 2)), ((3, 6), (0, 0))])
def test_winograd_equals_the_direct_sum(size, padding):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(5, 6, *size, generator=generator).contiguous(memory_format=torch.channels_last)
    weight, bias = torch.randn(7, 6, 3, 3, generator=generator), torch.randn(7, generator=generator)
    expected = nn.functional.conv2d(x.double(), weight.double(), bias.double(), padding=padding)
    got = winograd.convolve(x, winograd.transform_weight(weight), bias, padding)
    assert got.shape == expected.shape and got.is_contiguous(memory_format=torch.channels_last)
    assert (got - expected).abs().max() < 5e-6 * expected.abs().max()


@pytest.mark.skipif(not winograd.available(), reason="this build of torch lacks the matrix products")
def test_winograd_runs_in_both_directions_of_a_network(monkeypatch):
    calls = []
    convolve = winograd.convolve
    monkeypatch.setattr(winograd, "convolve", lambda *args: calls.append(args[0].shape) or convolve(*args))
    net, input_vr = resnet("resnet18"), with_random_program(PaddingVR(96, 24, MEAN, STD))
    network = build_network(net, input_vr)
    calls.clear()
    assert_same(net, network, input_vr, images_for(input_vr, 8), 1e-5, 5e-3)
    channels = [shape[1] for shape in calls]
    assert channels and channels == channels[::-1] and set(channels) <= {128, 256, 512}


def test_unknown_switch():
    with pytest.raises(ValueError, match="unknown switch 'shared-boarder'.*did you mean 'shared-border'"):
        build_network(nn.Identity(), PaddingVR(8, 2, MEAN, STD), switches=["shared-boarder"])


def test_images_of_another_size_are_refused():
    net, input_vr = random_net(7, 48, torch.float32), PaddingVR(48, 10, MEAN, STD)
    with pytest.raises(ValueError, match=r"images of shape \(n, 3, 10, 10\), got \(1, 3, 11, 11\)"):
        build_network(net, input_vr)(torch.rand(1, 3, 11, 11))


@pytest.mark.parametrize("kernel", [1, 2, 3, 5])
@pytest.mark.parametrize("stride", [1, 2, 3])
@pytest.mark.parametrize("padding", [0, 1, 2])
def test_reach_is_what_a_convolution_of_the_window_touches(kernel, stride, padding):
    if 2 * padding > kernel + 1:
        return
    for start in range(9):
        for stop in range(start + 1, 10):
            line = torch.zeros(1, 1, 9)
            line[..., start:stop] = 1
            touched = torch.nn.functional.conv1d(line, torch.ones(1, 1, kernel), None, stride, padding)[0, 0] > 0
            expected = touched.nonzero().flatten().tolist()
            first, last = Sliding(kernel, stride, padding).reach((start, stop), len(touched))
            assert list(range(first, last)) == expected


def test_flipped_weights_give_the_input_gradient():
    weight = torch.randn(6, 2, 3, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    x = torch.randn(1, 4, 5, 5, dtype=torch.float64, requires_grad=True)
    y = nn.functional.conv2d(x, weight, groups=2)
    g = torch.randn(y.shape, dtype=torch.float64)
    (expected,) = torch.autograd.grad((y * g).sum(), x)
    torch.testing.assert_close(nn.functional.conv2d(g, _flipped(weight, 2), padding=(2, 1), groups=2), expected)


def test_sums_over_many_images_stay_finite_in_half_precision():
    """A gradient that no image brings alone, 64 bring together: more than half precision holds."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 8, 4, stride=4), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 64, 5))
    nn.init.constant_(net[3].weight, 0.15)
    classifier = net.requires_grad_(False).eval()
    input_vr = PaddingVR(32, 16, (0.5,) * 3, (0.25,) * 3)
    images = torch.rand(64, 3, 16, 16)
    gradients = {}
    for dtype in (torch.float32, torch.float16):
        network = build_network(classifier, input_vr, dtype=dtype)
        input_vr.program.grad = None
        with torch.autocast("cpu", torch.float16, enabled=dtype == torch.float16), network.accumulate():
            network(images).float().backward(torch.full((64, 5), 5e4))
        gradients[dtype] = input_vr.program.grad
    exact, half = gradients.values()
    assert exact.abs().max() > 1e6 and half.isfinite().all()
    assert float((half - exact).norm() / exact.norm()) < 0.02
