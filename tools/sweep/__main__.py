"""python -m tools.sweep tools/sweep/grids/main_padding.yaml --seed 0 --dry-run

Run a grid of settings: every combination is one run of a training script, in a process and with a log of its own
(<results-path>/logs/...). The grid comes from a YAML file (those of the paper lie in tools/sweep/grids), from flags
with comma-separated values, or from both: then the flags win.

    python -m tools.sweep --script train_vm.py --dataset flowers102,dtd --mapping ilm,blm,blmpp --seed 0,1,2

Finished runs are skipped, failed ones are tried again, and runs that were cut off go on: the same command again is
always right. Ctrl-C lets every run save and end. Runs that would share a run folder, since they differ in a setting
that is no part of its name, get a results path of their own, <results-path>/<setting>=<value>.

Runs take turns on the GPUs of this machine (CUDA_VISIBLE_DEVICES is respected), one a GPU, or share its cores; or go to
Slurm, as a job array through submitit (pip install submitit):

    python -m tools.sweep GRID.yaml --jobs 8 --slurm slurm_partition=gpu timeout_min=600

Exit code: 0 where all runs are finished, 1 where some failed, 2 for a grid that can't be, 130 after Ctrl-C.
"""

import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import torch

from tools.console import Parser, user_errors
from tools.sweep.cells import FIELDS, SCRIPTS, Cell, expand, normalise, override, read_grid
from tools.sweep.slurm import SlurmRunner
from tools.training.run_folder import FREE_SETTINGS, Run, check_writable

POLL_SECONDS = 0.5
WHOLE = FREE_SETTINGS | {"engine", "weights", "templates"}  # flags whose value may hold a comma of its own


@dataclass
class Job:
    """A cell on its way.

    Attributes
    ----------
    cell : Cell
    state : str
        ``waiting``, ``queued`` (by Slurm), ``running``, ``finished``, ``skipped`` (finished before), ``failed`` or
        ``stopped``.
    error : str
        Why it failed: the last line of its log, or what stands in the way of starting it.
    lines : list of dict
        Its ``metrics.jsonl``, as last read.
    """

    cell: Cell
    state: str = "waiting"
    error: str = ""
    lines: list = ()
    log_start: int = 0
    started: float = 0.0

    def __post_init__(self):
        overwrite = self.cell.settings["overwrite"]
        try:
            run = Run(self.cell.folder, self.cell.kind, self.cell.settings, overwrite)
            self.state = "waiting" if run.result is None else "skipped"
        except ValueError as error:  # the folder holds a run with other settings
            self.state, self.error = "failed", str(error)
        if self.state == "skipped" or not overwrite:
            self.read_metrics()

    @property
    def over(self):
        return self.state not in ("waiting", "queued", "running")

    @property
    def epochs(self):
        return self.cell.settings["epochs"]

    def read_metrics(self):
        """Read which epochs are done; a line that is not whole yet waits for the next time."""
        with suppress(OSError, ValueError):
            text = (self.cell.folder / "metrics.jsonl").read_text()
            self.lines = [json.loads(line) for line in text.splitlines()]

    def pace(self):
        """Mean seconds an epoch, None before the first."""
        times = [sum(line["seconds"].values()) for line in self.lines]
        return sum(times) / len(times) if times else None

    def last_log_line(self):
        """The last line that this attempt wrote."""
        with suppress(OSError):
            with open(self.cell.log, "rb") as log:
                log.seek(max(self.log_start, log.seek(0, os.SEEK_END) - 65536))
                lines = log.read().decode("utf-8", "replace").splitlines()
            return next((line.strip() for line in reversed(lines) if line.strip()), "")
        return ""


class LocalRunner:
    """Runs processes of this machine, at most ``parallel`` at a time, each with a GPU or its share of the cores.

    Parameters
    ----------
    parallel : int
    gpus : list of str
        As ``CUDA_VISIBLE_DEVICES`` names them; empty on a machine without.
    """

    def __init__(self, parallel, gpus):
        self.parallel = parallel
        self._gpus = gpus
        self._free = list(range(parallel))
        self._processes = {}

    def room(self):
        """How many more runs can be started now."""
        return len(self._free)

    def start(self, cells):
        """Start the cells, no more of them than there is room for."""
        for cell in cells:
            slot = self._free.pop(0)
            environment = os.environ | {"PYTHONUNBUFFERED": "1"}
            if self._gpus:
                environment["CUDA_VISIBLE_DEVICES"] = self._gpus[slot % len(self._gpus)]
            elif self.parallel > 1:
                environment.setdefault("OMP_NUM_THREADS", str(max(1, _cores() // self.parallel)))
            with open(cell.log, "ab") as log:
                # a session of its own: Ctrl-C reaches this process alone, which then asks each run to end, once
                self._processes[cell.name] = slot, subprocess.Popen(
                    cell.command, env=environment, stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT,
                    start_new_session=True,
                )

    def exit_code(self, cell):
        """None while the run is not over."""
        slot, process = self._processes[cell.name]
        code = process.poll()
        if code is not None:
            del self._processes[cell.name]
            self._free.append(slot)
        return code

    def running(self, cell):
        return True

    def stop(self, cells, kill=False):
        """SIGTERM: a run finishes its batch, saves and ends; or SIGKILL, to its decoding threads and all."""
        for cell in cells:
            with suppress(ProcessLookupError):
                os.killpg(self._processes[cell.name][1].pid, signal.SIGKILL if kill else signal.SIGTERM)


def sweep(cells, runner, display):
    """Run cells until all are over.

    Parameters
    ----------
    cells : list of Cell
    runner : LocalRunner or SlurmRunner
    display : callable
        Called with the jobs whenever something may have changed, and with the job that did (or None).

    Returns
    -------
    jobs : list of Job
    signum : int
        The signal that ended the sweep early, or 0.
    """
    jobs = [Job(cell) for cell in cells]
    with _stop_requests(hang_up=isinstance(runner, LocalRunner)) as stops:
        try:
            _run_all(jobs, runner, display, stops)
        except BaseException:  # a full disk, say: nothing goes on unwatched
            runner.stop([job.cell for job in jobs if job.state in ("running", "queued")])
            raise
        return jobs, stops[0] if stops else 0


def _run_all(jobs, runner, display, stops):
    answered = 0
    while True:
        display(jobs, None)
        if len(stops) > answered:
            runner.stop([job.cell for job in jobs if job.state in ("running", "queued")], kill=answered > 0)
            answered = len(stops)
        if not stops:
            _start(jobs, runner, display)
        active = [job for job in jobs if job.state in ("running", "queued")]
        if not active:
            return
        time.sleep(POLL_SECONDS)
        for job in active:
            _follow(job, runner, stopping=bool(stops))
            if job.over:
                display(jobs, job)


def _start(jobs, runner, display):
    chosen = [job for job in jobs if job.state == "waiting"][:runner.room()]
    if not chosen:
        return
    for job in chosen:
        _make_room_for(job)
    runner.start([job.cell for job in chosen])
    for job in chosen:
        job.state = "queued" if isinstance(runner, SlurmRunner) else "running"
        job.started = time.monotonic()
        display(jobs, job)


def _make_room_for(job):
    """Log file and, for results paths of one grid, one cache of decoded images."""
    cell = job.cell
    cell.log.parent.mkdir(parents=True, exist_ok=True)
    with open(cell.log, "a", encoding="utf-8") as log:
        log.write(f"$ {shlex.join(cell.command)}\n")
        job.log_start = log.tell()
    own, shared = Path(cell.settings["results_path"]), cell.base / "cache"
    if own != cell.base and not (own / "cache").exists():
        shared.mkdir(parents=True, exist_ok=True)
        own.mkdir(parents=True, exist_ok=True)
        with suppress(OSError):  # without links every results path has a cache of its own, which costs only room
            (own / "cache").symlink_to(os.path.relpath(shared, own), target_is_directory=True)


def _follow(job, runner, stopping):
    code = runner.exit_code(job.cell)
    job.read_metrics()
    if code is None:
        if job.state == "queued" and runner.running(job.cell):
            job.state = "running"
        return
    if code == 0 and (job.cell.folder / "result.json").exists():
        job.state = "finished"
    elif stopping:
        job.state = "stopped"
    else:
        job.state = "failed"
        cause = code if isinstance(code, str) else f"exit code {code}" if code >= 0 else f"ended by signal {-code}"
        job.error = f"{job.last_log_line()[:300] or 'no output'} ({cause})"


def remaining_seconds(jobs, parallel):
    """An estimate of what is left, None before any epoch was timed.

    A run takes as long an epoch as it took so far; one that has not begun, as long as others of its script, data set,
    backbone and input VR, or else as all others on average.
    """
    def likeness(job):
        return job.cell.script, *(job.cell.settings[key] for key in ("dataset", "backbone", "reprogramming"))

    paces = {}
    for job in jobs:
        if job.pace() is not None:
            paces.setdefault(likeness(job), []).append(job.pace())
            paces.setdefault(None, []).append(job.pace())
    left = []
    for job in jobs:
        if not job.over:
            known = paces.get(likeness(job)) or paces.get(None)
            if not known:
                return None
            pace = sum(known) / len(known) if job.pace() is None else job.pace()
            left.append(pace * (job.epochs - len(job.lines)))
    return max(sum(left) / parallel, max(left)) if left else 0.0


def duration(seconds):
    """``45 s``, ``12 min``, ``3 h 20 min``, ``2 d 4 h``."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    if minutes < 60:
        return f"{minutes} min"
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours < 48 else f"{hours // 24} d {hours % 24} h"


def status(jobs, parallel):
    """One line: how many jobs are in which state, and how long it will take."""
    states = ("finished", "skipped", "running", "queued", "waiting", "failed", "stopped")
    counts = {state: sum(job.state == state for job in jobs) for state in states}
    shown = [f"{count} {state}" for state, count in counts.items() if count]
    left = remaining_seconds(jobs, parallel)
    if any(not job.over for job in jobs):
        shown.append("time left not known yet" if left is None else f"about {duration(left)} left")
    return f"{len(jobs)} runs: {', '.join(shown)}"


def table(jobs, parallel, width, height, now):
    """Lines of the live table: what runs, what failed, and a summary; at most ``height``, each at most ``width``."""
    running = [job for job in jobs if job.state == "running"]
    failed = [job for job in jobs if job.state == "failed"]
    done = [job for job in jobs if job.state == "finished"]
    room = max(1, height - 3)
    name_width = max([len(job.cell.name) for job in running + failed + done] or [3])
    lines = [f"{'run':{name_width}}  {'state':8}  {'epoch':>9}  {'test':>6}  {'time':>9}"]
    for job in [*running, *reversed(failed), *reversed(done)][:room]:
        accuracy = f"{job.lines[-1]['test_accuracy']:.1%}" if job.lines else ""
        took = duration(now - job.started) if job.state == "running" else ""
        epochs = f"{len(job.lines):4}/{job.epochs:<4}"
        line = f"{job.cell.name:{name_width}}  {job.state:8}  {epochs}  {accuracy:>6}  {took:>9}  {job.error}"
        lines.append(line.rstrip())
    return [line[:width] for line in [*lines, status(jobs, parallel)]]


class Display:
    """The live table on a terminal; plain lines, one a change, where the output is piped."""

    def __init__(self, parallel, stream):
        self._parallel, self._stream, self._live, self._drawn = parallel, stream, stream.isatty(), 0

    def __call__(self, jobs, changed):
        if self._live:
            size = shutil.get_terminal_size()
            lines = table(jobs, self._parallel, size.columns - 1, size.lines - 1, time.monotonic())
            up = f"\x1b[{self._drawn}A" if self._drawn else ""
            self._stream.write(f"{up}\x1b[J" + "\n".join(lines) + "\n")
            self._drawn = len(lines)
        elif changed is not None:
            what = {"running": "started", "finished": f"finished: {_accuracy(changed)}",
                    "failed": f"failed: {changed.error}"}.get(changed.state, changed.state)
            self._stream.write(f"{changed.cell.name} {what}; {status(jobs, self._parallel)}\n")
        self._stream.flush()


def _accuracy(job):
    return f"{job.lines[-1]['test_accuracy']:.2%} final accuracy" if job.lines else "no metrics"


@contextmanager
def _stop_requests(hang_up):
    """A list that SIGINT, SIGTERM and (unless ignored, as under nohup) SIGHUP are added to while they are caught."""
    stops, signums = [], [signal.SIGINT, signal.SIGTERM]
    if hang_up and signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:
        signums.append(signal.SIGHUP)
    earlier = {signum: signal.signal(signum, lambda number, frame: stops.append(number)) for signum in signums}
    try:
        yield stops
    finally:
        for signum, handler in earlier.items():
            signal.signal(signum, handler)


def _cores():
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _gpus(cells):
    """The GPUs to hand out: none where no cell would use one."""
    if all(cell.settings["device"] == "cpu" for cell in cells) or not torch.cuda.is_available():
        return []
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    return visible.split(",") if visible else [str(i) for i in range(torch.cuda.device_count())]


def _build_parser():
    parser = Parser(
        prog="python -m tools.sweep", usage="%(prog)s [GRID.yaml] [options] [settings]", description=__doc__
    )
    parser.add_argument("grid", nargs="?", metavar="GRID.yaml", help="grid file; its keys are the settings below, its "
                        "values one or a list; 'variants' is a list of smaller grids to join with the rest")
    parser.add_argument("--dry-run", action="store_true", help="print the runs and their commands; run nothing")
    parser.add_argument("--jobs", type=int, metavar="N",
                        help="runs at a time (default: one a GPU, or 1; with --slurm 16)")
    parser.add_argument("--slurm", nargs="*", metavar="KEY=VALUE",
                        help="run on Slurm; parameters of submitit's AutoExecutor, such as slurm_partition, "
                             "timeout_min (default 1440), cpus_per_task (4), gpus_per_node (1), mem_gb")
    settings = parser.add_argument_group("settings, with a value or several separated by commas")
    settings.add_argument("--script", metavar="SCRIPT", help=f"{', '.join(SCRIPTS)} (default: train_vm.py)")
    for name, field in FIELDS.items():
        flag, text = f"--{name.replace('_', '-')}", field.metadata["help"]
        if field.default is True:
            settings.add_argument(flag, metavar="true,false", help=f"with false: {text}")
        elif field.default is False:
            settings.add_argument(flag, nargs="?", const="true", metavar="true|false", help=text)
        else:
            settings.add_argument(flag, metavar="VALUE" if name in WHOLE else "VALUES", help=text)
    return parser


def _typed_grid(arguments):
    """The settings on the command line, as a grid."""
    grid = {}
    for name in ("script", *FIELDS):
        text = getattr(arguments, name)
        if text is None:
            continue
        values = [text] if name in WHOLE else text.split(",")
        if name in FIELDS and isinstance(FIELDS[name].default, bool):
            values = [{"true": True, "false": False}.get(value, value) for value in values]
        grid[name] = values
    return normalise(grid)


def _slurm_parameters(texts):
    parameters = {}
    for text in texts:
        key, equals, value = text.partition("=")
        if not equals:
            raise ValueError(f"--slurm takes KEY=VALUE, got {text!r}; write GRID.yaml before it")
        parameters[key] = int(value) if value.isdigit() else value
    return parameters


def _say_what_is_separated(cells, separated):
    if separated:
        example = next(path for cell in cells if (path := Path(cell.settings["results_path"])) != cell.base)
        print(f"run folders do not name {', '.join(separated)}: runs in which they are not the default's get results "
              f"paths of their own, such as {example}")


def main(argv=None):
    with user_errors():
        arguments = _build_parser().parse_args(argv)
        if arguments.jobs is not None and arguments.jobs < 1:
            raise ValueError(f"--jobs must be 1 or more, got {arguments.jobs}")
        typed = _typed_grid(arguments)
        if arguments.grid is None and not typed:
            raise ValueError("nothing to run: give GRID.yaml, or settings such as --mapping blm,blmpp; see --help")
        grid = override(read_grid(arguments.grid) if arguments.grid else {}, typed)
        cells, separated = expand(grid, elsewhere=arguments.slurm is not None)
        for base in {cell.base for cell in cells}:
            check_writable(base)
        if arguments.dry_run:
            jobs = [Job(cell) for cell in cells]
            for job in jobs:
                print(f"{job.state:8} {shlex.join(['python', *job.cell.command[1:]])} {job.error}".rstrip())
            _say_what_is_separated(cells, separated)
            print(status(jobs, arguments.jobs or 1))
            return 0
        if arguments.slurm is not None:
            parallel = arguments.jobs or 16
            folder = cells[0].base / "logs" / "slurm"
            runner = SlurmRunner(_slurm_parameters(arguments.slurm), folder, parallel)
        else:
            gpus = _gpus(cells)
            parallel = arguments.jobs or len(gpus) or 1
            runner = LocalRunner(parallel, gpus)
        _say_what_is_separated(cells, separated)
        jobs, signum = sweep(cells, runner, Display(parallel, sys.stdout))
    print(status(jobs, parallel))
    failed = [job for job in jobs if job.state == "failed"]
    for job in failed:
        print(f"failed: {job.cell.name}: {job.error}" + (f"; see {job.cell.log}" if job.log_start else ""))
    if signum:
        print("stopped; the same command goes on from here")
        return 128 + signum
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
