"""python -m tools.benchmark_mapping --source 21841 --target 10000 --samples 1000000 --mapping ilm blm blmpp

Seconds and peak memory of estimating label mappings from a stream of logits, each mapping in a fresh process.

The logits are windows at random offsets into one batch of twice the width, with a random maximum for each
sample: new predictions in every batch at hardly a cost of their own, so that it is the estimation that is
measured. "observe" is the whole stream, "refresh" turns its statistics into the mapping. "peak" is by how
much the process (on CUDA, its allocator), at its highest, exceeded what it held once its logits were made: it
counts statistics, scratch and mapping, but neither logits nor torch.
"""

import multiprocessing
import time
import warnings
from concurrent.futures import ProcessPoolExecutor

import torch

from tools.console import Parser, user_errors
from mapping import build_mapping, check_mapping_name
from tools.measuring import PeakMemory, synchronize
from tools.training.numerics import choose_device

_HIGHEST = 6.0  # one in a billion normal logits is higher; some 1 % of the softmax at S = 21841


@user_errors()
def main(argv=None):
    args = parse(argv)
    print(
        f"S={args.source} T={args.target} n={args.samples} batch={args.batch_size} {args.device}, torch "
        f"{torch.__version__}, {torch.get_num_threads()} threads"
    )
    print(f"{'mapping':8} {'observe s':>10} {'samples/s':>10} {'refresh s':>10} {'peak MB':>9}  statistics")
    setting, failed = (args.source, args.target, args.samples, args.batch_size, args.device), 0
    for name in args.mapping:
        with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
            try:
                observe, refresh, peak, statistics = pool.submit(measure, name, *setting).result()
            except Exception as error:  # memory, a GPU can fail in any way, up to the end of the process
                failed += 1
                print(f"{name:8} " + " ".join(f"{type(error).__name__}: {error}".split())[:300], flush=True)
                continue
        rate = args.samples / observe
        row = f"{name:8} {observe:10.1f} {rate:10.0f} {refresh:10.2f} {peak / 1e6:9.0f}  {statistics}"
        print(row, flush=True)
    if failed:
        raise ValueError(f"{failed} of the mappings could not be measured; each says why")


def parse(argv):
    parser = Parser(prog="python -m tools.benchmark_mapping", description=__doc__)
    parser.add_argument("--source", type=int, default=21841, help="pretrained labels S (21841)")
    parser.add_argument("--target", type=int, default=10000, help="downstream labels T (10000)")
    parser.add_argument("--samples", type=int, default=1_000_000, help="samples n (1000000)")
    parser.add_argument("--batch-size", type=int, default=256, help="samples a batch (256)")
    parser.add_argument("--device", default="cpu", help="cpu, cuda, cuda:N or auto (cpu)")
    parser.add_argument(
        "--mapping",
        nargs="+",
        default=["flm", "ilm", "blm", "blmpp"],
        metavar="NAME",
        help="estimated mappings to measure (flm ilm blm blmpp)",
    )
    args = parser.parse_args(argv)
    for option in ("source", "target", "samples", "batch_size"):
        if getattr(args, option) < 1:
            parser.error(f"--{option.replace('_', '-')} must be 1 or more, got {getattr(args, option)}")
    try:
        args.device = choose_device(args.device)
        args.mapping = [check_mapping_name(name) for name in args.mapping]
        for name in args.mapping:
            if not build_mapping(name, args.source, args.target).estimated:
                raise ValueError(f"mapping {name!r} is not estimated, so there is nothing to measure")
    except ValueError as error:
        parser.error(str(error))
    return args


def measure(name, num_source, num_target, num_samples, batch_size, device):
    """Estimate one mapping from a stream of `num_samples` made-up samples.

    Returns
    -------
    observe, refresh : float
        Seconds.
    peak : int
        Bytes at the highest, over those held before.
    statistics : str
        "sparse" or "dense": what the table was at the end of the stream.
    """
    warnings.simplefilter("ignore")  # labels without a sample are to be expected where n is not far above T
    generator = torch.Generator().manual_seed(0)
    pool = torch.randn(batch_size, 2 * num_source, generator=generator).to(device)
    warm_up = build_mapping(name, 100, 10).to(device)  # a small task first: torch's own buffers do not count
    warm_up.observe(torch.randn(batch_size, 100, device=device), torch.arange(batch_size) % 10)
    warm_up.refresh()

    memory = PeakMemory(device)
    mapping = build_mapping(name, num_source, num_target).to(device)
    start = time.perf_counter()
    for first in range(0, num_samples, batch_size):
        size = min(batch_size, num_samples - first)
        offset = int(torch.randint(num_source, (), generator=generator))
        labels = torch.randint(num_target, (size,), generator=generator)
        logits = pool[:size, offset : offset + num_source]
        predicted = torch.randint(num_source, (size, 1), generator=generator).to(device)
        replaced = logits.gather(1, predicted)
        logits.scatter_(1, predicted, _HIGHEST)
        mapping.observe(logits, labels.to(device))
        logits.scatter_(1, predicted, replaced)
    synchronize(device)
    observed = time.perf_counter()
    statistics = "sparse" if getattr(mapping._statistics.table(), "is_sparse", False) else "dense"
    mapping.refresh()
    synchronize(device)
    refreshed = time.perf_counter()
    return observed - start, refreshed - observed, memory.bytes(), statistics


if __name__ == "__main__":
    main()
