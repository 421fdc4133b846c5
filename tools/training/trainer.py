"""The three steps of an epoch: estimate the mapping, train the pattern, evaluate on the test set."""

import math
import signal
import sys
import time
from typing import NamedTuple

import torch
from torch.nn import functional
from tqdm import tqdm

from tools.training import distributed
from tools.training.numerics import chunk_size_of, network_outputs
from tools.training.readout import Readout


class NonFiniteError(ArithmeticError):
    """A loss, gradient or mapping became infinite or NaN; the message says where."""


class Interrupted(Exception):
    """SIGINT or SIGTERM arrived; ``signum`` says which."""

    def __init__(self, signum):
        super().__init__(f"{signal.Signals(signum).name} received")
        self.signum = signum


def learning_rate(schedule, lr, position, epochs):
    """The learning rate at a point of training.

    Parameters
    ----------
    schedule : str
        ``steps``: ×0.1 from epoch ⌊0.5·epochs⌋ on and again from ⌊0.72·epochs⌋ on, but not in the very first epoch;
        ``cosine``: from ``lr`` to 0, at every step.
    lr : float
        At the start.
    position : float
        Epochs that lie behind, a fraction of the present one included; in [0, epochs).
    epochs : int
        Of the whole run.
    """
    if schedule == "steps":
        milestones = (max(1, math.floor(round(share * epochs, 9))) for share in (0.5, 0.72))
        return lr / 10 ** sum(position >= milestone for milestone in milestones)
    return lr * (1 + math.cos(math.pi * position / epochs)) / 2


class Trained(NamedTuple):
    """What an epoch of training came to; None, but for the seconds, where nothing was trained."""

    loss: float | None  # mean over samples
    accuracy: float | None  # fraction of 1
    lr: float | None  # at the epoch's first step
    seconds: float


class Tested(NamedTuple):
    """What a pass over the test set, and over the images held out for validation, came to."""

    accuracy: float  # fraction of 1
    validation_accuracy: float | None  # likewise
    seconds: float


class Trainer:
    """Trains one pattern (and one mapping) on one task.

    Everything random is a function of (seed, epoch, position), so that the state to keep is the parameters', the
    optimisers' and the mapping's.

    Parameters
    ----------
    network : nn.Module
        Images in [0, 1], (n, 3, h, w), to what ``readout`` reads, differentiable with respect to ``program``.
    program : nn.Parameter
        The pattern θ.
    mapping : mapping.LabelMapping
    loaders : dict
        ``estimate``, ``train``, ``test``: `data.BatchLoader`.
    optimizer : torch.optim.Optimizer
        Of ``program``.
    schedule : str
        See `learning_rate`; a `linear` mapping's optimiser (Adam, lr 0.1) follows the same one.
    epochs : int
    precision : str
        ``fp32``, ``tf32``, ``bf16`` or ``fp16``, of the network while it trains. Estimating and testing are float32,
        as in published code, and so are mapping and loss at all times; ``tf32`` rounds the factors of every matrix
        product of the process.
    on_nonfinite : str
        ``stop`` or ``skip``.
    should_stop : callable
        Asked after every batch: 0, or the number of the signal that asks to stop.
    readout : tools.training.readout.Readout, optional
        Default: the network's outputs are the pretrained logits.
    """

    def __init__(
        self,
        network,
        program,
        mapping,
        loaders,
        optimizer,
        schedule,
        epochs,
        precision="fp32",
        on_nonfinite="stop",
        should_stop=lambda: 0,
        readout=None,
    ):
        self.network, self.program, self.mapping, self.loaders = network, program, mapping, loaders
        self.schedule, self.epochs, self.on_nonfinite = schedule, epochs, on_nonfinite
        self.should_stop, self.readout = should_stop, readout or Readout(mapping)
        self.device = program.device
        self.optimizers = [optimizer] if program.requires_grad else []
        if mapping.trainable:
            self.optimizers.append(torch.optim.Adam(mapping.parameters(), lr=0.1))
        self.base_lrs = [optimizer.param_groups[0]["lr"] for optimizer in self.optimizers]
        self.parameters = [p for p in (program, *mapping.parameters()) if p.requires_grad]
        self.precision = precision
        self.chunk_size = chunk_size_of(network, self.device)
        self.skipped_steps = 0

    # ---- the three steps ----

    def estimate(self, epoch):
        """Estimate ω from one pass over the training set with the present θ; the seconds that it took."""
        start = time.perf_counter()
        with torch.inference_mode(), self.network.accumulate():
            for batch in self._batches("estimate", epoch):
                outputs = self._within_memory(len(batch.images), lambda: self._outputs(batch.images))  # noqa: B023
                self.mapping.observe(self.readout.pretrained(outputs), batch.labels)
            self.mapping.all_reduce_statistics()
        self.refresh(epoch)
        return self._seconds_since(start)

    def refresh(self, epoch):
        """Turn what was observed into ω; the seconds that it took."""
        start = time.perf_counter()
        try:
            self.mapping.refresh()
        except FloatingPointError as error:
            if self.on_nonfinite == "stop" or not self.mapping.ready:
                rate = f", learning rate {self._set_lr(epoch):g}" if self.epochs else ""
                raise NonFiniteError(f"{_number(epoch)}, estimating the mapping{rate}: {error}") from error
            self.skipped_steps += 1
        return self._seconds_since(start)

    def train(self, epoch, observe=False):
        """Train θ for one epoch on the cross-entropy of the mapped logits.

        Parameters
        ----------
        epoch : int
        observe : bool
            Also hand the pretrained logits to the mapping, for an ω that needs no pass of its own.

        Returns
        -------
        Trained
        """
        if not self.epochs or not self.parameters:
            return Trained(None, None, None, 0.0)
        start = time.perf_counter()
        self.readout.hold()
        loader, lr = self.loaders["train"], None
        totals = torch.zeros(3, dtype=torch.float64, device=self.device)  # loss, correct, seen
        watch = _NonFiniteWatch(self.device, lag=self.on_nonfinite == "stop" and self.device.type == "cuda")
        for step, batch in enumerate(self._batches("train", epoch)):
            first_lr = self._set_lr(epoch + step / len(loader))
            lr = first_lr if lr is None else lr
            for optimizer in self.optimizers:
                optimizer.zero_grad(set_to_none=True)
            loss_sum, outputs, correct = self._forward_backward(batch)
            distributed.sum_over_processes(*(p.grad for p in self.parameters))
            finite = torch.isfinite(loss_sum) & torch.stack([p.grad.isfinite().all() for p in self.parameters]).all()
            where = f"{_number(epoch)}, batch {step + 1}, learning rate {first_lr:g}"
            if self.on_nonfinite == "skip":
                if distributed.any_process(not finite, self.device):
                    self.skipped_steps += 1
                    continue
            else:
                watch.check(finite, where)
            for optimizer in self.optimizers:
                optimizer.step()
            totals += torch.stack([loss_sum.double(), correct.double(), _count(batch, totals)])
            if observe:
                self.mapping.observe(self.readout.pretrained(outputs), batch.labels)
        watch.finish()
        if observe:  # now, so that a checkpoint holds what all processes saw
            self.mapping.all_reduce_statistics()
        distributed.sum_over_processes(totals)
        loss_sum, correct, seen = totals.tolist()
        assert self.skipped_steps or seen == loader.num_samples, "the training pass lost samples"
        if not seen or not all(bool(parameter.isfinite().all()) for parameter in self.parameters):
            what = "the pattern or the mapping is not finite after the last batch" if seen else "no batch was finite"
            raise NonFiniteError(f"{_number(epoch)}, learning rate {lr:g}: {what}")
        return Trained(loss_sum / seen, correct / seen, lr, self._seconds_since(start))

    def evaluate(self, epoch=0):
        """Measure the test set, and what is held out for validation; every sample once.

        Returns
        -------
        Tested
        """
        start = time.perf_counter()
        accuracy = self._accuracy("test", epoch)
        validation = self._accuracy("validation", epoch) if "validation" in self.loaders else None
        return Tested(accuracy, validation, self._seconds_since(start))

    def _accuracy(self, split, epoch):
        totals = torch.zeros(2, dtype=torch.float64, device=self.device)  # correct, seen
        self.readout.hold()
        with torch.inference_mode(), self.network.accumulate():
            for batch in self._batches(split, epoch):
                outputs = self._within_memory(len(batch.images), lambda: self._outputs(batch.images))  # noqa: B023
                predicted = self.readout.downstream(outputs).argmax(1)
                totals += torch.stack([(predicted == batch.labels).sum().double(), _count(batch, totals)])
        distributed.sum_over_processes(totals)
        correct, seen = totals.tolist()
        assert seen == self.loaders[split].num_samples, "the evaluation lost samples"
        return correct / seen

    # ---- what they are made of ----

    def _batches(self, step, epoch):
        loader = self.loaders[step]
        quiet = not sys.stderr.isatty() or distributed.rank() > 0
        progress = tqdm(loader.epoch(epoch), f"{_number(epoch)} {step}", len(loader), leave=False, disable=quiet)
        for batch in progress:
            yield batch
            self.check_stop()

    def check_stop(self):
        """Raise `Interrupted` where a signal has arrived, in any process; all of them must call this."""
        self.check_stop_here(distributed.any_process(self.should_stop(), self.device))

    def check_stop_here(self, signum=None):
        """Raise `Interrupted` where a signal has arrived in this process."""
        signum = self.should_stop() if signum is None else signum
        if signum:
            raise Interrupted(signum)

    def _outputs(self, images, precision="fp32"):
        if not len(images):  # a process whose share of the last batch is empty still takes part in every sum
            return images.new_zeros(0, self.readout.width)
        return network_outputs(self.network, images, precision, self.chunk_size)

    def _forward_backward(self, batch):
        """Accumulate the gradient of the global batch's mean loss, a chunk at a time."""
        return self._within_memory(len(batch.labels), lambda: self._accumulate(batch))

    def _within_memory(self, count, function):
        """The value of ``function()``; where memory does not suffice, in chunks half as large."""
        while True:
            try:
                return function()
            except RuntimeError as error:
                if not _out_of_memory(error):
                    raise
                if self.chunk_size == 1:
                    raise torch.OutOfMemoryError(str(error)) from error
            # out of the except clause, whose traceback holds on to the graph
            self.chunk_size = max(1, min(self.chunk_size, count) // 2)
            print(f"out of memory: going on in chunks of {self.chunk_size} images (same result)", flush=True)
            for parameter in self.parameters:
                parameter.grad = None
            if self.device.type == "cuda":
                torch.cuda.empty_cache()

    def _accumulate(self, batch):
        loss_sum = torch.zeros((), device=self.device)
        correct = torch.zeros((), dtype=torch.int64, device=self.device)
        half = self.precision in ("bf16", "fp16")  # in which the gradient of a mean over the batch would underflow
        kept = []
        chunks = zip(batch.images.split(self.chunk_size), batch.labels.split(self.chunk_size), strict=True)
        with self.network.accumulate():
            for images, labels in chunks:
                if not len(labels):
                    break
                outputs = self._outputs(images, self.precision)
                mapped = self.readout.downstream(outputs)
                loss = functional.cross_entropy(mapped, labels, reduction="sum")
                (loss if half else loss / batch.global_size).backward()
                loss_sum += loss.detach()
                correct += (mapped.detach().argmax(1) == labels).sum()
                kept.append(outputs.detach())
        for parameter in self.parameters:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
            elif half:
                parameter.grad /= batch.global_size
        return loss_sum, torch.cat(kept) if kept else self._outputs(batch.images), correct

    def _set_lr(self, position):
        for optimizer, base in zip(self.optimizers, self.base_lrs, strict=True):
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(self.schedule, base, position, self.epochs)
        return self.optimizers[0].param_groups[0]["lr"] if self.optimizers else 0.0

    def _seconds_since(self, start):
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter() - start

    # ---- state ----

    def state_dict(self):
        """Program, mapping (with its pending statistics) and optimisers, to be saved before the next step."""
        return {
            "program": self.program.detach(),
            "mapping": dict(self.mapping.state_dict()),
            "optimizers": [
                [optimizer.state.get(parameter, {}) for parameter in group["params"]]
                for optimizer in self.optimizers
                for group in optimizer.param_groups
            ],
            "skipped_steps": self.skipped_steps,
        }

    def load_state_dict(self, state):
        """Take up what `state_dict` gave.

        Raises
        ------
        ValueError
            Where it is of another pattern, mapping or optimiser.
        """
        try:
            program = state["program"]
            if program.shape != self.program.shape or not program.is_floating_point():
                raise ValueError(f"a pattern of shape {tuple(program.shape)}, expected {tuple(self.program.shape)}")
            with torch.no_grad():
                self.program.copy_(program)
            self.mapping.load_state_dict(state["mapping"])
            if not self.mapping.ready:
                raise ValueError("no mapping yet")
            for optimizer, saved in zip(self.optimizers, state["optimizers"], strict=True):
                own = optimizer.state_dict()["param_groups"]  # these follow from the settings
                checked = _checked_optimizer_state(optimizer, saved)
                optimizer.load_state_dict({"state": checked, "param_groups": own})
            self.skipped_steps = int(state["skipped_steps"])
        except (ValueError, KeyError, TypeError, AttributeError, IndexError, RuntimeError) as error:
            reason = " ".join(str(error).split())[:200]
            raise ValueError(
                f"the checkpoint does not belong to this run ({reason}); --overwrite starts from scratch"
            ) from error


def _checked_optimizer_state(optimizer, saved):
    """The state of an optimiser's parameters as ``load_state_dict`` wants it, checked to be of this optimiser."""
    names = {"step", "exp_avg", "exp_avg_sq"} if isinstance(optimizer, torch.optim.Adam) else {"momentum_buffer"}
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    for values, parameter in zip(saved, parameters, strict=True):
        shapes = {name: () if name == "step" else parameter.shape for name in names}
        if values and (values.keys() != names or any(values[name].shape != shapes[name] for name in names)):
            raise ValueError("an optimiser's state of another form")
        if not all(value.dtype == torch.float32 for value in values.values()):
            raise ValueError("an optimiser's state of another type")
        if "step" in values and not 0 <= values["step"] < math.inf:
            raise ValueError("an optimiser's count of steps below 0 or not finite")
    return {index: values for index, values in enumerate(saved) if values}


def _out_of_memory(error):
    """Also where cuDNN finds no algorithm whose workspace fits, and where cuBLAS gets none."""
    said = ("unable to find an engine", "CUBLAS_STATUS_ALLOC_FAILED", "CUDNN_STATUS_ALLOC_FAILED")
    return isinstance(error, torch.OutOfMemoryError) or any(text in str(error) for text in said)


class _NonFiniteWatch:
    """Stops at the first step that is not finite; on a GPU one step later, so that no step waits for the device."""

    def __init__(self, device, lag):
        self.lag, self.pending = lag, None
        self.device = device

    def check(self, finite, where):
        if not self.lag:
            self._raise_unless(finite, where)
            return
        self.finish()
        flag = torch.empty((), dtype=torch.bool, pin_memory=True)
        flag.copy_(finite, non_blocking=True)
        event = torch.cuda.Event()
        event.record()
        self.pending = flag, event, where

    def finish(self):
        if self.pending is not None:
            flag, event, where = self.pending
            event.synchronize()
            self.pending = None
            self._raise_unless(flag, where)

    def _raise_unless(self, finite, where):
        if distributed.any_process(not finite, self.device):
            raise NonFiniteError(f"{where}: the loss or its gradient is not finite")


def _count(batch, like):
    return like.new_full((), len(batch.labels))  # filled there: new_tensor would wait for a copy


def _number(epoch):
    """An epoch as people count them, from 1."""
    return f"epoch {epoch + 1}"
