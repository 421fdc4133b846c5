"""What a sweep shows: a line for each run that starts or ends, and on a terminal a live table of what runs."""

from datetime import timedelta

from rich.console import Console, Group
from rich.live import Live
from rich.table import Table
from rich.text import Text

from tools.sweep.jobs import remaining_seconds


class Display:
    """Shows jobs for as long as its block runs: ``display(jobs, changed)``, with the job that changed or None.

    Parameters
    ----------
    parallel : int
        Runs at a time.
    console : rich.console.Console, optional
    """

    def __init__(self, parallel, console=None):
        console = console or Console()
        self._parallel, self._live = parallel, None
        if console.is_terminal and not console.is_dumb_terminal:
            self._live = Live(console=console, auto_refresh=False, transient=True)

    def __enter__(self):
        if self._live:
            self._live.start()
        return self

    def __exit__(self, *error):
        if self._live:
            self._live.update("")  # or all of a table higher than the terminal would be drawn at the end
            self._live.stop()

    def __call__(self, jobs, changed):
        if self._live:
            if changed is not None and changed.state != "running":
                print(outcome(changed))  # above the table
            self._live.update(table(jobs, self._parallel), refresh=True)
        elif changed is not None:
            print(f"{outcome(changed)}; {status(jobs, self._parallel)}", flush=True)


def outcome(job):
    """One line: what became of a job, with accuracy, time and log where it has them."""
    what = {
        "running": "started",
        "failed": f"failed: {job.error}",
        "finished": f"finished: {_accuracy(job) or 'no'} final accuracy",
    }.get(job.state, job.state)
    ran = f", {duration(job.seconds)}; log {job.cell.log}" if job.over and job.log_start else ""
    return f"{job.cell.name} {what}{ran}"


def _accuracy(job):
    return f"{job.lines[-1]['test_accuracy']:.2%}" if job.lines else ""


def status(jobs, parallel):
    """One line: how many jobs are in which state, and how long it will take."""
    states = ("finished", "finished before", "running", "queued", "waiting", "busy elsewhere", "failed", "stopped")
    counts = {state: sum(job.state == state for job in jobs) for state in states}
    shown = [f"{count} {state}" for state, count in counts.items() if count]
    left = remaining_seconds(jobs, parallel)
    if any(not job.over for job in jobs):
        shown.append("time left not known yet" if left is None else f"about {duration(left)} left")
    return f"{len(jobs)} run{'s' * (len(jobs) != 1)}: {', '.join(shown)}"


def table(jobs, parallel):
    """The live table: a summary, and below it what runs."""
    shown = Table(box=None)
    shown.add_column("run", no_wrap=True)
    for name in ("epoch", "test", "time"):
        shown.add_column(name, justify="right", no_wrap=True)
    for job in jobs:
        if job.state == "running":
            shown.add_row(job.cell.name, f"{len(job.lines)}/{job.epochs}", _accuracy(job), duration(job.seconds))
    return Group(Text(status(jobs, parallel)), shown)


def duration(seconds):
    """``0:00:45``, ``3:20:00``, ``2 days, 4:00:00``."""
    return str(timedelta(seconds=round(seconds)))
