"""Streaming class means and within-class scatter of logits, for Gaussian class models.

Axis suffixes: n samples, s pretrained labels, t downstream labels.
"""

from typing import NamedTuple

import torch
import torch.distributed as dist

from .statistics import IGNORED, Stream, gather_rows

SAMPLE_SIZE = 2048  # rows: at most 1.1 points of standard error of an accuracy, far less of a difference of two
_ROWS = 256  # of a batch at once


class ClassMoments(NamedTuple):
    """What `Moments` leaves to an estimator.

    Attributes
    ----------
    counts : Tensor, (T,) int64
        Samples of each downstream label.
    means : Tensor, (T, S) float64
        Mean logits of each label; 0 where it has no sample.
    scatter : Tensor, (S, S) float64
        Sum over samples of d dᵀ, with d a sample's logits minus the mean of its label. Only the lower triangle is to be
        read.
    rows, labels : Tensor, (m, S) float32 and (m,) int64, or None
        A sample of m logits with their labels.
    """

    counts: torch.Tensor
    means: torch.Tensor
    scatter: torch.Tensor
    rows: torch.Tensor | None
    labels: torch.Tensor | None


class Moments(Stream):
    """Counts, sums and within-class scatter of logits, in float64.

    The scatter is gathered about the means themselves, batch by batch (Chan, Golub and LeVeque 1983): nothing is
    subtracted that is large beside the result, as it would be from Σ z zᵀ.

    With `sampled` it also keeps `SAMPLE_SIZE` of the rows, or all if there are no more: those with the smallest digest
    of logits and label. Which rows that are depends neither on their order nor on how they came in batches or ranks.

    Parameters
    ----------
    num_source, num_target : int
        S and T.
    sampled : bool
    """

    def __init__(self, num_source, num_target, sampled):
        self.sampled = sampled
        super().__init__(num_source, num_target)

    def _clear(self):
        self._counts = self._sums = self._scatter = None
        self._rows, self._num_rows = [], 0  # [(rows, labels)]

    def _rows_at_once(self):
        return _ROWS

    def _add(self, logits_ns, labels_n, counted_n):
        z_ns = logits_ns.double().masked_fill(~counted_n[:, None], 0)
        same_nn = (labels_n[:, None] == labels_n) & counted_n[:, None] & counted_n
        size_n = same_nn.sum(1).clamp(min=1).double()
        mean_ns = same_nn.double() @ z_ns / size_n[:, None]  # of the batch's samples of one's own label
        before_n = self._counts[labels_n].double()
        old_mean_ns = self._sums[labels_n] / before_n.clamp(min=1)[:, None]
        # What two groups' means differ by adds to their scatter once for each label: at its first sample.
        first_n = ~same_nn.tril(-1).any(1) & counted_n
        moved_n = (before_n * size_n / (before_n + size_n)).sqrt() * first_n
        parts = torch.cat([z_ns - mean_ns, (mean_ns - old_mean_ns) * moved_n[:, None]])
        self._scatter.addmm_(parts.T, parts)
        self._sums.index_put_((labels_n,), z_ns, accumulate=True)  # in a fixed order on CUDA too
        self._counts.index_put_((labels_n,), counted_n.long(), accumulate=True)
        if self.sampled:
            self._keep(logits_ns.float(), labels_n.masked_fill(~counted_n, IGNORED))
        return z_ns.isfinite().all()

    def _keep(self, rows, labels):
        self._rows.append((rows.clone(), labels.clone()))
        self._num_rows += len(rows)
        if self._num_rows >= 2 * SAMPLE_SIZE:
            self._thin()

    def _thin(self):
        """Join the rows, in the order of their digests, and drop those beyond the sample."""
        rows, labels = (torch.cat(parts) for parts in zip(*self._rows, strict=True))
        generator = torch.Generator().manual_seed(0)
        factors = torch.randint(2**62, (self.num_source + 1,), generator=generator).to(rows.device, non_blocking=True)
        digest = labels * factors[-1]
        for block, part in zip(digest.split(_ROWS), (rows + 0.0).split(_ROWS), strict=True):  # -0.0 + 0.0 is 0.0
            block += (part.view(torch.int32) * factors[:-1]).sum(1)  # modulo 2^64: in any order the same
        digest.masked_fill_(labels == IGNORED, torch.iinfo(torch.int64).max)
        kept = digest.sort(stable=True).indices[:SAMPLE_SIZE]
        self._rows, self._num_rows = [(rows[kept], labels[kept])], len(kept)

    def _sample(self):
        self._thin()
        ((rows, labels),) = self._rows
        counted = labels != IGNORED
        return rows[counted], labels[counted]

    def _result(self):
        means = self._sums / self._counts.clamp(min=1)[:, None]
        rows, labels = self._sample() if self.sampled else (None, None)
        return ClassMoments(self._counts, means, self._scatter, rows, labels)

    def _all_reduce(self):
        own_means = self._sums / self._counts.clamp(min=1)[:, None]
        root = self._counts.double().sqrt()[:, None]
        dist.all_reduce(self._counts)
        dist.all_reduce(self._sums)
        parts = (own_means - self._sums / self._counts.clamp(min=1)[:, None]) * root
        self._scatter.addmm_(parts.T, parts)
        dist.all_reduce(self._scatter)
        if self.sampled:
            nothing = self._sums.new_zeros(0, self.num_source, dtype=torch.float32), self._counts[:0]
            own = (torch.cat(parts) for parts in zip(*self._rows, nothing, strict=True))
            rows, labels = gather_rows(*own)
            self._rows = list(zip(rows, labels, strict=True))
            self._thin()

    def _state(self):
        state = {"counts": self._counts, "sums": self._sums, "scatter": self._scatter}
        if self.sampled:
            state["rows"], state["labels"] = self._sample()
        return state

    def _load(self, state, num_samples, device):
        counts, sums, scatter = (state[name].to(device) for name in ("counts", "sums", "scatter"))
        fits = all(
            new.dtype == own.dtype and new.shape == own.shape
            for new, own in ((counts, self._counts), (sums, self._sums), (scatter, self._scatter))
        )
        fits = fits and bool((counts >= 0).all()) and int(counts.sum()) == num_samples
        if fits and self.sampled:
            rows, labels = state["rows"].to(device), state["labels"].to(device)
            fits = rows.dtype == torch.float32 and rows.shape == (min(num_samples, SAMPLE_SIZE), self.num_source)
            fits = fits and labels.dtype == torch.int64 and labels.shape == rows.shape[:1]
            fits = fits and bool(((labels >= 0) & (labels < self.num_target)).all())
            self._rows, self._num_rows = [(rows.clone(), labels.clone())], len(rows)
        if fits:
            self._counts, self._sums, self._scatter = counts.clone(), sums.clone(), scatter.clone()
        return fits

    def _place(self, device):
        if self._counts is None:
            self._counts = torch.zeros(self.num_target, dtype=torch.int64, device=device)
            self._sums = torch.zeros(self.num_target, self.num_source, dtype=torch.float64, device=device)
            self._scatter = torch.zeros(self.num_source, self.num_source, dtype=torch.float64, device=device)
        elif self._counts.device != device:
            self._counts, self._sums = self._counts.to(device), self._sums.to(device)
            self._scatter = self._scatter.to(device)
            self._rows = [(rows.to(device), labels.to(device)) for rows, labels in self._rows]
