"""Parts of one's own, a file each: from training through a stop and all tools to the report."""

import json
import os

import numpy as np
import pytest
from PIL import Image

import train_vm
from data.files import read_json
from mapping import MAPPINGS, Method, Setting
from tests.conftest import TINY
from tests.system.processes import finish, start_module
from tools.training.finished import load_run
from tools.training.plugins import load_plugin
from tools.training.run_folder import load_checkpoint, read_config

MAPPING = """
from mapping import MAPPINGS, MatrixMapping, Method, Setting, bayesian

POWER = Setting("power", 2.0, "exponent of the weights", "above 0", lambda power: power > 0)


def build(num_source, num_target, *, seed, power):
    def estimate(counts):
        weights = bayesian(counts) ** power
        return weights / weights.sum(0)

    return MatrixMapping("sharp", num_source, num_target, estimate)


MAPPINGS["sharp"] = Method(build, (POWER,))
"""
INPUT_VR = """
import torch
from mapping import Setting
from models import REPROGRAMMING, InputVR, Reprogramming

WIDTH = Setting("frame_width", 16, "width of the frame in pixels", "1 or more", lambda width: width >= 1)


class FrameVR(InputVR):
    def __init__(self, canvas_size, mean, std, width):
        super().__init__(canvas_size, canvas_size, mean, std)
        mask = torch.ones(1, 1, canvas_size, canvas_size)
        mask[..., width:-width, width:-width] = 0
        self.register_buffer("mask", mask, persistent=False)

    def pattern(self):
        return self.mask * self.program


def build(*, canvas_size, image_size, border, mean, std, frame_width):
    return FrameVR(canvas_size, mean, std, frame_width)


REPROGRAMMING["frame"] = Reprogramming(build, images="resized", augment=True, settings=(WIDTH,))
"""
BACKBONE = """
from torch import nn
from models import BACKBONES, Classifier


def small(name, weights):
    net = nn.Sequential(nn.Conv2d(3, 8, 5, stride=4), nn.ReLU(), nn.AdaptiveAvgPool2d(2), nn.Flatten(),
                        nn.Linear(32, 20))
    return Classifier(net, name, mean=(0.5, 0.5, 0.5), std=(0.25, 0.25, 0.25), input_size=64, num_source=20)


BACKBONES["small"] = small
"""
DATA_SET = """
import numpy as np
from data import DATASETS, ArraySource, DatasetInfo


def open_stripes(name, data_path):
    random = np.random.RandomState(0)

    def make(split, count):
        labels = np.arange(count) % 2
        images = random.randint(0, 120, (count, 32, 32, 3))
        for image, label in zip(images, labels):
            image[(slice(None), slice(None, None, 4))[:: 1 if label else -1]] += 120
        return ArraySource(f"{name}/{split}", images.astype(np.uint8), labels)

    return ["lying stripes", "upright stripes"], make("train", 24), make("test", 16)


DATASETS["stripes"] = DatasetInfo(train=24, test=16, classes=2, image_size=32, open=open_stripes)
"""
# file, flags that ask for it, what they must leave in config.json
PARTS = {
    "mapping": (MAPPING, ["--mapping", "sharp", "--power", "3"], {"mapping": "sharp", "power": 3.0}),
    "input VR": (
        INPUT_VR,
        ["--reprogramming", "frame", "--frame-width", "8"],
        {"reprogramming": "frame", "frame_width": 8},
    ),
    "backbone": (BACKBONE, ["--backbone", "small"], {"backbone": "small"}),
    "data set": (DATA_SET, ["--dataset", "stripes"], {"dataset": "stripes"}),
}
COMMON = [
    "--dataset",
    "synthetic",
    *TINY,
    "--epochs",
    "3",
    "--batch-size",
    "16",
    "--device",
    "cpu",
]
# SIGTERM arrives right after the first epoch was kept, however fast the machine is
STOP = """
import os
import signal
from tools.training.session import Session

if "STOP_AFTER_AN_EPOCH" in os.environ:
    end_epoch = Session.end_epoch

    def end_epoch_and_stop(self, *values):
        end_epoch(self, *values)
        os.kill(os.getpid(), signal.SIGTERM)

    Session.end_epoch = end_epoch_and_stop
"""


@pytest.mark.parametrize("part", PARTS)
def test_a_part_of_ones_own_through_all_commands(tmp_path, part):
    source, flags, expected = PARTS[part]
    plugin, results, log = tmp_path / "mine.py", tmp_path / "results", tmp_path / "log"
    plugin.write_text(source + STOP)
    Image.fromarray(np.full((40, 40, 3), 90, np.uint8)).save(tmp_path / "image.png")

    def run(module, *arguments, code=0, environment=None):
        log.write_text("")
        assert finish(start_module(module, log, *arguments, environment=environment)) == code, log.read_text()
        return log.read_text()

    training = [*COMMON, *flags, "--results-path", results, "--plugin", plugin]
    assert "SIGTERM received" in run("train_vm", *training, code=143, environment={"STOP_AFTER_AN_EPOCH": "1"})
    assert "going on after epoch 1" in run("train_vm", *training)
    (folder,) = (path.parent for path in results.rglob("result.json"))
    config = read_config(folder / "config.json")
    assert config["settings"] | expected | {"plugin": str(plugin)} == config["settings"]
    assert len(config["starts"]) == 2 and len(load_checkpoint(folder / "last.safetensors")["metrics"]) == 3
    for name, value in expected.items():  # a part's own setting tells its runs apart
        shown = f"{name}={value}" if name in ("power", "frame_width") else str(value)
        assert shown in str(folder.relative_to(results))

    accuracy = read_json(folder / "result.json")["final_accuracy"]
    needed = run("tools.evaluate", folder, code=2)
    assert f"{folder} was trained with --plugin {plugin}; give it again" in needed and needed.count("\n") == 1
    run("tools.evaluate", folder, "--plugin", plugin)
    assert read_json(folder / "evaluation.json")["accuracy"] == accuracy
    printed = run("tools.predict", folder, tmp_path / "image.png", "--json", "--plugin", plugin)
    predicted = json.loads(printed[printed.index("[\n") :])  # behind what was warned of
    assert len(predicted) == 1
    plugin.write_text(source + STOP + "# edited")
    warned = run("tools.predict", folder, tmp_path / "image.png", "--plugin", plugin)
    assert f"warning: {folder} was trained with another plugin" in warned
    refused = run("train_vm", *training, code=2)
    assert "holds a run with other plugin; give those of that time" in refused and refused.count("\n") == 1
    plugin.write_text(source + STOP)
    run("tools.export", folder, "--format", "torch", "--plugin", plugin)
    assert (folder / "model.pt2").stat().st_size > 0
    # which reads what was written, and runs nothing
    run("tools.report.__main__", results, "--out", tmp_path / "report.html")
    assert next(iter(expected.values())) in (tmp_path / "report.html").read_text()


def run_here(capsys, *flags):
    """Exit code and what was said on stderr, of a script in this process."""
    with pytest.raises(SystemExit) as caught:
        train_vm.main([*COMMON, *map(str, flags)])
    return caught.value.code, capsys.readouterr().err


@pytest.mark.parametrize(
    "name, source, said",
    [
        ("absent.py", None, "absent.py: no such file"),
        ("mine.txt", "", "mine.txt: expected a Python file, with the suffix .py"),
        ("raises.py", "raise RuntimeError('two\\nlines')", "raises.py failed: RuntimeError: two lines"),
        ("syntax.py", "def", "syntax.py failed: SyntaxError: "),
        ("exits.py", "import sys; sys.exit('I leave')", "exits.py failed: SystemExit: I leave"),
        ("leaves.py", "import absent_module_of_mine", "leaves.py failed: ModuleNotFoundError: "),
    ],
)
def test_files_that_are_no_plugin(tmp_path, capsys, name, source, said):
    if source is not None:
        (tmp_path / name).write_text(source)
    results = tmp_path / "results"
    code, error = run_here(capsys, "--plugin", tmp_path / name, "--results-path", results)
    assert code == 2 and error.startswith("error: ") and error.count("\n") == 1 and said in error
    assert not results.exists()


@pytest.mark.parametrize("name", ["lr", "seed", "folder", "num_source", "class", "a-b", "_power"])
def test_setting_of_a_name_that_is_taken_or_none(tmp_path, monkeypatch, capsys, name):
    monkeypatch.setitem(MAPPINGS, "sharp", Method(None, (Setting(name, 2.0, "exponent"),)))
    code, error = run_here(capsys, "--mapping", "sharp", "--results-path", tmp_path)
    assert code == 2 and error == f"error: sharp declares a setting {name!r}, a name that is taken or none; rename it\n"


def test_plugin_without_a_value_is_one_line(capsys):
    assert run_here(capsys, "--plugin") == (2, "error: argument --plugin: expected one argument\n")


def test_a_run_folder_starts_no_code(tmp_path, vm_run):
    """Whatever its config.json says: the user names the file, or it does not run."""
    ran, plugin, folder = tmp_path / "ran", tmp_path / "evil.py", tmp_path / "run"
    plugin.write_text(f"open({str(ran)!r}, 'w')")
    folder.mkdir()
    for path in vm_run.iterdir():
        if path.is_file():
            os.link(path, folder / path.name)
    config = read_json(folder / "config.json")
    config["settings"]["plugin"] = str(plugin)
    (folder / "config.json").unlink()
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=r"evil.py; give it again \(its code will run\)"):
        load_run(folder, splits=())
    assert not ran.exists()
    load_run(folder, splits=(), plugin=plugin)
    assert ran.exists()


def test_a_plugin_that_was_edited_runs_again_in_the_same_process(tmp_path, monkeypatch):
    """As in a notebook; a run would else remember the new file beside what the old one did."""
    monkeypatch.setitem(MAPPINGS, "mine", None)
    plugin = tmp_path / "mine.py"
    for entry in ("first", "second one", "second one"):
        plugin.write_text(f"from mapping import MAPPINGS\nMAPPINGS['mine'] = [{entry!r}]\n")
        load_plugin(plugin)
        assert MAPPINGS["mine"] == [entry]
        found = MAPPINGS["mine"]
    load_plugin(plugin)
    assert MAPPINGS["mine"] is found  # once, as long as it is the same
