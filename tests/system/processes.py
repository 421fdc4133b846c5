"""The scripts in processes of their own, which start at once: forked from one that has imported everything.

They are processes like any other: they can be killed, get signals, and are told by the environment that they are one
of several, as ``torchrun`` tells them.
"""

import json
import multiprocessing
import os
import socket
import sys
import threading
from importlib import import_module
from multiprocessing.connection import wait
from pathlib import Path

from data.files import read_json
from tools.training.run_folder import load_checkpoint

ROOT = Path(__file__).parents[2]
_QUIET = {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "passive", "PYTHONPATH": f"{ROOT}"}
PARTS = {
    "train_vm": ["--backbone", "efficientnet_lite0", "--canvas-size", "48"],
    "train_vm_fast": ["--backbone", "efficientnet_lite0", "--canvas-size", "48"],
    "train_vlm": ["--backbone", "tiny-test", "--weights", "none", "--lr", "10"],
}

# Starting a process asks for the end of all others, and of two threads that ask for one only one is told it; the other
# is told 255.
_ONE_ASKS = threading.Lock()


def _context():
    context = multiprocessing.get_context("forkserver")
    os.environ.update(_QUIET)  # of the server, and so of all that it forks
    context.set_forkserver_preload(["tests.system.processes_preload"])
    return context


def _run(script, arguments, log, errors, environment):
    for path, descriptor in ((log, 1), (errors, 2)):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND), descriptor)
    sys.stdout = os.fdopen(1, "w", closefd=False)
    sys.stderr = os.fdopen(2, "w", buffering=1, closefd=False)
    os.environ.update(environment)
    try:
        result = import_module(script).main(arguments)
        sys.exit(result if isinstance(result, int) else 0)  # the scripts return what result.json holds
    finally:
        sys.stdout.flush()


def start(script, results, *arguments, environment=None):
    """Start a script on the synthetic data set; a `multiprocessing.Process` whose output goes to ``results``.log."""
    results = Path(results)
    results.parent.mkdir(parents=True, exist_ok=True)
    command = ["--dataset", "synthetic", "--device", "cpu", "--results-path", str(results)]  # a GPU's bits may differ
    return start_module(script, log_of(results), *command, *PARTS[script], *arguments, environment=environment)


def start_module(module, log, *arguments, errors=None, environment=None):
    """Start the ``main`` of any module; a `multiprocessing.Process` whose output is added to the file ``log``.

    What it writes to stderr goes there too, or to the file ``errors``.
    """
    command = [str(argument) for argument in arguments]
    process = _context().Process(target=_run, args=(module, command, str(log), str(errors or log), environment or {}))
    with _ONE_ASKS:
        process.start()
    return process


def run(script, results, *arguments, timeout=600):
    """Run a script to its end; exit code."""
    process = start(script, results, *arguments)
    return finish(process, timeout)


def finish(process, timeout=600):
    """Wait for a process; its exit code. One that hangs is killed and fails the test."""
    over = wait([process.sentinel], timeout)
    with _ONE_ASKS:
        if not over:
            process.kill()
        process.join()
    assert over, f"still running after {timeout} s"
    return process.exitcode


def start_group(count, script, results, *arguments):
    """Start a script as ``count`` processes that work together."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    return [
        start(
            script,
            results,
            *arguments,
            environment={
                "RANK": str(rank),
                "LOCAL_RANK": str(rank),
                "WORLD_SIZE": str(count),
                "LOCAL_WORLD_SIZE": str(count),
                "MASTER_ADDR": "127.0.0.1",
                "MASTER_PORT": str(port),
            },
        )
        for rank in range(count)
    ]


def log_of(results):
    return Path(f"{results}.log")


def folder_of(results):
    """The only run folder below ``results``, None while there is none."""
    found = [path.parent for path in Path(results).rglob("config.json")]
    assert len(found) <= 1
    return found[0] if found else None


def outcome(results):
    """Everything that a finished run leaves, less times and places, in a form to compare bit by bit."""
    folder = folder_of(results)
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    for line in lines:
        del line["seconds"]
    checkpoints = {name: _plain(load_checkpoint(folder / name)) for name in ("last.safetensors", "best.safetensors")}
    return {"result": read_json(folder / "result.json"), "metrics": lines, **checkpoints}


def _plain(value):
    if hasattr(value, "numpy"):
        return str(value.dtype), tuple(value.shape), value.contiguous().numpy().tobytes()
    if isinstance(value, dict):
        return {k: _plain(v) for k, v in value.items() if k not in ("seconds", "results_path", "workers", "overwrite")}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    return value
