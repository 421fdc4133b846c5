"""Runs on this machine: processes that take turns on its GPUs or share its cores."""

import os
import signal
import subprocess
from contextlib import suppress

import torch

from data.memory import num_cores


class LocalRunner:
    """Runs processes of this machine, at most ``parallel`` at a time, each with a GPU or its share of the cores.

    Parameters
    ----------
    parallel : int
    gpus : list of str
        As ``CUDA_VISIBLE_DEVICES`` names them; empty on a machine without.
    """

    remote = False  # runs end with this process

    def __init__(self, parallel, gpus):
        self.parallel = parallel
        self._gpus = gpus
        self._free = list(range(parallel))
        self._processes = {}

    def room(self):
        """How many more runs can be started now."""
        return len(self._free)

    def start(self, cells):
        """Start the cells, no more of them than there is room for."""
        for cell in cells:
            slot = self._free.pop(0)
            environment = os.environ | {"PYTHONUNBUFFERED": "1"}
            if self._gpus:
                environment["CUDA_VISIBLE_DEVICES"] = self._gpus[slot % len(self._gpus)]
            elif self.parallel > 1:
                environment.setdefault("OMP_NUM_THREADS", str(max(1, num_cores() // self.parallel)))
            # a session of its own: Ctrl-C reaches this process alone, which then asks each run to end, once
            how = {"stdin": subprocess.DEVNULL, "stderr": subprocess.STDOUT, "start_new_session": True}
            with open(cell.log, "ab") as log:
                self._processes[cell.name] = slot, subprocess.Popen(cell.command, env=environment, stdout=log, **how)

    def exit_code(self, cell):
        """None while the run is not over."""
        slot, process = self._processes[cell.name]
        code = process.poll()
        if code is not None:
            del self._processes[cell.name]
            self._free.append(slot)
        return code

    def stop(self, cells, kill=False):
        """SIGTERM: a run finishes its batch, saves and ends; or SIGKILL, to its decoding threads and all."""
        for cell in cells:
            with suppress(ProcessLookupError):
                os.killpg(self._processes[cell.name][1].pid, signal.SIGKILL if kill else signal.SIGTERM)


def find_gpus(cells):
    """The GPUs to hand out: none where no cell would use one."""
    if all(cell.cfg.device == "cpu" for cell in cells) or not torch.cuda.is_available():
        return []
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    return visible.split(",") if visible else [str(i) for i in range(torch.cuda.device_count())]
