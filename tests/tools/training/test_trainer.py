"""The training step: fast path beside plain path, ω from the training pass beside a pass of its own, schedules."""

import json
import math
import os

import pytest
import torch
from torch.nn import functional

from cfg import RECIPES, VLMConfig, VMConfig, VMFastConfig
from mapping import build_mapping
from models import SWITCHES
from tests.data.helpers import write_flowers_subset
from tools.training.build import build_clip, build_vision
from tools.training.command_line import parse
from tools.training.trainer import Trainer, learning_rate

CPU, ALL = torch.device("cpu"), ",".join(SWITCHES)


def trainer(tmp_path, mapping="blmpp", engine=ALL, reprogramming="padding", seed=0, epochs=4):
    settings = VMConfig.of(
        dataset="digits",
        train_fraction=0.07,
        backbone="efficientnet_lite0",
        canvas_size=64,
        mapping=mapping,
        seed=seed,
        reprogramming=reprogramming,
        results_path=str(tmp_path),
        epochs=epochs,
        batch_size=24,
        engine=engine,
    )
    system = build_vision(settings, CPU)
    # At 0 the whole canvas around the image is one grey, for which this network has a ReLU6 whose input, 4e-7, is
    # within rounding of its kink: either side of it is right, and Adam's first step doubles the difference.
    torch.nn.init.normal_(system.input_vr.program, std=0.1, generator=torch.Generator().manual_seed(seed))
    return trainer_of(system, 24, seed, epochs)


def trainer_of(system, batch_size, seed, epochs):
    """The trainer of a vision model under the published recipe."""
    program = system.input_vr.program
    adam, loaders = torch.optim.Adam([program], lr=0.01), system.loaders(batch_size, seed)
    return Trainer(system.network, program, system.mapping, loaders, adam, "steps", epochs)


@pytest.mark.parametrize("mapping, reprogramming", [("ilm", "padding"), ("blmpp", "padding"), ("blm", "watermarking")])
def test_fast_path_gives_the_numbers_of_the_plain_path(tmp_path, mapping, reprogramming):
    runs = {}
    for engine in ("plain", ALL):
        runs[engine] = run = trainer(tmp_path, mapping, engine, reprogramming)
        run.estimate(0)
        run.first_weights = run.mapping.weights.clone()
        start = run.program.detach().clone()
        run.trained = run.train(0)
        run.step = run.program.detach() - start
    plain, fast = runs["plain"], runs[ALL]
    assert "fast path" in fast.network.description and plain.network.description == "plain path"
    torch.testing.assert_close(fast.first_weights, plain.first_weights, rtol=1e-4, atol=1e-6)
    assert fast.trained.loss == pytest.approx(plain.trained.loss, rel=1e-4)
    assert fast.trained.accuracy == pytest.approx(plain.trained.accuracy, abs=0.02)
    assert float((fast.step - plain.step).norm() / plain.step.norm()) < 0.02


def test_mapping_from_the_training_pass(tmp_path):
    """What train_vm_fast.py estimates is the mapping of the logits that training saw, with the same K."""
    run = trainer(tmp_path)
    run.estimate(0)
    expected = build_mapping("blmpp", run.mapping.num_source, 10)
    assert expected.k == run.mapping.k == 1
    step_logits = []
    observe = run.mapping.observe

    def spy(logits, labels):
        step_logits.append((logits.clone(), labels.clone()))
        observe(logits, labels)

    run.mapping.observe = spy
    run.train(0, observe=True)
    assert [len(labels) for _, labels in step_logits] == [24, 24, 12]
    expected.observe(torch.cat([logits for logits, _ in step_logits]), torch.cat([y for _, y in step_logits]))
    expected.refresh()
    run.refresh(1)
    torch.testing.assert_close(run.mapping.weights, expected.weights, rtol=1e-6, atol=1e-9)


def test_loss_and_gradient_are_the_mean_over_the_batch(tmp_path):
    run = trainer(tmp_path, engine="plain")
    run.estimate(0)
    batch = next(iter(run.loaders["train"].epoch(0)))
    run.step.chunk_size = 5  # 5 + 5 + 5 + 5 + 4
    _, loss_sum, correct, chunked = run.step(batch.images, batch.labels, torch.tensor(24.0))
    run.program.grad = None
    logits = run.mapping(run.network(batch.images))
    loss = functional.cross_entropy(logits, batch.labels)
    loss.backward()
    assert float(loss_sum) == pytest.approx(24 * loss.item(), rel=1e-5)
    assert int(correct) == int((logits.argmax(1) == batch.labels).sum())
    assert float((chunked - run.program.grad).norm() / run.program.grad.norm()) < 1e-4


def test_learning_rate():
    rates = [learning_rate("steps", 0.01, epoch, 200) for epoch in range(200)]
    assert rates[0] == rates[99] == 0.01
    assert rates[100] == rates[143] == pytest.approx(0.001)
    assert rates[144] == rates[199] == pytest.approx(0.0001)
    for epochs, falls in ((1, ()), (2, (1, 1)), (3, (1, 2)), (6, (3, 4)), (10, (5, 7)), (25, (12, 18)), (50, (25, 36))):
        for epoch in range(epochs):  # one rate from an epoch's first step to its last
            expected = 0.01 * 0.1 ** sum(epoch >= fall for fall in falls)
            assert learning_rate("steps", 0.01, epoch, epochs) == pytest.approx(expected)
            assert learning_rate("steps", 0.01, epoch + 0.99, epochs) == pytest.approx(expected)
    assert learning_rate("cosine", 40, 0, 6) == 40
    assert learning_rate("cosine", 40, 3, 6) == pytest.approx(20)
    assert learning_rate("cosine", 40, 6, 6) == 0
    assert learning_rate("cosine", 40, 1.5, 6) == pytest.approx(20 * (1 + math.sqrt(0.5)))


def test_defaults_and_recipes():
    vm, fast, vlm = (parse(config, "", []) for config in (VMConfig, VMFastConfig, VLMConfig))
    assert (vm.dataset, vm.mapping, vm.reprogramming, vm.backbone) == ("sun397", "blmpp", "padding", "resnet18")
    assert (vm.epochs, vm.batch_size, vm.lr, vm.seed, vm.laplace, vm.topk_ratio) == (200, 256, 0.01, 0, 1.0, 0.15)
    assert fast.settings == vm.settings
    assert (vlm.reprogramming, vlm.backbone, vlm.weights, vlm.lr) == (
        "watermarking",
        "ViT-B-32-quickgelu",
        "openai",
        40.0,
    )
    assert RECIPES.keys() == {"dtd", "oxfordpets", "digits"}
    assert parse(VMConfig, "", ["--dataset", "dtd"]).batch_size == 64
    assert parse(VMConfig, "", ["--dataset", "dtd", "--batch-size", "128"]).batch_size == 128
    assert parse(VMConfig, "", ["--mapping", "blmp"]).mapping == "blmpp"
    assert parse(VMConfig, "", ["--engine", "fold-batchnorm,channels-last"]).engine == "channels-last,fold-batchnorm"


def test_clip_border_is_thirty(tmp_path):
    cfg = VLMConfig.of(
        dataset="synthetic", backbone="tiny-test", weights="none", mapping="ilm", results_path=str(tmp_path)
    )
    system = build_clip(cfg, CPU)
    assert system.input_vr.border == 30
    assert float(system.input_vr.mask.sum()) == 224**2 - 164**2
    assert system.mapping.num_source == 81 * 8


@pytest.mark.soak
@pytest.mark.filterwarnings("ignore:flowers102 has")
@pytest.mark.skipif(not os.environ.get("BLM_REAL_DATA"), reason="BLM_REAL_DATA names no folder with flowers102/")
@pytest.mark.parametrize("seeds", [1, 10])
@pytest.mark.parametrize("mapping, expected", [("blmpp", 0.64), ("ilm", 0.405)])
def test_twenty_real_flowers(tmp_path, mapping, expected, seeds):
    """Ten epochs on labels 10-29. One run of an independent implementation ended at 0.640 with BLM+, at 0.405 with ILM.

    ILM with seed 0 misses that. With 16 images a class its counts are full of ties, and single runs scatter: hence
    also the mean of ten.
    """
    import train_vm

    write_flowers_subset(tmp_path / "flowers102", range(10, 30))
    final = []
    for seed in range(seeds):
        train_vm.main(
            [
                "--dataset",
                "flowers102",
                "--data-path",
                str(tmp_path),
                "--mapping",
                mapping,
                "--backbone",
                "efficientnet_lite0",
                "--batch-size",
                "64",
                "--epochs",
                "10",
                "--seed",
                str(seed),
                "--results-path",
                str(tmp_path / "results"),
            ]
        )
        name = f"efficientnet_lite0_padding_{mapping}_seed{seed}_epochs=10_batch_size=64"
        result = json.loads((tmp_path / "results" / "vm" / "flowers102" / name / "result.json").read_text())
        final.append(result["final_accuracy"])
    mean = sum(final) / seeds
    print(mapping, final, f"mean {mean:.3f}")
    assert mean == pytest.approx(expected, abs=0.05)


@pytest.mark.soak
def test_the_first_command_of_the_readme(tmp_path):
    import train_vm

    train_vm.main(
        [
            "--dataset",
            "digits",
            "--backbone",
            "efficientnet_lite0",
            "--canvas-size",
            "128",
            "--epochs",
            "6",
            "--results-path",
            str(tmp_path),
        ]
    )
    (path,) = (tmp_path / "vm" / "digits").glob("*/result.json")
    result = json.loads(path.read_text())
    print(result)
    assert result["final_accuracy"] > 0.7 and result["final_accuracy"] == pytest.approx(0.765, abs=0.04)


@pytest.mark.soak
@pytest.mark.filterwarnings("ignore:flowers102 has")
@pytest.mark.parametrize("dataset", ["digits", "flowers102"])
def test_final_accuracy_of_three_seeds_fast_and_plain(tmp_path, dataset):
    """The README's table's command with BLM+, and its first one, which fails: on 896 digits single runs lie further
    apart than the bound. See the next test."""
    import train_vm

    options = ["--canvas-size", "128", "--epochs", "6"]
    if dataset == "flowers102":
        if not os.environ.get("BLM_REAL_DATA"):
            pytest.skip("BLM_REAL_DATA names no folder with flowers102/")
        options = ["--data-path", os.environ["BLM_REAL_DATA"], "--epochs", "10", "--batch-size", "64"]
    final = {}
    for engine in (ALL, "plain"):
        for seed in range(3):
            train_vm.main(
                [
                    "--dataset",
                    dataset,
                    "--backbone",
                    "efficientnet_lite0",
                    "--mapping",
                    "blmpp",
                    "--seed",
                    str(seed),
                    "--engine",
                    engine,
                    "--results-path",
                    str(tmp_path / engine[:5]),
                    *options,
                ]
            )
            (path,) = (tmp_path / engine[:5] / "vm" / dataset).glob(f"*_seed{seed}_*/result.json")
            final.setdefault(engine, []).append(json.loads(path.read_text())["final_accuracy"])
    print(final)
    fast, plain = (sum(final[engine]) / 3 for engine in (ALL, "plain"))
    assert fast == pytest.approx(plain, abs=0.01)


@pytest.mark.soak
def test_fast_path_trains_as_well_as_the_plain_path(tmp_path):
    """Rounding sends single runs apart, by points of accuracy on so small a task: what must agree is their mean."""
    ends = {}
    for seed in range(16):
        for engine in ("plain", ALL):
            settings = VMConfig.of(
                dataset="digits",
                train_fraction=0.4,
                backbone="efficientnet_lite0",
                canvas_size=64,
                seed=seed,
                results_path=str(tmp_path),
                epochs=8,
                batch_size=16,
                engine=engine,
            )
            run = trainer_of(build_vision(settings, CPU), 16, seed, 8)
            for epoch in range(8):
                run.estimate(epoch)
                trained = run.train(epoch)
            ends.setdefault(engine, []).append((trained.loss, 100 * run.evaluate().accuracy))
    plain, fast = (torch.tensor(ends[engine], dtype=torch.float64) for engine in ("plain", ALL))
    difference, error = (fast - plain).mean(0), (fast - plain).std(0) / 16**0.5
    for name, values in (("plain", plain), ("fast", fast)):
        print(f"{name}: loss, accuracy in %: mean {values.mean(0).tolist()}, deviation {values.std(0).tolist()}")
    print(f"difference {difference.tolist()} +- {error.tolist()}")
    assert (difference.abs() < 2.5 * error).all() and error[0] < 0.06 and error[1] < 3
