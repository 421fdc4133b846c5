"""Linear discriminant analysis: from class means and within-class scatter to an affine mapping.

This mapping is ours, not the paper's. Its statistics stream as those of Hayes and Kanan, "Lifelong Machine Learning
with Deep Streaming Linear Discriminant Analysis" (CVPR workshops 2020); it shrinks their covariance as Ledoit and Wolf,
"A well-conditioned estimator for large-dimensional covariance matrices" (2004), but chooses how far by the decisions.

Axis suffixes: m sampled logits, s pretrained labels or directions of the covariance, t downstream labels. Nothing here
changes its input.
"""

import math
from functools import partial

import torch

from .moments import SAMPLE_SIZE

_NO_SPREAD = 1e-10  # of the total scatter within classes, or _ROUNDING of the logits' squares: none but for rounding
_ROUNDING = 1e-13
_CHOLESKY_FROM = 1e-8  # shrinkage from which on the covariance is far enough from singular
CANDIDATES = tuple(1 / (1 + 2**-power) for power in range(-13, 8))  # of shrinkage, odds of 1 to 8192 up to 128 to 1
_BLOCK_CELLS = 2**22  # cells of an (m, s) or (m, t) scratch in float64 at once


def within_covariance(counts, means, scatter):
    """Pooled within-class covariance Σ, the maximum-likelihood estimate.

    Where no class has two different samples Σ would be 0, and nothing tells how far a class spreads. Then it is the
    mean squared distance of the class means from the mean of all, times the identity (the identity, if that is 0 too):
    the nearest class mean is predicted.

    Parameters
    ----------
    counts : Tensor, (T,)
        All above 0.
    means : Tensor, (T, S) float64
    scatter : Tensor, (S, S) float64

    Returns
    -------
    Tensor, (S, S) float64
    """
    share = (counts / counts.sum()).double()
    between = float(share @ (means - share @ means).square().sum(1))
    within = float(scatter.trace() / counts.sum())
    rounding = _ROUNDING * float(share @ means.square().sum(1))
    if within > max(_NO_SPREAD * between, rounding):
        return scatter / counts.sum()
    variance = between if between > rounding else 1.0
    return variance * torch.eye(len(scatter), dtype=scatter.dtype, device=scatter.device)


def memory_needed(num_source, num_target, tuned):
    """Bytes that statistics and estimate take at their highest, rounded up.

    Parameters
    ----------
    num_source, num_target : int
        S and T.
    tuned : bool
        Whether by `tuned_lda`.
    """
    square, table = num_source**2, num_source * num_target
    if not tuned:
        return 8 * (7 * square + 4 * table) + 2**26
    return 8 * (10 * square + 6 * table) + 8 * SAMPLE_SIZE * (5 * num_source + 3 * num_target) + 2**28


def lda(counts, means, covariance, shrinkage):
    """Logits of Gaussian class models with one covariance, Σ_ρ = (1 − ρ) Σ + ρ tr(Σ)/S I.

    ω_t = Σ_ρ⁻¹ μ_t and b_t = −½ μ_tᵀ Σ_ρ⁻¹ μ_t + log π_t, with π_t the share of t in the samples: scikit-learn's
    ``LinearDiscriminantAnalysis(solver="lsqr", shrinkage=ρ)``.

    Parameters
    ----------
    counts : Tensor, (T,)
        All above 0.
    means : Tensor, (T, S) float64
    covariance : Tensor, (S, S) float64
    shrinkage : float in [0, 1]
        ρ. A Σ_ρ that cannot be inverted is pseudo-inverted: directions without spread are left out.

    Returns
    -------
    weights : Tensor, (S, T) float64
    bias : Tensor, (T,) float64
    """
    if shrinkage < _CHOLESKY_FROM:
        values, vectors = torch.linalg.eigh(covariance)
        return _from_directions(counts, means, values, vectors, shrinkage)
    shrunk = (1 - shrinkage) * covariance
    shrunk.diagonal().add_(shrinkage * covariance.diagonal().mean())
    weights = torch.cholesky_solve(means.T, torch.linalg.cholesky(shrunk))
    return weights, _bias(counts, means, weights)


def tuned_lda(counts, means, covariance, rows, labels):
    """`lda` with shrinkage and temperature chosen by its leave-one-out decisions.

    The shrinkage is the one of `CANDIDATES` with the fewest leave-one-out errors, and among equals the least log-loss.
    Gaussian class models in many dimensions are far too sure of themselves, so ω and b are divided by the temperature,
    1 or above, that makes the leave-one-out log-loss least. It changes no decision.

    Parameters
    ----------
    counts, means, covariance
        As for `lda`.
    rows : Tensor, (m, S)
    labels : Tensor, (m,) int64
        Samples that `counts`, `means` and `covariance` are made from, not necessarily all. If none has a label with two
        samples, shrinkage and temperature are 1.

    Returns
    -------
    weights, bias : Tensor
        As from `lda`.
    shrinkage, temperature : float
    """
    values, vectors = torch.linalg.eigh(covariance)
    judged = counts[labels] > 1
    rows, labels = rows[judged].double(), labels[judged]
    shrinkage, temperature = 1.0, 1.0
    if len(rows):
        centre = means.mean(0)  # distances are the same about any centre, and lose fewer digits about this one
        rows_ms, means_ts = (rows - centre) @ vectors, (means - centre) @ vectors
        judge = partial(leave_one_out, counts, means_ts, values, rows_ms, labels)
        errors = [int((judge(candidate).argmax(1) != labels).sum()) for candidate in CANDIDATES]
        fewest = [candidate for candidate, count in zip(CANDIDATES, errors, strict=True) if count == min(errors)]
        (_, temperature), shrinkage = min((_temperature(judge(candidate), labels), candidate) for candidate in fewest)
    weights, bias = _from_directions(counts, means, values, vectors, shrinkage)
    return weights / temperature, bias / temperature, shrinkage, temperature


def leave_one_out(counts, means, values, rows, labels, shrinkage):
    """Logits of each row by class models that have not seen it, up to a constant for each row.

    Without its sample the scatter is smaller by n/(n−1) d dᵀ, with n the samples of its label and d its distance from
    their mean; Sherman and Morrison's formula then gives the inverse. Its own mean would be that of n−1 samples, which
    a new sample will not meet: that is as far from the mean of n samples as √((n+1)/(n−1)) d is. Without this, labels
    with few samples would look further away from their own samples than they are.

    Parameters
    ----------
    counts : Tensor, (T,)
    means : Tensor, (T, S) float64
        In the directions of the covariance: multiplied by its eigenvectors.
    values : Tensor, (S,)
        Eigenvalues of the covariance.
    rows : Tensor, (m, S) float64
        Likewise in the directions of the covariance.
    labels : Tensor, (m,) int64
        Of labels with two samples or more.
    shrinkage : float in (0, 1]

    Returns
    -------
    Tensor, (m, T) float64
    """
    inverse_s = _inverse(values, shrinkage)
    prior_t = (counts / counts.sum()).double().log()
    size_m = counts[labels].double()
    norm_t = means.square() @ inverse_s
    block_rows = max(1, _BLOCK_CELLS // max(rows.shape[1], len(means)))
    blocks = []
    for z, label, n in zip(rows.split(block_rows), labels.split(block_rows), size_m.split(block_rows), strict=True):
        # Squared distances under the inverse covariance: of z from 0 (zz), from its mean (dd), d·(z − μ_t) (cross).
        d = z - means[label]
        q, zz = d * inverse_s, (z.square() @ inverse_s)
        dd, cross = (q * d).sum(1), (q * z).sum(1)[:, None] - q @ means.T
        removed = (1 - shrinkage) / counts.sum() * n / (n - 1)
        gain = removed / (1 - removed * dd)
        distance = zz[:, None] - 2 * (z * inverse_s) @ means.T + norm_t + gain[:, None] * cross.square()
        own = (n + 1) / (n - 1) * (dd + gain * dd.square())
        distance.scatter_(1, label[:, None], own[:, None])
        blocks.append(prior_t - distance / 2)
    return torch.cat(blocks)


def _temperature(scores, labels):
    """Least mean log-loss of ``scores / τ`` over τ from 1 to 1000, and that τ."""
    scores = scores - scores.amax(1, keepdim=True)
    own = scores.gather(1, labels[:, None])[:, 0]
    low, high = math.log(1e-3), 0.0  # of the log of 1/τ, in which the slope of the log-loss changes sign but once
    for _ in range(40):
        middle = (low + high) / 2
        expected = (torch.softmax(scores * math.exp(middle), 1) * scores).sum(1)
        low, high = (middle, high) if float((expected - own).sum()) < 0 else (low, middle)
    tau = math.exp(-(low + high) / 2)
    return float(torch.nn.functional.cross_entropy(scores / tau, labels)), tau


def _from_directions(counts, means, values, vectors, shrinkage):
    weights = vectors @ (_inverse(values, shrinkage)[:, None] * (vectors.T @ means.T))
    return weights, _bias(counts, means, weights)


def _inverse(values, shrinkage):
    """Inverse of the shrunk eigenvalues; 0 for those that are 0 but for rounding."""
    shrunk = (1 - shrinkage) * values.clamp(min=0) + shrinkage * values.mean()
    smallest = len(values) * torch.finfo(values.dtype).eps * shrunk.max()
    return torch.where(shrunk > smallest, 1 / shrunk, 0)


def _bias(counts, means, weights):
    return (counts / counts.sum()).double().log() - (means.T * weights).sum(0) / 2
