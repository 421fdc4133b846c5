"""One training run from command line to result: what the three scripts share around their loop."""

import signal
import sys
import threading
import time
import warnings
from contextlib import ExitStack, contextmanager

import torch

from tools.console import MainProcessFailed, one_line_warnings, user_errors
from data import UnreadableImage
from tools.training import distributed
from tools.training.numerics import choose_device, choose_precision, model_of, plan_for, set_up_arithmetic
from tools.training.plugins import plugin_fingerprint
from tools.training.run_folder import Run, check_writable, checkpoint_path, summarise
from tools.training.trainer import Interrupted, NonFiniteError, Trainer

_HISTORY_LABELS = 10  # pretrained labels of each downstream label that a checkpoint remembers of every epoch


class Session:
    """Set up a run, go on where it was cut off, keep every finished epoch, and close it with a result.

    Parameters
    ----------
    cfg : cfg.Config
        Settings of a script.
    build : callable
        ``build(cfg, device) -> tools.training.build.System``.
    optimizer : callable
        ``optimizer([program]) -> torch.optim.Optimizer``.
    schedule : str
        See `tools.training.trainer.learning_rate`.
    command : list of str, optional
        What was typed, for ``config.json``.
    """

    def __init__(self, cfg, build, optimizer, schedule, command=None):
        self.cfg, self._build, self._optimizer, self._schedule = cfg, build, optimizer, schedule
        self._command = sys.argv[1:] if command is None else command
        self.extra_results = {}

    def __enter__(self):
        self._stack = ExitStack()
        try:
            self._set_up()
        except BaseException:
            self._stack.close()
            raise
        return self

    def _set_up(self):
        cfg, start = self.cfg, time.perf_counter()
        with user_errors():
            device = choose_device(cfg.device)
            precision = choose_precision(cfg.precision, device)
            self._stack.enter_context(distributed.process_group(device))
            self.main = distributed.rank() == 0
            # the next run of this process begins as this one did
            self._stack.callback(torch.set_num_threads, torch.get_num_threads())
            self._stack.callback(torch.use_deterministic_algorithms, torch.are_deterministic_algorithms_enabled())
            set_up_arithmetic(device, precision, cfg.deterministic, cfg.threads)
            check_writable(cfg.folder)
            self.run = Run(cfg, self._command, model_of(device), precision)
            self._stack.enter_context(one_line_warnings(self._warn))
            self.system = system = self._build(cfg, device)
            system.content |= plugin_fingerprint(cfg.plugin)
            self.task, self.mapping = system.task, system.mapping
            self.result = self._finished_result(system)
        if self.result is not None:
            self.trainer, self.first_epoch = None, max(1, cfg.epochs)
            return
        images = len(system.task.train.labels) * cfg.epochs
        plan = plan_for(device, cfg.engine, images, distributed.world_size())
        loaders = system.loaders(cfg.batch_size, cfg.seed, plan.passed_at_once)
        self.log(
            f"task: {cfg.dataset}, {len(system.task.train.labels)} training and "
            f"{len(system.task.test.labels)} test images, {system.task.num_target} classes; "
            f"{loaders['train'].description}"
        )
        self.log(
            f"network: {cfg.backbone}, {system.classifier.num_source} pretrained labels, on {model_of(device)}, "
            f"threads {torch.get_num_threads()}, {precision}{plan.note and f', {plan.note}'}; "
            f"{system.network.description}"
        )
        should_stop = self._stack.enter_context(_stop_signals())
        self.trainer = Trainer(
            system.network,
            system.input_vr.program,
            system.mapping,
            loaders,
            self._optimizer([system.input_vr.program]),
            self._schedule,
            cfg.epochs,
            precision,
            cfg.on_nonfinite,
            should_stop,
            system.readout,
            plan,
            self.log,
        )
        self._previous_weights, self._history, self.first_epoch = None, [], 0
        self._stack.callback(self.run.close)
        with user_errors():
            rounding = self.run.other_rounding()  # before the new start is noted
            checkpoint = distributed.by_main_process(lambda: self.run.open(system.content))
            if checkpoint is not None:
                self.trainer.load_state_dict(checkpoint)
            self._tensorboard = _open_tensorboard(cfg.folder) if cfg.tensorboard and self.main else None
        if checkpoint is not None:
            self._go_on_from(checkpoint, rounding)
        self.log(f"run folder: {cfg.folder}; ready after {time.perf_counter() - start:.1f} s")

    def _finished_result(self, system):
        """The result of a run that is finished already; None where something is left to do."""
        result = distributed.by_main_process(lambda: self.run.result)
        if result is None:
            return None
        distributed.by_main_process(lambda: self.run.refuse_other_content(system.content))
        rounding = "; ".join(self.run.other_rounding())
        note = f" ({rounding})" if rounding else ""
        self.log(
            f"{self.cfg.folder} is finished{note}: {result['final_accuracy']:.2%} final accuracy; "
            "--overwrite starts from scratch"
        )
        return result

    def _go_on_from(self, checkpoint, rounding):
        self.run.metrics = checkpoint["metrics"]
        self.first_epoch = len(checkpoint["metrics"])
        self._history = checkpoint.get("history", [])
        self._previous_weights = self._weights()
        if "zero_shot" in checkpoint:
            self.extra_results["zero_shot"] = checkpoint["zero_shot"]
        self.log(f"going on after epoch {self.first_epoch} of {self.cfg.folder}")
        for difference in rounding:
            warnings.warn(f"{difference}: from here on the run rounds otherwise than before", stacklevel=2)

    def log(self, text):
        """Print a line and keep it in ``log.txt``, once whatever the number of processes."""
        if distributed.rank() == 0:
            with _failing_with_code_1():
                print(text, flush=True)
                self.run.log(text)

    def _warn(self, text):
        print(text, file=sys.stderr)
        self.run.log(text)

    def measure_zero_shot(self):
        """Measure what a CLIP does without reprogramming; it goes into the log and ``result.json``."""
        if self.result is not None:
            return
        if "zero_shot" not in self.extra_results:
            accuracy = distributed.by_main_process(
                lambda: self.system.zero_shot_accuracy(self.cfg.batch_size, self.trainer.check_stop_here)
            )
            self.extra_results["zero_shot"] = accuracy
        accuracy = self.extra_results["zero_shot"]
        self.log(
            f"without reprogramming: {accuracy['single']:.2%} with a single template, "
            f"{accuracy['ensemble']:.2%} with the ensemble of all"
        )

    def epochs(self):
        """The numbers of the epochs that are still to be done; a run without training has one, to estimate and test."""
        yield from range(self.first_epoch, max(1, self.cfg.epochs))

    def end_epoch(self, epoch, estimating_seconds, trained, tested):
        """Keep an epoch: its metrics, and all that is needed to go on after it.

        Parameters
        ----------
        epoch : int
        estimating_seconds : float
            What `Trainer.estimate` or `Trainer.refresh` returned; 0 where the mapping stayed.
        trained : Trained
        tested : Tested
        """
        weights = self._weights()
        change = None if self._previous_weights is None else _distance(weights, self._previous_weights)
        self._previous_weights = weights
        seconds = {"estimate": estimating_seconds, "train": trained.seconds, "test": tested.seconds}
        metrics = {
            "epoch": epoch,
            "train_loss": trained.loss,
            "train_accuracy": trained.accuracy,
            "test_accuracy": tested.accuracy,
            "mapping_change": change,
            "lr": trained.lr,
            "seconds": {step: round(value, 3) for step, value in seconds.items()},
        }
        if tested.validation_accuracy is not None:
            metrics["validation_accuracy"] = tested.validation_accuracy
        if self.main:
            self._history.append({"epoch": epoch, **_heaviest(weights)})
            with _failing_with_code_1():
                self.run.save_epoch(
                    metrics,
                    {
                        **self.trainer.state_dict(),
                        **self.extra_results,
                        "history": self._history,
                        "class_names": self.task.class_names,
                        "source_names": self.system.source_names,
                    },
                )
        else:
            self.run.metrics.append(metrics)
        if self._tensorboard is not None:
            for name in ("train_loss", "train_accuracy", "test_accuracy", "mapping_change", "lr"):
                if metrics[name] is not None:
                    self._tensorboard.add_scalar(name, metrics[name], epoch)
            self._tensorboard.flush()
        shown = "" if change is None else f", mapping change {change:.3g}"
        if tested.validation_accuracy is not None:
            shown = f", validation {tested.validation_accuracy:.2%}{shown}"
        if trained.loss is None:
            head = "without training: "
        else:
            head = f"epoch {epoch + 1}/{self.cfg.epochs}: loss {trained.loss:.4f}, train {trained.accuracy:.2%}, "
        self.log(f"{head}test {tested.accuracy:.2%}{shown}{self.mapping.note}, {sum(seconds.values()):.1f} s")

    def _weights(self):
        """ω to compare with the next one."""
        index = self.mapping.source_index
        return (self.mapping.weights if index is None else index).clone()

    def finish(self):
        """Write ``result.json`` and say what came out; a dict of what it holds."""
        if self.result is not None:
            return self.result
        result = summarise(self.cfg.settings, self.run.metrics) | self.extra_results
        if self.trainer.skipped_steps:
            result["skipped_steps"] = self.trainer.skipped_steps
            self.log(f"{self.trainer.skipped_steps} steps were skipped: their loss or gradient was not finite")
        alike = [[self.task.class_names[t] for t in labels] for labels in self.mapping.indistinct_labels()]
        if alike:
            named = "; ".join(" = ".join(names[:4]) for names in alike[:5])
            warnings.warn(
                f"the mapping cannot tell some labels apart, and takes the first of them: {named}", stacklevel=2
            )
        if self.main:
            with _failing_with_code_1():
                self.run.finish(result)
        text = f"final accuracy {result['final_accuracy']:.2%}"
        if result["epochs"]:
            best = f"{result['best_accuracy']:.2%} after epoch {result['best_epoch'] + 1}"
            text += f"; {best}, the best on validation" if "best_on" in result else f"; best on test {best}"
        self.log(text)
        return result

    def __exit__(self, kind, error, traceback):
        try:
            if isinstance(error, Interrupted):
                self.log(
                    f"{error}: stopped after a batch; {len(self.run.metrics)} finished epochs are kept, "
                    "the same command goes on from there"
                )
                sys.exit(128 + error.signum)
            if isinstance(error, MainProcessFailed):  # which says why itself, as where it was stopped alone at work
                signum = self.trainer.should_stop()
                sys.exit(128 + signum if signum else 2)
            if isinstance(error, NonFiniteError):
                count = len(self.run.metrics)
                kept = f"{checkpoint_path(self.run.folder)} ({count} epochs)" if count else "none yet"
                if self.main:
                    self._warn(
                        f"error: {error}; last good checkpoint: {kept}; try a smaller --lr, --precision fp32, "
                        "or --on-nonfinite skip"
                    )
                sys.exit(3)
            if isinstance(error, UnreadableImage):
                with user_errors():
                    raise error
            if isinstance(error, torch.OutOfMemoryError):
                self._warn(
                    f"error: not even one image at a time fits into the memory of {self.trainer.device}; take a "
                    "smaller --backbone or --canvas-size "
                    f"({' '.join(str(error).split()):.200})"
                )
                sys.exit(1)
        finally:
            self._stack.close()


def _distance(weights, previous):
    """‖ω − ω'‖₂ over all entries; for one-to-one mappings from the two index vectors alone."""
    if weights.dim() == 1:
        return (2 * float((weights != previous).sum())) ** 0.5
    rows = zip(weights.split(1024), previous.split(1024), strict=True)  # no third matrix of a large ω's size
    return float(torch.stack([(new - old).double().square().sum() for new, old in rows]).sum().sqrt())


def _heaviest(weights):
    """The pretrained labels of most weight, of either sign, in each column of ω, (T, at most 10), and those weights."""
    if weights.dim() == 1:
        return {"labels": weights[:, None].cpu().int(), "weights": torch.ones(len(weights), 1)}
    labels = weights.abs().topk(min(_HISTORY_LABELS, len(weights)), dim=0).indices
    return {"labels": labels.T.int().cpu(), "weights": weights.gather(0, labels).T.cpu()}


@contextmanager
def _failing_with_code_1():
    try:
        yield
    except BrokenPipeError:  # of `| head`, which is no failure
        raise
    except OSError as error:  # a full disk, most often: nothing to fix in the command line
        print(f"error: {error}", file=sys.stderr)
        sys.exit(1)


@contextmanager
def _stop_signals():
    """A function that tells which of SIGINT and SIGTERM arrived, 0 before any; a second one ends the process at once.

    Outside the main thread, where Python allows no handlers, none ever arrives.
    """
    arrived = []

    def note(signum, frame):
        arrived.append(signum)
        signal.signal(signum, signal.SIG_DFL)

    signums = (signal.SIGINT, signal.SIGTERM) if threading.current_thread() is threading.main_thread() else ()
    earlier = {signum: signal.signal(signum, note) for signum in signums}
    try:
        yield lambda: arrived[-1] if arrived else 0
    finally:
        for signum, handler in earlier.items():
            signal.signal(signum, handler)


def _open_tensorboard(folder):
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ModuleNotFoundError as error:
        raise ValueError("--tensorboard needs a package: pip install tensorboard") from error
    return SummaryWriter(str(folder))
