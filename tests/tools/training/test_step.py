"""The step as a pure function: recorded and compiled beside eager, what stays in place, bad steps without waiting."""

import shutil

import pytest
import torch
from torch import nn

from cfg import VLMConfig, VMConfig
from data import BatchLoader, ImageSet, padding_preset
from mapping import MAPPINGS, build_mapping
from mapping.statistics import IGNORED
from models import SWITCHES, Classifier, PaddingVR, build_network
from models.clip import ClipNet
from models.fast.conv import FrozenConv2d
from tools.training import numerics
from tools.training.build import build_clip, build_vision
from tools.training.numerics import Plan, choose_device, choose_precision, plan_for, set_up_arithmetic
from tools.training.readout import ClipReadout, Readout
from tools.training.step import Step
from tools.training.trainer import NonFiniteError, Trainer

CPU, S, T, MEAN, STD = torch.device("cpu"), 12, 4, (0.5, 0.4, 0.3), (0.2, 0.3, 0.4)
COMPILED = Plan(waits=False, compiled=True)


def small_trainer(kind, plan, optimizer=torch.optim.SGD, seed=0, **options):
    """Batches of 8, 8 and 4 images of 8 x 8 on a canvas of 16, a network of two convolutions; ``options`` go on."""
    torch.manual_seed(seed)
    width = S if kind == "vision" else 6
    net = nn.Sequential(
        nn.Conv2d(3, 8, 3, 2), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.Flatten(), nn.Linear(200, width)
    ).requires_grad_(False)
    vr, mapping = PaddingVR(16, 8, MEAN, STD), build_mapping("blmpp", S, T, topk_ratio=0.5)
    if kind == "vision":
        encoder, readout = Classifier(net, "small", MEAN, STD, 16, S), Readout(mapping)
    else:
        texts = nn.functional.normalize(torch.randn(S, width), dim=1)
        clip = ClipNet(net, texts, torch.tensor(2.0))
        encoder, readout = clip.image_encoder, ClipReadout(mapping, clip)
    images = torch.randint(256, (20, 8, 8, 3), dtype=torch.uint8)
    image_set = ImageSet(images, torch.randint(T, (20,)), [str(i) for i in range(20)], "made here")
    loaders = {
        step: BatchLoader(image_set, padding_preset(8), 8, CPU, shuffle=step == "train", seed=0, purpose=step)
        for step in ("estimate", "train", "test")
    }
    network = build_network(encoder, vr)
    optimizer = optimizer([vr.program], lr=0.1)
    return Trainer(
        network, vr.program, mapping, loaders, optimizer, "cosine", 3, readout=readout, plan=plan, **options
    )  # fmt: skip


@pytest.fixture
def as_on_a_gpu(monkeypatch):
    """The fused convolutions without the operators that only CPUs have."""
    monkeypatch.setattr(FrozenConv2d, "_has_kernels", lambda self, dtype: False)


@pytest.fixture
def recorded(monkeypatch, as_on_a_gpu):
    """Graphs are recorded and called as they are, without a compiler."""
    monkeypatch.setattr(torch, "compile", lambda graph, **options: graph)


def three_steps(trainer):
    trainer.estimate(0)
    trained = trainer.train(0, observe=True)
    return trained, trainer.mapping.get_extra_state()["statistics"], trainer.evaluate()


@pytest.mark.skipif(not (shutil.which("g++") or shutil.which("clang++")), reason="no C++ compiler")
@pytest.mark.parametrize("kind", ["vision", "clip"])
def test_compiled_is_eager(kind, as_on_a_gpu):
    said = []
    eager, compiled = (small_trainer(kind, plan, log=said.append) for plan in (Plan(waits=False), COMPILED))
    start = eager.program.detach().clone()
    results = three_steps(eager), three_steps(compiled)
    assert not said and compiled.step.compiled and len(compiled.step._graphs) == 2
    (trained, statistics, tested), (own, own_statistics, own_tested) = results
    assert own.loss == pytest.approx(trained.loss, rel=1e-6) and own.accuracy == trained.accuracy
    assert own_tested.accuracy == tested.accuracy
    moved = eager.program.detach() - start
    assert float((compiled.program.detach() - start - moved).norm() / moved.norm()) < 1e-6 and moved.norm() > 0
    torch.testing.assert_close(compiled.mapping.weights, eager.mapping.weights, rtol=1e-6, atol=1e-9)
    assert own_statistics["num_samples"] == 20 and own_statistics["keys"].equal(statistics["keys"])
    torch.testing.assert_close(own_statistics["values"], statistics["values"], rtol=1e-6, atol=1e-9)


CASES = {
    "cnn, watermarking": (build_vision, VMConfig, {"backbone": "timm:test_resnet", "reprogramming": "watermarking"}),
    "cnn, one-to-one": (build_vision, VMConfig, {"backbone": "timm:test_efficientnet", "mapping": "ilm"}),
    "cnn, learned": (build_vision, VMConfig, {"backbone": "timm:test_resnet", "mapping": "linear"}),
    "cnn, lda": (build_vision, VMConfig, {"backbone": "timm:test_resnet", "mapping": "lda"}),
    "vit": (build_vision, VMConfig, {"backbone": "timm:test_vit", "canvas_size": 160}),
    "plain": (build_vision, VMConfig, {"backbone": "timm:test_resnet", "engine": "plain"}),
    "clip": (build_clip, VLMConfig, {"backbone": "tiny-test", "canvas_size": None}),
    "clip, learned": (build_clip, VLMConfig, {"backbone": "tiny-test", "canvas_size": None, "mapping": "linear"}),
}


@pytest.mark.parametrize("case, precision", [*((case, "fp32") for case in CASES), ("vit", "bf16"), ("clip", "bf16")])
def test_a_graph_of_one_batch_is_that_of_any_other(case, precision, tmp_path, recorded):
    """Nothing is baked in: recorded on one batch, called with other images, labels, sizes, counts, θ and ω."""
    build, config, options = CASES[case]
    defaults = {"dataset": "synthetic", "weights": "none", "canvas_size": 64, "results_path": str(tmp_path)}
    system = build(config.of(**defaults | options), CPU)
    said, generator = [], torch.Generator().manual_seed(0)
    trained = [p for p in (system.input_vr.program, *system.mapping.parameters()) if p.requires_grad]
    step = Step(system.network, system.readout, trained, precision, CPU, compiled=True, log=said.append)
    size = system.input_vr.image_size
    for count in (6, 4):
        with torch.no_grad():
            for parameter in trained:
                parameter.normal_(generator=generator)
        if system.mapping.estimated:
            outputs = torch.randn(40, system.mapping.num_source, generator=generator)
            system.mapping.observe(outputs, torch.arange(40) % 8)
            system.mapping.refresh()
        system.readout.hold()
        images = torch.rand(count, 3, size, size, generator=generator).contiguous(memory_format=torch.channels_last)
        labels = torch.randint(8, (count,), generator=generator)
        for batch in ((images,), (images, labels, torch.full((), 5.0 + count))):
            with torch.no_grad():
                expected, got = step(*batch), step.run(6, *batch)
            assert step.compiled, said
            tolerance = 1e-5 if precision == "fp32" else 2e-2  # of half precision: sums of other sizes round otherwise
            for one, other in zip(expected, got, strict=True):
                torch.testing.assert_close(other, one, rtol=tolerance, atol=tolerance * float(one.abs().max()))
    assert not said and len(step._graphs) == 2


def wrong(graph, **options):
    return lambda *inputs: [1.5 * output for output in graph(*inputs)]


def failing(graph, **options):
    raise torch.OutOfMemoryError("CUDA out of memory.")


def failing_at_the_second_call(graph, **options):
    calls = []

    def run(*inputs):
        calls.append(1)
        if len(calls) > 1:
            raise RuntimeError("operation not permitted when\nstream is capturing")
        return graph(*inputs)

    return run


@pytest.mark.parametrize("compiler, reason", [
    (wrong, "ArithmeticError: other results than the eager step's"),
    (failing, "OutOfMemoryError: CUDA out of memory."),
    (failing_at_the_second_call, "RuntimeError: operation not permitted when stream is capturing"),
])  # fmt: skip
def test_what_cannot_be_compiled_runs_eagerly(compiler, reason, monkeypatch, as_on_a_gpu):
    monkeypatch.setattr(torch, "compile", compiler)
    said = []
    eager, compiled = (small_trainer("vision", plan, log=said.append) for plan in (Plan(waits=False), COMPILED))
    expected, got = three_steps(eager), three_steps(compiled)
    said_of = [f"{kind} not compiled ({reason}): same results, slower" for kind in ("passes", "training")]
    assert said == said_of and not compiled.step.compiled
    assert got[0][:3] == expected[0][:3] and got[2].accuracy == expected[2].accuracy
    assert compiled.program.equal(eager.program) and compiled.mapping.weights.equal(eager.mapping.weights)


def test_passes_are_held_to_tf32_whatever_trains(monkeypatch, as_on_a_gpu):
    monkeypatch.setattr(torch, "compile", lambda graph, **options: lambda *inputs: [1.02 * y for y in graph(*inputs)])
    said = []
    small_trainer("vision", COMPILED, precision="bf16", log=said.append).estimate(0)
    assert said == ["passes not compiled (ArithmeticError: other results than the eager step's): same results, slower"]


def test_memory_too_short_for_large_passes_leaves_training_compiled(monkeypatch, as_on_a_gpu):
    labelled = lambda inputs: any(x.dtype == torch.int64 for x in inputs)  # noqa: E731
    monkeypatch.setattr(
        torch, "compile", lambda graph, **_: lambda *inputs: graph(*inputs) if labelled(inputs) else failing(graph)
    )
    said = []
    trainer = small_trainer("vision", COMPILED, log=said.append)
    three_steps(trainer)
    assert said == ["passes not compiled (OutOfMemoryError: CUDA out of memory.): same results, slower"]
    assert trainer.step.compiled == {"training"} and len(trainer.step._graphs) == 1


@pytest.mark.parametrize("precision, convolutions, products", [
    ("fp32", False, False), ("tf32", True, True), ("fp16", True, False), ("bf16", True, False),
])  # fmt: skip
def test_what_a_gpu_rounds_to_tf32(precision, convolutions, products, monkeypatch):
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: None)
    cudnn, matmul = torch.backends.cudnn, torch.backends.cuda.matmul
    kept = cudnn.allow_tf32, matmul.allow_tf32, cudnn.benchmark
    try:
        set_up_arithmetic(torch.device("cuda", 0), precision, deterministic=False)
        assert (cudnn.allow_tf32, matmul.allow_tf32) == (convolutions, products)
    finally:
        cudnn.allow_tf32, matmul.allow_tf32, cudnn.benchmark = kept


def test_a_mapping_may_have_its_tensors_later_and_others_each_time(recorded):
    """As one of a user's own may register an empty buffer, and fill it in `refresh`."""

    class Centred(nn.Module):
        def __init__(self):
            super().__init__()
            self.register_buffer("centres", None)

        def forward(self, outputs):
            return outputs[:, :T] if self.centres is None else -torch.cdist(outputs, self.centres)[:, :T]

    trainer = small_trainer("vision", COMPILED)
    mapping = Centred()
    mapping.num_source = S
    step = Step(trainer.network, Readout(mapping), [trainer.program], "fp32", CPU, compiled=True)
    images, labels, count = torch.rand(8, 3, 8, 8), torch.arange(8) % T, torch.tensor(8.0)
    for centres in (None, torch.randn(T, S), torch.randn(T, S), torch.randn(T + 2, S)):
        mapping.centres = centres
        for one, other in zip(step.run(8, images, labels, count), step(images, labels, count), strict=True):
            torch.testing.assert_close(one, other)
    assert step.compiled and len(step._graphs) == 3


@pytest.mark.parametrize("optimizer", [torch.optim.Adam, lambda p, lr: torch.optim.SGD(p, lr, momentum=0.9)])
@pytest.mark.parametrize("waits", [True, False])
def test_what_a_step_changes_stays_in_its_place(optimizer, waits):
    def places(trainer):
        (optimizer,) = trainer.optimizers
        tensors = [*trainer.readout.buffers(), trainer.program, *optimizer.state[trainer.program].values()]
        return [tensor.data_ptr() for tensor in [*tensors, optimizer.param_groups[0]["lr"]]]

    trainer, other = (small_trainer("clip", Plan(waits=waits), optimizer) for _ in range(2))
    at_first, programs = places(trainer), [trainer.program.detach().clone()]
    for epoch in range(2):
        trainer.estimate(epoch)
        trainer.train(epoch)
        programs.append(trainer.program.detach().clone())
        assert places(trainer) == at_first and not programs[-1].equal(programs[-2])
    at_first = places(other)
    other.load_state_dict(trainer.state_dict())
    assert places(other) == at_first and other.mapping.weights.equal(trainer.mapping.weights)
    for each in (trainer, other):
        each.train(2)
    assert other.program.equal(trainer.program) and places(other) == at_first


@pytest.mark.parametrize("plan", [Plan(), Plan(waits=False), COMPILED])
def test_a_step_that_is_not_finite_changes_nothing(plan, recorded):
    """The second batch is spoiled by its label's ω: skipped, θ, Adam's count and the statistics are as without it."""
    trainer = small_trainer("vision", plan, torch.optim.Adam, on_nonfinite="skip")
    trainer.estimate(0)
    run, calls, kept = trainer.step.run, [], []

    def spoil(size, *batch):
        outputs, *others = run(size, *batch)
        calls.append(len(batch))
        if len(calls) != 2:
            kept.append((outputs, batch[1]))
            return outputs, *others
        kept.append((trainer.program.detach().clone(), None))
        return outputs * float("nan"), others[0] * float("inf"), *others[1:]

    trainer.step.run = spoil
    observe, seen = trainer.mapping.observe, []
    trainer.mapping.observe = lambda *pair: (seen.append(trainer.program.detach().clone()), observe(*pair))
    trained = trainer.train(0, observe=True)
    assert calls == [3, 3, 3] and trainer.skipped_steps == 1 and trainer.program.isfinite().all()
    assert trainer.optimizers[0].state[trainer.program]["step"] == 2
    assert seen[0].equal(kept[1][0]) and (plan.waits or seen[1].equal(seen[0])) and not seen[-1].equal(seen[0])
    assert trainer.mapping.get_extra_state()["statistics"]["num_samples"] == 12
    expected = build_mapping("blmpp", S, T, topk_ratio=0.5)
    for outputs, labels in (kept[0], kept[2]):
        expected.observe(outputs, labels)
    expected.refresh()
    trainer.refresh(1)
    torch.testing.assert_close(trainer.mapping.weights, expected.weights)
    assert trained.loss < float("inf")


@pytest.mark.parametrize("plan", [Plan(), Plan(waits=False)])
def test_the_first_bad_step_is_named_at_once_or_at_the_end_of_the_epoch(plan):
    trainer = small_trainer("vision", plan)
    trainer.estimate(0)
    run, calls = trainer.step.run, []

    def spoil(size, *batch):
        outputs, loss, *others = run(size, *batch)
        calls.append(1)
        return outputs, loss * (float("nan") if len(calls) > 1 else 1), *others

    trainer.step.run = spoil
    with pytest.raises(NonFiniteError, match=r"epoch 2, batch 2, learning rate 0\.0\d+: the loss or its gradient"):
        trainer.train(1)
    assert len(calls) == (2 if plan.waits else 3)


@pytest.mark.parametrize("name", MAPPINGS)
def test_ignored_rows_count_for_nothing(name):
    generator = torch.Generator().manual_seed(0)
    logits, labels = torch.randn(50, S, generator=generator), torch.arange(50) % T
    both = [build_mapping(name, S, T) for _ in range(2)]
    for part in (slice(0, 30), slice(30, 50)):
        both[0].observe(logits[part], labels[part])
        filled = torch.cat([logits[part], torch.full((5, S), float("nan"))])[torch.randperm(len(labels[part]) + 5)]
        marked = torch.full((len(filled),), IGNORED)
        for row, values in enumerate(filled):
            same = (logits[part] == values).all(1).nonzero()
            marked[row] = labels[part][same[0, 0]] if len(same) else IGNORED
        both[1].observe(filled, marked)
    for mapping in both:
        mapping.refresh()
    torch.testing.assert_close(both[1].weights, both[0].weights)
    if name == "lda":
        torch.testing.assert_close(both[1].bias, both[0].bias)
        assert both[1].temperature == pytest.approx(both[0].temperature)


def test_what_a_device_gets(monkeypatch):
    gpu, long = torch.device("cuda", 0), numerics.COMPILED_FROM
    assert plan_for(CPU, "auto", long) == Plan(waits=True, passed_at_once=0, compiled=False, note="")
    assert plan_for(gpu, "auto", long) == Plan(waits=False, passed_at_once=1024, compiled=True, note="compiled")
    monkeypatch.setattr(torch, "are_deterministic_algorithms_enabled", lambda: True)
    plan = plan_for(gpu, "plain", long - 1, 2)
    reasons = "not all parts of --engine, a short run, several processes, --deterministic"
    assert plan == Plan(waits=False, passed_at_once=1024, compiled=False, note=f"not compiled ({reasons})")
    assert not plan_for(gpu, "auto", long).compiled


def test_what_a_gpu_lacks_is_refused(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "RTX 2060")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    gpu = choose_device("cuda:1")
    assert choose_precision("auto", gpu) == "fp16" and choose_precision("fp32", gpu) == "fp32"
    for precision in ("bf16", "tf32"):
        with pytest.raises(ValueError, match=f"--precision {precision}: RTX 2060 has none; take fp16 or fp32"):
            choose_precision(precision, gpu)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    assert choose_precision("bf16", gpu) == "bf16" and choose_precision("tf32", gpu) == "tf32"
    with pytest.raises(ValueError, match="this machine has 2 CUDA devices"):
        choose_device("cuda:2")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert choose_device("cuda") == gpu
    with pytest.raises(ValueError, match="take --device cuda$"):
        choose_device("cuda:1")


def test_larger_batches_where_no_gradient_is_needed(tmp_path):
    system = build_vision(
        VMConfig.of(dataset="synthetic", weights="none", backbone="timm:test_resnet", results_path=str(tmp_path)), CPU
    )
    largest = max(len(system.task.train.labels), len(system.task.test.labels))
    assert {step: loader.batch_size for step, loader in system.loaders(8, 0, 1024).items()} == {
        "estimate": largest, "train": 8, "test": largest
    }  # fmt: skip
    assert {loader.batch_size for loader in system.loaders(8, 0, 4).values()} == {8}


@pytest.mark.parametrize("switches", [tuple(SWITCHES), ()])
def test_gradients_beyond_the_range_of_half_precision_are_finite(switches):
    """No image's gradient is larger than float16 holds, their sum is a million: it is made in float32."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 8, 4, stride=4), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 64, S))
    net[0].weight.data.abs_()
    nn.init.constant_(net[3].weight, 0.1)
    vr, mapping = PaddingVR(32, 16, MEAN, STD), build_mapping("blm", S, T)
    mapping.ready = True
    mapping._weights[:, 0] = 3e4  # label 0 is predicted, label 1 is right: each logit has this gradient
    network = build_network(net.requires_grad_(False).eval(), vr, switches=switches)
    images, labels = torch.rand(64, 3, 16, 16), torch.ones(64, dtype=torch.int64)
    gradients = {}
    for precision in ("fp32", "fp16"):
        step = Step(network, Readout(mapping), [vr.program], precision, CPU)
        gradients[precision] = step(images, labels, torch.tensor(1.0))[3].clone()
    exact, half = gradients.values()
    assert exact.abs().max() > 1e6 and half.isfinite().all()
    assert float((half - exact).norm() / exact.norm()) < 0.02
