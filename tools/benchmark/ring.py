"""Where this project's training and a plain loop meet: the same images, network and recipe, compared and timed."""

import gc
import statistics
import sys
import time
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import torch
from torch.utils.flop_counter import FlopCounterMode

from data import BatchLoader, load_task, padding_preset
from mapping import build_mapping
from models import SWITCHES, PaddingVR, build_classifier, build_network
from tools.benchmark.published_loop import Plain, make_images
from tools.measuring import PeakMemory, busy_time, synchronize
from tools.training.numerics import half_dtype, plan_for, set_up_arithmetic
from tools.training.trainer import Trainer

_TITLES = {"resnet18": "ResNet-18", "resnet50": "ResNet-50", "vit_b_32": "ViT-B/32"}
_TITLES["efficientnet_lite0"] = "EfficientNet-Lite0"
# name -> (backbone, side of the images, how its row in the README calls the setting)
CASES = {
    f"{backbone}-{size}": (backbone, size, f"{title}, {size}x{size} in 224")
    for backbone, title in _TITLES.items()
    for size in (32, 128)
}
# how far from the plain loop: the share of ω that may lie at other labels, and the first epoch's loss, relative; half
# precision takes some images' highest logits for others
TOLERANCES = {"fp32": (2e-3, 2e-3), "tf32": (0.2, 0.02), "fp16": (0.2, 0.05), "bf16": (0.2, 0.1)}
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


class Ring:
    """Where contenders meet: holds what they share, and the plain loop's results."""

    def __init__(self, args, device, ceilings, folder):
        self.args, self.device, self.ceilings, self.folder = args, device, ceilings, folder
        self.classifiers, self.tasks, self.plain = {}, {}, {}

    def measure(self, case, batch_size, loops):
        """Time the loops of one case, taking turns; a list of rows, each with an error where its loop has failed."""
        entrants = [
            SimpleNamespace(loop=loop, seconds=[], peak=0, agreement=None, row={"loop": loop.name}) for loop in loops
        ]
        for turn in [partial(self._epoch, epoch) for epoch in range(1 + self.args.epochs)] + [self._report]:
            for entrant in entrants:
                if "error" in entrant.row:
                    continue
                try:
                    turn(entrant, case, batch_size)
                except Exception as error:  # memory, a compiler, a GPU can fail in any way; the others go on
                    entrant.contender, reason = None, " ".join(f"{type(error).__name__}: {error}".split())
                    entrant.row["error"] = reason[:300]
        return [entrant.row for entrant in entrants]

    def clear(self):
        """Let go of what the loops of before hold."""
        if self.device.type == "cuda":
            torch.compiler.reset()  # which lets go of captured graphs and their memory
        gc.collect()  # workers of the plain loop end here
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    def _epoch(self, epoch, entrant, case, batch_size):
        """Time an epoch; the first one is compared with the plain loop's instead."""
        loop, size = entrant.loop, CASES[case][1]
        classifier, (folder, task) = self._classifier(case), self._task(size)
        peak = PeakMemory(self.device)
        if epoch == 0:
            setting = classifier, _padding(classifier, size, self.device), task, batch_size, self.args.mapping
            entrant.contender = Plain(folder, *setting) if loop.switches is None else Ours(loop, *setting)
        seconds, contender = {}, entrant.contender
        with contender.arithmetic():
            for step in STEPS:
                start = time.perf_counter()
                getattr(contender, step)(epoch)
                synchronize(self.device)
                seconds[step] = time.perf_counter() - start
        if epoch or loop.compiled:  # a captured graph takes its memory in the first, once
            entrant.peak = max(entrant.peak, peak.bytes())
        if epoch:
            entrant.seconds.append(seconds)
        elif loop.switches is None:
            self.plain[case, batch_size] = {"weights": contender.weights.cpu(), "loss": contender.loss}
        elif not loop.observe and (case, batch_size) in self.plain:
            of_plain = TOLERANCES["fp16" if self.device.type == "cuda" else "fp32"]
            tolerances = max(TOLERANCES[loop.precision], of_plain)
            entrant.agreement = check_agreement(loop.name, self.plain[case, batch_size], contender, tolerances)

    def _report(self, entrant, case, batch_size):
        """Fill in the row."""
        loop, (_, task), plain = entrant.loop, self._task(CASES[case][1]), self.plain.get((case, batch_size), {})
        images = {"estimate": len(task.train), "train": len(task.train), "test": len(task.test)}
        median = {step: statistics.median(seconds[step] for seconds in entrant.seconds) for step in STEPS}
        total = statistics.median(sum(seconds.values()) for seconds in entrant.seconds)
        passes = {"estimate": not loop.observe, "train": 2, "test": 1}  # an image's forward passes' worth of work
        work = forward_gflops(self._classifier(case)) * sum(passes[step] * images[step] for step in STEPS)
        of_cifar10 = sum(median[step] / images[step] * CIFAR10[step] for step in STEPS)
        if loop.switches is None:
            plain["seconds"] = total
        row = {
            "precision": loop.precision,
            "images": [len(task.train), len(task.test)],
            **{step: round(median[step], 3) for step in STEPS},
            "epoch": round(total, 3),
            "train_images_per_second": round(len(task.train) / median["train"], 1),
            "cifar10_epoch": round(of_cifar10, 2),
            "cifar10_200_epochs_minutes": round(of_cifar10 * 200 / 60, 1),
            "share_of_peak": round(work / total / self.ceilings[loop.precision], 3),
            "peak_mib": round(entrant.peak / 2**20),
            "engine": entrant.contender.description,
            "agreement": entrant.agreement,
        }
        if "seconds" in plain:
            row["speedup"] = round(plain["seconds"] / total, 2)
        if self.device.type == "cuda":
            row |= profile(entrant.contender, len(task.train), batch_size, self.device)
        entrant.row |= row

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
    """How far ω and loss are apart after an epoch of both from the same start, measured as `TOLERANCES` are; a
    ValueError where one of them is beyond its tolerance."""
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


class Ours:
    """This project's loop; without an estimating pass where the loop observes."""

    def __init__(self, loop, classifier, input_vr, task, batch_size, mapping):
        size, device = input_vr.image_size, input_vr.program.device
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
                log=self._log,
            )  # fmt: skip
            if self.observe:
                self.trainer.estimate(0)
                self.trainer.train(0, observe=True)  # what the first epoch takes its mapping from

    def _log(self, line):
        if "not compiled" in line:  # a row is of what it is called, or of nothing
            raise RuntimeError(line)
        self.description += f"; {line}"  # as where memory takes a batch in parts

    def arithmetic(self):
        return nullcontext(set_up_arithmetic(self.device, self.precision, False))

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


def profile(contender, num_images, batch_size, device):
    """Kernels in a step of training, and the share of its time in which the GPU is busy."""
    activities = [torch.profiler.ProfilerActivity.CUDA]
    with contender.arithmetic(), torch.profiler.profile(activities=activities) as profiler:
        start = time.perf_counter()
        contender.train(0)
        synchronize(device)
        seconds = time.perf_counter() - start
    on_device = [event for event in profiler.events() if event.device_type == torch.autograd.DeviceType.CUDA]
    kernels = sum(not event.name.startswith(("Memcpy", "Memset")) for event in on_device)
    busy = busy_time((event.time_range.start, event.time_range.end) for event in on_device) / 1e6
    return {"kernels_per_step": round(kernels / -(-num_images // batch_size)), "gpu_busy": round(busy / seconds, 3)}


def forward_gflops(classifier):
    """Floating-point operations of one image's plain forward pass, in 10^9."""
    side = classifier.input_size
    image = torch.zeros(1, 3, side, side, device=next(classifier.parameters()).device)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        classifier(image)
    return counter.get_total_flops() / 1e9
