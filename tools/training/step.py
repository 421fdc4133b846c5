"""What is computed of a batch: a pure function of images, labels, θ and ω, which a compiler can take as a whole."""

from operator import attrgetter

import torch
from torch import nn
from torch.func import functional_call
from torch.fx.experimental.proxy_tensor import make_fx
from torch.nn import functional

from mapping.statistics import IGNORED
from tools.training.numerics import chunk_size_of, network_outputs

# Largest relative difference between compiled and eager: of outputs and loss, and of gradients. Half precision rounds
# ReLUs over, for which a gradient is another but no worse one; a wrong one is off by its own length or more.
_TOLERANCES = {"fp32": (1e-3, 1e-2), "tf32": (1e-2, 0.1), "fp16": (0.05, 0.5), "bf16": (0.1, 0.7)}


class Step(nn.Module):
    """Network, loss and gradient of a batch.

    Nothing is changed by a step, and no value is read on the host within it. On a CPU it is simply called, a chunk of
    images at a time. Where `compiled`, it is recorded as one graph of operations, with θ and ω among its inputs, which
    torch.compile turns into few kernels and, on a GPU, into a CUDA graph that is launched as a whole. Such a graph has
    one size of batch: shorter batches are filled up with rows that count for nothing. Where recording, compiling or
    capturing fails, memory is short, or the graph's results differ from the eager step's, the eager step goes on, for
    training or for the passes without gradients as the case may be, and ``log`` is told why.

    Parameters
    ----------
    network : nn.Module
        See `tools.training.trainer.Trainer`.
    readout : tools.training.readout.Readout
    trained : list of nn.Parameter
        Parameters of network and readout to give the gradient of.
    precision : str
        Of the network where there are labels; see `tools.training.trainer.Trainer`.
    compiled : bool
    log : callable
        Takes a line of text.

    Attributes
    ----------
    compiled : set of str
        What still is: ``training``, ``passes``.
    chunk_size : int
        Images that go through the network at once, where it is not compiled.
    """

    def __init__(self, network, readout, trained, precision, device, compiled=False, log=print):
        super().__init__()
        self.network, self.readout, self.precision, self.log = network, readout, precision, log
        self.compiled = {"training", "passes"} if compiled else set()
        self.chunk_size = chunk_size_of(network, device)
        names = {id(parameter): name for name, parameter in self.named_parameters()}
        self._trained = [names[id(parameter)] for parameter in trained if id(parameter) in names]
        self._graphs = {}  # by the names and shapes of what changes, the number of inputs and the size of the batch

    def forward(self, images, labels=None, count=None):
        """Compute a batch eagerly.

        Parameters
        ----------
        images : Tensor (n, 3, h, w)
        labels : Tensor (n,), int64, optional
            `IGNORED` for rows that count for nothing.
        count : Tensor (), float32, optional
            Images of the step, over all processes.

        Returns
        -------
        tuple
            The network's outputs (n, width), float32; with labels also the summed loss, the number of images that were
            predicted right, and for each trained parameter the gradient of the loss's mean over ``count`` images.
        """
        if labels is None:
            return (self._outputs(images, "fp32"),)
        trained = [attrgetter(name)(self) for name in self._trained]
        for parameter in trained:
            parameter.grad = None
        loss_sum = torch.zeros((), device=images.device)
        correct = torch.zeros((), dtype=torch.int64, device=images.device)
        half = self.precision in ("bf16", "fp16")  # in which the gradient of a mean over the batch would underflow
        kept = []
        with torch.enable_grad(), self.network.accumulate():
            for part, targets in zip(images.split(self.chunk_size), labels.split(self.chunk_size), strict=True):
                if not len(targets):
                    break
                outputs = self._outputs(part, self.precision)
                mapped = self.readout.downstream(outputs)
                loss = functional.cross_entropy(mapped, targets, reduction="sum", ignore_index=IGNORED)
                (loss if half else loss / count).backward()
                loss_sum += loss.detach()
                correct += (mapped.detach().argmax(1) == targets).sum()
                kept.append(outputs.detach())
        for parameter in trained:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
            elif half:
                parameter.grad /= count
        outputs = torch.cat(kept) if kept else self._outputs(images, self.precision)
        return outputs, loss_sum, correct, *(parameter.grad for parameter in trained)

    def _outputs(self, images, precision):
        if not len(images):  # a process whose share of the last batch is empty still takes part in every sum
            return images.new_zeros(0, self.readout.width)
        return network_outputs(self.network, images, precision, self.chunk_size)

    def run(self, size, *batch):
        """As `forward`, of a batch of at most ``size`` images: compiled, where it is and as long as that works."""
        kind = "training" if len(batch) > 1 else "passes"
        if kind in self.compiled:
            try:
                return self._run_compiled(size, *batch)
            except Exception as error:  # a compiler fails in any way; nothing is changed yet, the eager step goes on
                self.compiled.remove(kind)
                reason = " ".join(f"{type(error).__name__}: {error}".split())
            self._graphs.clear()  # with the memory of all graphs; those of the other kind are made again
            torch.compiler.reset()
            self.log(f"{kind} not compiled ({reason:.200}): same results, slower")
        return self(*batch)

    def _run_compiled(self, size, images, labels=None, count=None):
        missing = size - len(images)
        batch = [functional.pad(images, (0, 0, 0, 0, 0, 0, 0, missing)) if missing else images]
        if labels is not None:
            batch += [functional.pad(labels, (0, missing), value=IGNORED), count]
        # θ, ω and what else changes between steps, in its place or, a user's own ω, in another: a CUDA graph copies its
        # inputs. All other tensors are constants of the graph.
        changing = {name: attrgetter(name)(self).detach() for name in self._changing()}
        inputs = *changing.values(), *batch
        with torch.no_grad():
            key = *((name, tensor.shape) for name, tensor in changing.items()), len(batch), size
            if key not in self._graphs:
                self._graphs[key] = self._compile(list(changing), inputs, self(*batch))
            torch.compiler.cudagraph_mark_step_begin()  # what the last replay gave may be written over
            outputs, *others = self._graphs[key](*inputs)
        return outputs[: len(images)], *others

    def _changing(self):
        """Names; looked up in every step, as a mapping may have no ω at first."""
        readout = self.readout
        of_readout = [f"readout.{name}" for name, _ in (*readout.named_parameters(), *readout.named_buffers())]
        return dict.fromkeys([*self._trained, *of_readout])

    def _compile(self, names, inputs, expected):
        """A function of such inputs, checked against what the eager step, which comes first, gave for these."""

        def pure(*tensors):
            named = zip(names, tensors, strict=False)
            changing = {name: tensor.detach().requires_grad_(name in self._trained) for name, tensor in named}
            return functional_call(self, changing, tensors[len(changing) :])

        with torch.autograd.set_multithreading_enabled(False):  # the recorder sees its own thread alone
            graph = make_fx(pure)(*inputs)
        compiled = torch.compile(graph, mode="reduce-overhead", fullgraph=True, dynamic=False)
        got = compiled(*inputs)
        precision = self.precision if len(expected) > 1 else "fp32" if self.precision == "fp32" else "tf32"
        value, gradient = _TOLERANCES[precision]
        for index, pair in enumerate(zip(expected, got, strict=True)):
            if index != 2 and not _close(*pair, value if index < 2 else gradient):  # 2, a count, is free to break ties
                raise ArithmeticError("other results than the eager step's")
        return compiled


def _close(expected, got, tolerance):
    return bool((got - expected).norm() <= tolerance * expected.norm())
