"""Mappings that read a CLIP's image embedding, from the command line to the export; what doesn't fit into memory."""

import json
import os
import signal

import pytest
import torch

import train_vlm
from cfg import VLMConfig, VMConfig
from data.sources import synthetic
from mapping import MAPPINGS, registry
from mapping.label_mapping import LdaMapping
from models import build_classifier
from tests.conftest import BACKBONES, SHARED, train
from tests.data.helpers import write_flowers_subset
from tests.models.meaningful_clip import build_meaningful_clip
from tools import evaluate, export, predict
from tools.training import build
from tools.training.finished import load_run
from tools.training.run_folder import load_checkpoint
from tools.training.session import Session

CPU = torch.device("cpu")
NEEDS_REAL_DATA = pytest.mark.skipif(
    not (os.environ.get("BLM_REAL_DATA") and os.environ.get("BLM_REAL_WEIGHTS")),
    reason="needs BLM_REAL_DATA (folder holding flowers102) and BLM_REAL_WEIGHTS (tf_efficientnet_lite0.pth)",
)


def system_of(mapping, tmp_path, **settings):
    return build.build_clip(VLMConfig.of(
        dataset="synthetic", backbone="tiny-test", weights="none", mapping=mapping, results_path=str(tmp_path),
        **settings,
    ), CPU)  # fmt: skip


@pytest.fixture(scope="module")
def lda_run(tmp_path_factory):
    return train("train_vlm", tmp_path_factory.mktemp("lda"), "--mapping", "lda")


def test_the_prior_is_the_zero_shot_ensemble(tmp_path):
    system = system_of("lda", tmp_path)
    images = torch.randn(5, 3, 224, 224, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = system.classifier.zero_shot_logits(images)["ensemble"]
        torch.testing.assert_close(system.net(images) @ system.mapping._prior, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("mapping", MAPPINGS)
def test_what_a_mapping_reads_has_as_many_names(mapping, tmp_path):
    system = system_of(mapping, tmp_path)
    assert len(system.source_names) == system.mapping.num_source
    embedded = MAPPINGS[mapping].embedded
    assert embedded == (mapping == "lda") == (system.source_names[-1] == "embedding 31")
    outputs = torch.nn.functional.normalize(torch.randn(4, 32), dim=1)
    assert system.readout.width == 32 and system.readout.pretrained(outputs).shape == (4, len(system.source_names))
    assert system.classifier.num_source == 81 * 8


def test_evaluation_prediction_and_export_agree(lda_run, tmp_path, capsys):
    state = load_checkpoint(lda_run / "last.safetensors")
    assert state["source_names"] == [f"embedding {d}" for d in range(32)]
    assert state["history"][-1]["labels"].max() < 32
    run = load_run(lda_run, splits=("test",))
    assert len(run.source_names) == run.system.mapping.num_source == 32 and 0 <= run.system.mapping.prior_weight <= 1
    accuracy = json.loads((lda_run / "result.json").read_text())["final_accuracy"]
    logits, labels = evaluate.test_logits(run)
    assert float((logits.argmax(1) == labels).double().mean()) == accuracy
    images = run.system.task.test.images[:3].permute(0, 3, 1, 2).float() / 255
    ((embeddings, mapped),) = run.logits([images])
    torch.testing.assert_close(embeddings.norm(dim=1), torch.ones(3))
    torch.testing.assert_close(embeddings @ run.system.mapping.weights + run.system.mapping.bias, mapped)

    synthetic("test").image(0).save(tmp_path / "0.png")
    predict.main([str(lda_run), str(tmp_path / "0.png"), "--json"])
    (predicted,) = json.loads(capsys.readouterr().out)
    why = predicted["why"]
    assert predicted["predictions"][0]["label"] == int(mapped[0].argmax())
    assert why["pro"] + why["contra"] + why["rest"] == pytest.approx(why["margin"])
    assert all(row["name"] == f"embedding {row['label']}" for row in why["sources"])

    export.main([str(lda_run), "--format", "torch", "--out", str(tmp_path)])
    network = torch.export.load(tmp_path / "model.pt2").module()
    torch.testing.assert_close(network(images), mapped, atol=1e-4 * float(mapped.abs().max()), rtol=0)


def test_an_exported_clip_holds_no_prompts(vlm_run, tmp_path):
    """ω is folded into (D, T): neither the (S, D) text embeddings nor the (S, T) mapping are in the file."""
    export.main([str(vlm_run), "--format", "torch", "--out", str(tmp_path)])
    program = torch.export.load(tmp_path / "model.pt2")
    tensors = [*program.state_dict.values(), *program.constants.values()]
    assert (8, 32) in [tuple(t.shape) for t in tensors if isinstance(t, torch.Tensor)]
    assert not [t for t in tensors if isinstance(t, torch.Tensor) and 81 * 8 in t.shape]


def test_resumed_is_straight(lda_run, tmp_path, monkeypatch):
    end_epoch = Session.end_epoch

    def end_and_stop(self, epoch, *values):
        end_epoch(self, epoch, *values)
        os.kill(os.getpid(), signal.SIGTERM)

    with monkeypatch.context() as first, pytest.raises(SystemExit):
        first.setattr(Session, "end_epoch", end_and_stop)
        train("train_vlm", tmp_path, "--mapping", "lda")
    train_vlm.main([*SHARED, *BACKBONES["train_vlm"], "--mapping", "lda", "--results-path", str(tmp_path)])
    (folder,) = (path.parent for path in tmp_path.rglob("last.safetensors"))
    cut, straight = (load_checkpoint(path / "last.safetensors") for path in (folder, lda_run))
    assert cut["program"].equal(straight["program"]) and len(cut["metrics"]) == 3
    for name in ("_weights", "_bias", "_chosen"):
        assert cut["mapping"][name].equal(straight["mapping"][name])
    assert len(cut["mapping"]["_chosen"]) == 3 and "_prior" not in cut["mapping"]


@pytest.mark.parametrize("arguments", [["--shrinkage", "0.3"], ["--shrinkage", "0", "--shots", "1"], ["--shots", "2"]])
@pytest.mark.filterwarnings("ignore:synthetic has")
def test_given_shrinkage_and_few_images(arguments, tmp_path):
    folder = train(
        "train_vlm", tmp_path, "--mapping", "lda", "--reprogramming", "none", "--epochs", "0", "--lr", "40", *arguments
    )
    mapping = load_run(folder, splits=()).system.mapping
    assert mapping.weights.isfinite().all() and mapping.temperature >= 1 and 0 <= mapping.prior_weight <= 1
    assert mapping.shrinkage == float(arguments[1]) or arguments[0] == "--shots"


@pytest.mark.parametrize(
    "build_system, config, settings, source",
    [
        (build.build_clip, VLMConfig, {"backbone": "tiny-test"}, 32),
        (build.build_vision, VMConfig, {"backbone": "timm:test_resnet", "canvas_size": 64}, 1000),
    ],
)
def test_what_does_not_fit_into_memory_is_refused_before_it_starts(
    build_system, config, settings, source, tmp_path, monkeypatch
):
    settings |= {"dataset": "synthetic", "weights": "none", "results_path": str(tmp_path)}
    monkeypatch.setattr(build, "available_memory", lambda: 2**27)
    message = rf"--mapping lda from {source} .* 8 downstream labels needs 0\.[3-9] GiB of memory, 0\.1 GiB are free"
    with pytest.raises(ValueError, match=message) as caught:
        build_system(config.of(mapping="lda", **settings), CPU)
    assert "--mapping blmpp" in str(caught.value) and "--shrinkage" in str(caught.value)
    assert "\n" not in str(caught.value)
    build_system(config.of(mapping="lda", **settings), CPU, splits=("test",))  # estimates nothing
    build_system(config.of(mapping="blmpp", **settings), CPU)


@pytest.mark.soak
@pytest.mark.filterwarnings("ignore:flowers102 has")
@NEEDS_REAL_DATA
def test_shots_of_real_flowers(tmp_path, monkeypatch):
    """A CLIP with meaning whose zero-shot classifier is weak: lda beats blmpp, and a prior does little harm."""
    names = write_flowers_subset(tmp_path / "flowers102", range(10, 30))
    backbone = build_classifier("efficientnet_lite0", os.environ["BLM_REAL_WEIGHTS"])
    monkeypatch.setattr("tools.training.build.load_clip", lambda *_: build_meaningful_clip(backbone, names))
    rows = {}
    for shots in (1, 4, 16):
        for mapping, with_prior in (("blmpp", False), ("lda", False), ("lda", True)):
            results = tmp_path / f"{shots}{mapping}{with_prior}"
            with monkeypatch.context() as patch:
                if not with_prior:  # the mapping as a vision model has it
                    patch.setattr(
                        registry, "LdaMapping", lambda *args, prior, **settings: LdaMapping(*args, **settings)
                    )
                train_vlm.main([
                    "--dataset", "flowers102", "--data-path", str(tmp_path), "--mapping", mapping, "--epochs", "0",
                    "--reprogramming", "none", "--backbone", "meaningful", "--shots", str(shots), "--results-path",
                    str(results),
                ])  # fmt: skip
            (file,) = results.rglob("result.json")
            result = json.loads(file.read_text())
            rows[shots, "zero-shot"] = result["zero_shot"]["ensemble"]
            rows[shots, f"{mapping}{' with prior' * with_prior}"] = result["final_accuracy"]
    print("\n" + "\n".join(f"{shots} shots, {name}: {accuracy:.1%}" for (shots, name), accuracy in rows.items()))
    for shots in (4, 16):
        assert rows[shots, "lda with prior"] > rows[shots, "lda"] - 0.06
        assert rows[shots, "lda with prior"] > rows[shots, "blmpp"] > rows[shots, "zero-shot"]
