"""One training run from command line to result: what the three scripts share around their loop."""

import signal
import sys
import time
from contextlib import ExitStack, contextmanager

import torch

from data import UnreadableImage
from tools.console import one_line_warnings, process_age, user_errors
from tools.training import distributed
from tools.training.run_folder import Run, check_writable, run_folder, summarise
from tools.training.trainer import Interrupted, NonFiniteError, Trainer, set_up_arithmetic

_AGE_ONCE_IMPORTED = process_age()  # here, as a process may train more than once
_HISTORY_LABELS = 10  # pretrained labels of each downstream label that a checkpoint remembers of every epoch


class Session:
    """Set up a run, go on where it was cut off, keep every finished epoch, and close it with a result.

    Parameters
    ----------
    cfg : Config
        Settings of a script.
    assemble : callable
        ``assemble(cfg, device) -> tools.training.build.System``.
    optimizer : callable
        ``optimizer([program]) -> torch.optim.Optimizer``.
    schedule : str
        See `tools.training.trainer.learning_rate`.
    """

    def __init__(self, cfg, assemble, optimizer, schedule):
        self.cfg, self._assemble, self._optimizer, self._schedule = cfg, assemble, optimizer, schedule
        self.extra_results = {}

    def __enter__(self):
        self._stack = ExitStack()
        self._stack.enter_context(one_line_warnings())
        try:
            self._set_up()
        except BaseException:
            self._stack.close()
            raise
        return self

    def _set_up(self):
        cfg, start = self.cfg, time.perf_counter()
        device = distributed.local_device(cfg.torch_device)
        with user_errors():
            self._stack.enter_context(distributed.process_group(device))
        self.main = distributed.rank() == 0
        set_up_arithmetic(device, cfg.precision, cfg.deterministic)
        with user_errors():
            folder = run_folder(cfg.results_path, cfg.kind, cfg.settings)
            check_writable(folder)
            self.run = Run(folder, cfg.kind, cfg.settings, cfg.overwrite)
            result = distributed.by_main_process(lambda: self.run.result)
            if result is not None:
                self.log(f"{folder} is finished: {result['final_accuracy']:.2%} final accuracy; "
                         "--overwrite starts anew")
                sys.exit(0)
            system = self._assemble(cfg, device)
            loaders = system.loaders(cfg.batch_size, cfg.seed)
            self.log(f"task: {cfg.dataset}, {len(system.task.train.labels)} training and "
                     f"{len(system.task.test.labels)} test images, {system.task.num_target} classes; "
                     f"{loaders['train'].description}")
            self.log(f"network: {cfg.backbone}, {system.classifier.num_source} pretrained labels, on {device}, "
                     f"{cfg.precision}; {system.network.description}")
        self.system, self.task, self.mapping = system, system.task, system.mapping
        self.iterative = cfg.iteration and system.mapping.iterative
        self.trainer = Trainer(
            system.network, system.input_vr.program, system.mapping, loaders,
            self._optimizer([system.input_vr.program]), self._schedule, cfg.epochs, cfg.precision, cfg.on_nonfinite,
        )
        self._previous_weights, self._history = None, []
        self._stack.callback(self.run.close)
        self.first_epoch = 0
        with user_errors():
            checkpoint = distributed.by_main_process(self.run.open)
            if checkpoint is not None:
                self.trainer.load_state_dict(checkpoint)
            self._tensorboard = _open_tensorboard(folder) if cfg.tensorboard and self.main else None
        if checkpoint is not None:
            self.run.metrics = checkpoint["metrics"]
            self.first_epoch = len(checkpoint["metrics"])
            self._history = checkpoint.get("history", [])
            self._previous_weights = self._weights()
            self.log(f"going on after epoch {self.first_epoch - 1} of {folder}")
        waited = ({} if _AGE_ONCE_IMPORTED is None else {"imports": _AGE_ONCE_IMPORTED}) | system.waited
        ready = waited.get("imports", 0) + time.perf_counter() - start
        self.log(f"run folder: {folder}; ready after {ready:.1f} s ("
                 + ", ".join(f"{what} {seconds:.1f}" for what, seconds in waited.items()) + ")")
        self._stack.enter_context(_signals_to(self.trainer))

    def log(self, text):
        """Print a line, once whatever the number of processes."""
        if distributed.rank() == 0:
            print(text, flush=True)

    def measure_zero_shot(self):
        """Measure what a CLIP does without reprogramming; it goes into the log and ``result.json``."""
        accuracy = self.system.zero_shot_accuracy(self.cfg.batch_size)
        self.extra_results["zero_shot"] = accuracy
        self.log(f"without reprogramming: {accuracy['single']:.2%} with a single template, "
                 f"{accuracy['ensemble']:.2%} with the ensemble of all")

    def epochs(self):
        """The numbers of the epochs that are still to be done."""
        yield from range(self.first_epoch, self.cfg.epochs)

    def end_epoch(self, epoch, trained, test_accuracy):
        """Keep an epoch: its metrics, and all that is needed to go on after it.

        Parameters
        ----------
        epoch : int
        trained : dict
            What `Trainer.train` returned.
        test_accuracy : float
        """
        weights = self._weights()
        change = None if self._previous_weights is None else _distance(weights, self._previous_weights)
        self._previous_weights = weights
        seconds = {step: round(self.trainer.seconds.pop(step, 0.0), 3) for step in ("estimate", "train", "test")}
        metrics = {
            "epoch": epoch, "train_loss": trained["train_loss"], "train_accuracy": trained["train_accuracy"],
            "test_accuracy": test_accuracy, "mapping_change": change, "lr": trained["lr"], "seconds": seconds,
        }
        if self.main:
            self._history.append({"epoch": epoch, **_heaviest(weights)})
            with _failing_with_code_1():
                self.run.save_epoch(metrics, {
                    **self.trainer.state_dict(), **self.extra_results, "history": self._history,
                    "class_names": self.task.class_names, "source_names": self.system.classifier.source_names,
                })
        else:
            self.run.metrics.append(metrics)
        if self._tensorboard is not None:
            for name in ("train_loss", "train_accuracy", "test_accuracy", "mapping_change", "lr"):
                if metrics[name] is not None:
                    self._tensorboard.add_scalar(name, metrics[name], epoch)
            self._tensorboard.flush()
        shown = "" if change is None else f", mapping change {change:.3g}"
        self.log(f"epoch {epoch + 1}/{self.cfg.epochs}: loss {metrics['train_loss']:.4f}, "
                 f"train {metrics['train_accuracy']:.2%}, test {test_accuracy:.2%}{shown}, "
                 f"{sum(seconds.values()):.1f} s")

    def _weights(self):
        """ω to compare with the next one; estimated mappings make a new tensor each time, a learned one does not."""
        if self.mapping.source_index is not None:
            return self.mapping.source_index
        return self.mapping.weights.clone() if self.mapping.trainable else self.mapping.weights

    def finish(self):
        """Write ``result.json`` and say what came out."""
        result = summarise(self.cfg.settings, self.run.metrics) | self.extra_results
        if self.trainer.skipped_steps:
            result["skipped_steps"] = self.trainer.skipped_steps
            self.log(f"{self.trainer.skipped_steps} steps were skipped: their loss or gradient was not finite")
        if self.main:
            with _failing_with_code_1():
                self.run.finish(result)
        self.log(f"final accuracy {result['final_accuracy']:.2%}; best on test {result['best_accuracy']:.2%} "
                 f"after epoch {result['best_epoch'] + 1}")

    def __exit__(self, kind, error, traceback):
        try:
            if isinstance(error, Interrupted):
                self.log(f"{error}: stopped after a batch; {len(self.run.metrics)} finished epochs are kept, "
                         "the same command goes on from there")
                sys.exit(128 + error.signum)
            if isinstance(error, NonFiniteError):
                count = len(self.run.metrics)
                kept = f"{self.run.folder / 'last.pt'} ({count} epochs)" if count else "none yet"
                if self.main:
                    print(f"error: {error}; last good checkpoint: {kept}; try a smaller --lr, --precision fp32, or "
                          "--on-nonfinite skip", file=sys.stderr)
                sys.exit(3)
            if isinstance(error, UnreadableImage):
                with user_errors():
                    raise error
            if isinstance(error, torch.OutOfMemoryError):
                print(f"error: not even one image at a time fits into the memory of {self.trainer.device}; take a "
                      f"smaller --backbone or --canvas-size, or --precision bf16 ({' '.join(str(error).split()):.200})",
                      file=sys.stderr)
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
    """The pretrained labels of most weight in each column of ω, (T, at most 10), and those weights; descending."""
    if weights.dim() == 1:
        return {"labels": weights[:, None].cpu().int(), "weights": torch.ones(len(weights), 1)}
    top = weights.topk(min(_HISTORY_LABELS, len(weights)), dim=0)
    return {"labels": top.indices.T.int().cpu().contiguous(), "weights": top.values.T.cpu().contiguous()}


@contextmanager
def _failing_with_code_1():
    try:
        yield
    except OSError as error:  # a full disk, most often: nothing to mend in the command line
        print(f"error: {error}", file=sys.stderr)
        sys.exit(1)


@contextmanager
def _signals_to(trainer):
    """Have SIGINT and SIGTERM end the run after the batch at hand; a second one ends it at once."""
    def request_stop(signum, frame):
        trainer.stop_signal = signum
        signal.signal(signum, signal.SIG_DFL)

    earlier = {signum: signal.signal(signum, request_stop) for signum in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for signum, handler in earlier.items():
            signal.signal(signum, handler)


def _open_tensorboard(folder):
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ModuleNotFoundError as error:
        raise ValueError("--tensorboard needs a package: pip install tensorboard") from error
    return SummaryWriter(str(folder))
