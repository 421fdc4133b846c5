"""Runs on a Slurm cluster, through submitit. A job carries this file's code along, so it imports little."""

import os
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

# an hour of warning is not needed: a run that is cut off goes on after its last finished epoch
DEFAULTS = {"timeout_min": 1440, "cpus_per_task": 4, "gpus_per_node": 1}
POLLS_TO_SAVE = 600  # of a tenth of a second; Slurm gives 90 seconds


class SlurmJob:
    """What a Slurm job does: one run, its output in its log; submitted again where its time was up before it was done.

    Parameters
    ----------
    command : list of str
    log : Path
    """

    def __init__(self, command, log):
        self.command, self.log, self.process = command, Path(log), None

    def __call__(self):
        """Run to the end; the exit code."""
        if os.environ.get("SLURM_RESTART_COUNT", "0") != "0":  # its node failed, say
            self._go_on()
        # Slurm sends SIGUSR2 to every process of a job whose time is nearly up; submitit answers it by `checkpoint`
        how = {"preexec_fn": lambda: signal.signal(signal.SIGUSR2, signal.SIG_IGN), "stdin": subprocess.DEVNULL}
        with open(self.log, "ab") as log:
            self.process = subprocess.Popen(self.command, stdout=log, stderr=subprocess.STDOUT, **how)
            try:
                return self.process.wait()
            except BaseException:  # the job is interrupted: its run is as well
                self.process.terminate()
                raise

    def checkpoint(self):
        """Called by submitit when the time is nearly up: let the run save and end, and submit it again to go on."""
        import submitit

        if self.process is not None:
            self.process.terminate()
            with suppress(ChildProcessError):  # raised where it was waited for already
                for _ in range(POLLS_TO_SAVE):  # `poll` can't tell: this interrupts `wait`, which holds its lock
                    if os.waitid(os.P_PID, self.process.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT):
                        break
                    time.sleep(0.1)
            self._go_on()
        return submitit.helpers.DelayedSubmission(SlurmJob(self.command, self.log))

    def _go_on(self):
        """From now on, the run continues what it began: it does not start from scratch once more."""
        self.command = [argument for argument in self.command if argument != "--overwrite"]


class SlurmRunner:
    """Hands all runs to Slurm at once, as a job array of which ``parallel`` run at a time.

    Parameters
    ----------
    parameters : dict
        Of ``submitit.AutoExecutor.update_parameters``, beside `DEFAULTS`; ``cluster`` (default ``slurm``) may name
        submitit's ``local`` instead, for trying out.
    folder : Path
        For submitit's own files.
    parallel : int

    Raises
    ------
    ValueError
        submitit is not installed, there is no Slurm, or a parameter is not known.
    """

    remote = True  # runs go on without this process

    def __init__(self, parameters, folder, parallel):
        try:
            import submitit
        except ModuleNotFoundError:
            raise ValueError("--slurm needs a package: pip install submitit") from None
        self.parallel, self._jobs = parallel, {}
        parameters = dict(parameters)
        cluster = parameters.pop("cluster", "slurm")
        if cluster == "slurm":
            parameters = DEFAULTS | {"slurm_array_parallelism": parallel} | parameters
        try:
            self._executor = submitit.AutoExecutor(folder=folder, cluster=cluster)
            self._executor.update_parameters(name="sweep", **parameters)
        except (RuntimeError, NameError, TypeError, ValueError, AssertionError) as error:
            raise ValueError(f"--slurm: {error}") from None

    def room(self):
        """How many more runs can be started now."""
        return sys.maxsize

    def start(self, cells):
        """Submit the cells."""
        import cloudpickle

        here = sys.modules[__name__]
        cloudpickle.register_pickle_by_value(here)  # jobs need not find this package, whatever folder they start in
        try:
            with self._executor.batch():
                jobs = [self._executor.submit(SlurmJob(cell.command, cell.log.absolute())) for cell in cells]
        finally:
            cloudpickle.unregister_pickle_by_value(here)
        self._jobs.update((cell.name, job) for cell, job in zip(cells, jobs, strict=True))

    def exit_code(self, cell):
        """None while the run is not over; a text where Slurm or submitit itself failed."""
        job = self._jobs[cell.name]
        if not job.done():
            return None
        try:
            return job.result()
        except Exception as error:  # submitit raises its own, or what the job raised
            advice = "-", "You can check"  # follows the error itself: rules, and where submitit's logs lie
            lines = [line.strip() for line in str(error).splitlines() if line.strip()]
            lines = [line for line in lines if not line.startswith(advice)]
            return f"job {job.job_id} {job.state.lower()}: {lines[-1] if lines else type(error).__name__}"

    def running(self, cell):
        """Whether Slurm has started the run, as far as it says."""
        return self._jobs[cell.name].state == "RUNNING"

    def stop(self, cells, kill=False):
        """Cancel the jobs; Slurm sends SIGTERM, upon which a run saves and ends."""
        for cell in cells:
            self._jobs[cell.name].cancel(check=False)
