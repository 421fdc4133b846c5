"""python -m tools.benchmark

Seconds per epoch of this project's training beside a plain loop, on the same images, network and recipe, in one run.

The yardstick is written here, the way published code of this field goes about it: a DataLoader whose two workers decode
every image again with PIL, the backbone as it comes (NCHW, eager), all logits kept for the estimate and counted by the
CPU, one-to-one matching by an arg-max for each class, full back-propagation, loss and accuracy read at every step. On
a GPU it trains under fp16 autocast with a GradScaler, does all else with TF32 in the convolutions, and has cuDNN repeat
its bits. It differs in one thing: the workers live on from epoch to epoch, as epochs are short here. All others are
checked to give its mapping and its loss, within what the precision allows, before they are timed.

On a CPU the contenders of a case take turns, so that a drifting machine slows them alike. On a GPU there are more of
them than time: they come one after the other, the most telling first, until --minutes are over. Given are medians of
the epochs behind the first. "of peak" is the arithmetic that the plain path would need in that time, as a share of what
a large matrix product reaches on the spot: work that is saved counts as done, so it can exceed 100 %.
"""

import ctypes
import gc
import io
import json
import platform
import statistics
import sys
import tempfile
import time
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from datetime import date
from functools import partial
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch.nn import functional
from torch.utils.data import DataLoader, Dataset
from torch.utils.flop_counter import FlopCounterMode

from tools.console import Parser, user_errors
from data import BatchLoader, load_task, padding_preset, write_ilmvp
from data.ilmvp import LmdbSource
from data.loader import epoch_generator
from mapping import build_mapping
from models import SWITCHES, PaddingVR, build_classifier, build_network
from models.torchvision_shim import ensure_torchvision
from tools.training.numerics import choose_device, choose_precision, half_dtype, plan_for, set_up_arithmetic
from tools.training.run_folder import check_writable
from tools.training.trainer import Trainer

# name -> (backbone, side of the images, how its row in the README calls the setting)
CASES = {
    f"{backbone}-{size}": (backbone, size, f"{title}, {size}x{size} in 224")
    for backbone, title in (
        ("resnet18", "ResNet-18"),
        ("resnet50", "ResNet-50"),
        ("vit_b_32", "ViT-B/32"),
        ("efficientnet_lite0", "EfficientNet-Lite0"),
    )
    for size in (32, 128)
}
# what is measured unless asked otherwise; the most telling first
DEFAULTS = {
    "cpu": {
        "case": ["resnet18-32", "resnet18-128", "efficientnet_lite0-128"],
        "batch_size": [256],
        "precision": ["fp32"],
        "train": 512,
        "test": 102,
        "epochs": 3,
        "minutes": float("inf"),
    },
    "cuda": {
        "case": [f"{backbone}-{size}" for backbone in ("resnet18", "resnet50", "vit_b_32") for size in (32, 128)],
        "batch_size": [256, 64],
        "precision": ["fp16", "bf16", "tf32", "fp32"],
        "train": 2560,
        "test": 1024,
        "epochs": 2,
        "minutes": 9.0,
    },
}
# on a GPU; name -> switches of the network, whether the step is compiled
ENGINES = {"eager": (tuple(SWITCHES), False), "compiled": (tuple(SWITCHES), True), "plain": ((), False)}
# how far from the plain loop: the share of ω that may lie at other labels, and the first epoch's loss, relative; half
# precision takes some images' highest logits for others
TOLERANCES = {"fp32": (2e-3, 2e-3), "tf32": (0.2, 0.02), "fp16": (0.2, 0.05), "bf16": (0.2, 0.1)}
NUM_CLASSES = 10
DISTINCT = 510  # made-up images that differ; more of them are copies
CIFAR10 = {"estimate": 50_000, "train": 50_000, "test": 10_000}
STEPS = ("estimate", "train", "test")


@dataclass(frozen=True)
class Loop:
    """A contender: the plain loop where ``switches`` is None, else ours, with those of the network's parts."""

    name: str
    precision: str = "fp32"
    switches: tuple | None = tuple(SWITCHES)
    observe: bool = False  # the mapping comes from the training pass, as in train_vm_fast
    compiled: bool = False  # the step, as one graph


@user_errors()
def main(argv=None):
    args = parse(argv)
    with user_errors():
        device = choose_device(args.device)
        if args.json:
            check_writable(Path(args.json).absolute().parent, "--json")
        failed = write(measure(complete(args, device), device), args.json)
        if failed:
            raise ValueError(f"{failed} of the rows could not be measured; each says why")


def parse(argv):
    parser = Parser(prog="python -m tools.benchmark", description=__doc__)
    parser.add_argument("--case", nargs="+", choices=list(CASES), help="what to measure (CPU: three, GPU: six)")
    parser.add_argument("--images", metavar="PATH", help="ILM-VP folder to read in place of made-up images")
    parser.add_argument("--train", type=int, help="made-up training images (CPU: 512, GPU: 2560)")
    parser.add_argument("--test", type=int, help="made-up test images (CPU: 102, GPU: 1024)")
    parser.add_argument("--batch-size", type=int, nargs="+", help="images per step (CPU: 256, GPU: 256 64)")
    parser.add_argument("--precision", nargs="+", choices=list(TOLERANCES), help="of ours (CPU: fp32, GPU: all four)")
    parser.add_argument("--epochs", type=int, help="timed epochs of each contender (CPU: 3, GPU: 2)")
    parser.add_argument("--mapping", default="blmpp", choices=("ilm", "blm", "blmpp"), help="(blmpp)")
    parser.add_argument(
        "--switches",
        action="store_true",
        help="also time the whole fast path but for each of its parts, the plain path, and torch.compile",
    )
    parser.add_argument("--minutes", type=float, help="begin no row that would end later (CPU: no limit, GPU: 9)")
    parser.add_argument("--device", default="auto", help="cpu, cuda, cuda:N, or auto: cuda where there is one (auto)")
    parser.add_argument("--json", metavar="FILE", help="also write a line there for the machine and for each row")
    args = parser.parse_args(argv)
    for option in ("train", "test", "epochs", "minutes"):
        if getattr(args, option) is not None and getattr(args, option) < 1:
            parser.error(f"--{option} must be 1 or more, got {getattr(args, option)}")
    if min(args.batch_size or [1]) < 1:
        parser.error(f"--batch-size must be 1 or more, got {min(args.batch_size)}")
    return args


def complete(args, device):
    """The settings with what the device gets where nothing else was asked for."""
    for name, value in DEFAULTS[device.type].items():
        setattr(args, name, getattr(args, name) or value)
    for precision in args.precision:
        choose_precision(precision, device)
    return args


def plan(args, device):
    """What is measured together, in this order: a list of (case, batch size, list of `Loop`)."""
    more = []
    if args.switches:
        for part in SWITCHES:
            dropped = {part, "winograd"} if part == "fused-ops" else {part}  # winograd needs the fused convolutions
            name = "without " + " and ".join(name for name in SWITCHES if name in dropped)
            more.append(Loop(name, args.precision[0], tuple(name for name in SWITCHES if name not in dropped)))
        more.append(Loop("plain path", args.precision[0], ()))
        more.append(Loop("torch.compile", args.precision[0], (), compiled=True))
    if device.type == "cpu":
        loops = [Loop("plain", switches=None)]
        for precision in args.precision:
            suffix = "" if precision == "fp32" else f", {precision}"
            loops += [Loop(f"train_vm{suffix}", precision), Loop(f"train_vm_fast{suffix}", precision, observe=True)]
        return [(case, batch_size, loops + more) for batch_size in args.batch_size for case in args.case]
    groups = []
    for batch_size in args.batch_size:
        loops = [Loop("published", "fp16", None)]
        for precision in args.precision:
            for name, (parts, compiled) in ENGINES.items():
                loops.append(Loop(f"{precision}, {name}", precision, parts, compiled=compiled))
        groups += [(case, batch_size, [loop]) for loop in loops + more for case in args.case]
    return groups


def measure(args, device, clock=time.monotonic):
    """Measure what `plan` says, as long as there is time; yields a dict for the machine, then one for each row."""
    start, longest, groups = clock(), {}, plan(args, device)
    used = {loop.precision for *_, loops in groups for loop in loops}
    ceilings = {name: round(matrix_product_gflops(device, name), 1) for name in TOLERANCES if name in used}
    yield {
        "date": date.today().isoformat(),
        "device": device.type,
        "machine": _machine(device),
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "epochs": args.epochs,
        "mapping": args.mapping,
        "matrix_product_gflops": ceilings,
        "memory_gb_per_s": round(memory_bandwidth(device), 1),
    }
    with tempfile.TemporaryDirectory() as temporary:
        ring = Ring(args, device, ceilings, Path(temporary))
        for case, batch_size, loops in groups:
            kind = loops[-1].switches, loops[-1].compiled
            begin = clock()
            if begin - start + longest.get(kind, max(longest.values(), default=0)) > 60 * args.minutes:
                continue
            common = {"case": case, "title": CASES[case][2], "batch_size": batch_size}
            try:
                rows = ring.measure(case, batch_size, loops)
            except Exception as error:  # memory, a compiler, a GPU can fail in any way; the other rows go on
                reason = " ".join(f"{type(error).__name__}: {error}".split())
                rows = [{"loop": " / ".join(loop.name for loop in loops), "error": reason[:300]}]
            for row in rows:
                yield common | row
            ring.clear()
            longest[kind] = max(longest.get(kind, 0), clock() - begin)


class Ring:
    """Where contenders meet: holds what they share, and the plain loop's results."""

    def __init__(self, args, device, ceilings, folder):
        self.args, self.device, self.ceilings, self.folder = args, device, ceilings, folder
        self.classifiers, self.tasks, self.plain = {}, {}, {}

    def measure(self, case, batch_size, loops):
        """Time the loops of one case, taking turns; a list of rows."""
        _, size, _ = CASES[case]
        classifier, (folder, task) = self._classifier(case), self._task(size)
        setting = classifier, size, task, batch_size, self.args.mapping, self.device
        contenders, agreements, peaks = {}, {}, {}
        for loop in loops:
            peak = PeakMemory(self.device)
            contender = Plain(folder, *setting) if loop.switches is None else Ours(loop, *setting)
            self._epoch(contender, 0)
            peaks[loop] = peak.mebibytes() if loop.compiled else 0  # a captured graph takes its memory here, once
            if loop.switches is None:
                self.plain[case, batch_size] = {"weights": contender.weights.cpu(), "loss": contender.loss}
            elif not loop.observe and (case, batch_size) in self.plain:
                of_plain = "fp16" if self.device.type == "cuda" else "fp32"
                tolerances = max(TOLERANCES[loop.precision], TOLERANCES[of_plain])
                agreements[loop] = check_agreement(loop.name, self.plain[case, batch_size], contender, tolerances)
            contenders[loop] = contender
        seconds = {loop: [] for loop in loops}
        for epoch in range(1, 1 + self.args.epochs):
            for loop, contender in contenders.items():
                peak = PeakMemory(self.device)
                seconds[loop].append(self._epoch(contender, epoch))
                peaks[loop] = max(peaks[loop], peak.mebibytes())
        gflops, rows = forward_gflops(classifier), []
        for loop, contender in contenders.items():
            median = {step: statistics.median(s[step] for s in seconds[loop]) for step in STEPS}
            total = statistics.median(sum(s.values()) for s in seconds[loop])
            images = {"estimate": len(task.train), "train": len(task.train), "test": len(task.test)}
            passes = {"estimate": not loop.observe, "train": 2, "test": 1}  # an image's forward passes' worth of work
            work = gflops * sum(passes[step] * images[step] for step in STEPS)
            if loop.switches is None:
                self.plain[case, batch_size]["seconds"] = total
            of_cifar10 = sum(median[step] / images[step] * CIFAR10[step] for step in STEPS)
            row = {
                "loop": loop.name,
                "precision": loop.precision,
                "images": [len(task.train), len(task.test)],
                **{step: round(median[step], 3) for step in STEPS},
                "epoch": round(total, 3),
                "train_images_per_second": round(len(task.train) / median["train"], 1),
                "cifar10_epoch": round(of_cifar10, 2),
                "cifar10_200_epochs_minutes": round(of_cifar10 * 200 / 60, 1),
                "share_of_peak": round(work / total / self.ceilings[loop.precision], 3),
                "peak_mib": round(peaks[loop]),
                "engine": contender.description,
                "agreement": agreements.get(loop),
            }
            if (case, batch_size) in self.plain:
                row["speedup"] = round(self.plain[case, batch_size]["seconds"] / total, 2)
            if self.device.type == "cuda":
                row |= profile(contender, len(task.train), batch_size, self.device)
            rows.append(row)
        return rows

    def clear(self):
        gc.collect()  # workers of the plain loop end here
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    def _epoch(self, contender, epoch):
        """Seconds of the three steps."""
        seconds = {}
        with contender.arithmetic():
            for step in STEPS:
                start = time.perf_counter()
                getattr(contender, step)(epoch)
                _synchronize(self.device)
                seconds[step] = time.perf_counter() - start
        return seconds

    @torch.no_grad()
    def _classifier(self, case):
        """A random network whose logits are as different as those of a trained one.

        As it comes, it predicts one label for all images: every mapping is the same then, and so is every loss.
        """
        if case not in self.classifiers:
            backbone, size, _ = CASES[case]
            classifier = self.classifiers[case] = build_classifier(backbone, "none").to(self.device)
            head = [layer for layer in classifier.modules() if isinstance(layer, torch.nn.Linear)][-1]
            if not head.weight.any():  # torchvision's ViT
                head.weight.normal_(generator=torch.Generator(self.device).manual_seed(0))
            train, input_vr = self._task(size)[1].train, _padding(classifier, size, self.device)
            batch = next(iter(_loader(train, size, 64, self.device, "estimate").epoch(0)))
            logits = torch.cat([classifier(input_vr(images)) for images in batch.images.split(16)])
            std, mean = torch.std_mean(logits, dim=0)
            head.weight /= std[:, None]
            head.bias.sub_(mean).div_(std)
        return self.classifiers[case]

    def _task(self, size):
        if size not in self.tasks:
            folder = Path(self.args.images) if self.args.images else self.folder / str(size)
            if not self.args.images:
                make_images(folder, size, self.args.train, self.args.test)
            preset = padding_preset(size)
            task = load_task(f"folder:{folder}", "", preset, preset, cache_path=None, progress=sys.stderr.isatty())
            self.tasks[size] = folder, task
        return self.tasks[size]


def check_agreement(name, plain, ours, tolerances):
    """How far ω and loss are apart after an epoch of both from the same start, measured as `TOLERANCES` are.

    Raises
    ------
    ValueError
        Where one of them is beyond its tolerance.
    """
    weights = float((plain["weights"] - ours.weights.cpu()).abs().sum(0).mean() / 2)
    loss = abs(plain["loss"] - ours.loss) / plain["loss"]
    if not (weights <= tolerances[0] and loss <= tolerances[1]):
        raise ValueError(
            f"{name} and the plain loop disagree on {weights:.2g} of ω, on the loss by {loss:.2g} relative"
        )
    return {"mapping": weights, "loss": loss}


def _padding(classifier, size, device):
    return PaddingVR(classifier.input_size, size, classifier.mean, classifier.std).to(device)


def _loader(images, size, batch_size, device, step):
    return BatchLoader(images, padding_preset(size), batch_size, device, shuffle=step == "train", seed=0, purpose=step)


def _refuse(line):
    """A row is of what it is called, or of nothing: not of an eager step in place of the compiled one."""
    raise RuntimeError(line)


class Ours:
    """This project's loop; without an estimating pass where the loop observes."""

    def __init__(self, loop, classifier, size, task, batch_size, mapping, device):
        input_vr = _padding(classifier, size, device)
        self.mapping = build_mapping(mapping, classifier.num_source, task.num_target).to(device)
        plan = replace(plan_for(device), compiled=loop.compiled)
        passed = max(batch_size, min(plan.passed_at_once, len(task.train)))
        loaders = {
            "estimate": _loader(task.train, size, passed, device, "estimate"),
            "train": _loader(task.train, size, batch_size, device, "train"),
            "test": _loader(task.test, size, passed, device, "test"),
        }
        self.device, self.precision, self.observe = device, loop.precision, loop.observe
        with self.arithmetic():
            network = build_network(classifier, input_vr, switches=loop.switches, dtype=half_dtype(loop.precision))
            self.description = network.description
            optimizer = torch.optim.Adam([input_vr.program], lr=0.01)
            self.trainer = Trainer(
                network, input_vr.program, self.mapping, loaders, optimizer, "steps", 10**6, loop.precision, plan=plan,
                log=_refuse,
            )  # fmt: skip
            if self.observe:
                self.trainer.estimate(0)
                self.trainer.train(0, observe=True)  # what the first epoch takes its mapping from

    @contextmanager
    def arithmetic(self):
        set_up_arithmetic(self.device, self.precision, False)
        yield

    def estimate(self, epoch):
        if not self.observe:
            self.trainer.estimate(epoch)

    def train(self, epoch):
        if self.observe:
            self.trainer.refresh(epoch)
        self.weights = self.mapping.weights
        self.loss = self.trainer.train(epoch, observe=self.observe).loss

    def test(self, epoch):
        self.trainer.evaluate(epoch)


class Plain:
    """The yardstick: see the head of this file."""

    description = "plain loop"

    def __init__(self, folder, classifier, size, task, batch_size, mapping, device):
        self.classifier, self.device, self.mapping = classifier, device, mapping
        self.input_vr = _padding(classifier, size, device)
        self.num_target = task.num_target
        self.optimizer = torch.optim.Adam([self.input_vr.program], lr=0.01)
        self.half = device.type == "cuda"
        self.scaler = torch.amp.GradScaler(device.type, enabled=self.half)
        sets = {split: _Decoded(Path(folder) / f"{split}.lmdb", size) for split in ("train", "test")}
        self.order = list(range(len(sets["train"])))
        loader = partial(DataLoader, batch_size=batch_size, num_workers=2, persistent_workers=True)
        self.loaders = {
            "estimate": loader(sets["train"]),
            "train": loader(sets["train"], sampler=self.order),
            "test": loader(sets["test"]),
        }

    @contextmanager
    def arithmetic(self):
        set_up_arithmetic(self.device, "fp32", False)
        with torch.backends.cudnn.flags(enabled=True, deterministic=True, allow_tf32=True):
            yield

    def _batches(self, step):
        for images, labels in self.loaders[step]:
            yield images.to(self.device), labels.to(self.device)

    @torch.no_grad()
    def estimate(self, epoch):
        kept, labels = [], []
        for images, targets in self._batches("estimate"):
            logits = self.classifier(self.input_vr(images))
            if self.mapping == "blmpp":
                k = max(1, int(0.15 * self.num_target))
                values, index = logits.softmax(1).topk(k, dim=1)
                logits = torch.zeros_like(logits).scatter_(1, index, values).cpu()
            kept.append(logits)
            labels.append(targets)
        kept, labels = torch.cat(kept).cpu(), torch.cat(labels).cpu()
        if self.mapping != "blmpp":
            kept = functional.one_hot(kept.argmax(1), kept.shape[1]).float()
        joint = torch.zeros(self.num_target, kept.shape[1])
        joint = joint.scatter_add_(0, labels[:, None].expand(-1, kept.shape[1]), kept).T
        if self.mapping == "ilm":
            weights = torch.zeros_like(joint)
            for _ in range(self.num_target):
                source, target = divmod(int(joint.argmax()), self.num_target)
                weights[source, target] = 1
                joint[source], joint[:, target] = -1, -1
        else:
            posterior = joint / (joint.sum(1, keepdim=True) + 1)
            weights = posterior / posterior.sum(0, keepdim=True)
        self.weights = weights.to(self.device)

    def train(self, epoch):
        self.order[:] = torch.randperm(len(self.order), generator=epoch_generator(0, "train", epoch)).tolist()
        total, correct = 0.0, 0
        for images, labels in self._batches("train"):
            self.optimizer.zero_grad()
            with torch.autocast(self.device.type, torch.float16, enabled=self.half):
                logits = self.classifier(self.input_vr(images)) @ self.weights
                loss = functional.cross_entropy(logits, labels)
            self.scaler.scale(loss).backward()
            self.scaler.step(self.optimizer)
            self.scaler.update()
            correct += (logits.argmax(1) == labels).sum().item()
            total += loss.item() * len(labels)
        self.loss = total / len(self.order)

    @torch.no_grad()
    def test(self, epoch):
        correct = 0
        for images, labels in self._batches("test"):
            logits = self.classifier(self.input_vr(images)) @ self.weights
            correct += (logits.argmax(1) == labels).sum().item()


class _Decoded(Dataset):
    """Images as published code reads them: those of 32 pixels lie in memory, others are decoded each time."""

    def __init__(self, path, size):
        ensure_torchvision()
        from torchvision import transforms

        self.source, self.held = LmdbSource(path), None
        self.transform = transforms.Compose([transforms.Resize((size, size)), transforms.ToTensor()])
        if size <= 32:
            records = map(self._decode, range(len(self.source)))
            self.held = [(np.asarray(image), label) for image, label in records]

    def __len__(self):
        return len(self.source)

    def _decode(self, index):
        encoded, label = self.source.record(index)
        return Image.open(io.BytesIO(encoded)).convert("RGB"), label

    def __getitem__(self, index):
        image, label = self._decode(index) if self.held is None else self.held[index]
        return self.transform(Image.fromarray(image) if self.held else image), label


def profile(contender, num_images, batch_size, device):
    """Kernels in a step of training, and the share of its time in which the GPU is busy."""
    activities = [torch.profiler.ProfilerActivity.CUDA]
    with contender.arithmetic(), torch.profiler.profile(activities=activities) as profiler:
        start = time.perf_counter()
        contender.train(0)
        _synchronize(device)
        seconds = time.perf_counter() - start
    on_device = [event for event in profiler.events() if event.device_type == torch.autograd.DeviceType.CUDA]
    kernels = sum(not event.name.startswith(("Memcpy", "Memset")) for event in on_device)
    busy = busy_time((event.time_range.start, event.time_range.end) for event in on_device) / 1e6
    return {"kernels_per_step": round(kernels / -(-num_images // batch_size)), "gpu_busy": round(busy / seconds, 3)}


def busy_time(intervals):
    """Length of the union of intervals (start, end)."""
    total, reached = 0.0, float("-inf")
    for start, end in sorted(intervals):
        total += max(0.0, end - max(start, reached))
        reached = max(reached, end)
    return total


class PeakMemory:
    """Memory that a stretch of code needed beyond what was held before it."""

    def __init__(self, device):
        self.device = device
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
            self.before = torch.cuda.memory_allocated(device)
        else:
            try:
                ctypes.CDLL(None).malloc_trim(0)  # what the contender before has freed, but the process still holds
                Path("/proc/self/clear_refs").write_text("5")  # resets the peak of the resident set
            except (OSError, AttributeError):
                pass  # not Linux, or not allowed: the peak is then that of the whole process
            self.before = _status("VmRSS")

    def mebibytes(self):
        if self.device.type == "cuda":
            return (torch.cuda.max_memory_allocated(self.device) - self.before) / 2**20
        return (_status("VmHWM") - self.before) / 2**20


def _status(field):
    path = Path("/proc/self/status")
    lines = path.read_text().splitlines() if path.exists() else []
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith(field)), 0)


def _synchronize(device):
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def matrix_product_gflops(device, precision, repeats=5):
    """The best rate of a large matrix product, in 10^9 floating-point operations per second."""
    set_up_arithmetic(device, precision, False)
    size = 2048 if device.type == "cpu" else 8192
    a = torch.randn(size, size, device=device, dtype=half_dtype(precision))
    return 2 * size**3 / _best_time(lambda: a @ a, device, repeats) / 1e9


def memory_bandwidth(device, repeats=5):
    """The best rate of a large copy within the device's memory, bytes read and written, in 10^9 per second."""
    a = torch.ones(2**26 if device.type == "cpu" else 2**28, device=device)
    b = torch.empty_like(a)
    return 2 * a.nbytes / _best_time(lambda: b.copy_(a), device, repeats) / 1e9


def _best_time(function, device, repeats):
    times = []
    for _ in range(repeats):
        _synchronize(device)
        start = time.perf_counter()
        function()
        _synchronize(device)
        times.append(time.perf_counter() - start)
    return min(times)


def forward_gflops(classifier):
    """Floating-point operations of one image's plain forward pass, in 10^9."""
    side = classifier.input_size
    image = torch.zeros(1, 3, side, side, device=next(classifier.parameters()).device)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        classifier(image)
    return counter.get_total_flops() / 1e9


def make_images(folder, size, train, test):
    """Write an ILM-VP folder of smooth random images: JPEG of about 200 pixels, or PNG of 32x32."""
    generator = np.random.default_rng(0)

    def image():
        coarse = Image.fromarray(generator.integers(0, 256, (8, 8, 3), dtype=np.uint8))
        stored = io.BytesIO()
        if size <= 32:
            coarse.resize((size, size), Image.Resampling.BICUBIC).save(stored, "PNG")
        else:
            coarse.resize((240, 200), Image.Resampling.BICUBIC).save(stored, "JPEG", quality=90)
        return stored.getvalue()

    def split(count):
        distinct = [image() for _ in range(min(count, DISTINCT))]
        return [(distinct[i % DISTINCT], i % NUM_CLASSES, f"{i}.img") for i in range(count)]

    names = [f"class {label}" for label in range(NUM_CLASSES)]
    write_ilmvp(folder, train=split(train), test=split(test), class_names=names)


def _machine(device):
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    model = platform.processor() or platform.machine()
    path = Path("/proc/cpuinfo")
    if path.exists():
        names = [line.partition(":")[2].strip() for line in path.read_text().splitlines() if "model name" in line]
        model = names[0] if names else model
    capability = torch.backends.cpu.get_cpu_capability()
    return f"{model}, {torch.get_num_threads()} cores, {capability}"


# heading -> (a row's value, how it is shown); the latter on GPUs alone
COLUMNS = {
    "loop": ("loop", "{}"),
    "estimate s": ("estimate", "{:.2f}"),
    "train s": ("train", "{:.2f}"),
    "test s": ("test", "{:.2f}"),
    "epoch s": ("epoch", "{:.2f}"),
    "speed-up": ("speedup", "{:.1f}×"),
    "train img/s": ("train_images_per_second", "{:.1f}"),
    "of peak": ("share_of_peak", "{:.0%}"),
    "peak MiB": ("peak_mib", "{}"),
}
GPU_COLUMNS = {
    "CIFAR-10 epoch s": ("cifar10_epoch", "{:.2f}"),
    "200 epochs min": ("cifar10_200_epochs_minutes", "{:.1f}"),
    "kernels per step": ("kernels_per_step", "{}"),
    "GPU busy": ("gpu_busy", "{:.0%}"),
}


def write(report, path):
    """Print a report as Markdown and, where there is a ``path``, write it there as JSON lines; each row as it comes.

    Returns
    -------
    int
        Rows that could not be measured.
    """
    failed, last = 0, None
    with open(path, "w", encoding="utf-8") if path else nullcontext() as file:
        for entry in report:
            if file:
                print(json.dumps(entry), file=file, flush=True)
            if "machine" in entry:
                columns = COLUMNS | (GPU_COLUMNS if entry["device"] == "cuda" else {})
                print(_headline(entry), f"| setting | {' | '.join(columns)} |", sep="\n\n")
                print("|" + " --- |" * (1 + len(columns)), flush=True)
                continue
            if "error" in entry:
                failed, cells = failed + 1, [f"{entry['loop']}: {entry['error']}"]
            else:
                cells = [_cell(entry.get(key), shown) for key, shown in columns.values()]
            title = f"{entry['title']}, batch {entry['batch_size']}"
            print(f"| {'' if title == last else title} | {' | '.join(cells)} |", flush=True)
            last = title
    return failed


def _headline(entry):
    products = ", ".join(f"{name} {rate}" for name, rate in entry["matrix_product_gflops"].items())
    return (
        f"{entry['machine']}; torch {entry['torch']}, {entry['mapping']}; "
        f"median of {entry['epochs']} epochs after one to warm up; "
        f"matrix product {products} GFLOP/s, memory {entry['memory_gb_per_s']} GB/s; {entry['date']}"
    )


def _cell(value, shown):
    return "–" if value is None else shown.format(value)


if __name__ == "__main__":
    main()
