"""docs/guides.md and the four commands of the README, run as they stand on small pictures."""

import json
import os
import re
import shlex
import subprocess
import sys
from dataclasses import fields
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from cfg import VLMConfig

ROOT = Path(__file__).parents[2]
README, GUIDES = ((ROOT / path).read_text(encoding="utf-8") for path in ("README.md", "docs/guides.md"))
# less work than a reader wants
CUTS = {"--epochs 20": "--epochs 2", "--epochs 2\n": "--epochs 1\n", "--dataset digits": "--dataset synthetic"}


def section(text, title):
    return text.split(f"## {title}\n")[1].split("\n## ")[0]


def blocks(text, language):
    return re.findall(rf"```{language}\n(.*?)```", text, re.DOTALL)


@pytest.fixture
def project(tmp_path):
    """A folder that looks like the root of the project, for commands to run in and write into."""
    for path in ROOT.iterdir():
        if path.name in ("cfg.py", "data", "mapping", "models", "tools") or path.name.startswith("train_"):
            (tmp_path / path.name).symlink_to(path)
    return tmp_path


def run_commands(text, folder):
    outputs = []
    for block in blocks(text, "bash"):
        for long, short in CUTS.items():
            block = block.replace(long, short)
        for line in block.strip().splitlines():
            command = [sys.executable if word == "python" else word for word in shlex.split(line)]
            environment = os.environ | {"PYTHONPATH": str(folder)}
            done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=300)
            assert done.returncode == 0, f"{line}\n{done.stderr}"
            outputs.append(done.stdout)
    return outputs


def write_photos(folder):
    generator = np.random.default_rng(0)
    for split, count in (("train", 8), ("test", 4)):
        for name, colour in (("cat", (200, 60, 40)), ("dog", (40, 80, 200))):
            (folder / split / name).mkdir(parents=True)
            for i in range(count):
                pixels = np.array(colour) + generator.integers(-30, 30, (60, 80, 3))
                Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(folder / split / name / f"{i}.jpg")


def test_your_own_data(project):
    write_photos(project / "photos")
    checked, _, evaluated, predicted = run_commands(section(README, "Your own pictures"), project)
    run = project / "results" / "vm" / "folder-photos" / "efficientnet_lite0_padding_blmpp_seed0"
    accuracy = json.loads((run / "result.json").read_text())["final_accuracy"]
    assert f"{accuracy:.2%}".rstrip("%") in evaluated or f"{accuracy:.1%}".rstrip("%") in evaluated
    assert predicted.count(".jpg") >= 8 and "cat" in predicted and "dog" in predicted


@pytest.mark.parametrize(
    "title, script, folder",
    [
        ("Your own mapping in thirty lines", "train_sharp.py", "efficientnet_lite0_padding_sharp_seed0"),
        ("Your own backbone", "train_mine.py", "mine_padding_blmpp_seed0"),
    ],
)
def test_your_own_part(project, title, script, folder):
    text = section(GUIDES, title)
    (source,) = blocks(text, "python")
    assert len(source.splitlines()) <= 36
    (project / script).write_text(source, encoding="utf-8")
    (output,) = run_commands(text, project)
    result = json.loads((project / "results" / "vm" / "synthetic" / folder / "result.json").read_text())
    assert result["epochs"] == 1 and 0 <= result["final_accuracy"] <= 1
    assert "fast path" in output


def test_readme_names_every_flag():
    for setting in fields(VLMConfig):
        flag = "--" + ("no-" if setting.default is True else "") + setting.name.replace("_", "-")
        assert f"| `{flag}` |" in README
