"""The scripts called from Python: in a notebook, in a thread, twice in one process."""

import signal
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from importlib import import_module

import pytest
import torch

from data.files import read_json
from tests.system.processes import PARTS, ROOT, folder_of
from tools.training.run_folder import read_config
from tools.training.trainer import Trainer


@pytest.mark.parametrize("script", PARTS)
def test_main_returns_the_result_of_a_run_and_of_a_finished_one(tmp_path, monkeypatch, script):
    main = import_module(script).main
    command = ["--dataset", "synthetic", "--device", "cpu", "--mapping", "flm", "--epochs", "1", *PARTS[script]]
    command += ["--results-path", str(tmp_path)]
    result = main(command)
    assert result == read_json(folder_of(tmp_path) / "result.json")
    for step in ("estimate", "train", "evaluate"):
        monkeypatch.delattr(Trainer, step)
    assert main(command) == result


def test_main_in_a_thread_whatever_ctrl_c_does(tmp_path):
    """Programs with a window often leave Ctrl-C to the system; only the main thread may change that."""
    command = ["--dataset", "synthetic", "--device", "cpu", "--epochs", "0", *PARTS["train_vm"]]
    command += ["--results-path", str(tmp_path)]
    earlier = signal.signal(signal.SIGINT, signal.SIG_DFL)
    try:
        with ThreadPoolExecutor(1) as pool:
            result = pool.submit(import_module("train_vm").main, command).result()
    finally:
        signal.signal(signal.SIGINT, earlier)
    assert result["epochs"] == 0


def test_a_run_leaves_the_next_one_of_its_process_as_it_found_it(tmp_path):
    command = ["--dataset", "synthetic", "--device", "cpu", "--mapping", "flm", "--epochs", "0", *PARTS["train_vm"]]
    command += ["--results-path", str(tmp_path)]
    before = torch.get_num_threads(), torch.are_deterministic_algorithms_enabled()
    import_module("train_vm").main([*command, "--threads", str(before[0] + 1), "--deterministic"])
    assert read_config(folder_of(tmp_path) / "config.json")["starts"][0]["threads"] == before[0] + 1
    assert (torch.get_num_threads(), torch.are_deterministic_algorithms_enabled()) == before


def test_exit_code_of_a_finished_run(tmp_path):
    command = [sys.executable, "train_vm.py", "--dataset", "synthetic", "--epochs", "0", *PARTS["train_vm"]]
    command += ["--results-path", str(tmp_path)]
    for said in ("final accuracy", "is finished"):
        outcome = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
        assert outcome.returncode == 0 and said in outcome.stdout
        assert outcome.stderr.count("\n") == outcome.stderr.count("warning: "), outcome.stderr
