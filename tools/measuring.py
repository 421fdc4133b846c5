"""What a machine is and can do at most, and what a stretch of code takes of it: for the benchmarks."""

import ctypes
import time
from contextlib import suppress
from pathlib import Path

import torch

from tools.training.numerics import half_dtype, model_of, set_up_arithmetic


def synchronize(device):
    """Wait until a GPU has done all that it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def machine_name(device):
    """The GPU's name, or the CPU's with its cores in use and its vector instructions."""
    if device.type == "cuda":
        return model_of(device)
    return f"{model_of(device)}, {torch.get_num_threads()} cores, {torch.backends.cpu.get_cpu_capability()}"


def matrix_product_gflops(device, precision):
    """The best rate of a large matrix product, in 10^9 floating-point operations per second."""
    set_up_arithmetic(device, precision, False)
    size = 2048 if device.type == "cpu" else 8192
    a = torch.randn(size, size, device=device, dtype=half_dtype(precision))
    return 2 * size**3 / _best_time(lambda: a @ a, device) / 1e9


def memory_bandwidth(device):
    """The best rate of a large copy within the device's memory, bytes read and written, in 10^9 per second."""
    a = torch.ones(2**26 if device.type == "cpu" else 2**28, device=device)
    b = torch.empty_like(a)
    return 2 * a.nbytes / _best_time(lambda: b.copy_(a), device) / 1e9


def busy_time(intervals):
    """Length of the union of intervals (start, end)."""
    total, reached = 0.0, float("-inf")
    for start, end in sorted(intervals):
        total += max(0.0, end - max(start, reached))
        reached = max(reached, end)
    return total


class PeakMemory:
    """Memory that a stretch of code, which begins where this is made, needs at its highest beyond what was held before.

    On a GPU that of torch's allocator, else what of the process is resident.
    """

    def __init__(self, device):
        self.device = device
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
        with suppress(OSError, AttributeError):  # not Linux, or not allowed: a peak below an earlier one does not show
            ctypes.CDLL(None).malloc_trim(0)  # what was freed before, but the process still holds
            Path("/proc/self/clear_refs").write_text("5")
        self.before = self._highest()

    def bytes(self):
        """Of the stretch so far."""
        return self._highest() - self.before

    def _highest(self):
        if self.device.type == "cuda":
            return torch.cuda.max_memory_allocated(self.device)
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(1024 * int(line.split()[1]) for line in lines if line.startswith("VmHWM"))


def _best_time(function, device, repeats=5):
    times = []
    for _ in range(repeats):
        synchronize(device)
        start = time.perf_counter()
        function()
        synchronize(device)
        times.append(time.perf_counter() - start)
    return min(times)
