"""tools.visualize through its command line, by the numbers that it writes beside the figures."""

import json
import shutil
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace

import matplotlib
import numpy as np
import pytest
import torch
from PIL import Image

import train_vm
from tests.conftest import BACKBONES, SHARED, train
from tools import evaluate, visualize
from tools.training.finished import load_run
from tools.training.run_folder import load_checkpoint
from tools.visualize import block_order, same_class_neighbours, spread

FIGURES = ("pattern", "labels", "mapping", "curves", "evolution", "outputs")


MEASURED = ("confusion", "classes", "reliability")


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


def test_every_figure_is_a_pdf_and_an_image_with_ink(drawn):
    *_, out, numbers = drawn
    assert set(numbers) == set(FIGURES)
    files = {f"{name}.{kind}" for name in FIGURES for kind in ("pdf", "png")}
    assert {path.name for path in out.iterdir()} == files | {"figures.json"}
    for name in FIGURES:
        assert (out / f"{name}.pdf").read_bytes().startswith(b"%PDF")
        grey = np.asarray(Image.open(out / f"{name}.png").convert("L"))
        assert grey.shape[1] > 1000 and grey.min() < 60 and np.median(grey) > 100


def test_pattern_has_its_caption(drawn):
    """The stretch is said; the VR that draws itself is the run's."""
    run, checkpoint, _, numbers = drawn
    image, caption = load_run(run, splits=()).system.input_vr.as_image()
    assert numbers["pattern"]["caption"] == caption and "contrast ×" in caption and image.shape[2] == 3


def test_what_evaluate_measured_is_drawn_once_it_did(vm_run, tmp_path, capsys):
    folder = tmp_path / "run"
    shutil.copytree(vm_run, folder)
    visualize.main([str(folder), "--device", "cpu"])
    warned = capsys.readouterr().err.splitlines()
    assert [line.split()[1] for line in warned] == list(MEASURED)
    assert all("not measured yet; python -m tools.evaluate" in line for line in warned)
    assert not any((folder / "figures" / f"{name}.png").exists() for name in MEASURED)
    evaluate.main([str(folder), "--device", "cpu"])
    visualize.main([str(folder), "--device", "cpu"])
    assert capsys.readouterr().err == ""
    numbers = json.loads((folder / "figures" / "figures.json").read_text())
    evaluation = json.loads((folder / "evaluation.json").read_text())
    assert numbers["classes"] == {c["name"]: c["accuracy"] for c in evaluation["classes"]}
    assert numbers["reliability"] == {"ece": evaluation["ece"], "bins": evaluation["calibration"]}
    shares = np.array(numbers["confusion"]["shares"])  # four test images of each class
    assert np.allclose(shares.sum(1), 1) and np.trace(shares) / 8 == pytest.approx(evaluation["accuracy"])
    assert all((folder / "figures" / f"{name}.{kind}").exists() for name in MEASURED for kind in ("png", "pdf"))
    (folder / "evaluation.json").write_text(json.dumps(evaluation | {"epoch": 0}))
    visualize.main([str(folder), "--device", "cpu"])
    assert capsys.readouterr().err.count("is of another state of the run") == 3
    (folder / "confusion.csv").write_text("x\n")
    (folder / "evaluation.json").write_text("[")
    visualize.main([str(folder), "--device", "cpu"])
    assert capsys.readouterr().err.count("is damaged") == 3


@pytest.fixture(scope="module")
def few(tmp_path_factory):
    """One epoch of lda on a data set of three test images, one class without any, drawn."""
    root = tmp_path_factory.mktemp("few")
    for split, counts in (("train", (4, 4, 4)), ("test", (2, 1, 0))):
        for t, count in enumerate(counts):
            folder = root / "data" / split / "abc"[t]
            for i in range(count):
                folder.mkdir(parents=True, exist_ok=True)
                noise = np.random.default_rng(10 * t + i).integers(0, 60, (40, 40, 3), np.uint8)
                Image.fromarray(noise + np.uint8(60 * t)).save(folder / f"{i}.png")
    run = train(
        "train_vm",
        root,
        "--dataset",
        f"folder:{root / 'data'}",
        "--epochs",
        "1",
        "--mapping",
        "lda",
        "--canvas-size",
        "160",
    )
    return run


@pytest.mark.filterwarnings("ignore:.*has no images of")
def test_few_images_and_one_epoch(few, tmp_path, capsys):
    evaluate.main([str(few), "--device", "cpu", "--out", str(tmp_path / "elsewhere")])
    capsys.readouterr()
    visualize.main([str(few), "--device", "cpu", "--out", str(tmp_path)])
    printed = capsys.readouterr()
    assert "outputs is left out: t-SNE needs at least 4 test images" in printed.err and "there are 3" in printed.err
    assert [Path(line.split(".pdf")[0]).name for line in printed.out.splitlines()] == [
        "pattern",
        "labels",
        "mapping",
        "curves",
        "evolution",
    ]
    numbers = json.loads((tmp_path / "figures.json").read_text())
    assert [entry["label"] for entry in numbers["pattern"]["images"]] == ["a", "b"]
    weights = load_run(few, splits=()).system.mapping.weights
    assert (weights < 0).any()
    for t, entries in enumerate(numbers["labels"].values()):  # the largest of either sign
        largest = weights[:, t].abs().sort(descending=True).values[:8].tolist()
        assert [abs(entry["weight"]) for entry in entries] == largest
        assert all(weights[entry["label"], t] == entry["weight"] for entry in entries)
    assert numbers["curves"]["mapping_change"] == [None]


def test_axes_of_curves():
    """One epoch has one tick and room on both sides; all panels span the same epochs; marks are whole at the edge."""
    metrics = [
        {
            "epoch": e,
            "train_loss": 2.0,
            "train_accuracy": 0.5,
            "test_accuracy": 1.0,
            "mapping_change": 0.5 if e else None,
        }
        for e in range(3)
    ]
    for count, limits, ticks in ((1, (0.5, 1.5), [1]), (2, (0.5, 2.5), [1, 2]), (3, (0.96, 3.04), [1, 2, 3])):
        drawing = object.__new__(visualize.Drawing)
        drawing.metrics = metrics[:count]
        figure, _ = drawing.curves()
        for axis in figure.axes:
            assert axis.get_xlim() == pytest.approx(limits) and axis.get_xticks().tolist() == ticks
            assert all(not line.get_clip_on() for line in axis.lines)
        assert figure.axes[1].get_ylim() == pytest.approx((0, 108))
        texts = [text.get_text() for text in figure.axes[2].texts]
        assert texts == (["there is none before\nthe second epoch"] if count == 1 else [])
        assert len(figure.axes[2].get_yticks()) == 0 if count == 1 else figure.axes[2].get_ylim()[0] == 0


@pytest.mark.parametrize("count, every", [(2, 1), (89, 1), (397, 3)])
def test_labels_of_the_heat_map_can_be_read(count, every):
    drawing = object.__new__(visualize.Drawing)
    drawing.class_names = [f"a name of a class {t}" for t in range(count)]
    columns = list(range(count))
    figure, axis, _, named = drawing._heat_map(np.eye(count), columns, columns, drawing.class_names)
    assert named == every and axis.get_xticks().tolist() == columns[::every]
    sizes = [label.get_fontsize() for label in [*axis.get_xticklabels(), *axis.get_yticklabels()]]
    assert 5.5 <= min(sizes) and max(sizes) <= 7
    assert {label.get_rotation() for label in axis.get_xticklabels()} == {0 if count == 2 else 90}


@pytest.mark.parametrize("names, rotation", [
    ([str(digit) for digit in range(10)], 0),
    (["a benign tumour of the skin", "a malignant tumour of the skin"], 0),
    ([f"pneumonoultramicroscopic disease {t}" for t in range(5)], 90),
])  # fmt: skip
def test_names_below_the_heat_map_stand_upright_where_their_words_fit(names, rotation):
    drawing = object.__new__(visualize.Drawing)
    drawing.class_names, columns = names, list(range(len(names)))
    with matplotlib.rc_context(visualize.STYLE):
        figure, axis, *_ = drawing._heat_map(np.eye(len(names)), columns, columns, names)
        figure.draw_without_rendering()
    labels = axis.get_xticklabels()
    assert {label.get_rotation() for label in labels} == {rotation}
    assert [" ".join(label.get_text().split()) for label in labels] == [visualize._short(name, 30) for name in names]
    assert_apart(labels)


@pytest.fixture
def long_names(vm_run):
    """A run's figures with long names, of four labels: the first two have one test image, the others three."""
    run = load_run(vm_run, splits=("test",))
    names = [f"Photograph of a Mediterranean MUSHROOM, No. {t}" for t in range(8)]
    drawing = visualize.Drawing(replace(run, checkpoint=run.checkpoint | {"class_names": names}), [0, 1, 2, 3])
    images = drawing._test_images
    drawing._test_images = lambda label, count: images(label, min(count, 1 if label < 2 else 3))
    with matplotlib.rc_context(visualize.STYLE):
        yield drawing


def box(artist):
    return artist.get_window_extent()


def assert_apart(artists):
    """From left to right, each of them beside the last."""
    assert all(box(one).x1 < box(other).x0 for one, other in pairwise(artists))


def assert_inside(figure, artist):
    page = figure.bbox
    assert page.x0 <= box(artist).x0 and box(artist).x1 <= page.x1
    assert page.y0 <= box(artist).y0 and box(artist).y1 <= page.y1


def test_long_names_are_whole_and_apart(long_names):
    drawn = [getattr(long_names, name)()[0] for name in ("outputs", "pattern", "labels", "evolution")]
    for figure in drawn:
        figure.draw_without_rendering()
    outputs, pattern, labels, evolution = drawn
    assert_inside(outputs, outputs.legends[0])
    assert_apart([axis.title for axis in outputs.axes])
    assert_inside(pattern, pattern._supxlabel)
    assert_apart([axis.title for axis in pattern.axes])
    assert_apart([axis.xaxis.label for axis in pattern.axes])
    assert_apart([axis._left_title for axis in evolution.axes[:2]])
    for axis in evolution.axes:
        assert_inside(evolution, axis._left_title)
    assert len(labels.axes) == 4 * (3 + 1), "as many places as the label with most images fills, and the bars"
    gaps = [other.get_position().x0 - one.get_position().x1 for one, other in pairwise(labels.axes[8:11])]
    assert gaps[0] == pytest.approx(gaps[1]), "a long title leaves the images where they are"
    for axis in labels.axes:
        assert axis.images or axis.patches or not axis.axison, "an empty place covers nothing"


def test_neighbours_are_said_where_a_class_has_two_images(long_names):
    several, _ = long_names.outputs()
    images = long_names._test_images
    long_names._test_images = lambda label, count: images(label, 1)
    alone, numbers = long_names.outputs()
    assert all("nearest neighbour of the same class: " in axis.get_title() for axis in several.axes)
    assert not any("neighbour" in axis.get_title() for axis in alone.axes)
    assert numbers["before"]["same_class_neighbours"] is None


@pytest.mark.parametrize("accuracy", [0.0, 1.0])
def test_the_overall_line_and_the_legend_lie_on_nothing(accuracy):
    bins = [{"confidence": None, "accuracy": None, "num_samples": 0}] * 15
    bins[1] = {"confidence": 0.1, "accuracy": 0.95, "num_samples": 9}
    classes = [{"name": name, "accuracy": accuracy, "confused_with": None} for name in "ab"]
    evaluation = {"ece": 0.85, "calibration": bins, "accuracy": accuracy, "classes": classes}
    drawing = object.__new__(visualize.Drawing)
    drawing._evaluation = lambda: (evaluation, None)
    with matplotlib.rc_context(visualize.STYLE):
        reliability, by_class = drawing.reliability()[0], drawing.classes()[0]
        reliability.draw_without_rendering()
    (legend,) = reliability.legends
    assert_inside(reliability, legend)
    assert not any(box(legend).overlaps(axis.get_tightbbox()) for axis in reliability.axes)
    (line,) = by_class.axes[0].lines
    assert set(line.get_xdata()) == {100 * accuracy} and not line.get_clip_on() and line.get_marker() == "v"


def test_six_lines_over_many_epochs_are_told_apart_in_grey():
    """Neighbours in darkness differ in dashes, others in darkness; no two have marks at the same epochs."""
    lines = [visualize._line(i, range(200)) for i in range(6)]
    grey = [np.dot(matplotlib.colors.to_rgb(line["color"]), (0.299, 0.587, 0.114)) for line in lines]
    for i, one in enumerate(lines):
        for j, other in enumerate(lines[:i]):
            assert one["linestyle"] != other["linestyle"] or abs(grey[i] - grey[j]) > 0.15
            assert one["markevery"] != other["markevery"]


@pytest.mark.parametrize("kind, mapping, name", [
    ("vlm", "lda", "dimension of the image embedding (3 of 5)"),
    ("vlm", "blm", "pretrained label (3 of 5)"),
    ("vm", "lda", "pretrained label (3 of 5)"),
])  # fmt: skip
def test_rows_of_the_heat_map_are_called_what_they_are(kind, mapping, name):
    drawing = object.__new__(visualize.Drawing)
    drawing.class_names, drawing.source_names = ["a", "b", "c"], [f"s{i}" for i in range(5)]
    drawing.weights = torch.eye(5, 3)
    drawing.run = SimpleNamespace(kind=kind, settings=SimpleNamespace(mapping=mapping))
    figure, _ = drawing.mapping()
    assert figure.axes[0].get_ylabel() == name


def test_weights_beyond_the_kept_ones_are_drawn_as_bounds():
    """Label 7 is not among the kept two in epoch 1: there it weighs at most 0.3, the lesser of those.

    The bound's dots fill only the gap, so that they don't fill the dashes of lines, and no other line is dotted.
    """
    drawing = object.__new__(visualize.Drawing)
    drawing.class_names, drawing.source_names, drawing.chosen = ["rose"], [f"s{i}" for i in range(9)], [0]
    kept = [((7, 1), (0.6, 0.4)), ((1, 2), (0.5, 0.3)), ((7, 1), (0.7, 0.2)), ((7, 1), (0.7, 0.2))]
    history = [
        {"epoch": e, "labels": torch.tensor([labels]), "weights": torch.tensor([weights], dtype=torch.float64)}
        for e, (labels, weights) in enumerate(kept)
    ]
    drawing.run = SimpleNamespace(checkpoint={"history": history})
    figure, numbers = drawing.evolution()
    assert numbers["weights"]["rose"][0]["weights"] == [0.6, None, 0.7, 0.7]
    dotted, line, *_ = figure.axes[0].lines
    assert dotted.get_ydata()[:3].tolist() == [0.6, 0.3, 0.7] and np.isnan(line.get_ydata()[1])
    assert np.isnan(dotted.get_ydata()[3]) and line.get_ydata()[3] == 0.7
    assert all(line.get_linestyle() in ("-", "--") for line in figure.axes[0].lines if line.get_marker() != "None")
    assert "not among the 2 heaviest" in figure._supxlabel.get_text()


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
        ([str(vm_run), "--label", "no such"], "the task has no such label"),
        ([str(tmp_path)], "holds no run"),
        ([str(cut_off)], "before the end of its first epoch"),
        ([str(vm_run), "--lable", "x"], "did you mean --label"),
    ):
        with pytest.raises(SystemExit) as stop:
            visualize.main([*arguments, "--out", str(tmp_path / "out")])
        error = capsys.readouterr().err
        assert stop.value.code == 2 and said in error and error.count("\n") == 1
    assert not (tmp_path / "out").exists()
    (tmp_path / "out").write_text("mine")
    with pytest.raises(SystemExit):
        visualize.main([str(vm_run), "--out", str(tmp_path / "out")])
    assert capsys.readouterr().err.endswith("out is a file; choose another --out\n")


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
    assert same_class_neighbours(outputs, torch.tensor([0, 0, 1, 2, 2])) == 1, "a class of one sample has no such pair"
    assert same_class_neighbours(outputs, torch.arange(5)) is None
    assert spread(6, 8) == [0, 2, 3, 4, 6, 7]
    assert spread(6, 4) == [0, 1, 2, 3] and spread(2, 100) == [25, 75]


def test_without_a_pattern_none_is_shown_or_named(tmp_path):
    drawing = visualize.Drawing(
        load_run(train("train_vm", tmp_path, "--reprogramming", "none", "--epochs", "0")), [0, 1]
    )
    for figure in (drawing.pattern()[0], drawing.outputs()[0]):
        texts = [text.get_text() for text in figure.findobj(matplotlib.text.Text)]
        assert texts and not any("pattern" in text for text in texts) and len(figure.axes) == 2
