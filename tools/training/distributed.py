"""Several processes as one: what the scripts need of ``torchrun``, and nothing where there is a single process."""

import os
from contextlib import contextmanager
from datetime import timedelta

import torch
import torch.distributed as dist

from tools.console import MainProcessFailed

_PATIENCE = timedelta(hours=12)  # of processes that wait for process 0, while it downloads or decodes a data set


def rank():
    """This process's number, 0 without ``torchrun``."""
    return dist.get_rank() if dist.is_initialized() else 0


def world_size():
    """The number of processes, 1 without ``torchrun``."""
    return dist.get_world_size() if dist.is_initialized() else 1


@contextmanager
def process_group(device):
    """Join the group that ``torchrun`` describes for as long as the block runs: gloo, and NCCL between GPUs' tensors.

    Raises
    ------
    ValueError
        ``WORLD_SIZE`` asks for several processes, but was not set by ``torchrun``.
    """
    size = os.environ.get("WORLD_SIZE", "1")
    if size == "1":
        yield
        return
    missing = [name for name in ("RANK", "MASTER_ADDR", "MASTER_PORT") if name not in os.environ]
    if missing:
        raise ValueError(
            f"WORLD_SIZE is {size}, but {', '.join(missing)} not set; start several processes with "
            "torchrun --nproc-per-node=N, or unset WORLD_SIZE"
        )
    dist.init_process_group("cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo", timeout=_PATIENCE)
    try:
        yield
    finally:
        dist.destroy_process_group()


@contextmanager
def main_process_first():
    """Run the block in process 0, then in the others: one of them fills a cache, the others find it filled.

    Raises
    ------
    MainProcessFailed
        In the others, where the block failed in process 0.
    """
    if rank() == 0:
        done = False
        try:
            yield
            done = True
        finally:
            from_main_process(done)
        return
    if not from_main_process(None):
        raise MainProcessFailed("process 0 failed")
    yield


def sum_over_processes(*tensors):
    """Add up each tensor over the processes, in place."""
    if world_size() > 1:
        for tensor in tensors:
            dist.all_reduce(tensor)


def any_process(flag):
    """Whether ``flag`` is true (or how large the greatest one is) in any process; an int."""
    if world_size() == 1:
        return int(flag)
    value = torch.tensor(int(flag))  # on the CPU: to read it from a GPU would wait for all that is queued there
    dist.all_reduce(value, op=dist.ReduceOp.MAX)
    return int(value)


def from_main_process(value):
    """Process 0's ``value`` in every process."""
    if world_size() == 1:
        return value
    box = [value]
    dist.broadcast_object_list(box, src=0)
    return box[0]


def by_main_process(function):
    """What ``function()`` returns in process 0, the only one to call it, in every process.

    Raises
    ------
    MainProcessFailed
        In the others, where it failed in process 0.
    """
    value = None
    with main_process_first():
        if rank() == 0:
            value = function()
    return from_main_process(value)
