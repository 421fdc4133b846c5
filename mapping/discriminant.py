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

    Where no class has two different samples Σ would be 0: nothing tells how far a class spreads in which directions.
    Then the covariance of the class means takes its place, which at least says in which directions logits vary; the
    identity, if the means do not differ.

    Parameters
    ----------
    counts : Tensor, (T,)
        All above 0.
    means : Tensor, (T, S) float64
    scatter : Tensor, (S, S) float64

    Returns
    -------
    covariance : Tensor, (S, S) float64
    known : bool
        Whether that is Σ.
    """
    share = _share(counts)
    offset = means - share @ means
    within = float(scatter.trace() / counts.sum())
    between = float(share @ offset.square().sum(1))
    rounding = _ROUNDING * float(share @ means.square().sum(1))
    if within > max(_NO_SPREAD * between, rounding):
        return scatter / counts.sum(), True
    if between > rounding:
        return (offset.T * share) @ offset, False
    return torch.eye(len(scatter), dtype=scatter.dtype, device=scatter.device), False


def memory_needed(num_source, num_target, tuned, prior=False):
    """Bytes that statistics and estimate take at their highest, rounded up.

    Parameters
    ----------
    num_source, num_target : int
        S and T.
    tuned : bool
        Whether by `tuned_lda`.
    prior : bool
        Whether with a prior, which makes it `tuned_lda`.
    """
    square, table = num_source**2, num_source * num_target
    if not tuned and not prior:
        return 8 * (7 * square + 4 * table) + 2**26
    more = 8 * (2 * table + 7 * SAMPLE_SIZE * num_target) if prior else 0
    return 8 * (10 * square + 6 * table) + 8 * SAMPLE_SIZE * (5 * num_source + 3 * num_target) + 2**28 + more


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


def tuned_lda(counts, means, covariance, rows, labels, known=True, prior=None, candidates=CANDIDATES):
    """`lda` with shrinkage and temperature chosen by its leave-one-out decisions.

    The shrinkage is the one of `CANDIDATES` with the fewest leave-one-out errors, and among equals the least log-loss.
    Gaussian class models in many dimensions are far too sure of themselves, so ω and b are divided by the temperature,
    1 or above, that makes the leave-one-out log-loss least. It changes no decision. For that log-loss every label is
    smoothed by 1/(m + 2), as if one of two samples more were wrong (Platt, "Probabilistic outputs for support vector
    machines", 1999): a few samples without an error would else make it sure beyond all measure.

    A prior adds its own logits, those of a classifier that has seen none of the samples (after Wang et al., "A
    Hard-to-Beat Baseline for Training-free CLIP-based Adaptation", ICLR 2024, who weigh the two on a validation set):

        logits(x) = (x @ ω + b) / τ + β x @ prior,

    with the τ, 1 or above, and the β, from 0 to 1, that make the leave-one-out log-loss least together. The shrinkage
    is then the one with the fewest errors of the sum. Without the prior, β = 0, there must be fewer errors by more than
    chance makes of such a count, two standard deviations, for it to be left out.

    Parameters
    ----------
    counts, means, covariance
        As for `lda`.
    rows : Tensor, (m, S)
    labels : Tensor, (m,) int64
        Samples that `counts`, `means` and `covariance` are made from, not necessarily all. If none has a label with two
        samples, the shrinkage is that of the means' covariance by OAS, and the temperature the mean squared distance of
        the class means from their mean under the shrunk covariance: as unsure as one must be. β is then the best for
        the prior alone, which has seen none of the samples.
    known : bool
        From `within_covariance`. If not, no sample can be left out either.
    prior : Tensor, (S, T) float64, optional
    candidates : tuple of float in [0, 1]
        Of shrinkage; a single one is given, not chosen.

    Returns
    -------
    weights, bias : Tensor
        As from `lda`.
    shrinkage, temperature : float
    prior_weight : float
        β; only with a prior.
    """
    values, vectors = torch.linalg.eigh(covariance)
    share = _share(counts)
    centre = share @ means  # distances are the same about any centre, and lose fewer digits about this one
    means_ts = (means - centre) @ vectors
    judged = (counts[labels] > 1) & known
    prior_mt = None if prior is None else rows.double() @ prior
    prior_weight = 0.0
    if judged.any():
        rows_ms, labels = (rows[judged].double() - centre) @ vectors, labels[judged]
        judge = partial(leave_one_out, counts, means_ts, values, rows_ms, labels)
        # Below the least of CANDIDATES a covariance without one of few samples is singular but for rounding.
        judged_by = [max(c, CANDIDATES[0]) for c in candidates]
        errors = [int((judge(c).argmax(1) != labels).sum()) for c in judged_by]
        both = None
        if prior is not None:
            both = min((*_add_prior(judge(c), prior_mt[judged], labels), c) for c in judged_by)
        if both is not None and min(errors) >= both[0] - 2 * math.sqrt(both[0]):
            _, _, temperature, prior_weight, shrinkage = both
        else:
            fewest = [c for c, count in zip(judged_by, errors, strict=True) if count == min(errors)]
            (_, temperature), shrinkage = min((_temperature(judge(c), labels), c) for c in fewest)
        shrinkage = candidates[judged_by.index(shrinkage)]
    else:
        shrinkage = _oas(values, len(counts)) if candidates is CANDIDATES else candidates[0]
        temperature = max(1.0, float(share @ (means_ts.square() @ _inverse(values, shrinkage))))
        if prior is not None:
            _, _, prior_weight = _weigh(torch.zeros_like(prior_mt), prior_mt, labels)
    weights, bias = _from_directions(counts, means, values, vectors, shrinkage)
    weights, bias = weights / temperature, bias / temperature
    if prior is None:
        return weights, bias, shrinkage, temperature
    return weights + prior_weight * prior, bias, shrinkage, temperature, prior_weight


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
    prior_t = _share(counts).log()
    size_m, total = counts[labels].double(), float(counts.sum())
    norm_t = means.square() @ inverse_s
    block_rows = max(1, _BLOCK_CELLS // max(rows.shape[1], len(means)))
    blocks = []
    for z, label, n in zip(rows.split(block_rows), labels.split(block_rows), size_m.split(block_rows), strict=True):
        # Squared distances under the inverse covariance: of z from 0 (zz), from its mean (dd), d·(z − μ_t) (cross).
        d = z - means[label]
        q, zz = d * inverse_s, (z.square() @ inverse_s)
        dd, cross = (q * d).sum(1), (q * z).sum(1)[:, None] - q @ means.T
        removed = (1 - shrinkage) / total * n / (n - 1)
        gain = removed / (1 - removed * dd)
        distance = zz[:, None] - 2 * (z * inverse_s) @ means.T + norm_t + gain[:, None] * cross.square()
        own = (n + 1) / (n - 1) * (dd + gain * dd.square())
        distance.scatter_(1, label[:, None], own[:, None])
        blocks.append(prior_t - distance / 2)
    return torch.cat(blocks)


def _oas(values, num_samples):
    """Shrinkage by oracle approximation of a covariance of so many samples with these eigenvalues.

    Chen, Wiesel, Eldar and Hero, "Shrinkage algorithms for MMSE covariance estimation", 2010.
    """
    trace, squares, size = float(values.sum()), float(values.square().sum()), len(values)
    unequal = (num_samples + 1 - 2 / size) * (squares - trace**2 / size)
    closeness = (1 - 2 / size) * squares + trace**2
    return closeness / unequal if unequal > closeness else 1.0


def _own(scores, labels):
    """What each row's label scores, (m,), smoothed: its own score and a little of all labels' mean."""
    smoothing = 1 / (len(labels) + 2)
    return (1 - smoothing) * scores.gather(1, labels[:, None])[:, 0] + smoothing * scores.mean(1)


def _temperature(scores, labels):
    """Least mean smoothed log-loss of ``scores / τ`` over τ from 1 to a million, and that τ."""
    scores = scores - scores.amax(1, keepdim=True)
    own = _own(scores, labels)
    low, high = math.log(1e-6), 0.0  # of the log of 1/τ, in which the slope of the log-loss changes sign but once
    for _ in range(40):
        middle = (low + high) / 2
        expected = (torch.softmax(scores * math.exp(middle), 1) * scores).sum(1)
        low, high = (middle, high) if float((expected - own).sum()) < 0 else (low, middle)
    tau = math.exp(-(low + high) / 2)
    return float(((scores / tau).logsumexp(1) - own / tau).mean()), tau


def _add_prior(scores, prior, labels):
    """Errors and least smoothed log-loss of ``scores / τ + β prior``, and those τ and β."""
    loss, temperature, prior_weight = _weigh(scores, prior, labels)
    errors = int(((scores / temperature + prior_weight * prior).argmax(1) != labels).sum())
    return errors, loss, temperature, prior_weight


def _weigh(scores, prior, labels):
    """Least mean smoothed log-loss of ``scores / τ + β prior``, τ from 1 to a million and β from 0 to 1, and those.

    Convex in (1/τ, β): Newton's method, in which a coordinate stays at a bound that it would leave the box by.
    """
    # Relative to the label's own: the loss is then a log-sum-exp alone.
    parts_kmt = torch.stack([part - _own(part, labels)[:, None] for part in (scores, prior)])
    low, high = parts_kmt.new_tensor([1e-6, 0]), parts_kmt.new_tensor([1, 1])

    def loss(point):
        return float(torch.tensordot(point, parts_kmt, 1).logsumexp(1).mean())

    point = low
    least = loss(point)
    for _ in range(100):
        weighted_kmt = parts_kmt * torch.tensordot(point, parts_kmt, 1).softmax(1)
        mean_km = weighted_kmt.sum(2)
        slope = mean_km.mean(1)
        curvature = (weighted_kmt.flatten(1) @ parts_kmt.flatten(1).T - mean_km @ mean_km.T) / len(labels)
        free = torch.where(slope > 0, point > low, point < high)
        curvature = torch.where(free & free[:, None], curvature, 0) + torch.diag(1e-12 + (~free).double())
        step, size = torch.linalg.solve(curvature, torch.where(free, slope, 0)), 1.0
        while (found := loss(new := (point - size * step).clamp(low, high))) >= least and size > 1e-6:
            size /= 2
        gain = least - found
        if gain > 0:
            point, least = new, found
        if gain < 1e-12:
            break
    return least, float(1 / point[0]), float(point[1])


def _from_directions(counts, means, values, vectors, shrinkage):
    weights = vectors @ (_inverse(values, shrinkage)[:, None] * (vectors.T @ means.T))
    return weights, _bias(counts, means, weights)


def _inverse(values, shrinkage):
    """Inverse of the shrunk eigenvalues; 0 for those that are 0 but for rounding."""
    shrunk = (1 - shrinkage) * values.clamp(min=0) + shrinkage * values.mean()
    smallest = len(values) * torch.finfo(values.dtype).eps * shrunk.max()
    return torch.where(shrunk > smallest, 1 / shrunk, 0)


def _share(counts):
    return counts.double() / counts.sum()  # divided as integers it would be float32


def _bias(counts, means, weights):
    return _share(counts).log() - (means.T * weights).sum(0) / 2
