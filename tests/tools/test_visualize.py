"""tools.visualize through its command line, by the numbers that it writes beside the figures."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import train_vm
from tests.conftest import BACKBONES, SHARED
from tools import visualize
from tools.training.pattern_image import pattern_picture
from tools.training.run_folder import load_checkpoint
from tools.visualize import block_order, same_class_neighbours, spread

ROOT = Path(__file__).parents[2]
FIGURES = ("pattern", "labels", "mapping", "curves", "evolution", "outputs")


@pytest.fixture(scope="module", params=["vm_run", "vlm_run"])
def drawn(request, tmp_path_factory):
    """Of the vision model with the labels that are shown unasked, of the CLIP with two that are asked for."""
    run, out = request.getfixturevalue(request.param), tmp_path_factory.mktemp("figures")
    checkpoint, before = load_checkpoint(run / "last.safetensors"), sorted(path.name for path in run.iterdir())
    names = checkpoint["class_names"]
    chosen = [names[5], names[3]] if request.param == "vlm_run" else [names[t] for t in (0, 2, 3, 4, 6, 7)]
    flags = [f"--label={name}" for name in [*chosen, chosen[0]]] if request.param == "vlm_run" else []
    visualize.main([str(run), "--out", str(out), "--device", "cpu", *flags])
    assert sorted(path.name for path in run.iterdir()) == before
    numbers = json.loads((out / "figures.json").read_text())
    assert list(numbers["labels"]) == list(numbers["evolution"]["weights"]) == chosen
    assert [entry["label"] for entry in numbers["pattern"]["images"]] == chosen
    return run, checkpoint, out, numbers


def test_every_figure_is_a_pdf_and_a_picture_with_ink(drawn):
    *_, out, numbers = drawn
    assert set(numbers) == set(FIGURES)
    files = {f"{name}.{kind}" for name in FIGURES for kind in ("pdf", "png")}
    assert {path.name for path in out.iterdir()} == files | {"figures.json"}
    for name in FIGURES:
        assert (out / f"{name}.pdf").read_bytes().startswith(b"%PDF")
        grey = np.asarray(Image.open(out / f"{name}.png").convert("L"))
        assert grey.shape[1] > 1000 and grey.min() < 60 and np.median(grey) > 100


def test_labels_show_the_heaviest_entries_of_their_columns(drawn):
    _, checkpoint, _, numbers = drawn
    for name, shown in numbers["labels"].items():
        column = checkpoint["mapping"]["_weights"][:, checkpoint["class_names"].index(name)]
        weights = [entry["weight"] for entry in shown]
        assert weights == column.sort(descending=True).values[: len(shown)].tolist()
        assert len(shown) == min(8, int((column > 0).sum()))
        for entry in shown:
            assert column[entry["label"]] == entry["weight"]
            assert checkpoint["source_names"][entry["label"]] == entry["name"]


def test_evolution_starts_at_the_first_epoch_and_ends_at_the_mapping(drawn):
    _, checkpoint, _, numbers = drawn
    history = checkpoint["history"]
    assert numbers["evolution"]["epochs"] == [0, 1, 2] == [entry["epoch"] for entry in history]
    for name, lines in numbers["evolution"]["weights"].items():
        label = checkpoint["class_names"].index(name)
        column = checkpoint["mapping"]["_weights"][:, label]
        assert torch.equal(history[2]["weights"][label], column.sort(descending=True).values[:10])
        for epoch, entry in enumerate(history):
            kept = dict(zip(entry["labels"][label].tolist(), entry["weights"][label].tolist(), strict=True))
            rest = 0 if 0 in kept.values() else None  # only then is it known what the others weigh
            for line in lines:
                assert line["weights"][epoch] == kept.get(line["label"], rest)
        ever = max(float(entry["weights"][label].max()) for entry in history)
        assert max(w for w in lines[0]["weights"] if w is not None) == ever


def test_history_goes_on_where_a_run_was_cut_off(vm_run, tmp_path):
    straight = load_checkpoint(vm_run / "last.safetensors")
    folder = tmp_path.joinpath(*vm_run.parts[-3:])
    folder.mkdir(parents=True)
    shutil.copy(vm_run / "config.json", folder)
    shutil.copy(vm_run / "previous.safetensors", folder / "last.safetensors")
    train_vm.main([*SHARED, *BACKBONES["train_vm"], "--mapping", "blm", "--results-path", str(tmp_path)])
    resumed = load_checkpoint(folder / "last.safetensors")
    assert [entry["epoch"] for entry in resumed["history"]] == [0, 1, 2]
    for one, other in zip(straight["history"], resumed["history"], strict=True):
        assert torch.equal(one["labels"], other["labels"]) and torch.equal(one["weights"], other["weights"])


def test_curves_are_the_metrics(drawn):
    run, _, _, numbers = drawn
    metrics = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    for key in ("train_loss", "train_accuracy", "test_accuracy", "mapping_change"):
        assert numbers["curves"][key] == [line[key] for line in metrics]


def test_outputs_separate_classes_and_predictions_are_those_of_the_run(drawn):
    _, checkpoint, _, numbers = drawn
    outputs = numbers["outputs"]
    assert len(outputs["before"]["places"]) == len(outputs["after"]["places"]) == len(outputs["labels"]) == 32
    assert all(0 <= outputs[key]["same_class_neighbours"] <= 1 for key in ("before", "after"))
    assert {entry["predicted"] for entry in numbers["pattern"]["images"]} <= set(checkpoint["class_names"])


def test_heat_map_has_every_downstream_label_once(drawn):
    _, checkpoint, _, numbers = drawn
    assert sorted(numbers["mapping"]["columns"]) == sorted(checkpoint["class_names"])


def test_bad_input(vm_run, tmp_path, capsys):
    cut_off = tmp_path / "cut off"
    cut_off.mkdir()
    shutil.copy(vm_run / "config.json", cut_off)
    for arguments, said in (
        ([str(vm_run), "--label", "no such"], "the task has no such label"), ([str(tmp_path)], "holds no run"),
        ([str(cut_off)], "before the end of its first epoch"), ([str(vm_run), "--lable", "x"], "did you mean --label"),
    ):
        with pytest.raises(SystemExit) as stop:
            visualize.main([*arguments, "--out", str(tmp_path / "out")])
        error = capsys.readouterr().err
        assert stop.value.code == 2 and said in error and error.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_help_of_the_command():
    command = [sys.executable, "-m", "tools.visualize", "--help"]
    shown = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert shown.returncode == 0 and "--label NAME" in shown.stdout and "evolution" in shown.stdout


def test_block_order_undoes_a_shuffle():
    blocks = np.kron(np.eye(3), np.array([[0.5, 0.4], [0.3, 0.4]]))  # three blocks of two rows and two columns
    rows, columns = np.array([4, 0, 3, 5, 1, 2]), np.array([2, 5, 0, 3, 1, 4])
    kept, order = block_order(blocks[np.ix_(rows, columns)], rows=6)
    assert sorted(kept) == sorted(order) == list(range(6))
    assert (columns[order] // 2).tolist() == np.repeat((columns[order] // 2)[::2], 2).tolist()
    assert (rows[kept] // 2).tolist() == (columns[order] // 2).tolist(), "rows follow their columns"
    kept, order = block_order(np.array([[0.1, 0.0], [0.9, 0.2], [0.0, 0.8]]), rows=2)
    assert kept.tolist() == [1, 2] and order.tolist() == [0, 1]
    kept, _ = block_order(np.array([[0.1, 0.0], [0.0, 0.0], [0.0, 0.8]]), rows=3)
    assert kept.tolist() == [0, 2], "rows without weight show nothing"
    kept, order = block_order(np.full((4, 3), 0.25), rows=4)  # uniform columns have no order to find
    assert sorted(kept) == [0, 1, 2, 3] and sorted(order) == [0, 1, 2]


def test_neighbours_and_spread():
    outputs = torch.tensor([[0.0], [1.0], [5.0], [5.5], [5.7]])
    assert same_class_neighbours(outputs, torch.tensor([0, 0, 1, 1, 0])) == pytest.approx(3 / 5)
    assert spread(6, 8) == [0, 2, 3, 4, 6, 7]
    assert spread(6, 4) == [0, 1, 2, 3] and spread(2, 100) == [25, 75]


def test_pattern_picture():
    padding = {"reprogramming": "padding", "dataset": "digits"}
    program = torch.zeros(3, 36, 36)
    program[0, 0, 0], program[2, 35, 35] = 1e3, -1e3
    picture, _ = pattern_picture(padding, program)
    assert picture[0, 0].tolist() == [255, 128, 128] and picture[35, 35].tolist() == [128, 128, 0]
    assert picture[2:34, 2:34].max() == 0, "the place of the image"
    program = torch.zeros(3, 4, 4)
    program[0, 0, 0], program[1, 0, 0], program[:, 0, 1] = 2.0, -2.0, 1.0
    picture, caption = pattern_picture(padding | {"reprogramming": "watermarking"}, program)
    assert picture[0, 0].tolist() == [255, 0, 128] and picture[0, 1].tolist() == [191] * 3 and "+2" in caption
    assert (pattern_picture({"reprogramming": "watermarking"}, torch.zeros(3, 4, 4))[0] == 128).all()
