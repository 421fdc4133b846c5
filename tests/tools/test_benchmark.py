"""The benchmarks through their command lines, at sizes that show that they run and agree, not how fast."""

import json
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch

from models import SWITCHES
from tools import benchmark_mapping, measuring
from tools.benchmark import __main__ as benchmark
from tools.benchmark import ring as benchmark_ring
from tools.benchmark.ring import TOLERANCES, Loop, check_agreement, profile
from tools.training.step import Step

SMALL = [
    "--case",
    "resnet18-32",
    "--train",
    "8",
    "--test",
    "4",
    "--batch-size",
    "4",
    "--epochs",
    "1",
    "--device",
    "cpu",
]
CPU, GPU = torch.device("cpu"), torch.device("cuda")


def test_contenders_agree_and_every_row_adds_up(tmp_path, capsys):
    path = tmp_path / "figures.jsonl"
    benchmark.main([*SMALL, "--device", "cpu", "--precision", "fp32", "bf16", "--json", str(path)])
    machine, *rows = map(json.loads, path.read_text().splitlines())
    assert machine["device"] == "cpu" and set(machine["matrix_product_gflops"]) == {"fp32", "bf16"}
    assert [row["loop"] for row in rows] == [
        "plain", "train_vm", "train_vm_fast", "train_vm, bf16", "train_vm_fast, bf16",
    ]  # fmt: skip
    plain, ours, fast, half, _ = rows
    for row in rows:
        assert row["images"] == [8, 4] and row["batch_size"] == 4
        assert row["epoch"] == pytest.approx(row["estimate"] + row["train"] + row["test"], abs=0.01)
        assert row["speedup"] == pytest.approx(plain["epoch"] / row["epoch"], rel=0.02, abs=0.01)
        of_cifar10 = (row["estimate"] + row["train"]) * 50_000 / 8 + row["test"] * 10_000 / 4
        assert row["cifar10_epoch"] == pytest.approx(of_cifar10, abs=10)
        assert row["cifar10_200_epochs_minutes"] == pytest.approx(row["cifar10_epoch"] * 200 / 60, abs=0.2)
    assert plain["estimate"] > 0 and ours["estimate"] > 0 and fast["estimate"] == 0
    assert max(ours["agreement"].values()) <= 2e-3 and 1e-5 < half["agreement"]["loss"] <= 0.1
    table = [line.split("|") for line in capsys.readouterr().out.splitlines() if line.startswith("|")]
    assert len(table) == 7 and {len(row) for row in table} == {12}


def test_the_networks_tell_images_apart(tmp_path):
    """Else every mapping is the same, and every loss."""
    ring = small_ring(tmp_path)
    classifier = ring._classifier("resnet18-32")
    loader = benchmark_ring._loader(ring._task(32)[1].train, 32, 8, CPU, "estimate")
    logits = classifier(benchmark_ring._padding(classifier, 32, CPU)(next(iter(loader.epoch(0))).images))
    assert len(logits.argmax(1).unique()) > 4


def small_ring(folder):
    return benchmark.Ring(benchmark.complete(benchmark.parse(SMALL), CPU), CPU, {"fp32": 1.0}, folder)


class Contender:
    """Takes no time."""

    description, loss, weights = "stand-in", 1.0, torch.zeros(2)

    def __init__(self, *setting):
        self.epochs = []

    def arithmetic(self):
        return nullcontext()

    def train(self, epoch):
        self.epochs.append(epoch)

    def estimate(self, epoch):
        pass

    test = estimate


@pytest.mark.parametrize(
    "moved, loss, agrees", [(0.001, 1.0001, True), (0.003, 1.0, False), (0.0, 1.003, False), (0.0, float("nan"), False)]
)
def test_a_wrong_mapping_or_loss_is_not_timed(moved, loss, agrees):
    plain, ours = {"weights": torch.tensor([[1.0, 0.5], [0.0, 0.5]]), "loss": 1.0}, Contender()
    ours.weights, ours.loss = plain["weights"] + torch.tensor([[-moved, -moved], [moved, moved]]), loss
    if agrees:
        found = check_agreement("ours", plain, ours, TOLERANCES["fp32"])
        assert found == {"mapping": pytest.approx(moved, rel=1e-3), "loss": pytest.approx(loss - 1)}
    else:
        with pytest.raises(ValueError, match="ours and the plain loop disagree"):
            check_agreement("ours", plain, ours, TOLERANCES["fp32"])


def test_mapping_benchmark(capsys):
    benchmark_mapping.main(["--source", "50", "--target", "7", "--samples", "600", "--mapping", "ilm", "blmp"])
    _, _, ilm, blmpp = (line.split() for line in capsys.readouterr().out.splitlines())
    assert ilm[0] == "ilm" and blmpp[0] == "blmpp" and ilm[-1] == blmpp[-1] == "dense"
    assert float(ilm[2]) > 0 and float(blmpp[4]) >= 0


@pytest.mark.parametrize(
    "main, arguments, said",
    [
        (benchmark.main, ["--case", "resnet"], "invalid choice: 'resnet'"),
        (benchmark.main, ["--train", "0"], "--train must be 1 or more, got 0"),
        (benchmark.main, ["--minutes", "-1"], "--minutes must be 1 or more, got -1.0"),
        (benchmark.main, ["--device", "gpu"], "allowed are cpu, cuda"),
        (benchmark.main, ["--json", "/proc/version/figures.json"], "choose another --json"),
        (benchmark_mapping.main, ["--device", "gpu"], "allowed are cpu, cuda"),
        (benchmark_mapping.main, ["--samples", "0"], "--samples must be 1 or more, got 0"),
        (benchmark_mapping.main, ["--mapping", "rlm"], "nothing to measure"),
        (benchmark_mapping.main, ["--mapping", "bml"], "closest: blm"),
    ],
)
def test_bad_input(main, arguments, said, capsys):
    with pytest.raises(SystemExit) as caught:
        main(arguments)
    error = capsys.readouterr().err
    assert caught.value.code == 2 and said in error and error.count("\n") == 1


def test_the_whole_but_for_each_part():
    args = benchmark.complete(benchmark.parse(["--switches", "--case", "resnet18-32", "--batch-size", "4"]), CPU)
    ((case, batch_size, loops),) = benchmark.plan(args, CPU)
    assert (case, batch_size) == ("resnet18-32", 4) and [loop.name for loop in loops[:3]] == [
        "plain", "train_vm", "train_vm_fast",
    ]  # fmt: skip
    dropped = [loop.name.removeprefix("without ").split(" and ") for loop in loops[3:-2]]
    assert [parts[0] for parts in dropped] == list(SWITCHES)
    assert [parts for parts in dropped if len(parts) > 1] == [["fused-ops", "winograd"]]
    assert [loop.switches for loop in loops[3:-2]] == [
        tuple(name for name in SWITCHES if name not in parts) for parts in dropped
    ]
    assert [(loop.name, loop.switches, loop.compiled) for loop in loops[-2:]] == [
        ("plain path", (), False), ("torch.compile", (), True),
    ]  # fmt: skip


@pytest.mark.parametrize("mapping", ["ilm", "blm"])
def test_plain_loop_gives_the_other_mappings_too(mapping, capsys):
    arguments = ["--case", "resnet18-32", "--train", "12", "--test", "2", "--batch-size", "6", "--epochs", "1"]
    args = benchmark.complete(benchmark.parse([*arguments, "--device", "cpu", "--mapping", mapping]), CPU)
    _, _, ours, _ = benchmark.measure(args, CPU)
    assert ours["agreement"]["mapping"] < 1e-6


class Ring:
    """Takes as long as ``seconds`` says by a loop's switches, on a clock of its own."""

    seconds = {None: 20, tuple(SWITCHES): 50, (): 30}

    def __init__(self, *setting):
        self.now, self.measured = 0, []

    def measure(self, case, batch_size, loops):
        (loop,) = loops
        self.measured.append((case, batch_size, loop.name))
        self.now += self.seconds[loop.switches]
        if len(self.measured) == 3:
            return [{"loop": loop.name, "error": "OutOfMemoryError: CUDA out of memory"}]
        return [{"loop": loop.name}]

    def clear(self):
        pass


@pytest.fixture
def on_a_gpu(monkeypatch):
    """A `Ring` in place of the GPU, and the machine that a report on it begins with."""
    ring = Ring()
    monkeypatch.setattr(benchmark, "Ring", lambda *setting: ring)
    for name in ("matrix_product_gflops", "memory_bandwidth"):
        monkeypatch.setattr(benchmark, name, lambda *setting: 1.0)
    monkeypatch.setattr(benchmark, "machine_name", lambda device: "a GPU")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    return ring


def gpu_args(*arguments):
    return benchmark.complete(benchmark.parse(list(arguments)), GPU)


def gpu_report(ring, minutes):
    return benchmark.measure(gpu_args("--minutes", str(minutes)), GPU, clock=lambda: ring.now)


@pytest.mark.parametrize("minutes", [4, 9, 60, 300])
def test_a_gpu_is_measured_until_time_is_over_and_no_row_begins_that_would_end_later(on_a_gpu, minutes):
    rows = list(gpu_report(on_a_gpu, minutes))[1:]
    assert len(rows) == len(on_a_gpu.measured) and on_a_gpu.now <= 60 * minutes
    every = [(case, batch_size, loop.name) for case, batch_size, (loop,) in benchmark.plan(gpu_args(), GPU)]
    assert on_a_gpu.measured == [row for row in every if row in on_a_gpu.measured]
    assert on_a_gpu.measured[0] == ("resnet18-32", 256, "published")
    if minutes == 300:
        assert on_a_gpu.measured == every and len(every) == 2 * 6 * (1 + 4 * len(benchmark.ENGINES))
    else:
        assert on_a_gpu.now > 60 * minutes - 20, "not even the shortest row would have fitted"


def test_each_row_is_written_as_it_comes_and_one_that_fails_stops_no_other(on_a_gpu, tmp_path, capsys):
    path, shown = tmp_path / "rows.jsonl", []

    def watched():
        for number, entry in enumerate(gpu_report(on_a_gpu, 4)):
            assert len(path.read_text().splitlines()) == number
            shown.append(entry)
            yield entry

    assert benchmark.write(watched(), path) == 1
    assert list(map(json.loads, path.read_text().splitlines())) == shown
    assert shown[3] == {
        "case": "resnet50-32", "title": "ResNet-50, 32x32 in 224", "batch_size": 256, "loop": "published",
        "error": "OutOfMemoryError: CUDA out of memory",
    }  # fmt: skip
    out = capsys.readouterr().out.splitlines()
    assert len(out) == len(shown) + 3 and "| published: OutOfMemoryError: CUDA out of memory |" in out[6]


def test_kernels_and_the_time_in_which_the_gpu_is_busy(monkeypatch):
    assert measuring.busy_time([(5, 6), (0, 2), (1, 3), (5, 5.5), (1, 2)]) == 4

    def event(name, start, end, kind=torch.autograd.DeviceType.CUDA):
        return SimpleNamespace(name=name, device_type=kind, time_range=SimpleNamespace(start=start, end=end))

    events = [event("conv", 0, 3e5), event("add", 2e5, 5e5), event("Memcpy HtoD", 6e5, 7e5)]
    events += [event("relu", 8e5, 9e5), event("cudaLaunchKernel", 0, 1e6, torch.autograd.DeviceType.CPU)]
    monkeypatch.setattr(torch.profiler, "profile", lambda **_: nullcontext(SimpleNamespace(events=lambda: events)))
    monkeypatch.setattr(benchmark_ring.time, "perf_counter", iter([0.0, 2.0]).__next__)
    found = profile(Contender(), num_images=9, batch_size=4, device=CPU)
    assert found == {"kernels_per_step": 1, "gpu_busy": 0.35}


def test_the_memory_of_a_captured_graph_counts(tmp_path, monkeypatch):
    """It is taken in the epoch before those that are timed, which find it there."""
    contender = Contender()
    peak = SimpleNamespace(bytes=lambda: 2**20 * (10 if contender.epochs[-1] else 900))
    monkeypatch.setattr(benchmark_ring, "PeakMemory", lambda device: peak)
    monkeypatch.setattr(benchmark_ring, "Ours", lambda *setting: contender)
    loops = [Loop("eager"), Loop("compiled", compiled=True)]
    assert [row["peak_mib"] for row in small_ring(tmp_path).measure("resnet18-32", 4, loops)] == [10, 900]


def test_a_loop_that_fails_has_its_own_row_and_the_others_theirs(tmp_path, monkeypatch):
    """In its making, in its first epoch, in a timed one."""

    class Failing(Contender):
        def __init__(self, loop, *setting):
            super().__init__()
            self.name = loop.name
            self.train(-1)

        def train(self, epoch):
            if self.name == f"fails at {epoch}":
                raise torch.OutOfMemoryError("CUDA out of\nmemory")

    monkeypatch.setattr(benchmark_ring, "Ours", Failing)
    loops = [Loop(name) for name in ("first", "fails at -1", "fails at 0", "fails at 1", "last")]
    first, *failed, last = small_ring(tmp_path).measure("resnet18-32", 4, loops)
    assert failed == [{"loop": loop.name, "error": "OutOfMemoryError: CUDA out of memory"} for loop in loops[1:4]]
    assert "error" not in first | last and first["engine"] == last["engine"] == "stand-in"


def test_a_step_that_cannot_be_compiled_is_not_timed_in_its_eager_form(tmp_path, monkeypatch):
    monkeypatch.setattr(Step, "_run_compiled", lambda *batch: torch.zeros(1) @ torch.zeros(2))
    (row,) = small_ring(tmp_path).measure("resnet18-32", 4, [Loop("compiled", switches=(), compiled=True)])
    assert row["error"].startswith("RuntimeError: passes not compiled")


def test_a_batch_that_takes_several_parts_is_timed_and_its_row_says_so(tmp_path, monkeypatch):
    forward = Step.forward

    def short_of_memory(step, images, *rest):
        if step.chunk_size > 2:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return forward(step, images, *rest)

    monkeypatch.setattr(Step, "forward", short_of_memory)
    (row,) = small_ring(tmp_path).measure("resnet18-32", 4, [Loop("plain path", switches=())])
    assert row["engine"] == "plain path; out of memory: going on in chunks of 2 images (same result)"


def test_what_the_gpu_lacks_is_left_out_unless_asked_for(monkeypatch):
    def choose_precision(name, device):
        if name == "bf16":
            raise ValueError("this GPU has no bf16")
        return name

    monkeypatch.setattr(benchmark, "choose_precision", choose_precision)
    assert gpu_args().precision == gpu_args().precision == ["fp16", "tf32", "fp32"]
    with pytest.raises(ValueError, match="no bf16"):
        gpu_args("--precision", "fp32", "bf16")


def test_a_mapping_that_fails_stops_no_other(capsys, monkeypatch):
    monkeypatch.setattr(benchmark_mapping, "ProcessPoolExecutor", lambda *_: ThreadPoolExecutor(1))
    measure = benchmark_mapping.measure

    def failing(name, *setting):
        if name == "ilm":
            raise MemoryError("not\nenough")
        return measure(name, *setting)

    monkeypatch.setattr(benchmark_mapping, "measure", failing)
    with pytest.raises(SystemExit) as caught:
        benchmark_mapping.main(["--source", "20", "--target", "5", "--samples", "60", "--mapping", "ilm", "blm"])
    out, error = capsys.readouterr()
    assert caught.value.code == 2 and "1 of the mappings could not be measured" in error
    _, _, ilm, blm = out.splitlines()
    assert ilm.split(maxsplit=1) == ["ilm", "MemoryError: not enough"] and blm.split()[0] == "blm"
