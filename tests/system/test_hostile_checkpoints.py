"""Run folders and weights from strangers: a result, our error or the checkpoint before; no code run, nothing else."""

import io
import json
import os
import random
import time
import tracemalloc
import zipfile
from collections import Counter
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from mapping import build_mapping
from models.classifiers import read_state_dict
from tools.training.run_folder import Run, load_checkpoint
from tools.training.trainer import NonFiniteError, Trainer

S, T, SIDE = 6, 4, 5
SETTINGS = {"dataset": "digits", "backbone": "resnet18", "reprogramming": "padding", "mapping": "blm", "seed": 0,
            "epochs": 3}
RESULT = {"final_accuracy": 0.5, "best_accuracy": 0.5, "best_epoch": 0}


def trainer(name="blmpp", side=SIDE, num_source=S, optimizer=torch.optim.Adam):
    program = nn.Parameter(torch.zeros(3, side, side))
    mapping = build_mapping(name, num_source, T, topk_ratio=0.5)
    network = SimpleNamespace(batch_size=None)  # none of it is run here
    return Trainer(network, program, mapping, {}, optimizer([program], lr=0.1), "steps", 3)


def trained(name="blmpp", **kwargs):
    """A trainer with something in each part of its state."""
    made = trainer(name, **kwargs)
    generator = torch.Generator().manual_seed(0)
    for _ in range(2):
        made.mapping.observe(torch.randn(8, made.mapping.num_source, generator=generator), torch.arange(8) % T)
        if not made.mapping.ready:
            made.mapping.refresh()
    for parameter in made.parameters:
        parameter.grad = torch.randn(parameter.shape, generator=generator)
    for optimizer in made.optimizers:
        optimizer.step()
    return made


def fill(folder, name="blmpp"):
    """A run folder with two epochs and a result."""
    run = Run(folder, "vm", SETTINGS)
    run.open()
    for epoch in range(2):
        run.save_epoch({"epoch": epoch, "test_accuracy": 0.5}, trained(name).state_dict() | {"history": []})
    run.finish(RESULT)
    run.close()
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def take_up(folder, name="blmpp"):
    """What a script does with a run folder: ask for its result, take its checkpoint, go on one step."""
    run = Run(folder, "vm", SETTINGS)
    result = run.result
    checkpoint = run.open()
    try:
        made = trainer(name)
        if checkpoint is None:
            return "anew"
        made.load_state_dict(checkpoint)
        for parameter in made.parameters:
            parameter.grad = torch.zeros_like(parameter)
        for optimizer in made.optimizers:
            optimizer.step()
        if made.mapping.estimated:
            made.mapping.observe(torch.zeros(4, S), torch.arange(4))
            made.refresh(2)
        made.mapping(torch.zeros(2, S))
        return f"{len(run.metrics)} epochs" + (", finished" if result else "")
    finally:
        run.close()


def mutate(data, draw):
    """Bytes with a few of them changed, cut out, repeated, or blown up to numbers that matter."""
    data = bytearray(data)
    for _ in range(draw.choice((1, 1, 2, 5))):
        at, kind = draw.randrange(max(1, len(data))), draw.randrange(6)
        if kind == 0:
            data[at : at + 1] = bytes([draw.randrange(256)])
        elif kind == 1 and data:
            data[min(at, len(data) - 1)] ^= 1 << draw.randrange(8)
        elif kind == 2:
            del data[at : at + draw.choice((1, 4, 40, 4000))]
        elif kind == 3:
            data[at:at] = data[draw.randrange(len(data) + 1) :][: draw.choice((1, 8, 100))]
        elif kind == 4:
            data[at : at + 4] = draw.choice((b"\xff\xff\xff\x7f", b"\xff" * 4, b"\0\0\0\0", b"\0\0\0\x80"))
        else:
            words = b"NaN", b"1e999", b"null", b"[" * 50, b"-1", b'"x"', b"{}", b"cos\nsystem\n", b"R", b"."
            word = draw.choice(words)
            data[at : at + draw.choice((0, len(word)))] = word
    return bytes(data)


def repacked(data, change):
    """A checkpoint whose records went through ``change(name, content)``, with checksums that hold."""
    packed = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(data)) as old, zipfile.ZipFile(packed, "w") as new:
        for member in old.infolist():
            new.writestr(member.filename, change(member.filename, old.read(member)))
    return packed.getvalue()


def mutate_inside(data, draw):
    """A checkpoint with one record mutated, the pickle half the time, and checksums that hold."""
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        names = archive.namelist()
    chosen = next(n for n in names if n.endswith("data.pkl")) if draw.random() < 0.5 else draw.choice(names)
    return repacked(data, lambda name, content: mutate(content, draw) if name == chosen else content)


def fuzz(folder, count, seed):
    """Mutate the files of a run folder ``count`` times; outcomes by how often they came up."""
    good, draw, outcomes = fill(folder), random.Random(seed), Counter()
    for number in range(count):
        for path in folder.iterdir():
            path.unlink()
        for name, data in good.items():
            (folder / name).write_bytes(data)
        name = draw.choice(("last.safetensors", "last.safetensors", "last.safetensors", "config.json", "result.json", "metrics.jsonl"))
        change = mutate_inside if name == "last.safetensors" and draw.random() < 0.7 else mutate
        (folder / name).unlink()  # it may be a link
        (folder / name).write_bytes(change(good[name], draw))
        start = time.monotonic()
        try:
            outcome = take_up(folder)
        except (ValueError, NonFiniteError) as error:
            assert "\n" not in str(error)
            outcome = "our error"
        except Exception as error:
            raise AssertionError(f"mutation {number} of {name}: {type(error).__name__}: {error}") from error
        assert time.monotonic() - start < 20, f"mutation {number} of {name} took long"
        outcomes[name, outcome] += 1
        assert "anew" not in outcome
    return outcomes


def test_fuzzed_run_folders(tmp_path):
    (tmp_path / "run").mkdir()
    outcomes = fuzz(tmp_path / "run", 200, seed=0)
    kinds = {outcome for _, outcome in outcomes}
    assert {"our error", "1 epochs, finished", "2 epochs, finished"} <= kinds


@pytest.mark.soak
def test_fuzzed_run_folders_at_length(tmp_path):
    (tmp_path / "run").mkdir()
    outcomes = fuzz(tmp_path / "run", 10_000, seed=1)
    print("\n" + "\n".join(f"{name}: {outcome}: {count}" for (name, outcome), count in sorted(outcomes.items())))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["run"]


class System:
    def __reduce__(self):
        return os.system, ("touch pwned",)


class Evaluated:
    def __reduce__(self):
        return eval, ("__import__('os').system('touch pwned')",)


class Nested:
    def __reduce__(self):
        return dict, ([("metrics", System())],)


class Buffer:
    def __reduce__(self):
        return bytearray, (10**12,)


class Pixels:
    def __reduce__(self):
        return torch.FloatTensor, (10**11,)


@pytest.mark.parametrize("attack", [System, Evaluated, Nested, Buffer, Pixels])
@pytest.mark.parametrize("legacy", [False, True])
def test_code_and_bombs_in_a_pickle(tmp_path, monkeypatch, attack, legacy):
    monkeypatch.chdir(tmp_path)
    torch.save({"program": torch.zeros(2), "mapping": attack()}, "last.safetensors", _use_new_zipfile_serialization=not legacy)
    tracemalloc.start()
    for read in (load_checkpoint, read_state_dict):
        with pytest.raises(ValueError, match="last.pt is not a readable checkpoint of plain tensors"):
            read("last.safetensors")
    assert tracemalloc.get_traced_memory()[1] < 50e6
    tracemalloc.stop()
    assert os.listdir() == ["last.safetensors"]


def archive(path, records, compression=zipfile.ZIP_STORED):
    with zipfile.ZipFile(path, "w", compression) as packed:
        for name, content in records.items():
            packed.writestr(name, content)


def test_deep_nesting(tmp_path):
    deep = b"\x80\x02" + b"]" * 200_000 + b"a" * 199_999 + b"."
    archive(tmp_path / "deep.pth", {"x/data.pkl": deep, "x/version": b"3"})
    with pytest.raises(ValueError):
        load_checkpoint(tmp_path / "deep.pth")
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.json").write_text("[" * 100_000)
    with pytest.raises(ValueError, match="config.json holds no valid JSON"):
        Run(tmp_path / "run", "vm", SETTINGS)


@pytest.mark.parametrize("config", ["[]", "{}", '{"settings": []}', "3", "", "{", "\ufeff{}"])
def test_settings_that_are_none(tmp_path, config):
    (tmp_path / "config.json").write_text(config, encoding="utf-8")
    with pytest.raises(ValueError, match="config.json holds no"):
        Run(tmp_path, "vm", SETTINGS)


@pytest.mark.parametrize("result", ["[]", "{}", "", '{"final_accuracy": "0.5"}', '{"final_accuracy": NaN}', "1"])
def test_results_that_are_none(tmp_path, result):
    (tmp_path / "result.json").write_text(result)
    with pytest.raises(ValueError, match="result.json holds no .*; delete it, and the same command writes it anew"):
        _ = Run(tmp_path, "vm", SETTINGS).result


def wrong(key, value):
    def change(state):
        state[key] = value
    return change


def wrong_mapping(key, value):
    def change(state):
        state["mapping"][key] = value
    return change


def wrong_statistics(key, value):
    def change(state):
        state["mapping"]["_extra_state"]["statistics"][key] = value
    return change


def wrong_moment(key, value):
    def change(state):
        state["optimizers"][0]["state"][0][key] = value
    return change


@pytest.mark.parametrize("name, change", [
    ("blmpp", wrong("program", torch.zeros(3, 9, 9))),
    ("blmpp", wrong("program", torch.zeros(()))),  # would be broadcast
    ("blmpp", wrong("program", torch.zeros(3, SIDE, SIDE, dtype=torch.int64))),
    ("blmpp", wrong("mapping", {})),
    ("blmpp", wrong("mapping", {3: torch.zeros(2)})),
    ("blmpp", wrong("optimizers", [])),
    ("blmpp", wrong("optimizers", [{"state": 3}])),
    ("blmpp", wrong("optimizers", None)),
    ("blmpp", wrong("skipped_steps", "many")),
    ("blmpp", wrong_mapping("_weights", torch.zeros(T, S))),
    ("blmpp", wrong_mapping("_extra_state", 3)),
    ("blmpp", wrong_mapping("_extra_state", {"ready": False, "statistics": None})),
    ("blmpp", wrong_mapping("_extra_state", {"ready": 2, "statistics": None})),
    ("ilm", wrong_mapping("_index", torch.full((T,), S))),
    ("ilm", wrong_mapping("_index", torch.full((T,), -1))),
    ("ilm", wrong_mapping("_index", torch.zeros(T + 1, dtype=torch.int64))),
    ("linear", wrong_mapping("matrix", torch.zeros(S, T + 1))),
    ("blm", wrong_statistics("keys", torch.full((3,), S * T))),
    ("blm", wrong_statistics("extremes", torch.zeros(2, dtype=torch.int64))),
    ("blm", wrong_statistics("extremes", torch.tensor([0, 0, T]))),
    ("blm", wrong_statistics("extremes", torch.tensor([0, 1, 2]))),
    ("blm", wrong_statistics("values", torch.zeros(3))),
    ("blm", wrong_statistics("num_samples", 0)),
    ("blm", wrong_moment("exp_avg", torch.zeros(()))),
    ("blm", wrong_moment("step", torch.zeros(3))),
    ("blm", wrong_moment("step", torch.tensor(-1.0))),  # Adam would divide by 1 - beta^0
    ("blm", wrong_moment("step", torch.tensor(float("nan")))),
    ("blm", wrong_moment("exp_avg", torch.zeros(3, SIDE, SIDE, dtype=torch.int64))),
    ("blm", wrong_moment("momentum_buffer", torch.zeros(3, SIDE, SIDE))),
])
def test_state_of_another_run(name, change):
    state = trained(name).state_dict()
    trainer(name).load_state_dict(state)
    change(state)
    with pytest.raises(ValueError, match="the checkpoint does not belong to this run .*; --overwrite starts anew"):
        trainer(name).load_state_dict(state)


def test_moments_that_overlap_in_memory_are_taken_apart():
    state = trained("blm").state_dict()
    moments = state["optimizers"][0]["state"][0]
    moments["exp_avg"] = torch.ones(1).expand(3, SIDE, SIDE)
    made = trainer("blm")
    made.load_state_dict(state)
    made.program.grad = torch.zeros_like(made.program)
    made.optimizers[0].step()
    assert made.optimizers[0].state[made.program]["exp_avg"].unique().item() == pytest.approx(0.9)


def test_state_of_another_optimiser_mapping_and_classifier():
    state = trained("blm").state_dict()
    for other in (trainer("blm", optimizer=torch.optim.SGD), trainer("linear"), trainer("blm", num_source=S + 1)):
        with pytest.raises(ValueError, match="does not belong to this run"):
            other.load_state_dict(state)


def test_a_checkpoint_of_other_settings_is_refused(tmp_path):
    fill(tmp_path / "run")
    (tmp_path / "run" / "config.json").unlink()
    run = Run(tmp_path / "run", "vm", SETTINGS | {"seed": 1})
    with pytest.raises(ValueError, match="other settings .*seed was 0 and is 1"):
        run.open()
    run.close()


@pytest.mark.parametrize("metrics", [
    [], {}, [3], [{"epoch": 1, "test_accuracy": 0.5}], [{"epoch": 0}], [{"epoch": 0, "test_accuracy": "0.5"}],
    [{"epoch": 0, "test_accuracy": 0.5, "more": torch.zeros(2)}],
])
def test_metrics_that_are_none(tmp_path, metrics):
    checkpoint = {"kind": "vm", "settings": SETTINGS, "metrics": metrics, **trained().state_dict()}
    torch.save(checkpoint, tmp_path / "last.safetensors")
    with pytest.raises(ValueError, match="last.pt is damaged or no checkpoint of this project"):
        load_checkpoint(tmp_path / "last.safetensors")


def test_links_in_a_run_folder_are_not_written_through(tmp_path):
    precious, folder = tmp_path / "precious", tmp_path / "run"
    precious.write_text("mine")
    fill(folder)
    for name in (".last.pt.tmp", ".config.json.tmp", ".metrics.jsonl.tmp"):
        (folder / name).symlink_to(precious)
    take_up(folder)
    (folder / ".lock").unlink()
    (folder / ".lock").symlink_to(precious)
    with pytest.raises(OSError):
        take_up(folder)
    assert precious.read_text() == "mine"


def test_damage_never_becomes_the_checkpoint_before(tmp_path, capsys):
    """After a fall back, a process that dies within the next save must still find a good checkpoint."""
    fill(tmp_path)
    (tmp_path / "last.safetensors").unlink()
    (tmp_path / "last.safetensors").write_bytes(b"damaged")
    assert take_up(tmp_path).startswith("1 epochs")
    assert "last.pt is not a readable checkpoint" in capsys.readouterr().err
    run = Run(tmp_path, "vm", SETTINGS)
    run.open()
    run.save_epoch({"epoch": 1, "test_accuracy": 0.5}, trained().state_dict())
    run.close()
    for name in ("last.safetensors", "previous.safetensors"):
        assert load_checkpoint(tmp_path / name)
    assert json.loads((tmp_path / "result.json").read_text()) == RESULT
