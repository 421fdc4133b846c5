"""docs/guides.md and the four commands of the README, run as they stand on small images; the pages and their links."""

import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

ROOT = Path(__file__).parents[2]
README, GUIDES = ((ROOT / path).read_text(encoding="utf-8") for path in ("README.md", "docs/guides.md"))
# less work than a reader wants
CUTS = {"digits": "synthetic"}


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
            done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=600)
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
    checked, _, evaluated, predicted = run_commands(section(README, "Your own images"), project)
    (path,) = (project / "results" / "vm" / "folder-photos").glob("*/result.json")
    accuracy = json.loads(path.read_text())["final_accuracy"]
    assert f"{accuracy:.2%}".rstrip("%") in evaluated or f"{accuracy:.1%}".rstrip("%") in evaluated
    assert predicted.count(".jpg") >= 8 and "cat" in predicted and "dog" in predicted


@pytest.mark.parametrize("title", ["mapping", "input VR", "backbone", "data set"])
def test_your_own_part(project, title):
    text = section(GUIDES, f"Your own {title}")
    (source,) = blocks(text, "python")
    (name,) = re.findall(r"Save it as\s+`(\w+\.py)`", text)
    assert len(source.splitlines()) <= 36
    (project / name).write_text(source, encoding="utf-8")
    output, *_ = run_commands(text, project)
    (path,) = (project / "results" / "vm").rglob("result.json")
    result = json.loads(path.read_text())
    assert result["epochs"] == 2 and 0 <= result["final_accuracy"] <= 1
    assert "fast path" in output


def test_from_python_prints_what_stands_below(project):
    """To within what other CPUs round: numbers may differ by 3 %, times by any factor."""
    text = section(GUIDES, "From Python and a notebook")
    pieces, outputs = blocks(text, "python"), blocks(text, "text")
    program = "\nprint('#')\n".join(pieces)
    environment = os.environ | {"PYTHONPATH": str(project)}
    command = [sys.executable, "-c", program]
    done = subprocess.run(command, cwd=project, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    numbers = re.compile(r"\d+\.\d+\b(?! s$)", re.MULTILINE)
    for printed, expected in zip(done.stdout.split("#\n"), outputs, strict=True):
        printed = "\n".join(printed.splitlines()[-len(expected.splitlines()) :])
        assert re.sub(r"\d+\.\d+", "#", printed) == re.sub(r"\d+\.\d+", "#", expected.rstrip("\n"))
        found, wanted = ([float(number) for number in numbers.findall(part)] for part in (printed, expected))
        assert found == pytest.approx(wanted, rel=0.03)


def test_the_readme_is_read_in_minutes():
    assert len(README.splitlines()) <= 150


PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md", *sorted((ROOT / "docs").glob("*.md"))]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_and_named_files_are_there(page):
    text = page.read_text(encoding="utf-8")
    for target in re.findall(r"\]\(([^)#]+)[^)]*\)", text):
        assert target.startswith("https://") or (page.parent / target).exists(), target
    for path in re.findall(r"(?:tests|tools|docs)/[\w/.-]+\.(?:py|md|yaml|json|txt)", text):
        assert (ROOT / path).exists(), path
