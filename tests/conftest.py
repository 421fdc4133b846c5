"""Small finished runs that the tests of the tools share; nothing may be changed in their folders."""

import io
import os
from contextlib import redirect_stdout
from importlib import import_module

import pytest

if "PYTEST_XDIST_WORKER" in os.environ:  # before torch is imported: workers that share the cores take one thread each
    os.environ.setdefault("OMP_NUM_THREADS", "1")

TINY = ["--backbone", "timm:test_resnet", "--weights", "none", "--canvas-size", "64"]  # random weights, no download
SHARED = ["--dataset", "synthetic", "--epochs", "3", "--batch-size", "24"]
BACKBONES = {
    "train_vm": ["--backbone", "efficientnet_lite0", "--canvas-size", "64"],
    "train_vlm": ["--backbone", "tiny-test", "--weights", "none", "--lr", "10"],
}


def train(script, results, *arguments):
    """Run a training script in this process; its run folder."""
    before = set(results.rglob("config.json"))
    with redirect_stdout(io.StringIO()):  # a test that asks for a run wants to read its own output alone
        import_module(script).main([*SHARED, *BACKBONES[script], "--results-path", str(results), *arguments])
    (config,) = set(results.rglob("config.json")) - before
    return config.parent


@pytest.fixture(scope="session")
def vm_run(tmp_path_factory):
    """EfficientNet-Lite0 with ImageNet weights on a canvas of 64, padding, blm."""
    return train("train_vm", tmp_path_factory.mktemp("vm"), "--mapping", "blm")


@pytest.fixture(scope="session")
def vlm_run(tmp_path_factory):
    """The tiny CLIP, watermarking, blmpp."""
    return train("train_vlm", tmp_path_factory.mktemp("vlm"), "--mapping", "blmpp")


@pytest.fixture(scope="session")
def linear_run(tmp_path_factory):
    """A tiny random network, watermarking, the learned mapping with its bias, trained in bf16."""
    more = [*TINY, "--precision", "bf16"]
    return train(
        "train_vm", tmp_path_factory.mktemp("linear"), "--mapping", "linear", "--reprogramming", "watermarking", *more
    )


@pytest.fixture(scope="session")
def lda_run(tmp_path_factory):
    """EfficientNet-Lite0, padding, one epoch of the closed form: weights of both signs and a bias."""
    return train("train_vm", tmp_path_factory.mktemp("lda"), "--mapping", "lda", "--epochs", "1")


@pytest.fixture(scope="session")
def rlm_run(tmp_path_factory):
    """The tiny CLIP, padding, labels drawn at random."""
    return train("train_vlm", tmp_path_factory.mktemp("rlm"), "--mapping", "rlm", "--reprogramming", "padding")
