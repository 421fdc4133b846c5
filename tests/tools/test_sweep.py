"""tools.sweep: what a grid becomes, and how its runs are started, followed, skipped and stopped."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

from tools import check_data, prepare_data
from tools.sweep import __main__ as sweep
from tools.sweep import cells, slurm

GRIDS = sorted((Path(__file__).parents[2] / "tools" / "sweep" / "grids").glob("*.yaml"))
SMALL = ["--backbone", "timm:test_resnet", "--weights", "none", "--canvas-size", "64",
         "--epochs", "2", "--batch-size", "32"]


@pytest.fixture(autouse=True)
def _here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")


def refused(capsys, *arguments):
    with pytest.raises(SystemExit) as caught:
        sweep.main(list(arguments))
    error = capsys.readouterr().err
    assert caught.value.code == 2 and error.count("\n") == 1 and error.startswith("error: ")
    return error


def grid_file(text, path="grid.yaml"):
    Path(path).write_text(text)
    return path


# ---- grids ----


@pytest.mark.parametrize("path", GRIDS, ids=[path.stem for path in GRIDS])
def test_shipped_grids(path):
    planned, _ = cells.expand(cells.read_grid(path))  # makes the config of every cell, and so checks its values
    expected = {"main_padding": 360, "main_watermarking": 360, "clip": 180, "training_size": 60, "laplace": 120,
                "topk_ratio": 60, "ablations": 84, "linear": 108, "training_cost": 12}
    assert len(planned) == expected[path.stem]
    assert len({cell.folder for cell in planned}) == len({cell.log for cell in planned}) == len(planned)
    batch_sizes = {cell.settings["batch_size"] for cell in planned if cell.settings["dataset"] in ("dtd", "oxfordpets")}
    assert batch_sizes <= {64}, "the data set's recipe holds in a sweep as well"


def test_there_is_a_grid_for_every_table():
    assert len(GRIDS) == 9


def test_settings_that_folders_do_not_name_get_results_paths():
    planned, separated = cells.expand(cells.normalise({
        "dataset": "cifar100", "train-fraction": [0.4, 1.0], "mapping": ["blm", "blmp"], "results-path": "r",
        "variants": [{}, {"bayes": False, "seed": 7}, {"mapping": "blmpp"}],
    }))
    assert separated == ["train_fraction"]
    assert [cell.name for cell in planned] == [
        f"{path}vm/cifar100/resnet18_padding_{mapping}_seed{seed}"
        for seed in (0, 7) for path in ("train_fraction=0.4/", "") for mapping in ("blm", "blmpp")
    ]
    first, last = planned[0], planned[-1]
    assert first.arguments == ("--dataset", "cifar100", "--train-fraction", "0.4", "--mapping", "blm",
                               "--results-path", "r/train_fraction=0.4")
    assert first.folder == Path("r/train_fraction=0.4/vm/cifar100/resnet18_padding_blm_seed0")
    assert first.log == Path("r/logs/train_fraction=0.4/vm/cifar100/resnet18_padding_blm_seed0.log")
    assert "--no-bayes" in last.arguments and last.settings["bayes"] is False and last.settings["mapping"] == "blmpp"


def test_two_unnamed_settings_and_two_folders_of_one_name():
    planned, separated = cells.expand(cells.normalise(
        {"dataset": ["folder:a/x", "folder:b/x"], "laplace": [1, 2], "topk": [True, False], "seed": 3}
    ))
    assert separated == ["dataset", "laplace", "topk"] and len({cell.folder for cell in planned}) == 8
    assert str(planned[-1].folder) == (
        "results/dataset=folder-b-x/laplace=2.0/topk=false/vm/folder-x/resnet18_padding_blmpp_seed3"
    )


def test_flags_win_over_the_file(capsys):
    path = grid_file("script: [train_vm.py, train_vm_fast.py]\ndataset: [dtd, eurosat]\nvariants:\n"
                     "  - {mapping: [blm, blmpp], seed: 1}\n  - mapping: rlm\n")
    assert sweep.main([path, "--mapping", "ilm", "--dataset", "digits,dtd", "--iteration", "false", "--dry-run"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 9 and lines[-1].startswith("8 runs: 8 waiting")
    script = cells.ROOT / "train_vm_fast.py"
    assert lines[3] == (
        f"waiting  python {script} --dataset dtd --mapping ilm --no-iteration --seed 1 --results-path results"
    )
    assert not Path("results").exists()


BAD_GRIDS = [
    ("datset: dtd", "unknown setting 'datset'; did you mean 'dataset'?"),
    ("variants: [{mappings: ilm}]", "did you mean 'mapping'?"),
    ("variants: [{variants: [{}]}]", "unknown setting 'variants'"),
    ("mapping: [blm, bml]", "bml"),
    ("seed: [0, one]", "--seed"),
    ("seed: []", "no values"),
    ("seed: {a: 1}", "takes a value or a list"),
    ("laplace: [1, -1]", "--laplace must be 0 or more"),
    ("bayes: maybe", "takes true or false"),
    ("device: [cpu, cuda]", "takes one value"),
    ("script: train_vn.py", "allowed are train_vm.py"),
    ("script: train_vm.py\ntemplates: a.txt", "train_vm.py has no setting 'templates'"),
    ("seed: 1\nseed: 2", "key 'seed' is there twice"),
    ("seed: [1", "line 1 is no valid YAML"),
    ("seed: !!python/object/apply:os.system [touch hacked]", "no valid YAML"),
    ("- 1", "expected settings and their values, got list"),
    ("", "expected settings and their values, got NoneType"),
    ("dataset: ['folder:a/x', 'folder:a-x', 'folder:b/a-x']\nresults-path: /proc/version", "/proc/version"),
]


@pytest.mark.parametrize("text, words", BAD_GRIDS)
def test_bad_grids(tmp_path, capsys, text, words):
    assert words in refused(capsys, grid_file(text))
    assert [path.name for path in tmp_path.iterdir()] == ["grid.yaml"]


BAD_FLAGS = [
    ([], "nothing to run"),
    (["absent.yaml"], "absent.yaml does not exist"),
    (["--mappings", "blm"], "did you mean --mapping?"),
    (["--mapping", "blm", "--jobs", "0"], "--jobs must be 1 or more"),
    (["--bayes", "no"], "takes true or false"),
    (["--mapping", "blm", "--slurm", "GRID.yaml"], "KEY=VALUE"),
    (["--mapping", "blm", "--slurm", "cluster=local", "speed=9"], "speed"),
]


@pytest.mark.parametrize("arguments, words", BAD_FLAGS)
def test_bad_flags(capsys, arguments, words):
    assert words in refused(capsys, *arguments)


def test_precision_of_another_machine_is_taken_for_slurm():
    grid = cells.normalise({"precision": "tf32", "device": "cuda"})
    planned, _ = cells.expand(grid, elsewhere=True)
    assert planned[0].settings["precision"] == "tf32" and planned[0].settings["device"] == "cuda"
    assert {"--precision", "tf32", "--device", "cuda"} <= set(planned[0].arguments)
    with pytest.raises(ValueError, match="fp8"):
        cells.expand(cells.normalise({"precision": "fp8"}), elsewhere=True)


# ---- real runs ----


def test_sweep_of_real_runs(capsys):
    """Two runs that would share a folder, one that fails; then again, with nothing left to do."""
    path = grid_file(
        "mapping: blm\nresults-path: r\nvariants:\n  - {dataset: synthetic, train-fraction: [1.0, 0.5]}\n"
        "  - {dataset: folder:absent, reprogramming: watermarking}\n"
    )
    arguments = [path, "--jobs", "2", *SMALL]
    assert sweep.main(arguments) == 1
    out = capsys.readouterr().out
    leaf = "vm/synthetic/timm-test_resnet_padding_blm_seed0"
    for name, used in ((leaf, 64), (f"train_fraction=0.5/{leaf}", 32)):
        metrics = [json.loads(line) for line in Path("r", name, "metrics.jsonl").read_text().splitlines()]
        result = json.loads(Path("r", name, "result.json").read_text())
        assert result["final_accuracy"] == metrics[-1]["test_accuracy"] and len(metrics) == 2
        log = Path("r/logs", f"{name}.log").read_text()
        assert log.startswith("$ ") and f"{used} training and 32 test images" in log
        assert f"{name} finished: {result['final_accuracy']:.2%} final accuracy" in out
    assert Path("r/train_fraction=0.5/cache").resolve() == Path("r/cache").resolve()
    assert "3 runs: 2 finished, 1 failed\n" in out
    failed = out.splitlines()[-1]
    assert failed.startswith("failed: vm/folder-absent/") and failed.endswith(".log")
    assert "error: absent is not a folder" in failed and "(exit code 2)" in failed

    before = {path: path.stat().st_mtime_ns for path in Path("r").rglob("*")}
    Path("grid.yaml").write_text(Path("grid.yaml").read_text().rpartition("  -")[0])
    assert sweep.main(arguments) == 0
    assert capsys.readouterr().out.splitlines()[-1] == "2 runs: 2 skipped"
    assert {path: path.stat().st_mtime_ns for path in Path("r").rglob("*")} == before

    assert sweep.main([*arguments, "--epochs", "3", "--dry-run"]) == 0
    assert "epochs was 2 and is 3" in capsys.readouterr().out, "a folder with other settings is not taken for done"
    assert sweep.main([*arguments, "--overwrite", "--dry-run"]) == 0
    assert capsys.readouterr().out.splitlines()[-1].startswith("2 runs: 2 waiting")


# ---- processes, with a stand-in for the script ----

STAND_IN = """
import os, pathlib, signal, sys, time
folder = pathlib.Path(sys.argv[sys.argv.index("--results-path") + 1])
seed = sys.argv[sys.argv.index("--seed") + 1]
def stop(signum, frame):
    (folder / f"saved{seed}").write_text(str(signum))
    sys.exit(143)
if seed != "9":
    signal.signal(signal.SIGTERM, stop)
else:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
(folder / f"began{seed}").touch()
print("working", flush=True)
time.sleep(60)
"""


def stop_when(began, *signums):
    """Send signals to this process once the files are there, as Ctrl-C at a terminal would."""
    def send():
        deadline = time.monotonic() + 30
        while not all(Path(path).exists() for path in began) and time.monotonic() < deadline:
            time.sleep(0.02)
        for signum in signums:
            os.kill(os.getpid(), signum)
            time.sleep(1)

    thread = threading.Thread(target=send)
    thread.start()
    return thread


@pytest.fixture
def stand_in(tmp_path, monkeypatch):
    (tmp_path / "train_vm.py").write_text(STAND_IN)
    monkeypatch.setattr(cells, "ROOT", tmp_path)
    monkeypatch.setattr(sweep, "POLL_SECONDS", 0.05)


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM])
def test_runs_are_asked_to_save_and_end(stand_in, capsys, signum):
    thread = stop_when(["results/began0", "results/began1"], signum)
    assert sweep.main(["--seed", "0,1,2", "--jobs", "2"]) == 128 + signum
    thread.join()
    assert sorted(path.name for path in Path("results").glob("*[0-9]")) == ["began0", "began1", "saved0", "saved1"]
    assert Path("results/saved0").read_text() == str(int(signal.SIGTERM))
    lines = capsys.readouterr().out.splitlines()
    assert lines[-1] == "stopped; the same command goes on from here"
    assert "3 runs: 1 waiting, 2 stopped" in lines[-2]


def test_second_ctrl_c_kills(stand_in, capsys):
    thread = stop_when(["results/began9"], signal.SIGINT, signal.SIGINT)
    start = time.monotonic()
    assert sweep.main(["--seed", "9"]) == 130
    thread.join()
    assert time.monotonic() - start < 30 and "1 runs: 1 stopped" in capsys.readouterr().out


def test_trouble_in_the_sweep_itself_leaves_no_run_behind(stand_in, capsys, monkeypatch):
    def full(job, runner, stopping):
        while not Path("results/began0").exists():
            time.sleep(0.02)
        raise OSError("no space left on device")

    monkeypatch.setattr(sweep, "_follow", full)
    assert "no space left" in refused(capsys, "--seed", "0")
    deadline = time.monotonic() + 10
    while not Path("results/saved0").exists() and time.monotonic() < deadline:
        time.sleep(0.02)
    assert Path("results/saved0").exists()


def test_killed_run_is_reported_with_its_last_line(stand_in, tmp_path, capsys):
    (tmp_path / "train_vm.py").write_text("import os; print('so far', flush=True); os.kill(os.getpid(), 9)")
    assert sweep.main(["--mapping", "blm"]) == 1
    assert "so far (ended by signal 9)" in capsys.readouterr().out
    (tmp_path / "train_vm.py").write_text("pass")
    assert sweep.main(["--mapping", "blm"]) == 1, "exit code 0 without a result is no success"
    assert "no output (exit code 0)" in capsys.readouterr().out


def command_cell(tmp_path, name, code):
    return SimpleNamespace(name=name, command=[sys.executable, "-c", code], log=tmp_path / f"{name}.log")


def test_each_run_has_a_gpu_of_its_own(tmp_path):
    code = "import os; print(os.environ.get('CUDA_VISIBLE_DEVICES'), os.environ['OMP_NUM_THREADS'])"
    runner = sweep.LocalRunner(2, ["3", "GPU-7"])
    for turn in range(2):
        batch = [command_cell(tmp_path, f"{turn}{i}", code) for i in range(2)]
        runner.start(batch)
        assert runner.room() == 0
        while [runner.exit_code(cell) for cell in batch if cell.name in runner._processes]:
            time.sleep(0.02)
        assert runner.room() == 2
        assert sorted(cell.log.read_text() for cell in batch) == ["3 1\n", "GPU-7 1\n"]


# ---- what is shown ----


def job(seed, state, times=(), epochs=10, dataset="dtd"):
    settings = {"epochs": epochs, "dataset": dataset, "backbone": "b", "reprogramming": "padding"}
    lines = [{"seconds": {"train": t, "test": 1.0}, "test_accuracy": 0.5} for t in times]
    cell = SimpleNamespace(name=f"vm/{dataset}/seed{seed}", settings=settings, script="train_vm.py")
    made = sweep.Job.__new__(sweep.Job)
    made.__dict__.update(cell=cell, state=state, error="", lines=lines, started=100.0)
    return made


def test_estimate_of_what_remains():
    assert sweep.remaining_seconds([job(0, "running"), job(1, "waiting")], 2) is None
    assert sweep.remaining_seconds([job(0, "finished", [3] * 10)], 2) == 0
    jobs = [job(0, "running", [3] * 4), job(1, "waiting"), job(0, "waiting", dataset="gtsrb"), job(2, "failed")]
    assert sweep.remaining_seconds(jobs, 1) == 6 * 4 + 10 * 4 + 10 * 4
    assert sweep.remaining_seconds(jobs, 4) == 40, "no sooner than the longest run"
    jobs.append(job(1, "finished", [9] * 10, dataset="gtsrb"))
    assert sweep.remaining_seconds(jobs, 1) == 6 * 4 + 10 * 4 + 10 * 10


def test_table():
    jobs = [job(0, "running", [3] * 4), job(1, "failed"), job(2, "waiting"), job(3, "finished", [3] * 10)]
    jobs[1].error = "error: no such file (exit code 2)"
    lines = sweep.table(jobs, 1, 200, 20, now=160.0)
    assert lines[1].split() == ["vm/dtd/seed0", "running", "4/10", "50.0%", "60", "s"]
    assert lines[2].endswith("error: no such file (exit code 2)") and lines[3].split()[1] == "finished"
    assert lines[4] == "4 runs: 1 finished, 1 running, 1 waiting, 1 failed, about 64 s left"
    small = sweep.table(jobs * 50, 1, 40, 6, now=160.0)
    assert len(small) <= 6 and max(map(len, small)) <= 40


def test_live_table_is_drawn_over_itself():
    written = []
    stream = SimpleNamespace(isatty=lambda: True, write=written.append, flush=lambda: None)
    display = sweep.Display(1, stream)
    display([job(0, "running", [3] * 4)], None)
    display([job(0, "finished", [3] * 10)], None)
    assert written[0].startswith("\x1b[J") and written[1].startswith("\x1b[3A\x1b[J")


@pytest.mark.parametrize("seconds, text", [(12.4, "12 s"), (600, "10 min"), (12000, "3 h 20 min"), (187200, "2 d 4 h")])
def test_duration(seconds, text):
    assert sweep.duration(seconds) == text


# ---- Slurm ----


def test_slurm_without_submitit_or_slurm(capsys, monkeypatch):
    assert "--slurm" in refused(capsys, "--mapping", "blm", "--slurm")  # there is no srun on a test machine
    monkeypatch.setitem(sys.modules, "submitit", None)
    assert "pip install submitit" in refused(capsys, "--mapping", "blm", "--slurm")


SAVES = ("import signal, sys, time\nsignal.signal(signal.SIGTERM, lambda *_: sys.exit('saved'))\n"
         "print('began', flush=True)\ntime.sleep(60)")


def wait_for(log, text):
    deadline = time.monotonic() + 60
    while not log.exists() or log.read_text() != text:
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_jobs_of_submitit(tmp_path):
    """submitit's own local executor in the place of Slurm: exit codes, logs, cancelling."""
    pytest.importorskip("submitit")
    runner = slurm.SlurmRunner({"cluster": "local"}, tmp_path / "slurm", 2)
    good, bad, long = planned = [
        command_cell(tmp_path, "good", "print('hello')"), command_cell(tmp_path, "bad", "raise SystemExit(3)"),
        command_cell(tmp_path, "long", SAVES),
    ]
    runner.start(planned)
    deadline = time.monotonic() + 60
    codes = {}
    while len(codes) < 2 and time.monotonic() < deadline:
        time.sleep(0.1)
        codes = {cell.name: code for cell in planned if (code := runner.exit_code(cell)) is not None}
    assert codes == {"good": 0, "bad": 3} and good.log.read_text() == "hello\n"
    wait_for(long.log, "began\n")
    assert runner.room() > 1000 and runner.running(long)
    runner.stop([long])
    wait_for(long.log, "began\nsaved\n")


def test_job_whose_time_is_up_saves_and_is_submitted_again(tmp_path):
    submitit = pytest.importorskip("submitit")
    code = ("import signal, sys, time\nsignal.signal(signal.SIGTERM, lambda *_: sys.exit('saved'))\n"
            "print('began', flush=True)\ntime.sleep(60)")
    log = tmp_path / "job.log"
    running = slurm.Job([sys.executable, "-c", code], log)
    thread = threading.Thread(target=running)
    thread.start()
    wait_for(log, "began\n")
    running.process.send_signal(signal.SIGUSR2)  # as Slurm does, to every process
    again = running.checkpoint()
    thread.join()
    assert isinstance(again, submitit.helpers.DelayedSubmission) and log.read_text() == "began\nsaved\n"


@pytest.mark.parametrize("tool", [sweep, prepare_data, check_data])
def test_help(tool, capsys):
    with pytest.raises(SystemExit) as caught:
        tool.main(["--help"])
    assert caught.value.code == 0 and f"python -m {tool.__name__.removesuffix('.__main__')}" in capsys.readouterr().out


def test_from_a_shell():
    command = [sys.executable, "-m", "tools.sweep", "tools/sweep/grids/clip.yaml", "--seed", "0", "--dry-run"]
    outcome = subprocess.run(command, capture_output=True, text=True, cwd=cells.ROOT)
    assert outcome.returncode == 0 and outcome.stdout.count("train_vlm.py") == 60 and outcome.stderr == ""
