"""Numbers that go wrong and memory that runs out: where a run stops, what it skips, what it keeps."""

import json
import re

import pytest
import torch

import train_vm
import train_vm_fast
from tests.system.processes import PARTS, folder_of, outcome
from tools.training import build as assembly
from tools.training.run_folder import load_checkpoint

# two batches of 32 an epoch; estimation and evaluation run without gradient, one and two batches
COMMAND = ["--dataset", "synthetic", "--mapping", "blm", "--epochs", "4", "--batch-size", "32", *PARTS["train_vm"]]


@pytest.fixture
def sabotage(monkeypatch):
    """``sabotage(when)``: logits become NaN in calls of the network for which ``when(number, with_gradient)``."""

    def install(when, effect=lambda logits: logits * float("nan")):
        counts = {True: 0, False: 0}

        def spoil(network, images, logits):
            trained = torch.is_grad_enabled()
            counts[trained] += 1
            return effect(logits) if when(counts[trained] - 1, trained) else logits

        def build(*args, **kwargs):
            network = original(*args, **kwargs)
            network.register_forward_hook(spoil)
            return network

        monkeypatch.setattr(assembly, "build_network", build)
        return counts

    original = assembly.build_network
    yield install
    monkeypatch.setattr(assembly, "build_network", original)


def run(results, *flags, script=train_vm):
    """Exit code of a script in this process."""
    try:
        script.main([*COMMAND, "--results-path", str(results), *flags])
    except SystemExit as error:
        return error.code
    return 0


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    results = tmp_path_factory.mktemp("alone")
    assert run(results) == 0
    return outcome(results)


def test_a_loss_that_is_nan_stops_the_run_at_its_step(sabotage, alone, tmp_path, capsys, monkeypatch):
    sabotage(lambda number, trained: trained and number == 3)
    assert run(tmp_path) == 3
    last = folder_of(tmp_path) / "last.safetensors"
    error = capsys.readouterr().err
    assert error.startswith("error: epoch 2, batch 2, learning rate 0.01: the loss or its gradient is not finite")
    assert f"last good checkpoint: {last} (1 epochs)" in error and error.count("\n") == 1
    assert len(load_checkpoint(last)["metrics"]) == 1 and load_checkpoint(last)["program"].isfinite().all()
    monkeypatch.undo()
    assert run(tmp_path) == 0  # nothing of the bad step is in what was kept
    assert outcome(tmp_path) == alone


def test_nan_in_the_first_step_has_no_checkpoint_to_name(sabotage, tmp_path, capsys):
    sabotage(lambda number, trained: trained)
    assert run(tmp_path) == 3
    assert "epoch 1, batch 1, learning rate 0.01" in (error := capsys.readouterr().err)
    assert "last good checkpoint: none yet" in error
    assert not (folder_of(tmp_path) / "last.safetensors").exists()


@pytest.mark.parametrize("script", [train_vm, train_vm_fast])
def test_skipping_counts_and_goes_on(sabotage, tmp_path, capsys, script):
    sabotage(lambda number, trained: trained and number in (0, 3))
    assert run(tmp_path, "--on-nonfinite", "skip", script=script) == 0
    assert "2 steps were skipped: their loss or gradient was not finite" in capsys.readouterr().out
    folder = folder_of(tmp_path)
    assert json.loads((folder / "result.json").read_text())["skipped_steps"] == 2
    checkpoint = load_checkpoint(folder / "last.safetensors")
    assert checkpoint["skipped_steps"] == 2 and checkpoint["program"].isfinite().all()
    # Adam's own count: eight batches less two
    assert checkpoint["optimizers"][0][0]["step"] == 6
    assert [line["epoch"] for line in checkpoint["metrics"]] == [0, 1, 2, 3]


def test_skipping_has_an_end(sabotage, tmp_path, capsys):
    sabotage(lambda number, trained: trained and number >= 2)
    assert run(tmp_path, "--on-nonfinite", "skip") == 3
    assert "epoch 2, learning rate 0.01: no batch was finite" in capsys.readouterr().err
    assert len(load_checkpoint(folder_of(tmp_path) / "last.safetensors")["metrics"]) == 1


def test_nothing_is_said_of_steps_where_none_was_skipped(alone):
    assert "skipped_steps" not in alone["result"]


def second_estimation(number, trained):
    """Calls without gradient: two batches of estimation, one of evaluation, an epoch."""
    return not trained and number == 4


def test_a_mapping_that_is_nan_stops_the_run(sabotage, alone, tmp_path, capsys, monkeypatch):
    sabotage(second_estimation)
    assert run(tmp_path) == 3
    error = capsys.readouterr().err
    assert re.match(r"error: epoch 2, estimating the mapping, learning rate 0\.01: logits were not finite", error)
    assert "last.safetensors (1 epochs)" in error
    monkeypatch.undo()
    assert run(tmp_path) == 0
    assert outcome(tmp_path) == alone


def test_a_skipped_estimation_keeps_the_mapping_before(sabotage, tmp_path):
    sabotage(second_estimation)
    assert run(tmp_path, "--on-nonfinite", "skip") == 0
    folder = folder_of(tmp_path)
    changes = [line["mapping_change"] for line in load_checkpoint(folder / "last.safetensors")["metrics"]]
    assert changes[0] is None and changes[1] == 0 and changes[2] > 0
    assert json.loads((folder / "result.json").read_text())["skipped_steps"] == 1


def test_the_first_estimation_can_not_be_skipped(sabotage, tmp_path, capsys):
    sabotage(lambda number, trained: not trained)
    assert run(tmp_path, "--on-nonfinite", "skip") == 3
    assert "epoch 1, estimating the mapping" in capsys.readouterr().err


def test_a_pattern_that_overflows_is_not_kept(tmp_path, capsys, monkeypatch):
    real_step, calls = torch.optim.Adam.step, []

    def step(self, *args, **kwargs):
        real_step(self, *args, **kwargs)
        calls.append(None)
        if len(calls) == 4:  # the last batch of the second epoch, after which no loss would show it
            self.param_groups[0]["params"][0].data[0, 0, 0] = float("inf")

    monkeypatch.setattr(torch.optim.Adam, "step", step)
    assert run(tmp_path) == 3
    assert "epoch 2, learning rate 0.01: the pattern or the mapping is not finite" in capsys.readouterr().err
    assert load_checkpoint(folder_of(tmp_path) / "last.safetensors")["program"].isfinite().all()


@pytest.mark.parametrize("trained", [True, False])
def test_memory_that_runs_out_halves_the_chunks(sabotage, alone, tmp_path, capsys, trained):
    def burst(logits):
        raise torch.OutOfMemoryError("CUDA out of memory.")

    counts = sabotage(lambda number, grad: grad == trained and number == 2, burst)
    assert run(tmp_path) == 0
    assert capsys.readouterr().out.count("out of memory: going on in chunks of 16 images (same result)") == 1
    assert counts[True] > 8  # calls, where eight batches need eight
    halved = outcome(tmp_path)
    for line, other in zip(halved["metrics"], alone["metrics"], strict=True):
        assert line["train_loss"] == pytest.approx(other["train_loss"], rel=1e-3)
    assert halved["metrics"][0]["train_loss"] == pytest.approx(alone["metrics"][0]["train_loss"], rel=1e-5)


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory."),
        RuntimeError("GET was unable to find an engine to execute this computation"),  # cuDNN's way of saying so
    ],
)
def test_memory_that_holds_no_image(sabotage, tmp_path, capsys, error):
    def burst(logits):
        raise error

    sabotage(lambda number, trained: True, burst)
    assert run(tmp_path) == 1
    printed = capsys.readouterr()
    sizes = [int(size) for size in re.findall(r"in chunks of (\d+) images", printed.out)]
    assert sizes == [16, 8, 4, 2, 1]
    assert printed.err.startswith("error: not even one image at a time fits") and printed.err.count("\n") == 1
