"""Pure functions from a table of statistics to a label mapping.

``counts[s, t]`` is the mass of training samples predicted as pretrained label s whose downstream label is t,
shape (S, T): sample counts (int64) or summed probabilities (float64), as an ordinary or a sparse COO tensor.
Nothing here changes its input.
"""

import torch

_CHUNK_CELLS = 2**18  # cells of a dense table in float64 at once: 2 MB of scratch, whatever S and T are


def one_to_one(counts):
    """Match each downstream label with a pretrained label of its own, greedily by count (FLM, ILM).

    Take the largest entry, give that s to that t, strike out row s and column t, repeat. Equal counts go to
    the smaller s, then the smaller t; so labels left with zeros only take the smallest unused s, in order.

    Parameters
    ----------
    counts : Tensor, (S, T), non-negative, S >= T

    Returns
    -------
    Tensor, (T,) int64
        The pretrained label of each downstream label, on the device of `counts`.

    Notes
    -----
    O(m log m + S + T) for m non-zero entries: one sort and one scan, in place of an arg-max per label.
    """
    num_source, num_target = counts.shape
    assert num_source >= num_target, f"one-to-one needs S >= T, got {num_source} < {num_target}"
    s, t, count = _entries(counts)
    # Entries come ordered by (s, t), which a stable sort keeps among equal counts: this is the tie rule.
    order = torch.sort(count, descending=True, stable=True).indices
    source_of, used = [-1] * num_target, [False] * num_source
    missing = num_target
    for row, column in zip(s[order].tolist(), t[order].tolist(), strict=True):
        if not used[row] and source_of[column] < 0:
            used[row], source_of[column] = True, row
            missing -= 1
            if not missing:
                break
    unused = (row for row in range(num_source) if not used[row])
    return torch.tensor([row if row >= 0 else next(unused) for row in source_of], device=counts.device)


def bayesian(counts, laplace=1.0):
    """Weights of Bayesian-guided label mapping (BLM; BLM+ when `counts` holds probabilities).

    P[s, t] = counts[s, t] / (sum_t counts[s, t] + laplace), then w[s, t] = P[s, t] / sum_s P[s, t].
    Smoothing is in the denominator only, and comes before the columns are normalised (Cai et al., NeurIPS
    2024).

    Parameters
    ----------
    counts : Tensor, (S, T), non-negative
    laplace : float, >= 0

    Returns
    -------
    Tensor, (S, T) float32
        Columns sum to 1. A column without mass is uniform, 1/S.
    """
    row_sum = _sum(counts, 1).double()
    # A pretrained label that no sample was predicted as: 0/1, where 0/0 is NaN, and so is 0 times 1/laplace for a
    # laplace so small that its inverse is infinite.
    return _normalise_columns(counts, 1 / (row_sum + laplace).masked_fill_(row_sum == 0, 1))


def frequencies(counts):
    """Weights without the Bayesian step, for the ablation: w[s, t] = counts[s, t] / sum_s counts[s, t].

    Parameters and result are those of `bayesian`.
    """
    return _normalise_columns(counts, torch.ones(len(counts), dtype=torch.float64, device=counts.device))


def labels_without_mass(counts):
    """Downstream labels whose column of `counts` is all zero, ascending (list of int)."""
    return (_sum(counts, 0) == 0).nonzero().flatten().tolist()


def scatter_sum(index, values, size):
    """Sum `values` by `index` into `size` zeros; unlike `index_add_`, in a fixed order on CUDA too."""
    return values.new_zeros(size).index_put_((index,), values, accumulate=True)


def _entries(counts):
    """Row, column and value of the non-zero cells, ordered by row and then column."""
    if counts.is_sparse:
        counts = counts.coalesce()
        (s, t), value = counts.indices(), counts.values()
        kept = value != 0
        return s[kept], t[kept], value[kept]
    s, t = counts.nonzero(as_tuple=True)
    return s, t, counts[s, t]


def _sum(counts, dim):
    if not counts.is_sparse:
        return counts.sum(dim)
    counts = counts.coalesce()
    return scatter_sum(counts.indices()[1 - dim], counts.values(), counts.shape[1 - dim])


def _normalise_columns(counts, row_scale):
    """``M / sum_s M`` in float32 for ``M[s, t] = counts[s, t] * row_scale[s]``, uniform where the sum is 0.

    Float64 throughout, but never for more than a block of rows: the result is the one large allocation.
    """
    num_source, num_target = counts.shape
    if counts.is_sparse:
        counts = counts.coalesce()
        s, t = counts.indices()
        mass = counts.values() * row_scale[s]
        column_sum = scatter_sum(t, mass, num_target)
        weights = counts.new_zeros((num_source, num_target), dtype=torch.float32, layout=torch.strided)
        mass /= column_sum[t]
        weights[s, t] = mass.float()
    else:
        rows = max(1, _CHUNK_CELLS // num_target)
        column_sum = torch.zeros(num_target, dtype=torch.float64, device=counts.device)
        for block, scale in zip(counts.split(rows), row_scale.split(rows), strict=True):
            column_sum += (block * scale[:, None]).sum(0)
        column_sum_or_one = column_sum.masked_fill(column_sum == 0, 1)
        weights = torch.empty(num_source, num_target, device=counts.device)
        blocks = zip(weights.split(rows), counts.split(rows), row_scale.split(rows), strict=True)
        for weights_block, block, scale in blocks:
            weights_block.copy_((block * scale[:, None]).div_(column_sum_or_one))
    weights[:, column_sum == 0] = 1 / num_source
    return weights
