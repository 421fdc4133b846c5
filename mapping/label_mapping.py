"""Output label mappings as modules: observe (logits, labels), refresh, map logits.

S is the number of pretrained labels (`num_source`), T that of downstream labels (`num_target`).
"""

import math
import warnings

import torch
import torch.distributed as dist
from torch import nn

from .discriminant import CANDIDATES, lda, memory_needed, tuned_lda, within_covariance
from .estimators import labels_without_mass, one_to_one
from .moments import Moments
from .statistics import Statistics

_LABELS_NAMED = 20  # in a warning
_DIGEST_ROWS = 64  # of ω at once
_NEVER = -1e30  # bias of a label that lda has no sample of


class LabelMapping(nn.Module):
    """Turns S pretrained logits into T downstream logits. Made by `build_mapping`.

    A kind of mapping keeps what its ``forward`` reads, and `refresh` or training change, in parameters and buffers, and
    changes them in place: a compiled training step takes all else as constant.

    Attributes
    ----------
    name : str
        Canonical name: a key of `MAPPINGS`.
    num_source, num_target : int
        S and T.
    estimated : bool
        Whether it is made from observed statistics; `observe` and `refresh` do nothing otherwise.
    iterative : bool
        Whether the method re-estimates it every epoch.
    trainable : bool
        Whether it has parameters for a gradient to train.
    memory_needed : int
        Bytes that `observe` and `refresh` take at their highest, for `lda`; 0 for the others, which need little more
        than the mapping.
    k : int or None
        Probabilities kept a sample (BLM+).
    """

    iterative = trainable = False
    note = ""  # what a log should say of the present mapping, after a comma
    memory_needed = 0
    _fallback = ""  # what an estimated mapping does about labels without a sample

    def __init__(self, name, num_source, num_target, statistics=None):
        super().__init__()
        self.name, self.num_source, self.num_target = name, num_source, num_target
        self.estimated = statistics is not None
        self.k = statistics.k if self.estimated else None
        self.ready = not self.estimated  # whether there is a mapping to apply
        self._statistics = statistics
        self._warned = set()

    @property
    def weights(self):
        """The mapping as a matrix, (S, T) float32 without gradient; not to be written to, and `refresh` changes it."""
        raise AssertionError("each kind of mapping has its own")

    @property
    def bias(self):
        """What is added to the T products, (T,) float32 without gradient, or None; not to be written to."""
        return None

    def affine(self):
        """`weights` and `bias`, differentiable where they are learned."""
        return self.weights, self.bias

    @property
    def source_index(self):
        """The pretrained label of each downstream label, (T,) int64, for one-to-one mappings; else None."""
        return None

    @torch.inference_mode(False)
    @torch.no_grad()
    def indistinct_labels(self):
        """Groups of downstream labels that get equal logits for every image.

        Of equal logits the smallest label is predicted, the others never are.

        Returns
        -------
        list of list of int
            Ascending labels with equal columns of `weights` and equal `bias`.
        """
        if self.source_index is not None:
            return []
        weights, bias = self.weights, self.bias
        # A sum of integers is the same in any order: equal columns have equal sums, others hardly ever.
        digest = torch.zeros(self.num_target, dtype=torch.int64, device=weights.device)
        rows = [*weights.split(_DIGEST_ROWS)] + ([] if bias is None else [bias[None]])
        generator = torch.Generator().manual_seed(0)
        factors = torch.randint(2**62, (sum(map(len, rows)),), generator=generator).to(weights.device)
        for block, factor in zip(rows, factors.split([len(block) for block in rows]), strict=True):
            digest += ((block + 0.0).view(torch.int32).long() * factor[:, None]).sum(0)  # -0.0 + 0.0 is 0.0
        _, group_of, size = digest.unique(return_inverse=True, return_counts=True)
        groups = ((group_of == group).nonzero().flatten() for group in (size > 1).nonzero().flatten())
        return sorted(group.tolist() for group in groups if all(_all_equal(row[:, group]) for row in rows))

    # Statistics outlive the inference mode they may be observed in, hence ordinary tensors without gradient.
    @torch.inference_mode(False)
    @torch.no_grad()
    def observe(self, logits, labels):
        """Add a batch to the statistics; any number of calls, on any device.

        Parameters
        ----------
        logits : Tensor, (n, S), floating point of any precision
        labels : Tensor, (n,), integer in [0, T), or -100 for rows to leave out

        Raises
        ------
        ValueError
            Wrong shape or type, or labels out of range (on an accelerator those are reported by `refresh`).
        """
        if self.estimated:
            self._statistics.observe(logits, labels)

    @torch.inference_mode(False)
    @torch.no_grad()
    def refresh(self):
        """Make what was observed the mapping, and clear the statistics.

        A downstream label that was not observed gets a uniform column 1/S or, one-to-one, an unused
        pretrained label; with `lda` it is never predicted. One warning names such labels.

        Raises
        ------
        FloatingPointError
            Observed logits were not finite. The mapping stays as it was, the statistics are cleared.
        ValueError
            Observed labels were out of range; likewise.
        RuntimeError
            Nothing was observed.
        """
        if not self.estimated:
            return
        if not self._statistics.num_samples:
            raise RuntimeError(f"{self.name}: refresh() without a sample observed since the last one")
        try:
            table = self._statistics.table()
            absent = self._absent(table)
            self._estimate(table)
        finally:
            self._statistics.clear()
        self.ready = True
        self._warn_once(absent)

    @torch.inference_mode(False)
    @torch.no_grad()
    def all_reduce_statistics(self):
        """Sum the statistics over all ranks, each of which must call this once after the last `observe`.

        Does nothing where torch.distributed is not initialised.
        """
        if self.estimated and dist.is_available() and dist.is_initialized():
            self._statistics.all_reduce(next(self.buffers()).device)

    def get_extra_state(self):
        return {"ready": self.ready, "statistics": self._statistics.state() if self.estimated else None}

    @torch.inference_mode(False)
    @torch.no_grad()
    def set_extra_state(self, state):
        if not isinstance(state["ready"], bool):
            raise ValueError(f"got ready={state['ready']!r}, expected a bool")
        self.ready = state["ready"]
        if self.estimated:
            self._statistics.load_state(state["statistics"], next(self.buffers()).device)

    def extra_repr(self):
        return f"{self.name}, num_source={self.num_source}, num_target={self.num_target}"

    def _estimate(self, table):
        raise AssertionError("only estimated mappings have statistics")

    def _absent(self, table):
        return labels_without_mass(table)

    def _warn_once(self, absent):
        if not absent or tuple(absent) in self._warned:
            return
        self._warned.add(tuple(absent))
        named = ", ".join(map(str, absent[:_LABELS_NAMED]))
        more = f" and {len(absent) - _LABELS_NAMED} more" if len(absent) > _LABELS_NAMED else ""
        message = f"{self.name}: no training sample of downstream labels {named}{more}; {self._fallback}"
        warnings.warn(message, stacklevel=1)

    def _check(self, logits):
        if logits.shape[-1] != self.num_source:
            raise ValueError(
                f"got logits of shape {tuple(logits.shape)}, expected (n, {self.num_source}): "
                f"one column for each pretrained label"
            )
        self._check_ready()

    def _check_ready(self):
        if not self.ready:
            raise RuntimeError(f"{self.name} has no mapping yet: observe() training samples, then refresh()")


class OneToOneMapping(LabelMapping):
    """Random (`rlm`), frequent (`flm`) and iterative (`ilm`) label mapping: ``logits[:, source_index]``.

    `rlm` draws T distinct pretrained labels with `seed`; without a seed, see `estimators.one_to_one`.
    """

    _fallback = "they take the smallest unused pretrained labels"

    def __init__(self, name, num_source, num_target, *, iterative=False, seed=None):
        if num_source < num_target:
            raise ValueError(
                f"mapping {name!r} gives each downstream label a pretrained label of its own, but got "
                f"{num_source} pretrained and {num_target} downstream labels; use blm, blmpp or linear"
            )
        statistics, index = Statistics(num_source, num_target), torch.zeros(num_target, dtype=torch.int64)
        if seed is not None:
            generator = torch.Generator().manual_seed(seed)
            statistics, index = None, torch.randperm(num_source, generator=generator)[:num_target].clone()
        super().__init__(name, num_source, num_target, statistics)
        self.iterative = iterative
        self.register_buffer("_index", index)

    @property
    def source_index(self):
        self._check_ready()
        return self._index

    @property
    def weights(self):
        index = self.source_index
        one_hot = torch.zeros(self.num_source, self.num_target, device=index.device)
        one_hot[index, torch.arange(self.num_target, device=index.device)] = 1
        return one_hot

    @torch.inference_mode(False)
    @torch.no_grad()
    def set_extra_state(self, state):
        super().set_extra_state(state)
        if self._index.min() < 0 or self._index.max() >= self.num_source:  # buffers are loaded before
            raise ValueError(f"pretrained labels out of the {self.num_source} that there are")

    def forward(self, logits):
        """Map (n, S) logits of any precision to (n, T) float32."""
        self._check(logits)
        return logits.index_select(1, self._index).float()

    def _estimate(self, table):
        self._index.copy_(one_to_one(table))


class MatrixMapping(LabelMapping):
    """A many-to-many mapping estimated again every epoch (`blm`, `blmpp`): ``logits @ weights``.

    Parameters
    ----------
    name : str
    num_source, num_target : int
    estimator : callable
        Table ``counts[s, t]``, (S, T), ordinary or sparse COO, to the weights, (S, T) float32; a pure function, as
        those of `mapping.estimators`.
    k : int, optional
        The table sums each sample's k largest probabilities (BLM+) in place of counting its highest logit.
    iterative : bool
        Whether to estimate it again every epoch.
    """

    _fallback = "their weights are uniform over the pretrained labels"

    def __init__(self, name, num_source, num_target, estimator, k=None, iterative=True):
        super().__init__(name, num_source, num_target, Statistics(num_source, num_target, k))
        self.iterative = iterative
        self.estimator = estimator
        self.register_buffer("_weights", torch.zeros(num_source, num_target))

    @property
    def weights(self):
        self._check_ready()
        return self._weights

    def forward(self, logits):
        """Map (n, S) logits of any precision to (n, T) float32, under autocast too."""
        self._check(logits)
        return _float32_product(logits, self._weights)

    def _estimate(self, table):
        weights = self.estimator(table)
        if weights.shape != self._weights.shape:  # which a copy would spread out in silence
            got, expected = tuple(weights.shape), tuple(self._weights.shape)
            raise ValueError(f"{self.name}: its estimator gave weights of shape {got}, expected {expected}")
        self._weights.copy_(weights)


class LdaMapping(LabelMapping):
    """Linear discriminant analysis on the pretrained logits (`lda`): ``logits @ weights + bias``.

    An addition to the paper's mappings. See `mapping.discriminant`.

    Parameters
    ----------
    name : str
    num_source, num_target : int
    shrinkage : float in [0, 1] or "auto"
        Of the covariance; "auto" chooses it, and a temperature, again in every `refresh`.
    iterative : bool
    prior : Tensor, (S, T), optional
        A classifier that has seen no training sample, whose logits ``logits @ prior`` are part of the mapping's. No
        part of the state.

    Attributes
    ----------
    shrinkage, temperature : float
        Those of the present mapping; a given shrinkage goes with temperature 1, unless there is a prior.
    prior_weight : float or None
        Chosen with the temperature, whether the shrinkage is given or not. None without a prior.
    """

    _fallback = "they are never predicted"

    def __init__(self, name, num_source, num_target, shrinkage="auto", iterative=True, prior=None):
        tuned = shrinkage == "auto" or prior is not None
        super().__init__(name, num_source, num_target, Moments(num_source, num_target, sampled=tuned))
        self.iterative, self._candidates = iterative, CANDIDATES if shrinkage == "auto" else (shrinkage,)
        self._tuned = tuned
        self.memory_needed = memory_needed(num_source, num_target, tuned, prior is not None)
        self.register_buffer("_prior", prior, persistent=False)
        self.register_buffer("_weights", torch.zeros(num_source, num_target))
        self.register_buffer("_bias", torch.zeros(num_target))
        self.register_buffer("_chosen", torch.zeros(2 if prior is None else 3, dtype=torch.float64))

    @property
    def weights(self):
        self._check_ready()
        return self._weights

    @property
    def bias(self):
        self._check_ready()
        return self._bias

    @property
    def prior_weight(self):
        self._check_ready()
        return None if self._prior is None else float(self._chosen[2])

    @property
    def shrinkage(self):
        self._check_ready()
        return float(self._chosen[0])

    @property
    def temperature(self):
        self._check_ready()
        return float(self._chosen[1])

    @property
    def note(self):
        prior = "" if self._prior is None else f", prior weight {self.prior_weight:.3g}"
        return f", shrinkage {self.shrinkage:.3g}, temperature {self.temperature:.3g}{prior}"

    def forward(self, logits):
        """Map (n, S) logits of any precision to (n, T) float32, under autocast too."""
        self._check(logits)
        return _float32_product(logits, self._weights) + self._bias

    def _absent(self, moments):
        return (moments.counts == 0).nonzero().flatten().tolist()

    def _estimate(self, moments):
        seen = (moments.counts > 0).nonzero().flatten()
        counts, means = moments.counts[seen], moments.means[seen]
        covariance, known = within_covariance(counts, means, moments.scatter)
        if self._tuned:
            labels = torch.searchsorted(seen, moments.labels)
            prior = None if self._prior is None else self._prior.to(means)[:, seen]
            weights, bias, *chosen = tuned_lda(
                counts, means, covariance, moments.rows, labels, known, prior, self._candidates
            )
        else:
            (shrinkage,) = self._candidates
            weights, bias = lda(counts, means, covariance, shrinkage)
            chosen = shrinkage, 1.0
        # What all labels have in common decides nothing, but can be ten times what tells them apart: without it,
        # large weights are those that matter, and float32 loses no digits to it.
        weights, bias = weights - weights.mean(1, keepdim=True), bias - bias.mean()
        # Finite, and below what any logit brings: infinity would turn differences of biases into NaN.
        self._weights.fill_(1 / self.num_source)
        self._bias.fill_(_NEVER)
        seen = seen.to(self._bias.device)
        self._weights[:, seen], self._bias[seen] = weights.to(self._weights), bias.to(self._bias)
        self._chosen.copy_(torch.tensor(chosen, dtype=torch.float64))


class LinearMapping(LabelMapping):
    """A learned matrix (`linear`), the paper's gradient-trained reference: ``logits @ weights + bias``.

    Variants: "none" with a bias, "nobias" without, "sigmoid" with weights through a sigmoid and no bias.
    Initialised as `torch.nn.Linear` is, uniform in ±1/sqrt(S).
    """

    trainable = True

    def __init__(self, name, num_source, num_target, *, seed, variant):
        super().__init__(name, num_source, num_target)
        generator = torch.Generator().manual_seed(seed)
        bound = 1 / math.sqrt(num_source)

        def uniform(*shape):
            return nn.Parameter(torch.empty(shape).uniform_(-bound, bound, generator=generator))

        self.variant = variant
        self.matrix = uniform(num_source, num_target)
        self.offset = uniform(num_target) if variant == "none" else None

    @property
    def weights(self):
        return self.affine()[0].detach()

    @property
    def bias(self):
        return None if self.offset is None else self.offset.detach()

    def affine(self):
        return (self.matrix.sigmoid() if self.variant == "sigmoid" else self.matrix), self.offset

    def forward(self, logits):
        """Map (n, S) logits of any precision to (n, T) float32, under autocast too."""
        self._check(logits)
        weights, offset = self.affine()
        product = _float32_product(logits, weights)
        return product if offset is None else product + offset


def _all_equal(columns):
    return bool((columns == columns[:, :1]).all())


def _float32_product(logits, weights):
    # In float16 a uniform weight is subnormal from S = 16,384 on, and a sum of so many products loses digits.
    with torch.autocast(logits.device.type, enabled=False):
        return logits.float() @ weights
