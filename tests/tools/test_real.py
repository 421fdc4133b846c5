"""Every tool through its command line on runs of real images: handwritten digits, and flowers where given."""

import csv
import json
import os

import pytest
import torch

import train_vm
from data import BatchLoader
from data.ilmvp import LmdbSource
from data.sources import digits
from tests.data.helpers import write_flowers_subset
from tests.tools.test_report import page_data
from tools import check_data, evaluate, export, predict, visualize
from tools.report import __main__ as report
from tools.training.finished import load_run
from tools.training.run_folder import load_checkpoint

FLOWERS = {  # label in the folder of photographs: what ImageNet has of the kind, if anything
    7: {"cardoon", "sea urchin", "porcupine"},
    25: {"artichoke"},
    36: set(),
    43: {"daisy"},
    66: set(),
    80: set(),
}
pytestmark = pytest.mark.filterwarnings("ignore:flowers102 has")  # six of its classes
needs_flowers = pytest.mark.skipif(not os.environ.get("BLM_REAL_DATA"), reason="needs BLM_REAL_DATA: real flowers")


@pytest.fixture(scope="module")
def digits_run(tmp_path_factory):
    return _train(tmp_path_factory.mktemp("digits"), "digits", "--canvas-size", "64", "--train-fraction", "0.3")


@pytest.fixture(scope="module")
def flowers_run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("flowers")
    write_flowers_subset(folder / "data" / "flowers102", list(FLOWERS))
    return _train(folder, "flowers102", "--data-path", str(folder / "data"), "--batch-size", "32")


def _train(folder, dataset, *more):
    train_vm.main(
        [
            "--dataset",
            dataset,
            "--backbone",
            "efficientnet_lite0",
            "--epochs",
            "2",
            "--results-path",
            str(folder / "results"),
            *more,
        ]
    )
    (config,) = (folder / "results" / "vm" / dataset).glob("*/config.json")
    return config.parent


def pytest_generate_tests(metafunc):
    if "run_folder" in metafunc.fixturenames:
        runs = [pytest.param("digits_run"), pytest.param("flowers_run", marks=needs_flowers)]
        metafunc.parametrize("run_folder", runs, indirect=True, ids=["digits", "flowers"])


@pytest.fixture
def run_folder(request):
    return request.getfixturevalue(request.param)


@pytest.fixture
def outputs(run_folder):
    """Images in [0, 1], labels, and what the network of a run makes of them: the first 40 of the test set."""
    run = load_run(run_folder, splits=("test",))
    loader = BatchLoader(run.system.task.test, run.system.presets[1], 40, "cpu", shuffle=False, seed=0, purpose="test")
    batch = next(iter(loader.epoch(0)))
    ((source_logits, logits),) = run.logits([batch.images])
    return batch.images.contiguous(), batch.labels, source_logits, logits


def write_picture(run_folder, index, folder):
    """A test image as a file, as a user would have it."""
    if "digits" in str(run_folder):
        digits("test").image(index).save(folder / "image.png")
        return folder / "image.png"
    settings = json.loads((run_folder / "config.json").read_text())["settings"]
    encoded, _ = LmdbSource(f"{settings['data_path']}/flowers102/test.lmdb").record(index)
    (folder / "image.jpg").write_bytes(encoded)
    return folder / "image.jpg"


def test_evaluate(run_folder, tmp_path, capsys):
    evaluate.main([str(run_folder), "--out", str(tmp_path), "--json"])
    evaluation = json.loads(capsys.readouterr().out)
    result = json.loads((run_folder / "result.json").read_text())
    assert evaluation["accuracy"] == result["final_accuracy"] > 2 / len(evaluation["classes"]), "twice chance at least"
    with open(tmp_path / "confusion.csv", newline="") as file:
        counts = torch.tensor([[int(cell) for cell in row[1:]] for row in list(csv.reader(file))[1:]])
    assert counts.trace() / counts.sum() == pytest.approx(evaluation["accuracy"])
    assert [c["accuracy"] for c in evaluation["classes"]] == pytest.approx((counts.diag() / counts.sum(1)).tolist())
    assert evaluation["accuracy"] < evaluation["top5_accuracy"] <= 1 and 0 < evaluation["ece"] < 1


def test_predict(run_folder, outputs, tmp_path, capsys):
    _, _, source_logits, logits = outputs
    image = write_picture(run_folder, 30, tmp_path)
    predict.main([str(run_folder), str(image), "--json"])
    (prediction,) = json.loads(capsys.readouterr().out)
    expected, shown = logits[30].double().softmax(0).topk(5), prediction["predictions"]
    assert [row["label"] for row in shown] == expected.indices.tolist()
    assert [row["probability"] for row in shown] == pytest.approx(expected.values.tolist(), abs=1e-4)
    why, run = prediction["why"], load_run(run_folder, splits=())
    weights, winner, first = run.system.mapping.weights.double(), expected.indices[0], why["sources"][0]
    z = source_logits[30].double() - source_logits[30].double().mean()
    contributions = (weights[:, winner] - weights.mean(1)) * z
    assert first["label"] == int(contributions.argmax()) and first["name"] == run.source_names[first["label"]]
    assert first["contribution"] == pytest.approx(float(contributions.max()), abs=1e-3)


def test_export(run_folder, outputs, tmp_path):
    onnxruntime = pytest.importorskip("onnxruntime", reason="comes with requirements-dev.txt")
    images, _, _, logits = outputs
    export.main([str(run_folder), "--out", str(tmp_path)])
    session = onnxruntime.InferenceSession(tmp_path / "model.onnx", providers=["CPUExecutionProvider"])
    program = torch.export.load(tmp_path / "model.pt2").module()
    for got in (torch.from_numpy(session.run(None, {"images": images.numpy()})[0]), program(images)):
        torch.testing.assert_close(got, logits, atol=1e-4, rtol=1e-4)


def test_visualize(run_folder, tmp_path):
    visualize.main([str(run_folder), "--out", str(tmp_path), "--device", "cpu"])
    numbers = json.loads((tmp_path / "figures.json").read_text())
    state = load_checkpoint(run_folder / "last.safetensors")
    weights, names = state["mapping"]["_weights"], state["class_names"]
    for name, shown in numbers["labels"].items():
        column = weights[:, names.index(name)]
        assert [entry["weight"] for entry in shown] == column.sort(descending=True).values[: len(shown)].tolist()
        assert all(state["source_names"][entry["label"]] == entry["name"] for entry in shown)
    assert numbers["curves"]["test_accuracy"] == [line["test_accuracy"] for line in state["metrics"]]
    before, after = (numbers["outputs"][key]["same_class_neighbours"] for key in ("before", "after"))
    assert after > 2 / len(names) and before > 0, "the outputs part the classes"


def test_report(run_folder, tmp_path, capsys):
    report.main([str(run_folder), "--out", str(tmp_path / "page.html")])
    data, state = page_data(tmp_path / "page.html"), load_checkpoint(run_folder / "last.safetensors")
    (group,), (details,) = data["groups"], data["runs"]
    assert group["accuracy"] == pytest.approx(100 * state["metrics"][-1]["test_accuracy"])
    classes, sources = data["names"][details["classes"]], data["names"][details["sources"]]
    assert classes == state["class_names"] and sources == state["source_names"]
    weights = state["mapping"]["_weights"]
    for t, pairs in enumerate(details["mapping"]):
        assert [w for _, w in pairs] == pytest.approx(weights[:, t].topk(len(pairs)).values.tolist(), rel=1e-4)


@needs_flowers
def test_flowers_draw_on_what_an_imagenet_network_sees_in_them(flowers_run, tmp_path):
    report.main([str(flowers_run), "--out", str(tmp_path / "page.html")])
    data = page_data(tmp_path / "page.html")
    (details,) = data["runs"]
    sources = data["names"][details["sources"]]
    for name, sensible, pairs in zip(
        data["names"][details["classes"]], FLOWERS.values(), details["mapping"], strict=True
    ):
        assert not sensible or sensible & {sources[s] for s, _ in pairs[:3]}, f"{name}: {pairs}"


@needs_flowers
def test_check_data(flowers_run, capsys):
    data_path = json.loads((flowers_run / "config.json").read_text())["settings"]["data_path"]
    check_data.main([f"{data_path}/flowers102"])
    printed = capsys.readouterr()
    assert f"{16 * len(FLOWERS)}" in printed.out and f"{10 * len(FLOWERS)}" in printed.out
