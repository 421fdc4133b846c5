"""tools.sweep: what a grid becomes, and how its runs are started, followed, skipped and stopped."""

import fcntl
import io
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
from rich.console import Console

from tests.conftest import TINY
from tools import check_data, prepare_data, visualize
from tools.sweep import __main__ as sweep
from tools.sweep import cells, display, jobs, runner, slurm

GRIDS = Path(__file__).parents[2] / "tools" / "sweep" / "grids"
SMALL = [*TINY, "--epochs", "2", "--batch-size", "32"]


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


RUNS = {
    "main_padding": 360,
    "main_watermarking": 360,
    "clip": 180,
    "training_size": 60,
    "laplace": 120,
    "topk_ratio": 60,
    "ablations": 84,
    "linear": 108,
    "training_cost": 12,
    "study": 180,
    "shots": 60,
}


@pytest.mark.parametrize("name", sorted(RUNS.keys() | {path.stem for path in GRIDS.glob("*.yaml")}))
def test_shipped_grids(name):
    path = GRIDS / f"{name}.yaml"
    planned = cells.expand(cells.read_grid(path))  # makes the config of every cell, and so checks its values
    assert len(planned) == RUNS[name]
    assert len({cell.folder for cell in planned}) == len({cell.log for cell in planned}) == len(planned)
    batch_sizes = {cell.cfg.batch_size for cell in planned if cell.cfg.dataset in ("dtd", "oxfordpets")}
    assert batch_sizes <= {64}, "the data set's recipe holds in a sweep as well"
    head = path.read_text().partition("\nscript:")[0]
    assert "# Expect: " in head and all(word in head for word in ("accuracy", "time", "memory", "measured"))


def test_runs_are_told_apart_by_their_folders():
    planned = cells.expand(
        cells.normalise(
            {
                "dataset": "cifar100",
                "train-fraction": [0.4, 1.0],
                "mapping": ["blm", "blmp"],
                "results-path": "r",
                "variants": [{}, {"bayes": False, "seed": 7}, {"mapping": "blmpp"}],
            }
        )
    )
    assert [cell.name for cell in planned] == [
        f"vm/cifar100/resnet18_padding_{mapping}_seed{seed}{fraction}{bayes}"
        for seed, bayes in ((0, ""), (7, "_bayes=false"))
        for fraction in ("_train_fraction=0.4", "")
        for mapping in ("blm", "blmpp")
    ]
    first, last = planned[0], planned[-1]
    assert first.arguments == (
        "--dataset",
        "cifar100",
        "--train-fraction",
        "0.4",
        "--mapping",
        "blm",
        "--results-path",
        "r",
    )
    assert first.folder == Path("r/vm/cifar100/resnet18_padding_blm_seed0_train_fraction=0.4")
    assert first.log == Path("r/logs/vm/cifar100/resnet18_padding_blm_seed0_train_fraction=0.4.log")
    assert "--no-bayes" in last.arguments and last.cfg.bayes is False and last.cfg.mapping == "blmpp"


def test_flags_win_over_the_file(capsys):
    path = grid_file(
        "script: [train_vm.py, train_vm_fast.py]\ndataset: [dtd, eurosat]\nvariants:\n"
        "  - {mapping: [blm, blmpp], seed: 1}\n  - mapping: rlm\n"
    )
    assert sweep.main([path, "--mapping", "ilm", "--dataset", "digits,dtd", "--iteration", "false", "--dry-run"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 9 and lines[-1].startswith("8 runs: 8 waiting")
    script = cells.ROOT / "train_vm_fast.py"
    assert lines[3] == (f"waiting         python {script} --dataset dtd --mapping ilm --no-iteration --seed 1")
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
    ("dataset: ['folder:a/x', 'folder:b/x']", "/b/x share the run folder"),
    ("weights: [/a/net.pth, /b/net.pth]", "weights /a/net.pth and /b/net.pth share the run folder"),
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
    (["."], ". is a folder; expected a YAML file"),
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
    planned = cells.expand(grid, elsewhere=True)
    assert planned[0].cfg.precision == "tf32" and planned[0].cfg.device == "cuda"
    assert {"--precision", "tf32", "--device", "cuda"} <= set(planned[0].arguments)
    with pytest.raises(SystemExit):
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
    changed = "canvas_size=64_weights=none_epochs=2_batch_size=32"
    for name, used in ((f"{leaf}_{changed}", 64), (f"{leaf}_train_fraction=0.5_{changed}", 32)):
        metrics = [json.loads(line) for line in Path("r", name, "metrics.jsonl").read_text().splitlines()]
        result = json.loads(Path("r", name, "result.json").read_text())
        assert result["final_accuracy"] == metrics[-1]["test_accuracy"] and len(metrics) == 2
        log = Path("r/logs", f"{name}.log").read_text()
        assert log.startswith("$ ") and f"{used} training and 32 test images" in log
        accuracy = f"{result['final_accuracy']:.2%} final accuracy"
        finished = rf"^{name} finished: {accuracy}, \d+:\d\d:\d\d; log r/logs/{name}.log; "
        assert re.search(finished, out, re.MULTILINE)
    assert "3 runs: 2 finished, 1 failed\n" in out
    failed = out.splitlines()[-1]
    assert failed.startswith("vm/folder-absent/") and failed.endswith(".log")
    assert " failed: error: " in failed and "absent is not a folder" in failed and "(exit code 2)" in failed

    before = {path: path.stat().st_mtime_ns for path in Path("r").rglob("*")}
    Path("grid.yaml").write_text(Path("grid.yaml").read_text().rpartition("  -")[0])
    assert sweep.main(arguments) == 0
    assert capsys.readouterr().out.splitlines()[-1] == "2 runs: 2 finished before"
    assert {path: path.stat().st_mtime_ns for path in Path("r").rglob("*")} == before

    assert sweep.main([*arguments, "--epochs", "3", "--dry-run"]) == 0
    assert capsys.readouterr().out.splitlines()[-1].startswith("2 runs: 2 waiting"), "another length is another run"
    assert sweep.main([*arguments, "--overwrite", "--dry-run"]) == 0
    assert capsys.readouterr().out.splitlines()[-1].startswith("2 runs: 2 waiting")


def test_two_sweeps_of_one_grid_share_its_runs():
    command = [sys.executable, "-m", "tools.sweep", "--dataset", "synthetic", "--seed", "0,1", *SMALL]
    command += ["--results-path", str(Path("r").absolute())]
    both = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=cells.ROOT) for _ in range(2)]
    outputs = [sweep.communicate()[0] for sweep in both]
    assert [sweep.returncode for sweep in both] == [0, 0], outputs
    assert "failed" not in "".join(outputs)
    configs = [json.loads(path.read_text()) for path in Path("r").rglob("config.json")]
    assert [len(config["starts"]) for config in configs] == [1, 1], "each run is done once"
    assert len(list(Path("r").rglob("result.json"))) == 2


# ---- processes, with a stand-in for the script ----

STAND_IN = """
import os, pathlib, signal, sys, time
folder = pathlib.Path("results")
seed = sys.argv[sys.argv.index("--seed") + 1]
def stop(signum, frame):
    (folder / f"saved{seed}").write_text(str(signum))
    if seed != "9":
        sys.exit(143)
signal.signal(signal.SIGTERM, stop)
(folder / f"began{seed}").touch()
print("working", flush=True)
parent = os.getppid()
while os.getppid() == parent:
    time.sleep(0.05)
"""


def wait_until(condition):
    """Poll for an event; the bound is far beyond any machine and only keeps a broken test from hanging."""
    for _ in range(15_000):
        if condition():
            return
        time.sleep(0.02)
    raise AssertionError("waited in vain")


def signal_after(*pairs):
    """Send signals to this process, as Ctrl-C at a terminal would, each once its condition holds."""

    def send():
        for condition, signum in pairs:
            wait_until(condition)
            os.kill(os.getpid(), signum)

    thread = threading.Thread(target=send)
    thread.start()
    return thread


@pytest.fixture
def stand_in(tmp_path, monkeypatch):
    (tmp_path / "train_vm.py").write_text(STAND_IN)
    monkeypatch.setattr(cells, "ROOT", tmp_path)
    monkeypatch.setattr(jobs, "POLL_SECONDS", 0.05)


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM])
def test_runs_are_asked_to_save_and_end(stand_in, capsys, signum):
    thread = signal_after((lambda: all(Path(f"results/began{seed}").exists() for seed in (0, 1)), signum))
    assert sweep.main(["--seed", "0,1,2", "--jobs", "2"]) == 128 + signum
    thread.join()
    assert sorted(path.name for path in Path("results").glob("*[0-9]")) == ["began0", "began1", "saved0", "saved1"]
    assert Path("results/saved0").read_text() == str(int(signal.SIGTERM))
    lines = capsys.readouterr().out.splitlines()
    assert lines[-1] == "stopped; the same command goes on from here"
    assert "3 runs: 1 waiting, 2 stopped" in lines[-2]


def test_second_ctrl_c_kills(stand_in, capsys):
    began, asked = Path("results/began9"), Path("results/saved9")
    thread = signal_after((began.exists, signal.SIGINT), (asked.exists, signal.SIGINT))
    assert sweep.main(["--seed", "9"]) == 130
    thread.join()
    assert "1 run: 1 stopped" in capsys.readouterr().out


def test_two_ctrl_c_at_once_kill(monkeypatch):
    """However long the sweep was busy with something else in between."""
    killed = []
    stand_in = SimpleNamespace(
        remote=False,
        room=lambda: 1,
        start=lambda cells: None,
        stop=lambda cells, kill: killed.append(kill),
        exit_code=lambda cell: -9 if killed else None,
    )
    monkeypatch.setattr(jobs, "POLL_SECONDS", 0)

    def display(shown, changed):
        if changed is not None and changed.state == "running":
            for signum in (signal.SIGINT, signal.SIGTERM):
                signal.raise_signal(signum)

    planned = cells.expand(cells.normalise({"seed": 0}))
    (ended,), signum = jobs.sweep(planned, stand_in, display)
    assert killed == [True] and ended.state == "stopped" and signum == signal.SIGINT


def test_trouble_in_the_sweep_itself_leaves_no_run_behind(stand_in, capsys, monkeypatch):
    def full(job, runner, stopping):
        wait_until(Path("results/began0").exists)
        raise OSError("no space left on device")

    monkeypatch.setattr(jobs, "_follow", full)
    assert "no space left" in refused(capsys, "--seed", "0")
    wait_until(Path("results/saved0").exists)


def test_failed_run_is_reported_with_what_its_log_says(stand_in, tmp_path, capsys):
    (tmp_path / "train_vm.py").write_text("import os; print('so far', flush=True); os.kill(os.getpid(), 9)")
    assert sweep.main(["--mapping", "blm"]) == 1
    line = capsys.readouterr().out.splitlines()[-1]
    assert "failed: so far (ended by signal 9), " in line
    assert line.endswith("; log results/logs/vm/sun397/resnet18_padding_blm_seed0.log")
    (tmp_path / "train_vm.py").write_text("pass")
    assert sweep.main(["--mapping", "blm"]) == 1, "exit code 0 without a result is no success"
    assert "no output (exit code 0)" in capsys.readouterr().out
    (tmp_path / "train_vm.py").write_text("print('error: too large\\nepoch 3/10: loss 0.5'); raise SystemExit(2)")
    assert sweep.main(["--mapping", "blm"]) == 1
    assert "failed: error: too large (exit code 2)" in capsys.readouterr().out, "a healthy line is no error"


FINISHES = """
import os, pathlib, sys
folder = pathlib.Path("results/vm/sun397")
folder /= "resnet18_padding_blmpp_seed" + sys.argv[sys.argv.index("--seed") + 1]
if (folder / ".lock").exists():
    sys.exit("error: another process is at work")
folder.mkdir(parents=True)
(folder / "result.json").write_text('{"final_accuracy": 0.5}')
"""


@pytest.mark.parametrize("finished", [True, False])
def test_run_of_another_process_is_waited_for(stand_in, tmp_path, finished):
    """And skipped once it is finished, or gone on with where it was stopped."""
    (tmp_path / "train_vm.py").write_text(FINISHES)
    planned = cells.expand(cells.normalise({"seed": [0, 1]}))
    folder = planned[0].folder
    folder.mkdir(parents=True)
    lock = open(folder / ".lock", "w")
    fcntl.flock(lock, fcntl.LOCK_EX)
    seen = []

    def display(shown, changed):
        seen.append((shown[0].state, shown[1].state))
        if seen[-1] == ("busy elsewhere", "finished") and not lock.closed:
            if finished:
                (folder / "result.json").write_text('{"final_accuracy": 0.5}')
            else:
                shutil.rmtree(folder)
            lock.close()

    ended, signum = jobs.sweep(planned, runner.LocalRunner(1, []), display)
    assert [job.state for job in ended] == ["finished before" if finished else "finished", "finished"] and signum == 0
    assert seen[0] == ("busy elsewhere", "waiting") and planned[0].log.exists() is not finished


def test_run_that_another_process_took_first_is_not_failed(stand_in, tmp_path):
    """The other one begins after the sweep has looked, and before its own run is there."""
    (tmp_path / "train_vm.py").write_text(FINISHES)
    (cell,) = cells.expand(cells.normalise({"seed": 0}))
    locks, seen = [], []

    def display(shown, changed):
        seen.append(shown[0].state)
        if seen == ["waiting"]:
            return
        if seen[-1] == "busy elsewhere" and changed is not None:
            (cell.folder / "result.json").write_text('{"final_accuracy": 0.5}')
            locks[0].close()

    class Slow(runner.LocalRunner):
        def start(self, started):
            cell.folder.mkdir(parents=True)
            locks.append(open(cell.folder / ".lock", "w"))
            fcntl.flock(locks[0], fcntl.LOCK_EX)
            super().start(started)

    (ended,), _ = jobs.sweep([cell], Slow(1, []), display)
    assert ended.state == "finished before" and ended.error == ""
    assert list(dict.fromkeys(seen)) == ["waiting", "running", "busy elsewhere", "finished before"]


def command_cell(tmp_path, name, code, *arguments):
    return SimpleNamespace(name=name, command=[sys.executable, "-c", code, *arguments], log=tmp_path / f"{name}.log")


def test_each_run_has_a_gpu_of_its_own(tmp_path):
    code = "import os; print(os.environ.get('CUDA_VISIBLE_DEVICES'), os.environ['OMP_NUM_THREADS'])"
    local = runner.LocalRunner(2, ["3", "GPU-7"])
    for turn in range(2):
        batch = [command_cell(tmp_path, f"{turn}{i}", code) for i in range(2)]
        local.start(batch)
        assert local.room() == 0
        for cell in batch:
            wait_until(lambda cell=cell: local.exit_code(cell) is not None)
        assert local.room() == 2
        assert sorted(cell.log.read_text() for cell in batch) == ["3 1\n", "GPU-7 1\n"]


# ---- what is shown ----


def job(seed, state, times=(), epochs=10, dataset="dtd", **more):
    cfg = SimpleNamespace(epochs=epochs, dataset=dataset, backbone="b", reprogramming="padding")
    lines = [{"seconds": {"train": t, "test": 1.0}, "test_accuracy": 0.5} for t in times]
    name = f"vm/{dataset}/seed{seed}"
    cell = SimpleNamespace(name=name, cfg=cfg, script="train_vm.py", log=f"logs/{name}.log")
    made = jobs.Job.__new__(jobs.Job)
    usual = {"error": "", "log_start": 9, "seconds": 60.0}
    made.__dict__.update({"cell": cell, "state": state, "lines": lines} | usual | more)
    return made


def test_estimate_of_what_remains():
    remaining = jobs.remaining_seconds
    assert remaining([job(0, "running"), job(1, "waiting")], 2) is None
    assert remaining([job(0, "finished", [3] * 10)], 2) == 0
    several = [job(0, "running", [3] * 4), job(1, "waiting"), job(0, "waiting", dataset="gtsrb"), job(2, "failed")]
    assert remaining(several, 1) == 6 * 4 + 10 * 4 + 10 * 4
    assert remaining(several, 4) == 40, "no sooner than the longest run"
    several.append(job(1, "finished", [9] * 10, dataset="gtsrb"))
    assert remaining(several, 1) == 6 * 4 + 10 * 4 + 10 * 10


def test_what_became_of_a_job():
    assert display.outcome(job(0, "running")) == "vm/dtd/seed0 started"
    assert display.outcome(job(0, "finished", [3] * 10, seconds=12000)) == (
        "vm/dtd/seed0 finished: 50.00% final accuracy, 3:20:00; log logs/vm/dtd/seed0.log"
    )
    assert display.outcome(job(1, "failed", error="error: no such file (exit code 2)")) == (
        "vm/dtd/seed1 failed: error: no such file (exit code 2), 0:01:00; log logs/vm/dtd/seed1.log"
    )
    in_the_way = job(1, "failed", error="error: other settings", log_start=0)
    assert display.outcome(in_the_way) == "vm/dtd/seed1 failed: error: other settings"
    assert display.outcome(job(1, "busy elsewhere")) == "vm/dtd/seed1 busy elsewhere"


def test_live_table():
    """What runs, under a summary; what ended stands above as a line, and stays once the table is gone."""
    console = Console(file=io.StringIO(), force_terminal=True, width=200, height=20, _environ={"TERM": "xterm"})
    several = [job(0, "running", [3] * 4), job(1, "failed", error="error: no such file"), job(2, "waiting")]
    with display.Display(1, console) as show:
        show(several, None)
        several[0].state = "finished"
        show(several, several[0])
    text = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", console.file.getvalue())
    first = [line.split() for line in text.splitlines()[:3]]
    assert first[0] == "3 runs: 1 running, 1 waiting, 1 failed, about 0:01:04 left".split()
    assert first[1:] == [["run", "epoch", "test", "time"], ["vm/dtd/seed0", "4/10", "50.00%", "0:01:00"]]
    assert text.count("vm/dtd/seed0 finished: 50.00% final accuracy, 0:01:00; log logs/vm/dtd/seed0.log") == 1
    assert "\x1b[2K" in console.file.getvalue(), "the table is drawn over itself"


def test_table_of_many_runs_on_a_small_terminal():
    console = Console(file=io.StringIO(), force_terminal=True, width=40, height=6, _environ={"TERM": "xterm"})
    with display.Display(50, console) as show:
        show([job(seed, "running", [3]) for seed in range(50)], None)
    lines = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", console.file.getvalue()).splitlines()
    assert len(lines) <= 7 and max(map(len, lines)) <= 40


# ---- Slurm ----


def test_slurm_without_submitit_or_slurm(capsys, monkeypatch):
    assert "--slurm" in refused(capsys, "--mapping", "blm", "--slurm")  # there is no srun on a test machine
    monkeypatch.setitem(sys.modules, "submitit", None)
    assert "pip install submitit" in refused(capsys, "--mapping", "blm", "--slurm")


SAVES = """
import os, signal, sys, time
signal.signal(signal.SIGTERM, lambda *_: sys.exit("saved"))
print("began", flush=True)
parent = os.getppid()
while os.getppid() == parent:
    time.sleep(0.05)
"""


def has(log, text):
    return lambda: log.exists() and log.read_text() == text


def test_jobs_of_submitit(tmp_path):
    """submitit's own local executor in the place of Slurm: exit codes, logs, and why a job failed."""
    pytest.importorskip("submitit")
    submitted = slurm.SlurmRunner({"cluster": "local", "timeout_min": 600}, tmp_path / "slurm", 2)
    good, bad, broken = planned = [
        command_cell(tmp_path, "good", "print('hello')"),
        command_cell(tmp_path, "bad", "raise SystemExit(3)"),
        SimpleNamespace(name="broken", command=["/absent"], log=tmp_path / "broken.log"),
    ]
    submitted.start(planned)
    assert submitted.room() > 1000 and submitted.remote
    for cell in planned:
        wait_until(lambda cell=cell: submitted.exit_code(cell) is not None)
    assert submitted.exit_code(good) == 0 and submitted.exit_code(bad) == 3 and good.log.read_text() == "hello\n"
    assert submitted.exit_code(broken).startswith("job ") and "/absent" in submitted.exit_code(broken)


def test_slurm_jobs_are_followed_and_cancelled(tmp_path):
    pytest.importorskip("submitit")
    submitted = slurm.SlurmRunner({"cluster": "local"}, tmp_path / "slurm", 2)
    cancelled = []
    for state in ("PENDING", "RUNNING"):
        cancel = lambda check, state=state: cancelled.append(state)  # noqa: E731
        submitted._jobs[state] = SimpleNamespace(state=state, done=lambda: False, cancel=cancel)
    pending, running = (SimpleNamespace(name=state) for state in ("PENDING", "RUNNING"))
    assert submitted.exit_code(running) is None
    assert submitted.running(running) and not submitted.running(pending)
    submitted.stop([pending, running])
    assert cancelled == ["PENDING", "RUNNING"]


def test_cancelled_job_lets_its_run_save(tmp_path):
    cell = command_cell(tmp_path, "run", SAVES)
    earlier = signal.signal(signal.SIGINT, signal.default_int_handler)
    thread = signal_after((has(cell.log, "began\n"), signal.SIGINT))
    try:
        with pytest.raises(KeyboardInterrupt):
            slurm.SlurmJob(cell.command, cell.log)()
    finally:
        thread.join()
        signal.signal(signal.SIGINT, earlier)
    wait_until(has(cell.log, "began\nsaved\n"))


def test_job_whose_time_is_up_saves_and_is_submitted_again(tmp_path, monkeypatch):
    """Slurm sends SIGUSR2 to every process; submitit answers it in the middle of waiting for the run."""
    submitit = pytest.importorskip("submitit")
    cell = command_cell(tmp_path, "run", SAVES, "--overwrite", "--seed", "1")
    running, answers, ended = slurm.SlurmJob(cell.command, cell.log), [], []

    def sleep_until_the_run_has_ended(seconds):
        assert not ended, "goes on waiting although the run has ended"
        os.waitid(os.P_PID, running.process.pid, os.WEXITED | os.WNOWAIT)
        ended.append(True)

    def answer(*_):
        running.process.send_signal(signal.SIGUSR2)
        answers.append(running.checkpoint())

    monkeypatch.setattr(slurm, "time", SimpleNamespace(sleep=sleep_until_the_run_has_ended))
    earlier = signal.signal(signal.SIGUSR2, answer)
    thread = signal_after((has(cell.log, "began\n"), signal.SIGUSR2))
    try:
        running()
    finally:
        thread.join()
        signal.signal(signal.SIGUSR2, earlier)
    assert cell.log.read_text() == "began\nsaved\n" and isinstance(answers[0], submitit.helpers.DelayedSubmission)
    assert answers[0].function.command == [*cell.command[:3], "--seed", "1"], "overwriting is for the first start only"


def test_job_that_slurm_starts_again_does_not_overwrite(tmp_path, monkeypatch):
    cell = command_cell(tmp_path, "run", "import sys; print(sys.argv[1:])", "--overwrite", "--seed", "1")
    for count, printed in (("0", ["--overwrite", "--seed", "1"]), ("1", ["--seed", "1"])):
        monkeypatch.setenv("SLURM_RESTART_COUNT", count)
        cell.log.unlink(missing_ok=True)
        assert slurm.SlurmJob(cell.command, cell.log)() == 0
        assert cell.log.read_text() == f"{printed}\n"


@pytest.mark.parametrize("tool", [sweep, prepare_data, check_data, visualize])
def test_help(tool, capsys):
    with pytest.raises(SystemExit) as caught:
        tool.main(["--help"])
    assert caught.value.code == 0 and f"python -m {tool.__name__.removesuffix('.__main__')}" in capsys.readouterr().out


def test_help_speaks_of_vision_models_and_clip(capsys):
    with pytest.raises(SystemExit):
        sweep.main(["--help"])
    shown = " ".join(capsys.readouterr().out.split())
    assert "resnet18" in shown and "CLIP: an open_clip model name" in shown
    with pytest.raises(SystemExit):
        prepare_data.main(["--help"])
    assert "fgvc_aircraft the official" in capsys.readouterr().out.replace("  ", " ")


def test_from_a_shell():
    command = [sys.executable, "-m", "tools.sweep", "tools/sweep/grids/clip.yaml", "--seed", "0", "--dry-run"]
    outcome = subprocess.run(command, capture_output=True, text=True, cwd=cells.ROOT)
    assert outcome.returncode == 0 and outcome.stdout.count("train_vlm.py") == 60 and outcome.stderr == ""
