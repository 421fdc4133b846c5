"""Several processes together: the same mapping, losses and accuracy as one, and none is left behind by another."""

import json
import os
import re
import signal
import subprocess
import sys
import time

import pytest
import torch

from tests.system.processes import PARTS, ROOT, finish, folder_of, log_of, outcome, start_group
from tools.training.run_folder import load_checkpoint

# 64 training images in batches of 22, 32 test images: neither divides by 3, and the last batch of 20 not either
SHORT = ["--epochs", 2, "--batch-size", 22]


def together(count, script, results, *arguments):
    """Run a script as ``count`` processes; metrics and last checkpoint."""
    # small steps: at the first ones Adam turns any rounding in a gradient that is nearly zero into a whole step
    slow = [] if script == "train_vlm" else ["--lr", 0.003]
    processes = start_group(count, script, results, *SHORT, *slow, *arguments)
    assert [finish(process) for process in processes] == [0] * count, log_of(results).read_text()
    log = log_of(results).read_text()
    assert log.count("epoch 2/2") == log.count("run folder: ") == 1 and "error" not in log
    folder = folder_of(results)
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return lines, load_checkpoint(folder / "last.safetensors")


@pytest.mark.parametrize(
    "script, mapping, counts",
    [
        ("train_vm", "blmpp", (2, 3)),
        ("train_vm_fast", "blm", (3,)),
        ("train_vlm", "linear", (2,)),
    ],
)
def test_any_number_of_processes_gives_the_same(tmp_path, script, mapping, counts):
    lines, checkpoint = together(1, script, tmp_path / "1", "--mapping", mapping)
    for count in counts:
        others, other = together(count, script, tmp_path / str(count), "--mapping", mapping)
        for mine, theirs in zip(lines, others, strict=True):
            assert theirs["train_loss"] == pytest.approx(mine["train_loss"], rel=1e-5)
            assert theirs["train_accuracy"] * 64 == pytest.approx(round(theirs["train_accuracy"] * 64))
            assert theirs["test_accuracy"] == mine["test_accuracy"]
        for key, value in checkpoint["mapping"].items():
            if isinstance(value, torch.Tensor):
                torch.testing.assert_close(other["mapping"][key], value, rtol=1e-4, atol=1e-6)
        torch.testing.assert_close(other["program"], checkpoint["program"], rtol=1e-3, atol=1e-4)


def test_all_end_where_the_first_process_is_stopped_in_zero_shot(tmp_path):
    results, stop = tmp_path / "results", tmp_path / "stop.py"
    stop.write_text(
        "import os, signal\n"
        "from tools.training.build import System\n"
        "measure = System.zero_shot_accuracy\n"
        "def stopped(*arguments):\n"
        "    os.kill(os.getpid(), signal.SIGTERM)\n"
        "    return measure(*arguments)\n"
        "System.zero_shot_accuracy = stopped\n"
    )
    processes = start_group(2, "train_vlm", results, *SHORT, "--mapping", "flm", "--plugin", stop)
    codes = [finish(process) for process in processes]
    log = log_of(results).read_text()
    assert codes[0] == 143 and codes[1] in (2, 143), log
    assert "SIGTERM received" in log and "Traceback" not in log


def test_zero_shot_is_measured_by_the_first_process_alone_and_once(tmp_path):
    """The others wait for what it found; the data set's images go through the CLIP one time, not once a process."""
    results, arguments = tmp_path / "results", ["--mapping", "flm", "--batch-size", 16]
    spy = tmp_path / "spy.py"
    spy.write_text(
        "import os\nfrom tools.training.build import System\nmeasure = System.zero_shot_accuracy\n\n\n"
        "def spied(*args):\n    print('measuring in', os.environ['RANK'], flush=True)\n    return measure(*args)\n\n\n"
        "System.zero_shot_accuracy = spied\n"
    )
    for _ in range(2):  # the second time it is on record
        processes = start_group(2, "train_vlm", results, *arguments, "--epochs", 1, "--plugin", spy)
        assert [finish(process) for process in processes] == [0, 0], log_of(results).read_text()
        (folder_of(results) / "result.json").unlink()
    log = log_of(results).read_text()
    assert log.count("measuring in") == 1 and "measuring in 0" in log
    assert log.count("without reprogramming: ") == 2 and "going on after epoch 1" in log


def test_processes_that_were_stopped_go_on_as_if_they_had_not_been(tmp_path):
    """With statistics in the checkpoint: those of all processes, not of the first one alone."""
    arguments = ["--epochs", 4, "--batch-size", 22, "--mapping", "blm"]
    ends = []
    for name in ("alone", "stopped"):
        results = tmp_path / name
        if name == "stopped":
            processes = start_group(2, "train_vm_fast", results, *arguments)
            wait_for(lambda: "epoch 2/4" in log_of(tmp_path / "stopped").read_text())
            os.kill(processes[0].pid, signal.SIGTERM)
            assert [finish(process) for process in processes] == [143, 143]
        processes = start_group(2, "train_vm_fast", results, *arguments)
        assert [finish(process) for process in processes] == [0, 0], log_of(results).read_text()
        ends.append(outcome(results))
    assert "going on after epoch" in log_of(tmp_path / "stopped").read_text()
    assert ends[0] == ends[1]


@pytest.mark.parametrize(
    "flags, words",
    [
        (["--canvas-size", 16], "canvas 16x16"),  # each process finds out by itself
        (["--dataset", "sun397", "--reprogramming", "watermarking"], "sun397"),  # the first one does, the others wait
        (["--epochs", -1], "--epochs must be 0 or more"),  # before they have joined
    ],
)
def test_one_process_speaks_and_all_end(tmp_path, flags, words):
    first, second = start_group(2, "train_vm", tmp_path / "results", *SHORT, *flags)
    assert finish(first) == 2
    second.terminate()  # as torchrun does
    assert finish(second) in (2, -signal.SIGTERM)
    log = log_of(tmp_path / "results").read_text()
    assert log.count("error: ") == 1 and log.count("\n") == 1 and words in log


def test_a_signal_to_one_process_stops_all(tmp_path):
    processes = start_group(2, "train_vm", tmp_path / "results", "--epochs", 50)
    wait_for(lambda: folder_of(tmp_path / "results") and "epoch 1/50" in log_of(tmp_path / "results").read_text())
    os.kill(processes[1].pid, signal.SIGTERM)
    assert [finish(process) for process in processes] == [143, 143]
    log = log_of(tmp_path / "results").read_text()
    assert log.count("SIGTERM received: stopped after a batch") == 1 and "Traceback" not in log


def test_a_process_that_dies_ends_the_others_and_is_named(tmp_path):
    results = tmp_path / "results"
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--nproc-per-node=3",
        "--master-port=0",
        "--standalone",
        str(ROOT / "train_vm.py"),
        "--dataset",
        "synthetic",
        "--epochs",
        "500",
        "--results-path",
        str(results),
        *PARTS["train_vm"],
    ]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "passive"}
    with open(tmp_path / "log", "w+") as log:
        launcher = subprocess.Popen(command, stdout=log, stderr=log, env=environment)
        try:
            wait_for(lambda: "epoch 1/500" in (tmp_path / "log").read_text())
            workers = children(launcher.pid)
            victim = next(pid for pid in workers if environ(pid)["RANK"] == "1")
            os.kill(victim, signal.SIGKILL)
            assert launcher.wait(timeout=600) == 1
        finally:
            launcher.kill()
            launcher.wait()
    wait_for(lambda: not any(os.path.exists(f"/proc/{pid}") for pid in workers))
    text = (tmp_path / "log").read_text()
    assert re.search(rf"rank\s*:\s*1 .*\n\s*exitcode\s*:\s*-9 \(pid: {victim}\)", text), text


def wait_for(condition, timeout=600):
    until = time.monotonic() + timeout
    while not condition():
        assert time.monotonic() < until, f"not so after {timeout} s"
        time.sleep(0.05)


def children(pid):
    return [int(child) for child in open(f"/proc/{pid}/task/{pid}/children").read().split()]


def environ(pid):
    pairs = open(f"/proc/{pid}/environ").read().split("\0")
    return dict(pair.split("=", 1) for pair in pairs if "=" in pair)
