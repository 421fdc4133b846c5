"""python -m tools.sweep tools/sweep/grids/main_padding.yaml --seed 0 --dry-run

Run a grid of settings: every combination is one run of a training script, in a process and with a log of its own
(<results-path>/logs/...). The grid comes from a YAML file (those of the paper lie in tools/sweep/grids), from flags
with comma-separated values, or from both: then the flags win.

    python -m tools.sweep --script train_vm.py --dataset flowers102,dtd --mapping ilm,blm,blmpp --seed 0,1,2

Finished runs are skipped, failed ones are tried again, runs that were cut off go on, and those that another process is
at work on are waited for: the same command again is always right, and so are two at once. Ctrl-C lets every run save
and end.

Runs take turns on the GPUs of this machine (CUDA_VISIBLE_DEVICES is respected), one per GPU, or share its cores; or go
to Slurm, as a job array through submitit (pip install submitit):

    python -m tools.sweep GRID.yaml --jobs 8 --slurm slurm_partition=gpu timeout_min=600

Exit code: 0 where all runs are finished, 1 where some failed, 2 for a grid that can't be, 130 after Ctrl-C.
"""

import shlex
import sys
from pathlib import Path

from tools.console import Parser, user_errors
from tools.sweep.cells import SCRIPTS, expand, known_settings, normalise, override, read_grid
from tools.sweep.display import Display, outcome, status
from tools.sweep.jobs import Job, sweep
from tools.sweep.runner import LocalRunner, find_gpus
from tools.sweep.slurm import SlurmRunner
from tools.training.plugins import load_plugin_of
from tools.training.run_folder import check_writable


def _build_parser():
    usage = "%(prog)s [GRID.yaml] [options] [settings]"
    parser = Parser(prog="python -m tools.sweep", usage=usage, description=__doc__)
    add = parser.add_argument
    text = "grid file; its keys are the settings below, its values one or a list; 'variants' is a list of smaller "
    add("grid", nargs="?", metavar="GRID.yaml", help=text + "grids to join with the rest")
    add("--dry-run", action="store_true", help="print the runs and their commands; run nothing")
    add("--jobs", type=int, metavar="N", help="runs at a time (default: one per GPU, or 1; with --slurm 16)")
    text = "run on Slurm; parameters of submitit's AutoExecutor, such as slurm_partition, timeout_min (default 1440), "
    add("--slurm", nargs="*", metavar="KEY=VALUE", help=text + "cpus_per_task (4), gpus_per_node (1), mem_gb")
    settings = parser.add_argument_group("settings, with a value or several separated by commas")
    settings.add_argument("--script", metavar="SCRIPT", help=f"{', '.join(SCRIPTS)} (default: train_vm.py)")
    for setting in known_settings().values():
        flag, default = f"--{setting.name.replace('_', '-')}", setting.default
        if default is True:
            settings.add_argument(flag, metavar="true,false", help=f"with false: {setting.help}")
        elif default is False:
            settings.add_argument(flag, nargs="?", const="true", metavar="true|false", help=setting.help)
        else:
            settings.add_argument(flag, metavar="VALUES" if setting.affects == "result" else "VALUE", help=setting.help)
    return parser


def _typed_grid(arguments):
    """The settings on the command line, as a grid."""
    grid, known = {}, known_settings()
    for name in ("script", *known):
        text = getattr(arguments, name)
        if text is None:
            continue
        # what does not tell runs apart has one value, whose commas are its own
        values = text.split(",") if name == "script" or known[name].affects == "result" else [text]
        if name in known and isinstance(known[name].default, bool):
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


@user_errors()
def main(argv=None):
    load_plugin_of(argv)
    arguments = _build_parser().parse_args(argv)
    if arguments.jobs is not None and arguments.jobs < 1:
        raise ValueError(f"--jobs must be 1 or more, got {arguments.jobs}")
    typed = _typed_grid(arguments)
    if arguments.grid is None and not typed:
        raise ValueError("nothing to run: give GRID.yaml, or settings such as --mapping blm,blmpp; see --help")
    grid = override(read_grid(arguments.grid) if arguments.grid else {}, typed)
    cells = expand(grid, elsewhere=arguments.slurm is not None)
    results_path = Path(cells[0].cfg.results_path)
    check_writable(results_path)
    if arguments.dry_run:
        jobs = [Job(cell) for cell in cells]
        for job in jobs:
            print(f"{job.state:15} {shlex.join(['python', *job.cell.command[1:]])} {job.error}".rstrip())
        print(status(jobs, arguments.jobs or 1))
        return 0
    if arguments.slurm is not None:
        runner = SlurmRunner(_slurm_parameters(arguments.slurm), results_path / "logs" / "slurm", arguments.jobs or 16)
    else:
        gpus = find_gpus(cells)
        runner = LocalRunner(arguments.jobs or len(gpus) or 1, gpus)
    with Display(runner.parallel) as display:
        jobs, signum = sweep(cells, runner, display)
    print(status(jobs, runner.parallel))
    failed = [job for job in jobs if job.state == "failed"]
    for job in failed:
        print(outcome(job))
    if signum:
        print("stopped; the same command goes on from here")
        return 128 + signum
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
