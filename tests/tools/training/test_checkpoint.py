"""Run folders from strangers or broken disks: a result, our one-line error or the checkpoint before, nothing else."""

import json
import random
import time
from collections import Counter
from types import SimpleNamespace

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn

from cfg import VMConfig
from mapping import build_mapping
from tools.training.checkpoint import _checksum, read_checkpoint, write_checkpoint
from tools.training.run_folder import Run, load_checkpoint
from tools.training.trainer import NonFiniteError, Trainer

S, T, SIDE = 6, 4, 5
RESULT = {"final_accuracy": 0.5, "best_accuracy": 0.5, "best_epoch": 0}
CONTENT = {"class names": ["ant", "bee"]}


def settings(results, **more):
    return VMConfig.of(**{"dataset": "digits", "mapping": "blm", "epochs": 3, "results_path": str(results)} | more)


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


def fill(results):
    """A run with two epochs and a result; its folder, and what is in it."""
    run = Run(settings(results))
    run.open(CONTENT)
    for epoch in range(2):
        run.save_epoch({"epoch": epoch, "test_accuracy": 0.5}, trained().state_dict() | {"history": []})
    run.finish(RESULT)
    run.close()
    return run.folder, {path.name: path.read_bytes() for path in run.folder.iterdir()}


def take_up(results, name="blmpp"):
    """What a script does with a run folder: ask for its result, take its checkpoint, go on one step."""
    run = Run(settings(results))
    result = run.result
    try:
        checkpoint, made = run.open(CONTENT), trainer(name)
        if checkpoint is None:
            return "from scratch"
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
            word = draw.choice((b"NaN", b"1e999", b"null", b"[" * 50, b"-1", b'"x"', b"{}", b"$tensor", b"true"))
            data[at : at + draw.choice((0, len(word)))] = word
    return bytes(data)


def forge(path, change):
    """Put a checkpoint's JSON and tensors through ``change(content, tensors)``, with a checksum that holds."""
    with safe_open(path, "pt") as file:
        content, tensors = file.metadata()["content"], {name: file.get_tensor(name) for name in file.keys()}
    content = change(content, tensors) or content
    path.unlink()  # it may be a link
    save_file(tensors, path, {"content": content, "checksum": _checksum(content, tensors)})


def mutate_inside(path, draw):
    """One tensor's bytes, or the JSON, mutated under a checksum that holds."""

    def change(content, tensors):
        if draw.random() < 0.5:
            return mutate(content.encode(), draw).decode(errors="ignore")
        flat = tensors[draw.choice(sorted(tensors))].view(-1).view(torch.uint8)
        changed = mutate(flat.numpy().tobytes(), draw)[: len(flat)].ljust(len(flat), b"\xff")
        flat.copy_(torch.frombuffer(bytearray(changed), dtype=torch.uint8))
        return None

    forge(path, change)


def fuzz(results, count, seed):
    """Mutate the files of a run folder ``count`` times; outcomes by how often they came up."""
    (folder, good), draw, outcomes = fill(results), random.Random(seed), Counter()
    for number in range(count):
        for path in folder.iterdir():
            path.unlink()
        for name, data in good.items():
            (folder / name).write_bytes(data)
        name = draw.choice(("last.safetensors",) * 3 + ("config.json", "result.json", "metrics.jsonl"))
        if name == "last.safetensors" and draw.random() < 0.7:
            mutate_inside(folder / name, draw)
        else:
            (folder / name).write_bytes(mutate(good[name], draw))
        start = time.process_time()
        try:
            outcome = take_up(results)
        except (ValueError, NonFiniteError) as error:
            assert "\n" not in str(error)
            outcome = "our error"
        except Exception as error:
            raise AssertionError(f"mutation {number} of {name}: {type(error).__name__}: {error}") from error
        assert time.process_time() - start < 20, f"mutation {number} of {name} took long"
        outcomes[name, outcome] += 1
        assert "from scratch" not in outcome
    return outcomes


def test_fuzzed_run_folders(tmp_path):
    outcomes = fuzz(tmp_path, 200, seed=0)
    assert {"our error", "1 epochs, finished", "2 epochs, finished"} <= {outcome for _, outcome in outcomes}


@pytest.mark.soak
def test_fuzzed_run_folders_at_length(tmp_path):
    outcomes = fuzz(tmp_path / "results", 10_000, seed=1)
    print("\n" + "\n".join(f"{name}: {outcome}: {count}" for (name, outcome), count in sorted(outcomes.items())))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["results"]


def test_what_is_written_comes_back(tmp_path):
    base = torch.arange(12.0).view(3, 4)
    values = {
        "a": {"b": [base.T, base[:, 1:]], "c": None},
        "shared": base,
        "n": float("inf"),
        "text": "ω",
        "t": True,
        "scalar": torch.tensor(7),
        "empty": torch.zeros(0, 3),
        "half": torch.ones(2, dtype=torch.bfloat16),
    }
    write_checkpoint(tmp_path / "x", values)
    back = read_checkpoint(tmp_path / "x")
    assert list(back) == list(values) and (back["n"], back["text"], back["t"]) == (float("inf"), "ω", True)
    assert back["a"]["c"] is None and all(map(torch.equal, back["a"]["b"], values["a"]["b"]))
    for name in ("shared", "scalar", "empty", "half"):
        assert torch.equal(back[name], values[name]) and back[name].dtype == values[name].dtype


def test_every_flipped_bit_of_a_tensor_is_noticed(tmp_path):
    path = tmp_path / "x"
    write_checkpoint(path, {"program": torch.ones(3), "n": 1})
    whole = path.read_bytes()
    for at in range(len(whole) - 12, len(whole)):
        flipped = bytearray(whole)
        flipped[at] ^= 1 << (at % 8)
        path.write_bytes(flipped)
        with pytest.raises(ValueError, match="x is damaged or no checkpoint of this project .its checksum differs"):
            read_checkpoint(path)


def rename(content, tensors):
    tensors["other"] = tensors.pop("program")


def lose(content, tensors):
    del tensors["program"]


def deep(content, tensors):
    return "[" * 100_000


def digits(content, tensors):
    return content.replace('"epoch": 0', '"epoch": ' + "9" * 5000, 1)


def tensor_for_an_epoch(content, tensors):
    return content.replace('"epoch": 0', '"epoch": {"$tensor": "program"}', 1)


def no_tensor(content, tensors):
    return content.replace('{"$tensor": "program"}', '{"$tensor": []}')


FORGERIES = [rename, lose, deep, digits, tensor_for_an_epoch, no_tensor, lambda *_: "3", lambda *_: "{"]


@pytest.mark.parametrize("change", FORGERIES)
def test_json_and_tensors_that_do_not_agree(tmp_path, change):
    folder, _ = fill(tmp_path)
    forge(folder / "last.safetensors", change)
    with pytest.raises(ValueError, match="last.safetensors is damaged or no checkpoint of this project") as caught:
        load_checkpoint(folder / "last.safetensors")
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 400
    assert take_up(tmp_path) == "1 epochs, finished"


def test_a_file_of_another_kind(tmp_path):
    path = tmp_path / "last.safetensors"
    for data in (b"", b"hello", b"\xff" * 64, (10**12).to_bytes(8, "little") + b"{}"):
        path.write_bytes(data)
        with pytest.raises(ValueError, match="damaged or no checkpoint of this project"):
            read_checkpoint(path)
    save_file({"program": torch.zeros(3)}, path)  # somebody else's, without our metadata
    with pytest.raises(ValueError, match="damaged or no checkpoint of this project"):
        read_checkpoint(path)


@pytest.mark.parametrize("config", ["[" * 100_000, "", "{", "\ufeff{}"])
def test_settings_that_are_no_json(tmp_path, config):
    cfg = settings(tmp_path)
    cfg.folder.mkdir(parents=True)
    (cfg.folder / "config.json").write_text(config, encoding="utf-8")
    with pytest.raises(ValueError, match="config.json holds no valid JSON"):
        Run(cfg)


@pytest.mark.parametrize("result", ["[]", "{}", "", '{"final_accuracy": "0.5"}', '{"final_accuracy": NaN}', "1"])
def test_results_that_are_none(tmp_path, result):
    cfg = settings(tmp_path)
    cfg.folder.mkdir(parents=True)
    (cfg.folder / "result.json").write_text(result)
    with pytest.raises(ValueError, match="result.json holds no .*; delete it, and the same command writes it again"):
        _ = Run(cfg).result


def wrong(*keys_and_value):
    """A change of a state: the value to put where the keys lead."""
    *keys, value = keys_and_value

    def change(state):
        for key in keys[:-1]:
            state = state[key]
        state[keys[-1]] = value

    return change


STATISTICS = ("mapping", "_extra_state", "statistics")
MOMENTS = ("optimizers", 0, 0)


@pytest.mark.parametrize(
    "name, change",
    [
        ("blmpp", wrong("program", torch.zeros(3, 9, 9))),
        ("blmpp", wrong("program", torch.zeros(()))),  # would be broadcast
        ("blmpp", wrong("program", torch.zeros(3, SIDE, SIDE, dtype=torch.int64))),
        ("blmpp", wrong("mapping", {})),
        ("blmpp", wrong("mapping", {3: torch.zeros(2)})),
        ("blmpp", wrong("optimizers", [])),
        ("blmpp", wrong("optimizers", [3])),
        ("blmpp", wrong("optimizers", [[3]])),
        ("blmpp", wrong("optimizers", [[]])),
        ("blmpp", wrong("optimizers", None)),
        ("blmpp", wrong("skipped_steps", "many")),
        ("blmpp", wrong("mapping", "_weights", torch.zeros(T, S))),
        ("blmpp", wrong("mapping", "_extra_state", 3)),
        ("blmpp", wrong("mapping", "_extra_state", {"ready": False, "statistics": None})),
        ("blmpp", wrong("mapping", "_extra_state", {"ready": 2, "statistics": None})),
        ("ilm", wrong("mapping", "_index", torch.full((T,), S))),
        ("ilm", wrong("mapping", "_index", torch.full((T,), -1))),
        ("ilm", wrong("mapping", "_index", torch.zeros(T + 1, dtype=torch.int64))),
        ("linear", wrong("mapping", "matrix", torch.zeros(S, T + 1))),
        ("blm", wrong(*STATISTICS, "keys", torch.full((3,), S * T))),
        ("blm", wrong(*STATISTICS, "extremes", torch.zeros(2, dtype=torch.int64))),
        ("blm", wrong(*STATISTICS, "extremes", torch.tensor([0, 0, T]))),
        ("blm", wrong(*STATISTICS, "extremes", torch.tensor([0, 1, 2]))),
        ("blm", wrong(*STATISTICS, "values", torch.zeros(3))),
        ("blm", wrong(*STATISTICS, "num_samples", 0)),
        ("blm", wrong(*MOMENTS, "exp_avg", torch.zeros(()))),
        ("blm", wrong(*MOMENTS, "step", torch.zeros(3))),
        ("blm", wrong(*MOMENTS, "step", torch.tensor(-1.0))),  # Adam would divide by 1 - beta^0
        ("blm", wrong(*MOMENTS, "step", torch.tensor(float("nan")))),
        ("blm", wrong(*MOMENTS, "exp_avg", torch.zeros(3, SIDE, SIDE, dtype=torch.int64))),
        ("blm", wrong(*MOMENTS, "momentum_buffer", torch.zeros(3, SIDE, SIDE))),
    ],
)
def test_state_of_another_run(name, change):
    state = trained(name).state_dict()
    trainer(name).load_state_dict(state)
    change(state)
    with pytest.raises(ValueError, match="checkpoint does not belong to this run .*; --overwrite starts from scratch"):
        trainer(name).load_state_dict(state)


def test_state_of_another_optimiser_mapping_and_classifier():
    state = trained("blm").state_dict()
    for other in (trainer("blm", optimizer=torch.optim.SGD), trainer("linear"), trainer("blm", num_source=S + 1)):
        with pytest.raises(ValueError, match="does not belong to this run"):
            other.load_state_dict(state)


def test_a_checkpoint_of_other_settings_is_refused(tmp_path):
    folder, _ = fill(tmp_path)
    (folder / "config.json").unlink()
    folder.rename(settings(tmp_path, seed=1).folder)
    run = Run(settings(tmp_path, seed=1))
    with pytest.raises(ValueError, match="other settings .*seed was 0 and is 1"):
        run.open(CONTENT)
    run.close()


@pytest.mark.parametrize(
    "metrics",
    [
        [],
        {},
        [3],
        [{"epoch": 1, "test_accuracy": 0.5}],
        [{"epoch": 0}],
        [{"epoch": 0, "test_accuracy": "0.5"}],
        [{"epoch": 0, "test_accuracy": float("nan")}],
        [{"epoch": 0, "test_accuracy": 0.5}, {"epoch": 0, "test_accuracy": 0.5}],
    ],
)
def test_metrics_that_are_none(tmp_path, metrics):
    checkpoint = {"kind": "vm", "settings": settings(tmp_path).settings, "metrics": metrics, **trained().state_dict()}
    write_checkpoint(tmp_path / "last.safetensors", checkpoint)
    with pytest.raises(ValueError, match="last.safetensors is damaged or no checkpoint of this project"):
        load_checkpoint(tmp_path / "last.safetensors")


def test_links_in_a_run_folder_are_not_written_through(tmp_path):
    precious = tmp_path / "precious"
    precious.write_text("mine")
    folder, _ = fill(tmp_path / "results")
    for name in (".last.safetensors.tmp", ".config.json.tmp", ".metrics.jsonl.tmp"):
        (folder / name).symlink_to(precious)
    take_up(tmp_path / "results")
    (folder / ".lock").unlink()
    (folder / ".lock").symlink_to(precious)
    with pytest.raises(OSError):
        take_up(tmp_path / "results")
    (folder / ".lock").unlink()
    (folder / "log.txt").unlink(missing_ok=True)
    (folder / "log.txt").symlink_to(precious)
    run = Run(settings(tmp_path / "results"))
    run.log("a line")
    with pytest.raises(OSError):
        run.open(CONTENT)
    run.close()
    assert precious.read_text() == "mine"


def test_damage_never_becomes_the_checkpoint_before(tmp_path, capsys):
    """After a fall back, a process that dies within the next save must still find a good checkpoint."""
    folder, _ = fill(tmp_path)
    (folder / "last.safetensors").unlink()
    (folder / "last.safetensors").write_bytes(b"damaged")
    assert take_up(tmp_path).startswith("1 epochs")
    assert "last.safetensors is damaged or no checkpoint of this project" in capsys.readouterr().err
    run = Run(settings(tmp_path))
    run.open(CONTENT)
    run.save_epoch({"epoch": 1, "test_accuracy": 0.5}, trained().state_dict())
    run.close()
    for name in ("last.safetensors", "previous.safetensors"):
        assert load_checkpoint(folder / name)
    assert json.loads((folder / "result.json").read_text()) == RESULT
