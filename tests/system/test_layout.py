"""The direction of imports, which import-linter checks against the contracts in pyproject.toml."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PACKAGES = ("data", "mapping", "models", "tools")


def lint(folder):
    command = [sys.executable, "-c", "from importlinter.cli import lint_imports_command as main; main()", "--no-cache"]
    environment = os.environ | {"PYTHONPATH": str(folder)}
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=300)


def test_every_contract_holds():
    outcome = lint(ROOT)
    assert outcome.returncode == 0, outcome.stdout


@pytest.mark.parametrize(
    "file, line, broken",
    [
        ("mapping/estimators.py", "import numpy", "mapping imports torch alone"),
        ("data/loader.py", "from tools.console import Parser", "never the other way"),
        ("tools/predict.py", "from tools.evaluate import measure", "not each other"),
        ("tools/training/build.py", "from cfg import Config", "only the scripts and the sweep"),
    ],
)
def test_a_wrong_import_breaks_its_contract(tmp_path, file, line, broken):
    for package in PACKAGES:
        shutil.copytree(ROOT / package, tmp_path / package, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    path = tmp_path / file
    path.write_text(path.read_text() + f"\n{line}\n")
    outcome = lint(tmp_path)
    assert outcome.returncode == 1
    (named,) = [text for text in outcome.stdout.splitlines() if " BROKEN" in text]
    assert broken in named


def test_settings_import_no_tool_and_ask_no_hardware():
    program = (
        "import sys, torch\n"
        "def asked(*args): raise AssertionError('hardware')\n"
        "for name in ('is_available', 'device_count', 'current_device', 'mem_get_info', 'init'):\n"
        "    setattr(torch.cuda, name, asked)\n"
        "import cfg\n"
        "cfg.VMConfig.of()\n"
        "assert not [name for name in sys.modules if name.split('.')[0] == 'tools']\n"
    )
    outcome = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert outcome.returncode == 0, outcome.stderr
