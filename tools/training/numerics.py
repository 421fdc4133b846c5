"""What a device computes with: the choice of device and precision, torch's switches, images to pretrained logits."""

import os
import platform
from dataclasses import dataclass
from pathlib import Path

import torch

PLAIN_CHUNK = 32  # images that go through the plain network at once on a CPU
PASSED_AT_ONCE = 1024  # images per step of a pass without gradients on a GPU (an estimate, not measured)
COMPILED_FROM = 10**6  # images that a run trains on, all epochs together, from which compiling may pay (likewise)
_AUTOCAST = {"bf16": torch.bfloat16, "fp16": torch.float16}


def choose_device(name):
    """The device that ``--device`` names: cpu, cuda, cuda:N, or auto, which is cuda where there is one.

    A bare ``cuda`` is the GPU of this process on its machine, where ``torchrun`` started several.

    Raises
    ------
    ValueError
        For another name, a GPU that this machine lacks, or one for several processes.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError:
        device = None
    if device is None or device.type not in ("cpu", "cuda"):
        raise ValueError(f"--device {name}: allowed are cpu, cuda, cuda:N and auto")
    if device.type == "cuda" and device.index is None:
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
    elif device.type == "cuda" and os.environ.get("LOCAL_WORLD_SIZE", "1") != "1":
        raise ValueError(f"--device {name}: torchrun gives each process a GPU of its own; take --device cuda")
    if device.type == "cuda" and device.index >= torch.cuda.device_count():
        raise ValueError(f"--device {name}: this machine has {torch.cuda.device_count()} CUDA devices")
    return device


def model_of(device):
    """The name of the CPU or GPU."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def choose_precision(name, device):
    """The precision that ``--precision`` names: fp32, tf32, bf16, fp16, or auto: fp32 on a CPU, fp16 on a GPU.

    Raises
    ------
    ValueError
        For one that the device lacks.
    """
    if name == "auto":
        return "fp32" if device.type == "cpu" else "fp16"
    if device.type == "cpu" and name in ("tf32", "fp16"):
        raise ValueError(f"--precision {name} needs a GPU; on a CPU take fp32 or bf16")
    if device.type == "cuda" and name in ("tf32", "bf16") and torch.cuda.get_device_capability(device) < (8, 0):
        # which emulates the one and ignores the other
        raise ValueError(f"--precision {name}: {torch.cuda.get_device_name(device)} has none; take fp16 or fp32")
    return name


@dataclass(frozen=True)
class Plan:
    """What a device gets; `plan_for` decides it.

    Attributes
    ----------
    waits : bool
        Whether each training step is looked at before its gradient is used, so that a run stops at the very first bad
        one. Else a step that is not finite changes nothing, by itself, and is reported at the end of its epoch: nothing
        in an epoch waits for the device. The optimiser is one fused kernel then.
    passed_at_once : int
        Images per step of the passes without gradients, where that is more than the batch size.
    compiled : bool
        Whether network, loss and gradient are compiled, and captured as one graph on a GPU; see
        `tools.training.step.Step`.
    note : str
        What a log should say of it.
    """

    waits: bool = True
    passed_at_once: int = 0
    compiled: bool = False
    note: str = ""


def plan_for(device, engine="plain", images=0, processes=1):
    """The one place that decides what a device gets.

    A CPU waits, and takes batches as they are. A GPU waits for nothing and takes larger batches where it needs no
    gradient. It compiles, which takes minutes, for a long run of a single process with all parts of the fast network:
    a plain network, the reference on every device, is never compiled, nor is anything that has to repeat its bits.

    Parameters
    ----------
    device : torch.device
    engine : str
        As ``--engine`` has it.
    images : int
        That the run trains on, all epochs together.
    processes : int
    """
    if device.type == "cpu":
        return Plan()
    against = {
        "not all parts of --engine": engine != "auto",
        "a short run": images < COMPILED_FROM,
        "several processes": processes > 1,
        "--deterministic": torch.are_deterministic_algorithms_enabled(),
    }
    reasons = [reason for reason, holds in against.items() if holds]
    return Plan(
        waits=False,
        passed_at_once=PASSED_AT_ONCE,
        compiled=not reasons,
        note=f"not compiled ({', '.join(reasons)})" if reasons else "compiled",
    )


def set_up_arithmetic(device, precision, deterministic, threads=0):
    """Set what torch keeps for the whole process: the GPU in use, TF32 or not, algorithms that repeat their bits, and
    the number of threads of a CPU's arithmetic (0: as it is).

    Mapping, loss and statistics are float32 or wider at all times, and so are the passes that estimate and test, but
    for their convolutions on a GPU: these round their factors to TF32 unless the precision is fp32, as published code
    does by torch's own default. ``tf32`` rounds the factors of every other matrix product of the process as well.
    """
    if threads:
        torch.set_num_threads(threads)
    if device.type == "cuda":
        torch.cuda.set_device(device)
        torch.backends.cudnn.allow_tf32 = precision != "fp32"
        torch.backends.cuda.matmul.allow_tf32 = precision == "tf32"
        torch.backends.cudnn.benchmark = not deterministic
    if deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # cuBLAS repeats its bits only with a workspace
        torch.use_deterministic_algorithms(True)
        torch.utils.deterministic.fill_uninitialized_memory = False  # none of it is read before it is written


def half_dtype(precision):
    """What a precision autocasts the network to while it trains; float32 for those that do not."""
    return _AUTOCAST.get(precision, torch.float32)


def chunk_size_of(network, device):
    """Images that go through ``network`` at once: as many as run fastest on a CPU, a whole batch on a GPU."""
    return network.batch_size or (PLAIN_CHUNK if device.type == "cpu" else 2**31 - 1)


def network_outputs(network, images, precision="fp32", chunk_size=None):
    """What a network gives, float32, for images (n, 3, h, w) in [0, 1], computed ``chunk_size`` images at a time."""
    chunk_size = chunk_size or chunk_size_of(network, images.device)
    dtype = _AUTOCAST.get(precision)
    with torch.autocast(images.device.type, dtype, enabled=dtype is not None):
        return torch.cat([network(chunk).float() for chunk in images.split(chunk_size)])
