"""python -m tools.benchmark

Seconds per epoch of this project's training beside a plain loop, on the same images, network and recipe, in one run.

The yardstick is written the way published code of this field goes about it: a DataLoader whose two workers decode every
image again with PIL, the backbone as it comes (NCHW, eager), all logits kept for the estimate and counted by the
CPU, one-to-one matching by an arg-max for each class, full back-propagation, loss and accuracy read at every step. On
a GPU it trains under fp16 autocast with a GradScaler, does all else with TF32 in the convolutions, and has cuDNN repeat
its bits. It differs in one thing: the workers live on from epoch to epoch, as epochs are short here. All others are
checked to give its mapping and its loss, within what the precision allows, before they are timed.

On a CPU the contenders of a case take turns, so that a drifting machine slows them alike. On a GPU there are more of
them than time: they come one after the other, the most telling first, until --minutes are over. Given are medians of
the epochs behind the first. "of peak" is the arithmetic that the plain path would need in that time, as a share of what
a large matrix product reaches on the spot: work that is saved counts as done, so it can exceed 100 %.
"""

import json
import math
import tempfile
import time
from contextlib import nullcontext, suppress
from datetime import date
from pathlib import Path

import torch

from tools.console import Parser, user_errors
from models import SWITCHES
from tools.benchmark.ring import CASES, TOLERANCES, Loop, Ring
from tools.measuring import machine_name, matrix_product_gflops, memory_bandwidth
from tools.training.numerics import choose_device, choose_precision
from tools.training.run_folder import check_writable

# what is measured unless asked otherwise, on a CPU and on a GPU; the most telling first
DEFAULTS = {
    "case": (["resnet18-32", "resnet18-128", "efficientnet_lite0-128"], list(CASES)[:6]),
    "batch_size": ([256], [256, 64]),
    "precision": (["fp32"], ["fp16", "bf16", "tf32", "fp32"]),
    "train": (512, 2560),
    "test": (102, 1024),
    "epochs": (3, 2),
    "minutes": (math.inf, 9.0),
}
# on a GPU; name -> switches of the network, whether the step is compiled
ENGINES = {"eager": (tuple(SWITCHES), False), "compiled": (tuple(SWITCHES), True), "plain": ((), False)}


@user_errors()
def main(argv=None):
    args = parse(argv)
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
    """The settings with what the device gets where nothing else was asked for, but for precisions that it lacks."""
    asked = args.precision
    for name, defaults in DEFAULTS.items():
        setattr(args, name, getattr(args, name) or defaults[device.type == "cuda"])
    offered = []
    for precision in args.precision:
        with nullcontext() if asked else suppress(ValueError):
            offered.append(choose_precision(precision, device))
    args.precision = offered
    return args


def plan(args, device):
    """What is measured together, in this order: a list of (case, batch size, list of `Loop`)."""
    on_gpu = device.type == "cuda"
    loops = [Loop("published", "fp16", None) if on_gpu else Loop("plain", switches=None)]
    for precision in args.precision:
        suffix = "" if precision == "fp32" else f", {precision}"
        if on_gpu:
            for name, (parts, compiled) in ENGINES.items():
                loops.append(Loop(f"{precision}, {name}", precision, parts, compiled=compiled))
        else:
            loops += [Loop(f"train_vm{suffix}", precision), Loop(f"train_vm_fast{suffix}", precision, observe=True)]
    if args.switches:
        for part in SWITCHES:
            dropped = {part, "winograd"} if part == "fused-ops" else {part}  # winograd needs the fused convolutions
            name = "without " + " and ".join(name for name in SWITCHES if name in dropped)
            loops.append(Loop(name, args.precision[0], tuple(name for name in SWITCHES if name not in dropped)))
        loops.append(Loop("plain path", args.precision[0], ()))
        loops.append(Loop("torch.compile", args.precision[0], (), compiled=True))
    groups = [[loop] for loop in loops] if on_gpu else [loops]  # on a CPU they take turns
    return [(case, size, group) for size in args.batch_size for group in groups for case in args.case]


def measure(args, device, clock=time.monotonic):
    """Measure what `plan` says, as long as there is time; yields a dict for the machine, then one for each row."""
    start, longest, groups = clock(), {}, plan(args, device)
    used = {loop.precision for *_, loops in groups for loop in loops}
    ceilings = {name: round(matrix_product_gflops(device, name), 1) for name in TOLERANCES if name in used}
    yield {
        "date": date.today().isoformat(),
        "device": device.type,
        "machine": machine_name(device),
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
            for row in ring.measure(case, batch_size, loops):
                yield {"case": case, "title": CASES[case][2], "batch_size": batch_size} | row
            ring.clear()
            longest[kind] = max(longest.get(kind, 0), clock() - begin)


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

    Returns how many rows could not be measured.
    """
    failed, last = 0, None
    with open(path, "w", encoding="utf-8") if path else nullcontext() as file:
        for entry in report:
            if file:
                print(json.dumps(entry), file=file, flush=True)
            if "machine" in entry:
                columns = COLUMNS | (GPU_COLUMNS if entry["device"] == "cuda" else {})
                products = ", ".join(f"{name} {rate}" for name, rate in entry["matrix_product_gflops"].items())
                print(
                    f"{entry['machine']}; torch {entry['torch']}, {entry['mapping']}; "
                    f"median of {entry['epochs']} epochs after one to warm up; matrix product {products} GFLOP/s, "
                    f"memory {entry['memory_gb_per_s']} GB/s; {entry['date']}\n\n| setting | {' | '.join(columns)} |"
                )
                print("|" + " --- |" * (1 + len(columns)), flush=True)
                continue
            if "error" in entry:
                failed, cells = failed + 1, [f"{entry['loop']}: {entry['error']}"]
            else:
                values = [(entry.get(key), shown) for key, shown in columns.values()]
                cells = ["–" if value is None else shown.format(value) for value, shown in values]
            title = f"{entry['title']}, batch {entry['batch_size']}"
            print(f"| {'' if title == last else title} | {' | '.join(cells)} |", flush=True)
            last = title
    return failed


if __name__ == "__main__":
    main()
