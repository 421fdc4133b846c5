"""Streaming statistics of (predicted pretrained label, true downstream label) pairs.

Axis suffixes: n samples, s pretrained labels, t downstream labels, k kept probabilities a sample. A cell
(s, t) of the table has the key ``s * T + t``. Memory is bounded by the table, whatever the number of samples.
"""

import torch
import torch.distributed as dist

from .estimators import scatter_sum

IGNORED = -100  # label of a row that counts for nothing, as in torch.nn.functional.cross_entropy
DENSE_BYTES = 2**30  # a table up to this size is dense; with the float32 weights made from it, under 2 GB
_DENSE_SHARE = 1 / 16  # share of non-zero cells at which merging keys takes about the room of a dense table
_PENDING_ENTRIES = 2**21  # entries gathered before they are merged into the sorted keys
_SCRATCH_CELLS = 2**21  # numbers of scratch for a batch, some 8 MB whatever n and S; a kept entry takes four


class Table:
    """An (S, T) table of sums: dense, or sorted keys with values while that is the smaller of the two.

    Parameters
    ----------
    num_source, num_target : int
    dtype : torch.int64 or torch.float64
    device : torch.device
    """

    def __init__(self, num_source, num_target, dtype, device):
        self.num_source, self.num_target = num_source, num_target
        self.num_cells = num_source * num_target
        self.keys = torch.zeros(0, dtype=torch.int64, device=device)
        self.values = torch.zeros(0, dtype=dtype, device=device)
        self.pending = []  # (keys, values) not merged yet
        self.num_pending = 0
        self.dense = None  # (S * T,) once the table is dense
        if self.num_cells * self.values.element_size() <= DENSE_BYTES:
            self._make_dense()

    @property
    def device(self):
        return self.values.device

    def to(self, device):
        """Move the table."""
        self._merge()
        self.keys, self.values = self.keys.to(device), self.values.to(device)
        self.dense = None if self.dense is None else self.dense.to(device)

    def add(self, keys, values):
        """Add ``values`` (m,) to the cells ``keys`` (m,); a key may occur more than once."""
        if self.dense is not None:
            self.dense.index_put_((keys,), values, accumulate=True)
            return
        self.pending.append((keys, values))
        self.num_pending += len(keys)
        if self.num_pending >= max(_PENDING_ENTRIES, len(self.keys) // 2):
            self._merge()

    def entries(self):
        """Keys of the non-zero cells, ascending, and their values."""
        if self.dense is None:
            self._merge()
            return self.keys, self.values
        keys = self.dense.nonzero().flatten()
        return keys, self.dense[keys]

    def tensor(self):
        """The table as an (S, T) tensor, strided or sparse COO; the former shares the table's memory."""
        self._merge()
        shape = self.num_source, self.num_target
        if self.dense is not None:
            return self.dense.view(shape)
        indices = torch.stack([self.keys // self.num_target, self.keys % self.num_target])
        return torch.sparse_coo_tensor(indices, self.values, shape, is_coalesced=True, check_invariants=False)

    def all_reduce(self):
        """Sum the table over all ranks; each ends with the same table, bit for bit."""
        self._merge()
        anywhere_dense = torch.tensor([self.dense is not None], dtype=torch.int64, device=self.device)
        dist.all_reduce(anywhere_dense, dist.ReduceOp.MAX)
        if anywhere_dense:
            self._make_dense()
            dist.all_reduce(self.dense)
            return
        keys, values = gather_rows(self.keys, self.values)
        self.keys, self.values = self.keys[:0], self.values[:0]
        self.pending, self.num_pending = list(zip(keys, values, strict=True)), sum(map(len, keys))
        self._merge()

    def _merge(self):
        if self.pending:
            self._sort_in_pending()
            if len(self.keys) > _DENSE_SHARE * self.num_cells:
                self._make_dense()

    def _sort_in_pending(self):
        keys = torch.cat([self.keys, *(keys for keys, _ in self.pending)])
        values = torch.cat([self.values, *(values for _, values in self.pending)])
        self.pending, self.num_pending = [], 0
        self.keys, cell_of = keys.unique(return_inverse=True)  # sorted
        self.values = scatter_sum(cell_of, values, len(self.keys))

    def _make_dense(self):
        if self.dense is None:
            self.dense = scatter_sum(self.keys, self.values, self.num_cells)
            self.keys, self.values = self.keys[:0].clone(), self.values[:0].clone()


def gather_rows(*tensors):
    """Tensors of equal length, whose length differs from rank to rank: for each of them the list of all ranks' own."""
    size = torch.tensor([len(tensors[0])], device=tensors[0].device)
    sizes = [torch.empty_like(size) for _ in range(dist.get_world_size())]
    dist.all_gather(sizes, size)
    sizes = [int(size) for size in sizes]
    lists = []
    for mine in tensors:
        padded = torch.cat([mine, mine.new_zeros(max(sizes) - len(mine), *mine.shape[1:])])
        gathered = [torch.empty_like(padded) for _ in sizes]
        dist.all_gather(gathered, padded)
        lists.append([theirs[:size] for theirs, size in zip(gathered, sizes, strict=True)])
    return lists


class Stream:
    """What one pass over the training set leaves of its logits, gathered batch by batch.

    It lives where the logits are. On an accelerator `observe` waits for nothing: what is wrong with labels or logits
    is noted there, and raised by `table`. A kind of statistics defines the methods that are not implemented here.

    Parameters
    ----------
    num_source, num_target : int
        S and T.
    """

    k = None

    def __init__(self, num_source, num_target):
        self.num_source, self.num_target = num_source, num_target
        self.clear()

    def clear(self):
        """Forget everything observed."""
        self._num_samples = None  # int64, on the device
        self._extremes = None  # int64 on the device: [is any logit not finite, -lowest label, highest label]
        self._clear()

    @property
    def num_samples(self):
        """Rows observed; reading it waits for the device."""
        return 0 if self._num_samples is None else int(self._num_samples)

    def observe(self, logits, labels):
        """Add a batch.

        Parameters
        ----------
        logits : Tensor, (n, S), floating point of any precision
        labels : Tensor, (n,), integer in [0, T), or `IGNORED` for rows to leave out

        Raises
        ------
        ValueError
            Wrong shape or type of either, or labels out of range (on an accelerator `table` says so).
        """
        if logits.ndim != 2 or logits.shape[1] != self.num_source or not logits.is_floating_point():
            raise ValueError(
                f"got {logits.dtype} logits of shape {tuple(logits.shape)}, expected floating point of shape "
                f"(n, {self.num_source}): one column for each pretrained label"
            )
        if labels.shape != logits.shape[:1] or labels.is_floating_point() or labels.dtype is torch.bool:
            raise ValueError(
                f"got {labels.dtype} labels of shape {tuple(labels.shape)}, expected integers of shape "
                f"({len(logits)},): one downstream label for each row of logits"
            )
        if not len(logits):
            return
        labels = labels.to(logits.device, torch.int64)
        counted = labels != IGNORED
        labels = labels.masked_fill(~counted, 0)
        lowest, highest = labels.aminmax()
        if labels.device.type == "cpu":
            self._check_labels(int(lowest), int(highest))
        self._place_all(logits.device)
        clipped = labels.clamp(0, self.num_target - 1)  # out of range, an accelerator would abort the process
        rows = max(1, self._rows_at_once())
        finite = True
        for logits_ns, labels_n, counted_n in zip(
            logits.split(rows), clipped.split(rows), counted.split(rows), strict=True
        ):
            finite = self._add(logits_ns, labels_n, counted_n) & finite
        number = counted.sum()
        self._num_samples = number if self._num_samples is None else self._num_samples + number
        extremes = torch.stack([finite.logical_not().to(torch.int64), -lowest, highest])
        self._extremes = extremes if self._extremes is None else self._extremes.maximum(extremes)

    def table(self):
        """All that was observed, as the estimator of the mapping takes it.

        Raises
        ------
        FloatingPointError
            Logits were not finite.
        ValueError
            Labels were out of range.
        """
        assert self.num_samples, "no samples were observed"
        not_finite, minus_lowest, highest = self._extremes.tolist()
        if not_finite:
            raise FloatingPointError("logits were not finite: no label mapping can be estimated from them")
        self._check_labels(-minus_lowest, highest)
        return self._result()

    def all_reduce(self, device):
        """Sum over all ranks of torch.distributed, each of which must call this.

        Parameters
        ----------
        device : torch.device
            Where the statistics are made on a rank that observed nothing.
        """
        self._place_all(device if self._extremes is None else self._extremes.device)
        if self._extremes is None:
            self._extremes = torch.tensor([0, -self.num_target, -1], device=device)
            self._num_samples = torch.zeros((), dtype=torch.int64, device=device)
        dist.all_reduce(self._num_samples)
        dist.all_reduce(self._extremes, dist.ReduceOp.MAX)
        self._all_reduce()

    def state(self):
        """Everything as tensors and plain values, or None if nothing was observed."""
        if not self.num_samples:
            return None
        return {"num_samples": self.num_samples, "extremes": self._extremes, **self._state()}

    def load_state(self, state, device):
        """Restore what `state` returned, on ``device``.

        Raises
        ------
        ValueError
            Where that is no state of such statistics.
        """
        self.clear()
        if state is None:
            return
        num_samples, extremes = state["num_samples"], state["extremes"].to(device)
        self._place_all(device)
        fits = extremes.dtype == torch.int64 and extremes.shape == (3,) and isinstance(num_samples, int)
        fits = fits and num_samples > 0 and int(extremes[0]) in (0, 1)
        fits = fits and 0 <= -extremes[1] <= extremes[2] < self.num_target
        if not fits or not self._load(state, num_samples, device):
            self.clear()
            raise ValueError(f"not the statistics of {self.num_source} pretrained and {self.num_target} labels")
        self._num_samples, self._extremes = torch.tensor(num_samples, device=device), extremes.clone()

    def _place_all(self, device):
        self._place(device)
        if self._extremes is not None:
            self._extremes, self._num_samples = self._extremes.to(device), self._num_samples.to(device)

    def _check_labels(self, lowest, highest):
        if lowest < 0 or highest >= self.num_target:
            raise ValueError(
                f"got downstream labels from {lowest} to {highest}, expected 0 to {self.num_target - 1}: "
                f"is num_target={self.num_target} the number of classes?"
            )


class Statistics(Stream):
    """An (S, T) table of (predicted pretrained label, true downstream label).

    Without `k`, ``counts[s, t]``: samples with highest pretrained logit s and downstream label t, int64.
    With `k`, ``mass[s, t]``: sum over samples of label t of their probability of s, where each sample keeps
    the k largest of its S softmax probabilities; softmax and top-k in float32, sum in float64.
    `table` gives a strided or a sparse COO tensor.

    Parameters
    ----------
    num_source, num_target : int
        S and T.
    k : int or None, 1 <= k <= S
    """

    def __init__(self, num_source, num_target, k=None):
        super().__init__(num_source, num_target)
        self.k = k

    def _clear(self):
        self._table = None

    def _rows_at_once(self):
        return _SCRATCH_CELLS // (self.num_source + 4 * (self.k or 1))

    def _add(self, logits_ns, labels_n, counted_n):
        values_nk, source_nk = self._predict(logits_ns)
        values_nk = values_nk.masked_fill(~counted_n[:, None], 0)
        # NaN and infinity prevail in maximum and softmax, so the kept values tell of the whole row.
        finite = values_nk.isfinite().all()
        if self.k is None:
            values_nk = counted_n[:, None]
        keys_nk = source_nk * self.num_target + labels_n[:, None]
        self._table.add(keys_nk.flatten(), values_nk.to(self._table.values.dtype).flatten())
        return finite

    def _predict(self, logits_ns):
        """The values (n, k) that each row of logits keeps, and the pretrained labels they belong to."""
        if self.k is None:
            return logits_ns.max(dim=1, keepdim=True)  # the first of equal ones
        probability_ns = torch.softmax(logits_ns.float(), dim=1)
        if self.k == self.num_source:
            return probability_ns, torch.arange(self.k, device=logits_ns.device).expand_as(probability_ns)
        return probability_ns.topk(self.k, dim=1, sorted=False)

    def _result(self):
        return self._table.tensor()

    def _all_reduce(self):
        self._table.all_reduce()

    def _state(self):
        keys, values = self._table.entries()
        return {"keys": keys, "values": values}

    def _load(self, state, num_samples, device):
        keys, values = state["keys"].to(device), state["values"].to(device)
        fits = keys.dtype == torch.int64 and values.dtype == self._table.values.dtype
        fits = fits and keys.ndim == 1 and keys.shape == values.shape
        fits = fits and (not len(keys) or 0 <= int(keys.min()) <= int(keys.max()) < self._table.num_cells)
        if fits:
            self._table.add(keys, values)
        return fits

    def _place(self, device):
        if self._table is None:
            dtype = torch.int64 if self.k is None else torch.float64
            self._table = Table(self.num_source, self.num_target, dtype, device)
        elif self._table.device != device:
            self._table.to(device)
