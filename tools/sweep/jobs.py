"""From cells to finished runs: what state each is in, the loop that starts and follows them, what is left to do."""

import json
import shlex
import signal
import time
from collections import defaultdict
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from statistics import mean

from tools.sweep.cells import Cell
from tools.training.run_folder import Run, in_use

POLL_SECONDS = 0.5


@dataclass
class Job:
    """A cell on its way.

    Attributes
    ----------
    cell : Cell
    state : str
        ``waiting``, ``busy elsewhere`` (another process is at work on it), ``queued`` (by Slurm), ``running``,
        ``finished``, ``finished before`` (this sweep), ``failed`` or ``stopped``.
    error : str
        Why it failed: what its log says, or what stands in the way of starting it.
    lines : list of dict
        Its ``metrics.jsonl``, as last read.
    seconds : float
        How long it has been running, or ran, under this sweep.
    """

    cell: Cell
    state: str = "waiting"
    error: str = ""
    lines: list = ()
    log_start: int = 0
    started: float = 0.0
    seconds: float = 0.0

    def __post_init__(self):
        self.look()
        if self.state == "finished before" or not self.cell.cfg.overwrite:
            self.read_metrics()

    @property
    def over(self):
        return self.state in ("finished", "finished before", "failed", "stopped")

    @property
    def active(self):
        return self.state in ("queued", "running")

    @property
    def epochs(self):
        return max(1, self.cell.cfg.epochs)

    def look(self):
        """See from its folder whether it is finished, busy elsewhere, in the way of another run, or free to start."""
        try:
            run = Run(self.cell.cfg, self.cell.arguments)
            finished = run.result is not None
        except ValueError as error:
            self.state, self.error = "failed", str(error)
        else:
            self.state = "finished before" if finished else "busy elsewhere" if in_use(self.cell.folder) else "waiting"

    def read_metrics(self):
        """Read which epochs are done; a line that is not whole yet waits for the next time."""
        with suppress(OSError, ValueError):
            text = (self.cell.folder / "metrics.jsonl").read_text()
            self.lines = [json.loads(line) for line in text.splitlines()]

    def pace(self):
        """Mean seconds per epoch, once there are any."""
        return mean(sum(line["seconds"].values()) for line in self.lines)

    def log_error(self):
        """The last error that this attempt wrote, or else its last line."""
        with suppress(OSError):
            text = self.cell.log.read_bytes()[self.log_start :].decode("utf-8", "replace")
            lines = [line.strip() for line in text.splitlines() if line.strip()]
            return ([line for line in lines if line.startswith("error: ")] or lines or [""])[-1]
        return ""


def sweep(cells, runner, display):
    """Run cells until all are over; those that another process is at work on are waited for.

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
    with _stop_requests(hang_up=not runner.remote) as stops:
        try:
            _run_all(jobs, runner, display, stops)
        except BaseException:  # a full disk, say: nothing goes on unwatched
            runner.stop([job.cell for job in jobs if job.active])
            raise
        return jobs, stops[0] if stops else 0


def _run_all(jobs, runner, display, stops):
    answered = 0
    while True:
        display(jobs, None)
        if len(stops) > answered:
            runner.stop([job.cell for job in jobs if job.active], kill=len(stops) > 1)
            answered = len(stops)
        if not stops:
            _start(jobs, runner, display)
        active = [job for job in jobs if job.active]
        if not active and (stops or all(job.over for job in jobs)):
            return
        time.sleep(POLL_SECONDS)
        for job in active:
            _follow(job, runner, stopping=bool(stops))
            if not job.active:
                display(jobs, job)


def _start(jobs, runner, display):
    chosen, room = [], runner.room()
    for job in jobs:
        if len(chosen) < room and job.state in ("waiting", "busy elsewhere"):
            before = job.state
            job.look()
            if job.state == "waiting":
                chosen.append(job)
                continue
            job.read_metrics()
            if job.state != before:
                display(jobs, job)
    for job in chosen:
        job.cell.log.parent.mkdir(parents=True, exist_ok=True)
        with open(job.cell.log, "a", encoding="utf-8") as log:
            log.write(f"$ {shlex.join(job.cell.command)}\n")
            job.log_start = log.tell()
    if chosen:
        runner.start([job.cell for job in chosen])
    for job in chosen:
        job.state, job.started = "queued" if runner.remote else "running", time.monotonic()
        display(jobs, job)


def _follow(job, runner, stopping):
    code = runner.exit_code(job.cell)
    job.read_metrics()
    if code is None and job.state == "queued" and runner.running(job.cell):
        job.state, job.started = "running", time.monotonic()
    job.seconds = time.monotonic() - job.started
    if code is None:
        return
    if code == 0 and (job.cell.folder / "result.json").exists():
        job.state = "finished"
    elif stopping:
        job.state = "stopped"
    else:
        job.look()  # another process may have come first
        if job.state == "waiting":
            job.state = "failed"
            cause = code if isinstance(code, str) else f"exit code {code}" if code >= 0 else f"ended by signal {-code}"
            job.error = f"{job.log_error()[:300] or 'no output'} ({cause})"


def remaining_seconds(jobs, parallel):
    """An estimate of what is left, None before any epoch was timed.

    A run takes as long per epoch as it took so far; one that has not begun, as long as others of its script, data set,
    backbone and input VR, or else as all others on average.
    """

    def likeness(job):
        return job.cell.script, *(getattr(job.cell.cfg, key) for key in ("dataset", "backbone", "reprogramming"))

    paces, left = defaultdict(list), []
    for job in jobs:
        for key in (likeness(job), None) if job.lines else ():
            paces[key].append(job.pace())
    for job in jobs:
        if not job.over:
            known = [job.pace()] if job.lines else paces[likeness(job)] or paces[None]
            if not known:
                return None
            left.append(mean(known) * (job.epochs - len(job.lines)))
    return max(sum(left) / parallel, max(left)) if left else 0.0


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
