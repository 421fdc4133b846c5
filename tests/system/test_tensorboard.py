"""--tensorboard: the run folder gains event files that hold the metrics, and nothing without the flag."""

import json

import pytest

from tests.conftest import train


def test_events_are_the_metrics(tmp_path):
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    run = train("train_vm", tmp_path, "--mapping", "flm", "--epochs", "2", "--tensorboard")
    metrics = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    events = accumulator.EventAccumulator(str(run)).Reload()
    names = {"train_loss", "train_accuracy", "test_accuracy", "mapping_change", "lr"}
    assert set(events.Tags()["scalars"]) == names
    for name in names:
        logged = {event.step: event.value for event in events.Scalars(name)}
        expected = {line["epoch"]: line[name] for line in metrics if line[name] is not None}
        assert logged == pytest.approx(expected, rel=1e-6)


def test_no_events_unasked(vm_run):
    assert not list(vm_run.glob("events.*"))
