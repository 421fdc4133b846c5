"""The three steps of an epoch: estimate the mapping, train the pattern, evaluate on the test set."""

import math
import os
import signal
import sys
import time
from contextlib import contextmanager

import torch
from torch.nn import functional
from tqdm import tqdm

from tools.training import distributed

PLAIN_CHUNK = 32  # images that go through the plain network at once on a CPU


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


def set_up_arithmetic(device, precision, deterministic):
    """Set what torch keeps for the whole process: the GPU in use, TF32 or not, algorithms that repeat their bits."""
    if device.type == "cuda":
        torch.cuda.set_device(device)
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = precision == "tf32"
        torch.backends.cudnn.benchmark = not deterministic
    if deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # cuBLAS repeats its bits only with a workspace
        torch.use_deterministic_algorithms(True)
        torch.utils.deterministic.fill_uninitialized_memory = False  # none of it is read before it is written


def chunk_size_of(network, device):
    """Images that go through ``network`` at once: as many as run fastest on a CPU, a whole batch on a GPU."""
    return network.batch_size or (PLAIN_CHUNK if device.type == "cpu" else 2**31 - 1)


def pretrained_logits(network, images, precision="fp32", chunk_size=None):
    """Pretrained logits (n, S), float32, of images (n, 3, h, w) in [0, 1], computed ``chunk_size`` images at a time."""
    chunk_size = chunk_size or chunk_size_of(network, images.device)
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(precision)
    with torch.autocast(images.device.type, dtype, enabled=dtype is not None):
        return torch.cat([network(chunk).float() for chunk in images.split(chunk_size)])


class Trainer:
    """Trains one pattern (and one mapping) on one task.

    Everything random is a function of (seed, epoch, position), so that the state to keep is the parameters', the
    optimisers' and the mapping's.

    Parameters
    ----------
    network : nn.Module
        Images in [0, 1], (n, 3, h, w), to pretrained logits (n, S), differentiable with respect to ``program``.
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
        ``fp32``, ``tf32``, ``bf16`` or ``fp16``; statistics and losses are float32 whatever it is, and
            the mapping but for ``tf32``, which rounds the factors of all matrix products.
    on_nonfinite : str
        ``stop`` or ``skip``.
    """

    def __init__(self, network, program, mapping, loaders, optimizer, schedule, epochs, precision="fp32",
                 on_nonfinite="stop"):
        self.network, self.program, self.mapping, self.loaders = network, program, mapping, loaders
        self.schedule, self.epochs, self.on_nonfinite = schedule, epochs, on_nonfinite
        self.device = program.device
        self.optimizers = [optimizer]
        if mapping.trainable:
            self.optimizers.append(torch.optim.Adam(mapping.parameters(), lr=0.1))
        self.base_lrs = [optimizer.param_groups[0]["lr"] for optimizer in self.optimizers]
        self.parameters = [program, *mapping.parameters()]
        self.precision = precision
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=precision == "fp16")
        self.chunk_size = chunk_size_of(network, self.device)
        self.skipped_steps = 0
        self.seconds = {}
        self.stop_signal = 0

    # ---- the three steps ----

    def estimate(self, epoch):
        """Estimate ω from one pass over the training set with the present θ."""
        with self._timed("estimate"), torch.inference_mode(), self.network.accumulate():
            for batch in self._batches("estimate", epoch):
                self.mapping.observe(self._logits_that_fit(batch.images), batch.labels)
            self.mapping.all_reduce_statistics()
            self.refresh(epoch)

    def refresh(self, epoch):
        """Turn what was observed into ω."""
        try:
            self.mapping.refresh()
        except FloatingPointError as error:
            if self.on_nonfinite == "stop" or not self.mapping.ready:
                rate = f"learning rate {self._set_lr(epoch):g}"
                raise NonFiniteError(f"epoch {epoch}, estimating the mapping, {rate}: {error}") from error
            self.skipped_steps += 1

    def train(self, epoch, observe=False):
        """Train θ for one epoch on the cross-entropy of the mapped logits.

        Parameters
        ----------
        epoch : int
        observe : bool
            Also hand the pretrained logits to the mapping, for an ω that needs no pass of its own.

        Returns
        -------
        dict with ``train_loss`` (mean over samples), ``train_accuracy`` (fraction of 1) and ``lr``.
        """
        loader, lr = self.loaders["train"], None
        totals = torch.zeros(3, dtype=torch.float64, device=self.device)  # loss, correct, seen
        watch = _NonFiniteWatch(self.device, lag=self.on_nonfinite == "stop" and self.device.type == "cuda")
        with self._timed("train"):
            for step, batch in enumerate(self._batches("train", epoch)):
                first_lr = self._set_lr(epoch + step / len(loader))
                lr = first_lr if lr is None else lr
                for optimizer in self.optimizers:
                    optimizer.zero_grad(set_to_none=True)
                loss_sum, logits, correct = self._forward_backward(batch)
                distributed.sum_over_processes(*(p.grad for p in self.parameters))
                finite = torch.isfinite(loss_sum)
                if not self.scaler.is_enabled():  # under fp16 the scaler sees to overflowing gradients itself
                    finite = finite & torch.stack([p.grad.isfinite().all() for p in self.parameters]).all()
                where = f"epoch {epoch}, batch {step}, learning rate {first_lr:g}"
                if self.on_nonfinite == "skip":
                    if distributed.any_process(not finite, self.device):
                        self.skipped_steps += 1
                        continue
                else:
                    watch.check(finite, where)
                for optimizer in self.optimizers:
                    self.scaler.step(optimizer)
                self.scaler.update()
                totals += torch.stack([loss_sum.double(), correct.double(), _count(batch, totals)])
                if observe:
                    self.mapping.observe(logits, batch.labels)
            watch.finish()
            if observe:  # now, so that a checkpoint holds what all processes saw
                self.mapping.all_reduce_statistics()
        distributed.sum_over_processes(totals)
        loss_sum, correct, seen = totals.tolist()
        assert self.skipped_steps or seen == loader.num_samples, "the training pass lost samples"
        if not seen or not all(bool(parameter.isfinite().all()) for parameter in self.parameters):
            what = "the pattern or the mapping is not finite after the last batch" if seen else "no batch was finite"
            raise NonFiniteError(f"epoch {epoch}, learning rate {lr:g}: {what}")
        return {"train_loss": loss_sum / seen, "train_accuracy": correct / seen, "lr": lr}

    def evaluate(self, epoch=0):
        """Accuracy on the test set, every sample once whatever the number of processes; a fraction of 1."""
        totals = torch.zeros(2, dtype=torch.float64, device=self.device)  # correct, seen
        with self._timed("test"), torch.inference_mode(), self.network.accumulate():
            for batch in self._batches("test", epoch):
                predicted = self.mapping(self._logits_that_fit(batch.images)).argmax(1)
                totals += torch.stack([(predicted == batch.labels).sum().double(), _count(batch, totals)])
        distributed.sum_over_processes(totals)
        correct, seen = totals.tolist()
        assert seen == self.loaders["test"].num_samples, "the evaluation lost samples"
        return correct / seen

    # ---- what they are made of ----

    def _batches(self, step, epoch):
        loader = self.loaders[step]
        quiet = not sys.stderr.isatty() or distributed.rank() > 0
        progress = tqdm(loader.epoch(epoch), f"epoch {epoch} {step}", len(loader), leave=False, disable=quiet)
        for batch in progress:
            yield batch
            signum = distributed.any_process(self.stop_signal, self.device)
            if signum:
                progress.close()
                raise Interrupted(signum)

    def _logits(self, images):
        if not len(images):  # a process whose share of the last batch is empty still takes part in every sum
            return images.new_zeros(0, self.mapping.num_source)
        return pretrained_logits(self.network, images, self.precision, self.chunk_size)

    def _logits_that_fit(self, images):
        return self._within_memory(len(images), lambda: self._logits(images))

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
        kept = []
        chunks = zip(batch.images.split(self.chunk_size), batch.labels.split(self.chunk_size), strict=True)
        with self.network.accumulate():
            for images, labels in chunks:
                if not len(labels):
                    break
                logits = self._logits(images)
                mapped = self.mapping(logits)
                loss = functional.cross_entropy(mapped, labels, reduction="sum")
                self.scaler.scale(loss / batch.global_size).backward()
                loss_sum += loss.detach()
                correct += (mapped.detach().argmax(1) == labels).sum()
                kept.append(logits.detach())
        for parameter in self.parameters:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
        return loss_sum, torch.cat(kept) if kept else self._logits(batch.images), correct

    def _set_lr(self, position):
        for optimizer, base in zip(self.optimizers, self.base_lrs, strict=True):
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(self.schedule, base, position, self.epochs)
        return self.optimizers[0].param_groups[0]["lr"]

    @contextmanager
    def _timed(self, step):
        start = time.perf_counter()
        yield
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        self.seconds[step] = time.perf_counter() - start

    # ---- state ----

    def state_dict(self):
        """Program, mapping (with its pending statistics), optimisers and scaler, on the CPU."""
        return {
            "program": self.program.detach().cpu().clone(),
            "mapping": {key: _on_cpu(value) for key, value in self.mapping.state_dict().items()},
            "optimizers": [_on_cpu(optimizer.state_dict()) for optimizer in self.optimizers],
            "scaler": self.scaler.state_dict(),
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
                checked = _checked_optimizer_state(optimizer, saved["state"])
                optimizer.load_state_dict({"state": checked, "param_groups": own})
            self.scaler.load_state_dict(state["scaler"])
            self.skipped_steps = int(state["skipped_steps"])
        except (ValueError, KeyError, TypeError, AttributeError, IndexError, RuntimeError) as error:
            reason = " ".join(str(error).split())[:200]
            raise ValueError(
                f"the checkpoint does not belong to this run ({reason}); --overwrite starts anew"
            ) from error


def _checked_optimizer_state(optimizer, state):
    names = {"step", "exp_avg", "exp_avg_sq"} if isinstance(optimizer, torch.optim.Adam) else {"momentum_buffer"}
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    if state and state.keys() != set(range(len(parameters))):
        raise ValueError("an optimiser of other parameters")
    for index, values in state.items():
        shapes = {name: () if name == "step" else parameters[index].shape for name in names}
        if values.keys() != names or any(values[name].shape != shapes[name] for name in names):
            raise ValueError("an optimiser's state of another form")
        if not all(values[name].dtype == torch.float32 for name in names):
            raise ValueError("an optimiser's state of another type")
        if "step" in names and not 0 <= values["step"] < math.inf:
            raise ValueError("an optimiser's count of steps below 0 or not finite")
    return {index: {name: _on_its_own(value) for name, value in values.items()} for index, values in state.items()}


def _on_its_own(tensor):
    """A copy whose elements share no memory, whatever the strides of the original."""
    return tensor.clone(memory_format=torch.contiguous_format)


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


def _on_cpu(value):
    if isinstance(value, torch.Tensor):
        return value.detach().cpu().clone()
    if isinstance(value, dict):
        return {key: _on_cpu(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_on_cpu(item) for item in value]
    return value
