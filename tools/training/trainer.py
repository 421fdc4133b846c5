"""The three steps of an epoch: estimate the mapping, train the pattern, evaluate on the test set."""

import math
import signal
import sys
import time
from contextlib import nullcontext
from typing import NamedTuple

import torch
from tqdm import tqdm

from mapping.statistics import IGNORED
from tools.training import distributed
from tools.training.numerics import plan_for
from tools.training.readout import Readout
from tools.training.step import Step


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
        ``fp32``, ``tf32``, ``bf16`` or ``fp16``, of the network while it trains; see
        `tools.training.numerics.set_up_arithmetic` for what it means to the rest.
    on_nonfinite : str
        ``stop`` or ``skip``.
    should_stop : callable
        Asked after every batch: 0, or the number of the signal that asks to stop.
    readout : tools.training.readout.Readout, optional
        Default: the network's outputs are the pretrained logits.
    plan : tools.training.numerics.Plan, optional
        What the device gets; default: that of the plain network. On a CPU every step is called as it is and looked at
        before its gradient is used. On a GPU nothing in an epoch waits for the device, and the step may be compiled.
    log : callable
        Takes a line of text on what the user should know.
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
        plan=None,
        log=print,
    ):
        self.network, self.program, self.mapping, self.loaders = network, program, mapping, loaders
        self.schedule, self.epochs, self.on_nonfinite = schedule, epochs, on_nonfinite
        self.should_stop, self.readout, self.log = should_stop, readout or Readout(mapping), log
        self.device = program.device
        self.plan = plan or plan_for(self.device)
        self.optimizers = [optimizer] if program.requires_grad else []
        if mapping.trainable:
            self.optimizers.append(torch.optim.Adam(mapping.parameters(), lr=0.1))
        self.base_lrs = [optimizer.param_groups[0]["lr"] for optimizer in self.optimizers]
        for optimizer in self.optimizers:
            _keep_in_place(optimizer, fused=not self.plan.waits)
        self.parameters = [p for p in (program, *mapping.parameters()) if p.requires_grad]
        self.step = Step(network, self.readout, self.parameters, precision, self.device, self.plan.compiled, log)
        self.skipped_steps = 0

    # ---- the three steps ----

    def estimate(self, epoch):
        """Estimate ω from one pass over the training set with the present θ; the seconds that it took."""
        start = time.perf_counter()
        self._pass(
            "estimate", epoch, lambda outputs, labels: self.mapping.observe(self.readout.pretrained(outputs), labels)
        )
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
        loader, lrs = self.loaders["train"], []
        totals = torch.zeros(3, dtype=torch.float64, device=self.device)  # loss, correct, seen
        bad_steps = torch.zeros(len(loader), dtype=torch.bool, device=self.device)
        for number, batch in enumerate(self._batches("train", epoch)):
            lrs.append(self._set_lr(epoch + number / len(loader)))
            outputs, loss_sum, correct, *gradients = self._within_memory(loader, *batch)
            distributed.sum_over_processes(*gradients)
            finite = torch.stack([part.isfinite().all() for part in (loss_sum, *gradients)]).all()
            bad = (~finite).float()
            distributed.sum_over_processes(bad)
            bad = bad > 0
            bad_steps[number] = bad
            if self.plan.waits and bad:
                if self.on_nonfinite == "stop":
                    break
                continue
            for parameter, gradient in zip(self.parameters, gradients, strict=True):
                parameter.grad = gradient
            for optimizer in self.optimizers:
                if not self.plan.waits:
                    optimizer.found_inf = bad.float()  # where it is 1, the fused kernels change nothing
                optimizer.step()
                optimizer.zero_grad()  # lets go of the gradients
            sums = torch.stack([loss_sum.double(), correct.double(), _count(batch.labels, totals)])
            totals += sums.masked_fill(bad, 0)
            if observe:
                self.mapping.observe(self.readout.pretrained(outputs), batch.labels.masked_fill(bad, IGNORED))
        bad_steps = [number for number, bad in enumerate(bad_steps.tolist()) if bad]
        if bad_steps and self.on_nonfinite == "stop":
            where = f"{_number(epoch)}, batch {bad_steps[0] + 1}, learning rate {lrs[bad_steps[0]]:g}"
            raise NonFiniteError(f"{where}: the loss or its gradient is not finite")
        self.skipped_steps += len(bad_steps)
        if observe:  # now, so that a checkpoint holds what all processes saw
            self.mapping.all_reduce_statistics()
        distributed.sum_over_processes(totals)
        loss_sum, correct, seen = totals.tolist()
        assert self.skipped_steps or seen == loader.num_samples, "the training pass lost samples"
        if not seen or not all(bool(parameter.isfinite().all()) for parameter in self.parameters):
            what = "the pattern or the mapping is not finite after the last batch" if seen else "no batch was finite"
            raise NonFiniteError(f"{_number(epoch)}, learning rate {lrs[0]:g}: {what}")
        return Trained(loss_sum / seen, correct / seen, lrs[0], self._seconds_since(start))

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

        def count(outputs, labels):
            nonlocal totals
            predicted = self.readout.downstream(outputs).argmax(1)
            totals += torch.stack([(predicted == labels).sum().double(), _count(labels, totals)])

        self._pass(split, epoch, count)
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
        self.check_stop_here(distributed.any_process(self.should_stop()))

    def check_stop_here(self, signum=None):
        """Raise `Interrupted` where a signal has arrived in this process."""
        signum = self.should_stop() if signum is None else signum
        if signum:
            raise Interrupted(signum)

    def _pass(self, split, epoch, use):
        """Call ``use(outputs, labels)`` for every batch, without gradients."""
        # a compiled pass takes no inference tensors, and computes what a batch shares itself
        whole = "passes" in self.step.compiled
        with (
            torch.no_grad() if whole else torch.inference_mode(),
            nullcontext() if whole else self.network.accumulate(),
        ):
            for batch in self._batches(split, epoch):
                (outputs,) = self._within_memory(self.loaders[split], batch.images)
                use(outputs, batch.labels)

    def _within_memory(self, loader, images, *rest):
        """What the step makes of a batch; where memory does not suffice, in chunks half as large."""
        step = self.step
        if rest:
            labels, size = rest
            rest = labels, torch.full((), float(size), device=self.device)  # filled there, not copied to it
        while True:
            try:
                return step.run(loader.batch_size, images, *rest)
            except RuntimeError as error:
                if not _out_of_memory(error):
                    raise
                if step.chunk_size == 1:
                    raise torch.OutOfMemoryError(str(error)) from error
            # out of the except clause, whose traceback holds on to the graph
            step.chunk_size = max(1, min(step.chunk_size, len(images)) // 2)
            self.log(f"out of memory: going on in chunks of {step.chunk_size} images (same result)")
            if self.device.type == "cuda":
                torch.cuda.empty_cache()

    def _set_lr(self, position):
        lrs = [learning_rate(self.schedule, base, position, self.epochs) for base in self.base_lrs]
        for optimizer, lr in zip(self.optimizers, lrs, strict=True):
            for group in optimizer.param_groups:
                group["lr"].fill_(lr)
        return lrs[0] if lrs else 0.0

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
                [optimizer.state[parameter] for parameter in group["params"]]
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
                _load_optimizer(optimizer, saved)
            self.skipped_steps = int(state["skipped_steps"])
        except (ValueError, KeyError, TypeError, AttributeError, IndexError, RuntimeError) as error:
            reason = " ".join(str(error).split())[:200]
            raise ValueError(
                f"the checkpoint does not belong to this run ({reason}); --overwrite starts from scratch"
            ) from error


def _keep_in_place(optimizer, fused):
    """Make all that an optimiser changes now, its learning rate included, so that every step finds it in its place."""
    for group in optimizer.param_groups:
        device = group["params"][0].device if fused else "cpu"
        lr = torch.tensor(group["lr"], dtype=torch.float32 if fused else torch.float64, device=device)
        group.update(lr=lr, fused=fused or None)
        for parameter in group["params"]:
            state = optimizer.state[parameter]
            if isinstance(optimizer, torch.optim.Adam):
                state["step"] = torch.zeros((), device=device)
                state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(parameter), torch.zeros_like(parameter)
            elif group.get("momentum"):
                state["momentum_buffer"] = torch.zeros_like(parameter)


@torch.no_grad()
def _load_optimizer(optimizer, saved):
    """Copy a state of an optimiser's parameters into its own, whose form it must have; an empty one is the start."""
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    for values, parameter in zip(saved, parameters, strict=True):
        own = optimizer.state[parameter]
        if values and (values.keys() != own.keys() or any(values[name].shape != own[name].shape for name in own)):
            raise ValueError("an optimiser's state of another form")
        if not all(value.dtype == torch.float32 for value in values.values()):
            raise ValueError("an optimiser's state of another type")
        if "step" in values and not 0 <= values["step"] < math.inf:
            raise ValueError("an optimiser's count of steps below 0 or not finite")
        for name, value in own.items():
            value.copy_(values[name]) if values else value.zero_()


def _out_of_memory(error):
    """Also where cuDNN finds no algorithm whose workspace fits, and where cuBLAS or the driver gets none."""
    said = (
        "CUDA error: out of memory",
        "unable to find an engine",
        "CUBLAS_STATUS_ALLOC_FAILED",
        "CUDNN_STATUS_ALLOC_FAILED",
    )
    return isinstance(error, torch.OutOfMemoryError) or any(text in str(error) for text in said)


def _count(labels, like):
    return like.new_full((), len(labels))  # filled there: new_tensor would wait for a copy


def _number(epoch):
    """An epoch as people count them, from 1."""
    return f"epoch {epoch + 1}"
