"""python -m tools.benchmark --case resnet18-32 resnet18-128 efficientnet_lite0-128

Seconds per epoch of this project's training beside a plain loop, on the same images, network and recipe, in one run.

The yardstick is written here, the way published code of this field goes about it: a DataLoader whose workers decode
every image again with PIL, the backbone as it comes (NCHW, eager), all logits and a one-hot matrix kept for the
estimate, one-to-one matching by an arg-max for each class, full back-propagation. It is checked to give the same
mapping and the same loss before anything is timed. Every contender trains one epoch to warm up; then epochs of all of
them take turns, so that a drifting machine slows them alike, and medians are printed. "of peak" is the arithmetic that
the plain path would need in that time, as a share of a large float32 matrix product's rate measured on the spot: work
that is saved counts as done, so it can exceed 100 %.
"""

import ctypes
import io
import json
import platform
import statistics
import sys
import tempfile
import time
from datetime import date
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
from tools.training.numerics import choose_device, set_up_arithmetic
from tools.training.run_folder import check_writable
from tools.training.trainer import Trainer

# name -> (backbone, side of the images, how its row in the README calls the setting)
CASES = {
    "resnet18-32": ("resnet18", 32, "ResNet-18, 32x32 in 224"),
    "resnet18-128": ("resnet18", 128, "ResNet-18, 128x128 in 224"),
    "efficientnet_lite0-128": ("efficientnet_lite0", 128, "EfficientNet-Lite0, 128x128 in 224"),
}
NUM_CLASSES = 10
STEPS = ("estimate", "train", "test")


@user_errors()
def main(argv=None):
    args = parse(argv)
    with user_errors():
        if args.json:
            check_writable(Path(args.json).absolute().parent, "--json")
        report = measure(args)
    print(as_markdown(report))
    if args.json:
        Path(args.json).write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")


def parse(argv):
    parser = Parser(prog="python -m tools.benchmark", description=__doc__)
    parser.add_argument("--case", nargs="+", default=list(CASES), choices=list(CASES), help="what to measure (all)")
    parser.add_argument("--images", metavar="PATH", help="ILM-VP folder to read in place of made-up images")
    parser.add_argument("--train", type=int, default=512, help="made-up training images (512)")
    parser.add_argument("--test", type=int, default=102, help="made-up test images (102)")
    parser.add_argument("--batch-size", type=int, default=256, help="images per step (256, the recipe's)")
    parser.add_argument("--epochs", type=int, default=3, help="timed epochs of each contender (3)")
    parser.add_argument("--mapping", default="blmpp", choices=("ilm", "blm", "blmpp"), help="(blmpp)")
    parser.add_argument(
        "--switches",
        action="store_true",
        help="also time the whole fast path but for each of its parts, the plain path, and torch.compile",
    )
    parser.add_argument("--device", default="auto", help="cpu, cuda, cuda:N, or auto: cuda where there is one (auto)")
    parser.add_argument("--json", metavar="FILE", help="also write the figures there")
    args = parser.parse_args(argv)
    for option in ("train", "test", "batch_size", "epochs"):
        if getattr(args, option) < 1:
            parser.error(f"--{option.replace('_', '-')} must be 1 or more, got {getattr(args, option)}")
    return args


def measure(args):
    """All cases; a dict with the machine, its peak and a list of rows."""
    device = choose_device(args.device)
    set_up_arithmetic(device, "fp32", False)
    report = {
        "date": date.today().isoformat(),
        "machine": _machine(device),
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "batch_size": args.batch_size,
        "epochs": args.epochs,
        "mapping": args.mapping,
        "peak_gflops": round(matrix_product_gflops(device), 1),
        "cases": [],
    }
    for case in args.case:
        with tempfile.TemporaryDirectory() as temporary:
            folder = Path(args.images) if args.images else Path(temporary) / "images"
            if not args.images:
                make_images(folder, CASES[case][1], args.train, args.test)
            report["cases"].append(measure_case(case, folder, args, device, report["peak_gflops"]))
    return report


def measure_case(case, folder, args, device, peak_gflops):
    """Time the contenders of one case; a dict with their rows."""
    backbone, size, title = CASES[case]
    classifier = build_classifier(backbone, "none").to(device)
    preset = padding_preset(size)
    task = load_task(f"folder:{folder}", "", preset, preset, cache_path=None, progress=sys.stderr.isatty())
    common = (classifier, size, task, args, device)
    contenders = {"plain": Plain(folder, *common), "train_vm": Ours(tuple(SWITCHES), *common)}
    contenders["train_vm_fast"] = Ours(tuple(SWITCHES), *common, observe=True)
    if args.switches:
        for part in SWITCHES:
            dropped = {part, "winograd"} if part == "fused-ops" else {part}  # winograd needs the fused convolutions
            kept = tuple(name for name in SWITCHES if name not in dropped)
            contenders["without " + " and ".join(name for name in SWITCHES if name in dropped)] = Ours(kept, *common)
        contenders["plain path"] = Ours((), *common)
        contenders["torch.compile"] = Ours((), torch.compile(classifier), *common[1:])
    agreement = check_agreement(contenders["plain"], contenders["train_vm"])
    for contender in list(contenders.values())[2:]:
        contender.epoch(0)

    seconds = {name: [] for name in contenders}
    peaks = dict.fromkeys(contenders, 0)
    for epoch in range(args.epochs):
        for name, contender in contenders.items():
            peak = PeakMemory(device)
            seconds[name].append(contender.epoch(1 + epoch))
            peaks[name] = max(peaks[name], peak.mebibytes())
    gflops = forward_gflops(classifier)
    n_train, n_test = len(task.train), len(task.test)
    rows = []
    for name in contenders:
        median = {step: statistics.median(s[step] for s in seconds[name]) for step in STEPS}
        total = statistics.median(sum(s.values()) for s in seconds[name])
        passes = {"estimate": n_train if median["estimate"] else 0, "train": 2 * n_train, "test": n_test}
        rows.append(
            {
                "contender": name,
                **{step: round(median[step], 3) for step in STEPS},
                "epoch": round(total, 3),
                "train_images_per_second": round(n_train / median["train"], 1),
                "share_of_peak": round(sum(passes.values()) * gflops / total / peak_gflops, 3),
                "peak_mib": round(peaks[name]),
            }
        )
    for row in rows:
        row["speedup"] = round(rows[0]["epoch"] / row["epoch"], 2)
    return {
        "case": case,
        "title": title,
        "images": [n_train, n_test],
        "agreement": agreement,
        "engine": contenders["train_vm"].description,
        "rows": rows,
    }


def check_agreement(plain, ours):
    """Train an epoch with both from the same start; the largest difference of ω and the relative one of the loss.

    Raises
    ------
    ValueError
        Where they differ by more than rounding.
    """
    losses = [contender.epoch(0) and contender.loss for contender in (plain, ours)]
    weights = float((plain.weights - ours.weights).abs().max())
    loss = abs(losses[0] - losses[1]) / losses[0]
    if weights > 1e-4 or loss > 1e-4:
        raise ValueError(f"the contenders disagree: ω by {weights:.2g}, the first epoch's loss by {loss:.2g} relative")
    return {"mapping": weights, "loss": loss}


class Ours:
    """Epochs of this project's loop with the given switches; without an estimating pass where ``observe``."""

    def __init__(self, switches, classifier, size, task, args, device, observe=False):
        canvas = classifier.input_size
        input_vr = PaddingVR(canvas, size, classifier.mean, classifier.std).to(device)
        self.mapping = build_mapping(args.mapping, classifier.num_source, task.num_target).to(device)
        common = {"batch_size": args.batch_size, "device": device, "seed": 0}
        loaders = {
            step: BatchLoader(
                task.test if step == "test" else task.train,
                padding_preset(size),
                shuffle=step == "train",
                purpose=step,
                **common,
            )
            for step in STEPS
        }
        network = build_network(classifier, input_vr, switches=switches)
        self.description = network.description
        optimizer = torch.optim.Adam([input_vr.program], lr=0.01)
        self.trainer = Trainer(network, input_vr.program, self.mapping, loaders, optimizer, "steps", 10**6)
        self.observe = observe
        if observe:
            self.trainer.estimate(0)
            self.trainer.train(0, observe=True)  # what the first epoch takes its mapping from

    def epoch(self, epoch):
        """Seconds of the three steps."""
        estimating = 0.0 if self.observe else self.trainer.estimate(epoch)
        refreshing = self.trainer.refresh(epoch) if self.observe else 0.0
        self.weights = self.mapping.weights
        trained = self.trainer.train(epoch, observe=self.observe)
        self.loss = trained.loss
        tested = self.trainer.evaluate(epoch)
        return {"estimate": estimating, "train": trained.seconds + refreshing, "test": tested.seconds}


class Plain:
    """The yardstick: see the head of this file."""

    def __init__(self, folder, classifier, size, task, args, device):
        self.classifier, self.device, self.args = classifier, device, args
        self.input_vr = PaddingVR(classifier.input_size, size, classifier.mean, classifier.std).to(device)
        self.num_target = task.num_target
        self.optimizer = torch.optim.Adam([self.input_vr.program], lr=0.01)
        self.sets = {split: _Decoded(Path(folder) / f"{split}.lmdb", size) for split in ("train", "test")}

    def epoch(self, epoch):
        """Seconds of the three steps."""
        seconds, n = {}, len(self.sets["train"])
        order = torch.randperm(n, generator=epoch_generator(0, "train", epoch)).tolist()
        passes = {"estimate": ("train", None), "train": ("train", order), "test": ("test", None)}
        for step, (split, sampler) in passes.items():
            loader = DataLoader(
                self.sets[split],
                self.args.batch_size,
                sampler=sampler,
                num_workers=2,
                pin_memory=self.device.type == "cuda",
            )
            start = time.perf_counter()
            getattr(self, step)(loader)
            if self.device.type == "cuda":
                torch.cuda.synchronize(self.device)
            seconds[step] = time.perf_counter() - start
        return seconds

    def _forward(self, batch):
        images, labels = (part.to(self.device) for part in batch)
        return self.classifier(self.input_vr(images)), labels

    @torch.no_grad()
    def estimate(self, loader):
        logits, labels = (torch.cat(parts) for parts in zip(*map(self._forward, loader), strict=True))
        one_hot = functional.one_hot(labels, self.num_target)
        if self.args.mapping == "blmpp":
            k = max(1, int(0.15 * self.num_target))
            values, index = logits.softmax(1).topk(k, dim=1)
            joint = torch.zeros_like(logits).scatter_(1, index, values).T @ one_hot.float()
        else:
            joint = functional.one_hot(logits.argmax(1), logits.shape[1]).float().T @ one_hot.float()
        if self.args.mapping == "ilm":
            self.weights = torch.zeros_like(joint)
            for _ in range(self.num_target):
                source, target = divmod(int(joint.argmax()), self.num_target)
                self.weights[source, target] = 1
                joint[source], joint[:, target] = -1, -1
            return
        posterior = joint / (joint.sum(1, keepdim=True) + 1)
        self.weights = posterior / posterior.sum(0, keepdim=True)

    def train(self, loader):
        total = 0.0
        for batch in loader:
            logits, labels = self._forward(batch)
            loss = functional.cross_entropy(logits @ self.weights, labels)
            self.optimizer.zero_grad()
            loss.backward()
            self.optimizer.step()
            total += loss.item() * len(labels)
        self.loss = total / len(self.sets["train"])

    @torch.no_grad()
    def test(self, loader):
        correct = 0
        for batch in loader:
            logits, labels = self._forward(batch)
            correct += ((logits @ self.weights).argmax(1) == labels).sum().item()


class _Decoded(Dataset):
    """Images of an LMDB, decoded by PIL each time they are asked for."""

    def __init__(self, path, size):
        ensure_torchvision()
        from torchvision import transforms

        self.source = LmdbSource(path)
        self.transform = transforms.Compose([transforms.Resize((size, size)), transforms.ToTensor()])

    def __len__(self):
        return len(self.source)

    def __getitem__(self, index):
        encoded, label = self.source.record(index)
        return self.transform(Image.open(io.BytesIO(encoded)).convert("RGB")), label


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


def matrix_product_gflops(device, size=4096, repeats=5):
    """The best rate of a large float32 matrix product on ``device``, in 10^9 floating-point operations per second."""
    a = torch.randn(size, size, device=device)
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        (a @ a)[0, 0].item()
        times.append(time.perf_counter() - start)
    return 2 * size**3 / min(times) / 1e9


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
        return [(image(), i % NUM_CLASSES, f"{i}.img") for i in range(count)]

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


def as_markdown(report):
    """The figures as the README shows them."""
    lines = [
        f"{report['machine']}; torch {report['torch']}, float32, batch {report['batch_size']}, {report['mapping']}; "
        f"median of {report['epochs']} epochs after one to warm up; matrix product {report['peak_gflops']} GFLOP/s; "
        f"{report['date']}",
        "",
        "| setting | loop | estimate s | train s | test s | epoch s | speed-up | train img/s | of peak | peak MiB |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for case in report["cases"]:
        title = f"{case['title']} ({case['images'][0]} + {case['images'][1]} images)"
        for row in case["rows"]:
            lines.append(
                f"| {title} | {row['contender']} | {row['estimate']:.2f} | {row['train']:.2f} | {row['test']:.2f} | "
                f"{row['epoch']:.2f} | {row['speedup']:.1f}× | {row['train_images_per_second']:.1f} | "
                f"{row['share_of_peak']:.0%} | {row['peak_mib']} |"
            )
            title = ""
    return "\n".join(lines)


if __name__ == "__main__":
    main()
