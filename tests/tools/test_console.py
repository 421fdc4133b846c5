"""tools.console: how commands end where they are stopped, where nobody reads on, and at errors of the system."""

import os
import re
import signal
import subprocess
import sys
import warnings
from pathlib import Path

import pytest

from tools.console import no_traceback_when_stopped, one_line_warnings, user_errors
from tools import evaluate

ROOT = Path(__file__).parents[2]
TINY = ["--dataset", "synthetic", "--backbone", "timm:test_resnet", "--weights", "none", "--canvas-size", "64"]
COMMANDS = [
    "benchmark",
    "benchmark_mapping",
    "check_data",
    "evaluate",
    "export",
    "predict",
    "prepare_data",
    "report",
    "sweep",
    "visualize",
]


def run(*command, **options):
    return subprocess.run(
        [sys.executable, *command],
        stderr=subprocess.PIPE,
        text=True,
        cwd=ROOT,
        **options,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # which shells set to "ignore" in background
    )


def run_unread(*command):
    """With a stdout that nobody reads, as that of ``command | head -0`` once head has ended."""
    read, write = os.pipe()
    os.close(read)
    try:
        return run(*command, stdout=write)
    finally:
        os.close(write)


# ---- Ctrl-C ----


@pytest.mark.parametrize("handler", [signal.default_int_handler, signal.SIG_DFL], ids=["begun", "from the imports on"])
def test_ctrl_c_ends_in_a_newline_after_cleaning_up(capsys, handler):
    cleaned = []
    earlier = signal.signal(signal.SIGINT, handler)
    try:
        with pytest.raises(SystemExit) as caught, user_errors():
            try:
                signal.raise_signal(signal.SIGINT)
            finally:
                cleaned.append(True)
    finally:
        signal.signal(signal.SIGINT, earlier)
    assert caught.value.code == 130 and cleaned and capsys.readouterr().err == "\n"


def test_ctrl_c_in_the_middle_of_a_command(monkeypatch, capsys):
    monkeypatch.setattr(evaluate, "load_run", lambda *_: signal.default_int_handler(signal.SIGINT, None))
    with pytest.raises(SystemExit) as caught:
        evaluate.main(["results"])
    assert caught.value.code == 130 and capsys.readouterr().err == "\n"


@pytest.mark.parametrize("command", COMMANDS)
def test_ctrl_c_during_the_imports(tmp_path, command):
    """A module in torch's place presses it: the first thing that takes long."""
    (tmp_path / "torch.py").write_text("import signal\nsignal.raise_signal(signal.SIGINT)\n")
    outcome = run("-m", f"tools.{command}", stdout=subprocess.PIPE, env=os.environ | {"PYTHONPATH": str(tmp_path)})
    assert outcome.returncode == -signal.SIGINT, "which a shell calls 130"
    assert outcome.stdout + outcome.stderr == ""


@pytest.mark.parametrize("script", ["train_vm.py", "train_vm_fast.py", "train_vlm.py"])
def test_ctrl_c_during_the_imports_of_a_script(tmp_path, script):
    (tmp_path / "torch.py").write_text("import signal\nsignal.raise_signal(signal.SIGINT)\n")
    outcome = run(script, stdout=subprocess.PIPE, env=os.environ | {"PYTHONPATH": str(tmp_path)})
    assert outcome.returncode == -signal.SIGINT and outcome.stdout + outcome.stderr == ""


def test_importing_the_tools_leaves_ctrl_c_alone():
    code = "import signal, tools; assert signal.getsignal(signal.SIGINT) == signal.default_int_handler"
    assert run("-c", code).returncode == 0


def test_ctrl_c_during_the_set_up_of_a_training_run(tmp_path):
    code = (
        "import signal, sys, train_vm, tools.training.session as session\n"
        "session.set_up_arithmetic = lambda *_: signal.raise_signal(signal.SIGINT)\n"
        "train_vm.main(sys.argv[1:])"
    )
    outcome = run("-c", code, *TINY, "--results-path", str(tmp_path), stdout=subprocess.PIPE)
    assert outcome.returncode == 130 and outcome.stdout + outcome.stderr == "\n"


# ---- started by their path ----


@pytest.mark.parametrize("path", ["evaluate.py", "report", "report/__main__.py", "sweep", "benchmark"])
def test_a_command_started_by_its_path_says_how_to_start_it(tmp_path, path):
    command = [sys.executable, str(ROOT / "tools" / path), "results"]
    outcome = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert outcome.returncode == 2 and outcome.stdout == ""
    name = path.partition("/")[0].removesuffix(".py")
    assert outcome.stderr == f"error: start it from the folder {ROOT} as python -m tools.{name}, not by its path\n"


@pytest.mark.parametrize("command", COMMANDS)
def test_what_a_command_imports_of_the_project_first_is_what_says_so(command):
    path = ROOT / "tools" / command
    text = (path / "__main__.py" if path.is_dir() else path.with_suffix(".py")).read_text()
    imports = re.findall(r"^(?:from|import) (\w+)", text, re.MULTILINE)
    assert [name for name in imports if (ROOT / name).is_dir()][0] == "tools"


# ---- nobody reads on ----


@pytest.mark.parametrize("descriptors", [(1,), (2,), (1, 2)])
def test_closed_by_the_shell(descriptors):
    """``command >&-``: Python has None in place of the stream."""
    code = "import sys\nfrom tools.console import user_errors\nwith user_errors():\n    print('text', file=sys.stderr)"
    code += "\n    print('text')\n    sys.stderr.write('text')"

    def close():
        for descriptor in descriptors:
            os.close(descriptor)

    outcome = subprocess.run([sys.executable, "-c", code], cwd=ROOT, preexec_fn=close)
    assert outcome.returncode == 0


@pytest.mark.parametrize("lines", [1, 100_000], ids=["found at the end", "found at once"])
def test_closed_pipe(lines):
    code = f"from tools.console import user_errors\nwith user_errors():\n    [print('text') for _ in range({lines})]"
    outcome = run_unread("-c", code)
    assert outcome.returncode == 141 and outcome.stderr == ""


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full")
def test_training_run_whose_output_goes_to_a_full_disk(tmp_path):
    with open("/dev/full", "w") as full:
        outcome = run("train_vm.py", *TINY, "--results-path", str(tmp_path), stdout=full)
    assert outcome.returncode == 1 and outcome.stderr == "error: [Errno 28] No space left on device\n"


def test_command_whose_output_nobody_reads(vm_run, tmp_path):
    outcome = run_unread("-m", "tools.evaluate", str(vm_run), "--json", "--out", str(tmp_path))
    assert outcome.returncode == 141 and outcome.stderr == ""
    assert (tmp_path / "evaluation.json").exists()


def test_training_run_whose_output_nobody_reads(tmp_path):
    outcome = run_unread("train_vm.py", *TINY, "--epochs", "1", "--results-path", str(tmp_path))
    assert outcome.returncode == 141 and outcome.stderr == ""


def test_code_and_result_pass_where_nothing_happens():
    assert no_traceback_when_stopped()(lambda: 7)() == 7
    with pytest.raises(ZeroDivisionError), user_errors():
        raise ZeroDivisionError  # a bug keeps its traceback


def test_a_warning_is_told_once():
    """Data sets are opened twice: to see that they are there, and to read them."""
    told = []
    with warnings.catch_warnings(), one_line_warnings(told.append):
        warnings.simplefilter("always")
        for text in ("left out", "left out", "other"):
            warnings.warn(text, stacklevel=1)
    assert told == ["warning: left out", "warning: other"]


# ---- errors of the system ----


def test_error_of_the_system_is_told_in_words(capsys):
    with pytest.raises(SystemExit) as caught, user_errors():
        Path("/proc/absent").mkdir()
    assert caught.value.code == 2
    assert capsys.readouterr().err == "error: /proc/absent: No such file or directory\n"


def test_several_processes_without_torchrun(tmp_path):
    outcome = run(
        "train_vm.py",
        *TINY,
        "--results-path",
        str(tmp_path),
        stdout=subprocess.PIPE,
        env=os.environ | {"WORLD_SIZE": "2"},
    )
    assert outcome.returncode == 2 and outcome.stdout == ""
    assert outcome.stderr == (
        "error: WORLD_SIZE is 2, but RANK, MASTER_ADDR, MASTER_PORT not set; start several "
        "processes with torchrun --nproc-per-node=N, or unset WORLD_SIZE\n"
    )
