"""Mappings by name, with their settings."""

import math
from functools import partial

import pytest
import torch

from mapping import MAPPINGS, MatrixMapping, Method, Setting, build_mapping, check_mapping_name, mapping_settings


def sharpened(counts, power):
    """Columns of counts to a power, normalised."""
    mass = counts.to_dense().double() ** power
    return (mass / mass.sum(0)).float()


def build_sharp(num_source, num_target, *, seed, power):
    return MatrixMapping("sharp", num_source, num_target, partial(sharpened, power=power))


POWER = Setting("power", 2.0, "exponent of the counts", "above 0", lambda value: value > 0)


@pytest.fixture
def sharp(monkeypatch):
    monkeypatch.setitem(MAPPINGS, "sharp", Method(build_sharp, (POWER,)))


def test_names():
    assert list(MAPPINGS) == ["rlm", "flm", "ilm", "blm", "blmpp", "lda", "linear"]
    for name in ("blmp", "BLM+", "blm+", "BLMpp", "Blmp"):
        assert check_mapping_name(name) == "blmpp"
    assert check_mapping_name("ILM") == "ilm"
    kinds = {name: build_mapping(name, 4, 2) for name in MAPPINGS}
    assert [name for name, mapping in kinds.items() if mapping.iterative] == ["ilm", "blm", "blmpp", "lda"]
    assert [name for name, mapping in kinds.items() if mapping.estimated] == ["flm", "ilm", "blm", "blmpp", "lda"]
    assert [name for name, mapping in kinds.items() if mapping.trainable] == ["linear"]
    assert [name for name, mapping in kinds.items() if mapping.ready] == ["rlm", "linear"]


@pytest.mark.parametrize("name", ["ilm", "blm", "blmpp", "lda"])
def test_ablation_of_the_iteration(name):
    assert not build_mapping(name, 4, 2, iteration=False).iterative


@pytest.mark.parametrize("arguments, message", [
    ({"name": "bml"}, r"unknown mapping 'bml': expected one of rlm, flm, .*\(closest: blm\)"),
    ({"laplace": -0.1}, r"--laplace must be 0 or more, got -0.1"),
    ({"laplace": math.nan}, r"--laplace must be 0 or more, got nan"),
    ({"laplace": math.inf}, r"--laplace must be 0 or more, got inf"),
    ({"laplace": "1"}, r"--laplace must be 0 or more, got 1"),
    ({"name": "linear", "laplace": -1}, r"--laplace must be 0 or more"),  # checked with every mapping
    ({"topk_ratio": 0}, r"--topk-ratio must be in \(0, 1\], got 0"),
    ({"topk_ratio": 1.01}, r"--topk-ratio must be in \(0, 1\], got 1.01"),
    ({"topk_ratio": math.nan}, r"--topk-ratio must be in \(0, 1\], got nan"),
    ({"num_target": 0}, r"got 5 pretrained and 0 downstream labels"),
    ({"name": "linear", "linear_variant": "sigmoyd"}, r"--linear-variant must be one of none, .*, got sigmoyd"),
    ({"bayes": 0}, r"--no-bayes must be True or False, got 0"),
    ({"name": "ilm", "bayes": False}, r"bayes=False is an ablation of blm and blmpp, got mapping 'ilm'"),
    ({"name": "blm", "topk": False}, r"topk=False is an ablation of blmpp, got mapping 'blm'"),
    ({"name": "flm", "iteration": False}, r"iteration=False is an ablation of ilm and blm and blmpp and lda, got"),
    ({"shrinkage": 2}, r"--shrinkage must be auto or in \[0, 1\], got 2"),
    ({"shrinkage": "oas"}, r"--shrinkage must be auto or in \[0, 1\], got oas"),
    ({"shrinkage": math.nan}, r"--shrinkage must be auto or in \[0, 1\], got nan"),
])  # fmt: skip
def test_bad_arguments(arguments, message):
    with pytest.raises(ValueError, match=message) as error:
        build_mapping(**({"name": "blmpp", "num_source": 5, "num_target": 3} | arguments))
    assert "\n" not in str(error.value)


def test_unknown_settings_are_refused_and_those_of_other_mappings_ignored():
    with pytest.raises(TypeError, match=r"no mapping has a setting 'laplce' \(closest: laplace\)"):
        build_mapping("blm", 5, 3, laplce=2.0)
    assert build_mapping("ilm", 5, 3, laplace=2.0, topk_ratio=0.5, linear_variant="sigmoid").name == "ilm"


def test_own_mapping_with_a_setting_of_its_own(sharp):
    assert mapping_settings()["power"] == (POWER, ["sharp"])
    logits, labels = torch.eye(2)[[0, 0, 1, 1]], torch.tensor([0, 0, 0, 1])  # counts [2 0; 1 1]
    for settings, column in (({}, [4 / 5, 1 / 5]), ({"power": 1.0, "laplace": 3.0}, [2 / 3, 1 / 3])):
        mapping = build_mapping("sharp", 2, 2, **settings)
        mapping.observe(logits, labels)
        mapping.refresh()
        torch.testing.assert_close(mapping.weights, torch.tensor([column, [0, 1]]).T)
    with pytest.raises(ValueError, match="--power must be above 0, got -1"):
        build_mapping("blm", 2, 2, power=-1)


def test_one_name_cannot_mean_two_things(sharp, monkeypatch):
    monkeypatch.setitem(MAPPINGS, "blunt", Method(build_sharp, (POWER,)))
    assert mapping_settings()["power"] == (POWER, ["sharp", "blunt"])
    monkeypatch.setitem(MAPPINGS, "blunt", Method(build_sharp, (Setting("power", 3.0, "another"),)))
    with pytest.raises(ValueError, match="mappings sharp and blunt describe a setting 'power' differently"):
        mapping_settings()


def test_settings_of_the_mappings():
    users = {name: mappings for name, (_, mappings) in mapping_settings().items()}
    assert users == {
        "iteration": ["ilm", "blm", "blmpp", "lda"], "laplace": ["blm", "blmpp"], "bayes": ["blm", "blmpp"],
        "shrinkage": ["lda"], "topk_ratio": ["blmpp"], "topk": ["blmpp"], "linear_variant": ["linear"],
    }  # fmt: skip


def test_types_and_flags_of_settings():
    shrinkage = mapping_settings()["shrinkage"][0].type
    assert shrinkage("auto") == "auto" and shrinkage("0.1") == 0.1
    assert POWER.type("3") == 3.0 and POWER.flag == "--power" and POWER.affects == "result"
    assert Setting("topk", True, "").flag == "--no-topk" and Setting("over_write", False, "").flag == "--over-write"
    assert Setting("weights", None, "").type is str
    assert Setting("count", 1, "", type=float).type is float
    Setting("weights", None, "").check(None)
    for choices, value in ((("a", "b"), "c"), ((1, 2), 3)):
        with pytest.raises(ValueError, match=f"--kind must be one of {choices[0]}, {choices[1]}, got {value}"):
            Setting("kind", choices[0], "", choices=choices).check(value)
