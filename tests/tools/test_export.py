"""tools.export through its command line: files opened without this project's code give a run's logits."""

import json
import os
import subprocess
import sys

import pytest
import torch

from data import BatchLoader
from tools import export
from tools.training.finished import load_run

onnxruntime = pytest.importorskip("onnxruntime", reason="comes with requirements-dev.txt")


def expected_logits(folder):
    """A run's 32 test images, its logits of them, and the tolerance that float32 allows."""
    run = load_run(folder, splits=("test",))
    system = run.system
    loader = BatchLoader(system.task.test, system.presets[1], 32, "cpu", shuffle=False, seed=0, purpose="test")
    (batch,) = loader.epoch(0)
    ((_, logits),) = run.logits([batch.images])
    return batch.images.contiguous(), logits, 1e-4 * max(1.0, float(logits.abs().max()))


@pytest.fixture(scope="module", params=["vm_run", "vlm_run", "linear_run", "lda_run", "rlm_run"])
def exported(request, tmp_path_factory):
    """A run and the folder that both its files are in."""
    folder, out = request.getfixturevalue(request.param), tmp_path_factory.mktemp("exported") / "new"
    export.main([str(folder), "--out", str(out)])
    assert sorted(path.name for path in out.iterdir()) == ["model.onnx", "model.pt2"]
    return folder, out


def test_onnx(exported):
    folder, out = exported
    images, logits, tolerance = expected_logits(folder)
    session = onnxruntime.InferenceSession(out / "model.onnx", providers=["CPUExecutionProvider"])
    assert [i.name for i in session.get_inputs()] == ["images"]
    assert session.get_inputs()[0].shape[1:] == list(images.shape[1:])
    for n in (1, 5, 32):
        got = torch.from_numpy(session.run(["logits"], {"images": images[:n].numpy()})[0])
        torch.testing.assert_close(got, logits[:n], atol=tolerance, rtol=0)


def test_torch(exported):
    folder, out = exported
    images, logits, tolerance = expected_logits(folder)
    network = torch.export.load(out / "model.pt2").module()
    for n in (1, 5, 32):
        torch.testing.assert_close(network(images[:n]), logits[:n], atol=tolerance, rtol=0)


@pytest.mark.parametrize("exported", ["vm_run", "vlm_run"], indirect=True)
def test_both_files_say_what_they_are(exported):
    folder, out = exported
    in_torch = {f"{key}.json": "" for key in ("class_names", "preprocessing", "run")}
    torch.export.load(out / "model.pt2", extra_files=in_torch)
    texts = onnxruntime.InferenceSession(out / "model.onnx").get_modelmeta().custom_metadata_map
    assert {f"{key}.json": text for key, text in texts.items()} == in_torch
    settings = json.loads((folder / "config.json").read_text())["settings"]
    clip = settings["backbone"] == "tiny-test"
    assert json.loads(texts["class_names"])[:2] == ["red disc", "red square"]
    preprocessing = json.loads(texts["preprocessing"])
    assert preprocessing["size"] == (224 if clip else 32) and preprocessing["range"] == [0, 1]
    assert preprocessing["interpolation"].startswith("bicubic" if clip else "bilinear")
    assert preprocessing["resize"].startswith("shorter side" if clip else "both sides")
    run = json.loads(texts["run"])
    assert run["mapping"] == settings["mapping"] and run["backbone"] == settings["backbone"] and run["epoch"] == 2
    assert run["test_accuracy"] == json.loads((folder / "result.json").read_text())["final_accuracy"]


@pytest.mark.parametrize("exported", ["vlm_run"], indirect=True)
def test_a_clip_is_folded(exported):
    """Its head is (T, D), on the image embedding: nothing of the S texts is left."""
    folder, out = exported
    run = load_run(folder, splits=())
    state = torch.export.load(out / "model.pt2").module().state_dict()
    num_source, width = run.system.classifier.net.text_embeddings.shape
    assert state["head.weight"].shape == (8, width)
    assert all(num_source not in tensor.shape for tensor in state.values())
    images = torch.rand(4, 3, 224, 224, generator=torch.Generator().manual_seed(0))
    ((source, _),) = run.logits([images])
    unfolded = source @ run.system.mapping.weights
    got = torch.export.load(out / "model.pt2").module()(images)
    torch.testing.assert_close(got, unfolded, atol=1e-5 * max(1.0, float(unfolded.abs().max())), rtol=0)


ELSEWHERE = """
import sys, torch
network, images = torch.export.load(sys.argv[1]).module(), torch.load(sys.argv[2])
print(network(images).tolist())
assert not {"models", "mapping", "tools", "timm", "open_clip"} & sys.modules.keys()
"""


@pytest.mark.parametrize("exported", ["vlm_run"], indirect=True)
def test_torch_without_this_project(exported, tmp_path):
    folder, out = exported
    images, logits, tolerance = expected_logits(folder)
    torch.save(images[:2], tmp_path / "images.pt")
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"} | {"OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", ELSEWHERE, str(out / "model.pt2"), str(tmp_path / "images.pt")]
    outcome = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert outcome.returncode == 0, outcome.stderr
    torch.testing.assert_close(torch.tensor(json.loads(outcome.stdout)), logits[:2], atol=tolerance, rtol=0)


def test_wrong_logits_are_never_kept(rlm_run, tmp_path, capsys, monkeypatch):
    write, load = export.FORMATS["torch"]
    monkeypatch.setitem(export.FORMATS, "torch", (write, lambda file: lambda images: load(file)(images) + 0.5))
    with pytest.raises(SystemExit) as caught:
        export.main([str(rlm_run), "--format", "torch", "--out", str(tmp_path)])
    error = capsys.readouterr().err
    assert caught.value.code == 2 and error.count("\n") == 1 and "gives other logits" in error and "0.5" in error
    assert list(tmp_path.iterdir()) == []


def test_missing_packages_are_named(vm_run, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(export, "find_spec", lambda name: None if name == "onnxruntime" else name)
    with pytest.raises(SystemExit) as caught:
        export.main([str(vm_run), "--out", str(tmp_path)])
    error = capsys.readouterr().err
    assert caught.value.code == 2 and error.count("\n") == 1
    assert "pip install onnxruntime" in error and "--format torch" in error
    assert list(tmp_path.iterdir()) == []
