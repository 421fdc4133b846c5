"""The benchmarks through their command lines, at sizes that show that they run and agree, not how fast."""

import json

import pytest
import torch

from models import SWITCHES
from tools import benchmark, benchmark_mapping


def test_contenders_agree_and_every_row_adds_up(tmp_path, capsys):
    benchmark.main(
        [
            "--case",
            "resnet18-32",
            "--train",
            "8",
            "--test",
            "4",
            "--batch-size",
            "4",
            "--epochs",
            "1",
            "--device",
            "cpu",
            "--json",
            str(tmp_path / "figures.json"),
        ]
    )
    report = json.loads((tmp_path / "figures.json").read_text())
    (case,) = report["cases"]
    assert case["images"] == [8, 4] and max(case["agreement"].values()) <= 1e-4
    assert [row["contender"] for row in case["rows"]] == ["plain", "train_vm", "train_vm_fast"]
    plain, ours, fast = case["rows"]
    for row in case["rows"]:
        assert row["epoch"] == pytest.approx(row["estimate"] + row["train"] + row["test"], abs=0.01)
        assert row["speedup"] == pytest.approx(plain["epoch"] / row["epoch"], rel=0.02, abs=0.01)
    assert plain["estimate"] > 0 and ours["estimate"] > 0 and fast["estimate"] == 0
    table = [line.split("|") for line in capsys.readouterr().out.splitlines() if line.startswith("|")]
    assert len(table) == 5 and {len(row) for row in table} == {12}


def test_a_wrong_mapping_or_loss_is_not_timed():
    class Contender:
        def __init__(self, weights, loss):
            self.weights, self.loss = weights, loss

        def epoch(self, epoch):
            return {"estimate": 1}

    plain = Contender(torch.zeros(2), 1.0)
    assert benchmark.check_agreement(plain, Contender(torch.zeros(2), 1.00005))["loss"] == pytest.approx(5e-5, rel=1e-3)
    for other in (Contender(torch.full((2,), 2e-4), 1.0), Contender(torch.zeros(2), 1.0002)):
        with pytest.raises(ValueError, match="disagree"):
            benchmark.check_agreement(plain, other)


def test_mapping_benchmark(capsys):
    benchmark_mapping.main(["--source", "50", "--target", "7", "--samples", "600", "--mapping", "ilm", "blmp"])
    _, _, ilm, blmpp = (line.split() for line in capsys.readouterr().out.splitlines())
    assert ilm[0] == "ilm" and blmpp[0] == "blmpp" and ilm[-1] == blmpp[-1] == "dense"
    assert float(ilm[2]) > 0 and float(blmpp[4]) >= 0


@pytest.mark.parametrize(
    "main, arguments, said",
    [
        (benchmark.main, ["--case", "resnet"], "invalid choice: 'resnet'"),
        (benchmark.main, ["--train", "0"], "--train must be 1 or more, got 0"),
        (benchmark.main, ["--device", "gpu"], "allowed are cpu, cuda"),
        (benchmark.main, ["--json", "/proc/version/figures.json"], "choose another --json"),
        (benchmark_mapping.main, ["--device", "gpu"], "allowed are cpu, cuda"),
        (benchmark_mapping.main, ["--samples", "0"], "--samples must be 1 or more, got 0"),
        (benchmark_mapping.main, ["--mapping", "rlm"], "nothing to measure"),
        (benchmark_mapping.main, ["--mapping", "bml"], "closest: blm"),
    ],
)
def test_bad_input(main, arguments, said, capsys):
    with pytest.raises(SystemExit) as caught:
        main(arguments)
    error = capsys.readouterr().err
    assert caught.value.code == 2 and said in error and error.count("\n") == 1


def test_the_whole_but_for_each_part(monkeypatch):
    made, epochs = {}, []

    class Contender:
        description = "stand-in"

        def __init__(self, switches, classifier, *rest, **options):
            made[len(made)] = switches
            self.weights, self.loss = classifier, 1.0

        def epoch(self, epoch):
            epochs.append((self, epoch))
            return dict.fromkeys(benchmark.STEPS, 1.0)

    monkeypatch.setattr(benchmark, "Ours", Contender)
    monkeypatch.setattr(benchmark, "Plain", lambda folder, *rest: Contender((), *rest))
    monkeypatch.setattr(benchmark, "check_agreement", lambda *both: [each.epoch(0) for each in both] and {})
    report = benchmark.measure(
        benchmark.parse(
            [
                "--case",
                "resnet18-32",
                "--switches",
                "--train",
                "2",
                "--test",
                "2",
                "--epochs",
                "1",
            ]
        )
    )
    names = [row["contender"] for row in report["cases"][0]["rows"]]
    dropped = [name.removeprefix("without ").split(" and ") for name in names[3:-2]]
    assert [parts[0] for parts in dropped] == list(SWITCHES) and names[-2:] == ["plain path", "torch.compile"]
    assert [parts for parts in dropped if len(parts) > 1] == [["fused-ops", "winograd"]]
    assert list(made.values())[3:-2] == [tuple(name for name in SWITCHES if name not in parts) for parts in dropped]
    for contender in {each for each, _ in epochs}:
        assert [epoch for each, epoch in epochs if each is contender] == [0, 1], "one to warm up, one that is timed"


@pytest.mark.parametrize("mapping", ["ilm", "blm"])
def test_plain_loop_gives_the_other_mappings_too(tmp_path, mapping):
    arguments = ["--case", "resnet18-32", "--train", "24", "--test", "4", "--batch-size", "12", "--epochs", "1"]
    report = benchmark.measure(benchmark.parse([*arguments, "--device", "cpu", "--mapping", mapping]))
    assert report["cases"][0]["agreement"]["mapping"] < 1e-6
