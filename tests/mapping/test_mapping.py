"""Label mappings by hand-computed tables, against naive loops, and at their edges."""

import io
import json
import math
import warnings

import pytest
import torch
import torch.distributed as dist
from torch.profiler import ProfilerActivity, profile

from mapping import MAPPINGS, MatrixMapping, Statistics, bayesian, build_mapping, frequencies, one_to_one
from mapping import statistics as statistics_module

ESTIMATED = ("flm", "ilm", "blm", "blmpp")
DEVICES = ["cpu"] + ["cuda"] * torch.cuda.is_available()


def logits_of(predicted, num_source):
    """Logits whose highest entry is the given pretrained label."""
    return 5 * torch.nn.functional.one_hot(torch.as_tensor(predicted), num_source).float()


def samples_of(counts):
    """Logits and labels that have the (S, T) table of `counts`."""
    counts = torch.as_tensor(counts)
    pairs = counts.nonzero().repeat_interleave(counts[counts > 0], dim=0)
    return logits_of(pairs[:, 0], len(counts)), pairs[:, 1]


def estimated(name, counts, **options):
    mapping = build_mapping(name, *torch.as_tensor(counts).shape, **options)
    mapping.observe(*samples_of(counts))
    mapping.refresh()
    return mapping


def random_batch(n, num_source, num_target, seed=0):
    generator = torch.Generator().manual_seed(seed)
    logits = 3 * torch.randn(n, num_source, generator=generator)
    return logits, torch.randint(num_target, (n,), generator=generator)


@pytest.fixture
def sparse(monkeypatch):
    """Small tables kept as sorted keys, merged often."""
    monkeypatch.setattr(statistics_module, "DENSE_BYTES", 0)
    monkeypatch.setattr(statistics_module, "_DENSE_SHARE", 1)
    monkeypatch.setattr(statistics_module, "_PENDING_ENTRIES", 7)


# Estimators, on tables that can be checked by hand


@pytest.mark.parametrize("layout", ["dense", "sparse"])
@pytest.mark.parametrize(
    "estimate, expected",
    [
        # Row sums 4, 2, 0. P = [3/5 1/5; 0 2/3; 0 0], its columns sum to 3/5 and 13/15.
        (lambda counts: bayesian(counts, 1), [[1, 3 / 13], [0, 10 / 13], [0, 0]]),
        # P = [3/4 1/4; 0 1; 0 0]: the pretrained label without samples is 0/0 without care.
        (lambda counts: bayesian(counts, 0), [[1, 1 / 5], [0, 4 / 5], [0, 0]]),
        (lambda counts: bayesian(counts, 8), [[1, 5 / 17], [0, 12 / 17], [0, 0]]),
        (frequencies, [[1, 1 / 3], [0, 2 / 3], [0, 0]]),
    ],
    ids=["laplace 1", "laplace 0", "laplace 8", "frequencies"],
)
def test_weights_by_hand(estimate, expected, layout):
    counts = torch.tensor([[3, 1], [0, 2], [0, 0]])
    given = counts.to_sparse() if layout == "sparse" else counts.clone()
    weights = estimate(given)
    assert weights.dtype is torch.float32
    torch.testing.assert_close(weights, torch.tensor(expected), rtol=1e-7, atol=0)
    torch.testing.assert_close(given.to_dense(), counts, rtol=0, atol=0)


@pytest.mark.parametrize("layout", ["dense", "sparse"])
@pytest.mark.parametrize(
    "counts, expected",
    [
        ([[5, 4], [4, 0]], [0, 1]),  # greedy, where swapping would gather 8 in place of 5
        ([[1, 2], [3, 4]], [0, 1]),
        ([[2, 2], [2, 2]], [0, 1]),  # ties: smaller s first, then smaller t
        ([[0, 1], [1, 1]], [1, 0]),
        ([[0, 0, 0], [0, 0, 0], [0, 7, 0], [0, 0, 0]], [0, 2, 1]),  # zeros only: smallest unused s, in order
        ([[0, 0], [0, 0], [0, 0]], [0, 1]),
    ],
)
def test_one_to_one_by_hand(counts, expected, layout):
    counts = torch.tensor(counts)
    given = counts.to_sparse() if layout == "sparse" else counts.clone()
    assert one_to_one(given).tolist() == expected
    torch.testing.assert_close(given.to_dense(), counts, rtol=0, atol=0)


def test_estimators_take_views():
    counts = torch.tensor([[3, 0, 0], [1, 2, 0]]).T
    torch.testing.assert_close(bayesian(counts), bayesian(counts.contiguous()), rtol=0, atol=0)
    assert one_to_one(counts).tolist() == [0, 1]


def naive_bayesian(counts, laplace):
    num_source, num_target = counts.shape
    weights = [[0.0] * num_target for _ in range(num_source)]
    for t in range(num_target):
        for s in range(num_source):
            denominator = sum(counts[s].tolist()) + laplace
            weights[s][t] = float(counts[s, t]) / denominator if denominator else 0.0
        total = sum(row[t] for row in weights)
        for row in weights:
            row[t] = row[t] / total if total else 1 / num_source
    return torch.tensor(weights)


def naive_one_to_one(counts):
    counts, index = counts.clone(), [0] * counts.shape[1]
    for _ in range(counts.shape[1]):
        s, t = divmod(int(counts.argmax()), counts.shape[1])  # the first maximum is that of smaller s, then t
        index[t] = s
        counts[s] = counts[:, t] = -1
        counts[counts < 0] = -1
    return index


@pytest.mark.parametrize("seed", range(40))
def test_against_naive_loops(seed):
    generator = torch.Generator().manual_seed(seed)
    num_source, num_target = (int(torch.randint(1, 13, (), generator=generator)) for _ in range(2))
    largest = int(torch.randint(2, 6, (), generator=generator))
    counts = torch.randint(-largest, largest, (num_source, num_target), generator=generator).clamp(min=0)
    for laplace in (0, 0.5, 1, 10):
        for given in (counts, counts.to_sparse(), counts.double()):
            expected = naive_bayesian(counts, laplace)
            torch.testing.assert_close(bayesian(given, laplace), expected, rtol=2e-7, atol=0)
    if num_source >= num_target:
        assert one_to_one(counts).tolist() == naive_one_to_one(counts)
        assert one_to_one(counts.to_sparse()).tolist() == naive_one_to_one(counts)


def test_weights_of_many_blocks_of_rows(monkeypatch):
    counts = torch.randint(0, 9, (50, 7), generator=torch.Generator().manual_seed(0))
    expected = bayesian(counts)
    monkeypatch.setattr("mapping.estimators._CHUNK_CELLS", 20)
    torch.testing.assert_close(bayesian(counts), expected, rtol=1e-6, atol=0)


# Statistics


def test_counts_are_exact_and_axes_are_source_by_target():
    statistics = Statistics(3, 2)
    statistics.observe(logits_of([0, 0, 2, 0], 3), torch.tensor([0, 0, 0, 1]))
    assert statistics.table().tolist() == [[2, 1], [0, 0], [1, 0]]
    assert statistics.table().dtype is torch.int64
    statistics.observe(torch.zeros(1, 3), torch.tensor([1]))  # equal logits: the smaller s
    assert statistics.table().tolist() == [[2, 2], [0, 0], [1, 0]]


def test_blmpp_by_hand():
    logits, labels = torch.tensor([[0.5, 0.3, 0.2], [0.1, 0.6, 0.3]]).log(), torch.tensor([0, 1])
    mapping = build_mapping("blmpp", 3, 2, topk_ratio=1.0)
    assert mapping.k == 2
    mapping.observe(logits, labels)
    mapping.refresh()
    # mass = [.5 0; .3 .6; 0 .3], P = [1/3 0; 3/19 6/19; 0 3/13]
    expected = torch.tensor([[19 / 28, 0], [9 / 28, 26 / 45], [0, 19 / 45]])
    torch.testing.assert_close(mapping.weights, expected, rtol=1e-6, atol=0)
    mapping = build_mapping("blmp", 3, 2)
    assert mapping.name == "blmpp" and mapping.k == 1
    mapping.observe(logits, labels)
    mapping.refresh()
    assert mapping.weights.tolist() == [[1, 0], [0, 1], [0, 0]]


@pytest.mark.parametrize("k", [1, 3, 8])
def test_exactly_k_are_kept_among_equal_logits(k):
    statistics = Statistics(8, 2, k)
    statistics.observe(torch.zeros(1, 8), torch.tensor([1]))
    assert statistics.table()[:, 1].sort().values.tolist() == [0] * (8 - k) + [1 / 8] * k


@pytest.mark.parametrize("name", ESTIMATED)
@pytest.mark.parametrize("device", DEVICES)
def test_one_batch_or_many(name, device):
    logits, labels = random_batch(1000, 60, 30)
    whole = build_mapping(name, 60, 30)
    whole.observe(logits, labels)
    whole.refresh()
    parts = build_mapping(name, 60, 30).to(device)
    for first in range(0, 1000, 77):
        parts.observe(logits[first : first + 77].to(device), labels[first : first + 77].to(device))
    parts.observe(logits[:0].to(device), labels[:0].to(device))
    parts.refresh()
    assert parts.weights.device.type == device
    rtol = 2e-7 if device == "cpu" else 2e-6
    torch.testing.assert_close(parts.weights.cpu(), whole.weights, rtol=rtol, atol=0)


@pytest.mark.parametrize("name", ESTIMATED)
@pytest.mark.parametrize("share", [1, 0.1], ids=["sparse", "turned dense"])
def test_sparse_statistics_give_the_same(name, share, sparse, monkeypatch):
    logits, labels = random_batch(600, 60, 30)
    mapping = build_mapping(name, 60, 30)
    monkeypatch.setattr(statistics_module, "_DENSE_SHARE", share)
    for batch in zip(logits.split(50), labels.split(50), strict=True):
        mapping.observe(*batch)
    assert mapping._statistics.table().is_sparse == (share == 1)
    mapping.refresh()
    monkeypatch.undo()
    expected = build_mapping(name, 60, 30)
    expected.observe(logits, labels)
    assert not expected._statistics.table().is_sparse
    expected.refresh()
    torch.testing.assert_close(mapping.weights, expected.weights, rtol=2e-7, atol=0)


def test_large_tables_are_sparse_and_small_ones_dense():
    sizes = {(21841, 10000): True, (32157, 397): False}
    for (num_source, num_target), is_sparse in sizes.items():
        statistics = Statistics(num_source, num_target)
        statistics.observe(logits_of([7], num_source), torch.tensor([3]))
        assert statistics.table().is_sparse == is_sparse


@pytest.mark.parametrize("k", [None, 3, 20], ids=["counts", "top 3", "all"])
def test_batches_larger_than_the_scratch(k, monkeypatch):
    logits, labels = random_batch(90, 20, 4)
    whole, blocks = Statistics(20, 4, k), Statistics(20, 4, k)
    whole.observe(logits, labels)
    monkeypatch.setattr(statistics_module, "_SCRATCH_CELLS", 200)
    blocks.observe(logits, labels)
    torch.testing.assert_close(blocks.table(), whole.table(), rtol=1e-12, atol=0)


@pytest.mark.parametrize("name", ESTIMATED)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("device", DEVICES)
def test_precision_and_layout_of_logits(name, dtype, device):
    logits, labels = random_batch(300, 40, 20)
    logits = logits.to(dtype)
    expected = build_mapping(name, 40, 20)
    expected.observe(logits.float(), labels)
    expected.refresh()
    mapping = build_mapping(name, 40, 20).to(device)
    view = torch.stack([logits.T, logits.T], dim=2).to(device)[..., 1].T
    assert not view.is_contiguous()
    with torch.autocast(device, dtype=torch.bfloat16):
        mapping.observe(view, labels.to(device, torch.int32))
    mapping.refresh()
    # On CUDA equal half-precision logits may be kept in another order than on the CPU.
    if device == "cpu" or name != "blmpp":
        torch.testing.assert_close(mapping.weights.cpu(), expected.weights, rtol=2e-7, atol=0)
    torch.testing.assert_close(mapping.weights.sum(0).cpu(), torch.ones(20))


def test_statistics_outlive_inference_mode_and_carry_no_graph():
    logits, labels = random_batch(50, 10, 4)
    with torch.inference_mode():
        inside = build_mapping("blm", 10, 4)
    for mapping in (build_mapping("blm", 10, 4), inside):
        with torch.inference_mode():
            mapping.observe(logits.detach().clone(), labels.clone())
            mapping.refresh()
            mapping.observe(logits.detach().clone(), labels.clone())
        mapping.observe(logits.requires_grad_(), labels)
        mapping.refresh()
        assert not mapping.weights.requires_grad and not mapping.weights.is_inference()
        logits.grad = None
        mapping(logits).sum().backward()
        torch.testing.assert_close(logits.grad, mapping.weights.sum(1).expand(50, 10))


def test_weights_of_another_shape_are_refused():
    mapping = MatrixMapping("mine", 10, 4, lambda counts: torch.ones(10, 1))
    mapping.observe(*random_batch(50, 10, 4))
    with pytest.raises(ValueError, match=r"mine: its estimator gave weights of shape \(10, 1\), expected \(10, 4\)"):
        mapping.refresh()


# Edges


@pytest.mark.parametrize("num_target, ratio, num_source, k", [
    (2, 0.15, 9, 1), (3, 0.15, 9, 1), (4, 0.15, 9, 1), (5, 0.15, 9, 1), (6, 0.15, 9, 1), (13, 0.15, 99, 1),
    (14, 0.15, 99, 2), (20, 0.15, 99, 3), (397, 0.15, 32157, 59), (100, 0.29, 500, 29), (10, 1.0, 4, 4),
])  # fmt: skip
def test_k(num_target, ratio, num_source, k):
    assert build_mapping("blmpp", num_source, num_target, topk_ratio=ratio).k == k


@pytest.mark.parametrize("num_target", range(2, 7))
def test_few_classes(num_target):
    mapping = build_mapping("blmpp", 8, num_target)
    mapping.observe(logits_of(range(num_target), 8), torch.arange(num_target))
    mapping.refresh()
    torch.testing.assert_close(mapping.weights, torch.eye(8)[:, :num_target], rtol=0, atol=0)


@pytest.mark.parametrize("name", ["blm", "blmpp"])
@pytest.mark.parametrize("laplace", [0, 1])
def test_absent_label_is_uniform(name, laplace):
    mapping = build_mapping(name, 4, 3, laplace=laplace)
    with pytest.warns(UserWarning) as caught:
        mapping.observe(logits_of([2, 2, 3], 4), torch.tensor([0, 0, 2]))
        mapping.refresh()
    (warning,) = caught
    assert str(warning.message) == (
        f"{name}: no training sample of downstream labels 1; their weights are uniform over the pretrained labels"
    )
    assert mapping.weights.tolist() == [[0, 0.25, 0], [0, 0.25, 0], [1, 0.25, 0], [0, 0.25, 1]]


def test_warns_once_for_each_set_of_labels():
    mapping = build_mapping("ilm", 4, 3)

    def warned_about(labels):
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            mapping.observe(logits_of([2] * len(labels), 4), torch.tensor(labels))
            mapping.refresh()
        return [str(warning.message) for warning in caught]

    ending = "; they take the smallest unused pretrained labels"
    assert warned_about([1]) == ["ilm: no training sample of downstream labels 0, 2" + ending]
    assert mapping.source_index.tolist() == [0, 2, 1]
    assert warned_about([1]) == []
    assert warned_about([1, 2]) == ["ilm: no training sample of downstream labels 0" + ending]
    assert warned_about([0, 1, 2]) == []


def test_warning_of_many_labels_is_short():
    mapping = build_mapping("blm", 4, 100)
    mapping.observe(logits_of([0], 4), torch.tensor([99]))
    with pytest.warns(UserWarning, match="labels 0, 1, 2, .*, 18, 19 and 79 more;"):
        mapping.refresh()


def test_column_without_mass_is_uniform():
    for counts in (torch.tensor([[2, 0], [1, 0]]), torch.tensor([[2.0, 0], [1, 0]], dtype=torch.float64)):
        for given in (counts, counts.to_sparse()):
            torch.testing.assert_close(bayesian(given, 0), torch.tensor([[0.5, 0.5], [0.5, 0.5]]))
    assert bayesian(torch.zeros(3, 2), 0).tolist() == torch.full((3, 2), 1 / 3).tolist()


@pytest.mark.parametrize("name", ["blm", "blmpp"])
def test_laplace_zero_with_unused_pretrained_labels(name):
    mapping = estimated(name, [[3, 0], [0, 0], [0, 2]], laplace=0)
    assert mapping.weights.tolist() == [[1, 0], [0, 0], [0, 1]]


@pytest.mark.parametrize("layout", ["dense", "sparse"])
@pytest.mark.parametrize("laplace", [5e-324, 1e-320, 1e-308, 1e308])
def test_extreme_laplace(laplace, layout):
    counts = torch.tensor([[3, 1], [0, 2], [0, 0]])
    given = counts.to_sparse() if layout == "sparse" else counts
    expected = [[1, 1 / 5], [0, 4 / 5], [0, 0]] if laplace < 1 else [[1, 1 / 3], [0, 2 / 3], [0, 0]]
    torch.testing.assert_close(bayesian(given, laplace), torch.tensor(expected), rtol=1e-6, atol=0)


@pytest.mark.parametrize("name", ["rlm", "flm", "ilm"])
def test_too_few_pretrained_labels_for_one_to_one(name):
    with pytest.raises(ValueError, match=f"'{name}'.* got 3 pretrained and 4 downstream labels"):
        build_mapping(name, 3, 4)
    assert estimated("blm", [[1, 1, 1]]).weights.tolist() == [[1, 1, 1]]


@pytest.mark.parametrize("name", ESTIMATED)
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_logits_that_are_not_finite(name, value):
    counts = [[2, 0], [0, 3], [0, 0]]
    mapping = estimated(name, counts)
    before = mapping.weights.clone()
    logits, labels = samples_of(counts)
    bad = logits.clone()
    bad[1, 2] = value
    mapping.observe(bad, labels)
    mapping.observe(logits, labels)
    with pytest.raises(FloatingPointError, match="logits were not finite"):
        mapping.refresh()
    assert mapping.weights.equal(before)
    mapping.observe(logits_of([2, 1], 3), torch.tensor([0, 1]))  # nothing of the bad epoch is left
    mapping.refresh()
    assert mapping.weights.tolist() == [[0, 0], [0, 1], [1, 0]]


def test_masked_logits_are_fine():
    mapping = build_mapping("blmpp", 3, 2)
    mapping.observe(torch.tensor([[0, -math.inf, -math.inf], [-math.inf, 0, 0.5]]), torch.tensor([0, 1]))
    mapping.refresh()
    assert mapping.weights.tolist() == [[1, 0], [0, 0], [0, 1]]


@pytest.mark.parametrize("labels", [[0, 2], [-1, 1]])
@pytest.mark.parametrize("device", DEVICES)
def test_labels_out_of_range(labels, device):
    mapping = build_mapping("blm", 3, 2).to(device)
    message = f"got downstream labels from {min(labels)} to {max(labels)}, expected 0 to 1"
    with pytest.raises(ValueError, match=message):
        mapping.observe(logits_of([0, 1], 3).to(device), torch.tensor(labels, device=device))
        mapping.refresh()
    mapping.observe(logits_of([0, 1], 3).to(device), torch.tensor([0, 1], device=device))
    mapping.refresh()
    assert mapping.weights.tolist() == [[1, 0], [0, 1], [0, 0]]


@pytest.mark.parametrize("logits, labels, message", [
    (torch.zeros(2, 4), torch.tensor([0, 1]), r"shape \(2, 4\), expected floating point of shape \(n, 3\)"),
    (torch.zeros(3), torch.tensor([0]), r"logits of shape \(3,\)"),
    (torch.zeros(2, 3, dtype=torch.int64), torch.tensor([0, 1]), r"torch.int64 logits"),
    (torch.zeros(2, 3), torch.tensor([0]), r"labels of shape \(1,\), expected integers of shape \(2,\)"),
    (torch.zeros(2, 3), torch.tensor([0.0, 1.0]), r"torch.float32 labels"),
])  # fmt: skip
def test_wrong_shapes_and_types(logits, labels, message):
    with pytest.raises(ValueError, match=message):
        build_mapping("blm", 3, 2).observe(logits, labels)


@pytest.mark.parametrize("name", list(MAPPINGS))
def test_forward_refuses_logits_of_another_width(name):
    with pytest.raises(ValueError, match=r"got logits of shape \(2, 5\), expected \(n, 4\)"):
        build_mapping(name, 4, 2)(torch.zeros(2, 5))


@pytest.mark.parametrize("name", ESTIMATED)
def test_use_before_estimation_is_a_bug(name):
    mapping = build_mapping(name, 4, 2)
    for use in (lambda: mapping.weights, lambda: mapping(torch.zeros(1, 4)), mapping.refresh):
        with pytest.raises(RuntimeError):
            use()


# The mapping as a module


def test_refresh_clears_the_statistics():
    mapping = estimated("blm", [[3, 0], [0, 2], [0, 0]])
    mapping.observe(*samples_of([[0, 0], [0, 1], [1, 0]]))
    assert mapping.weights.tolist() == [[1, 0], [0, 1], [0, 0]]
    mapping.refresh()
    assert mapping.weights.tolist() == [[0, 0], [0, 1], [1, 0]]


@pytest.mark.parametrize("name", MAPPINGS)
def test_what_forward_reads_stays_in_its_place(name):
    """A compiled training step may have noted where ω lies."""
    mapping, other = (build_mapping(name, 12, 5) for _ in range(2))
    places = [tensor.data_ptr() for tensor in (*mapping.parameters(), *mapping.buffers())]
    for seed in range(2):
        mapping.observe(*random_batch(200, 12, 5, seed))
        mapping.refresh()
    mapping.load_state_dict(other.state_dict())
    assert places == [tensor.data_ptr() for tensor in (*mapping.parameters(), *mapping.buffers())]


@pytest.mark.parametrize("name", MAPPINGS)
@pytest.mark.parametrize("device", DEVICES)
def test_forward_is_the_product_with_the_weights(name, device):
    mapping = build_mapping(name, 12, 5, linear_variant="nobias").to(device)
    mapping.observe(*(tensor.to(device) for tensor in random_batch(200, 12, 5)))
    mapping.refresh()
    logits = random_batch(9, 12, 5, seed=1)[0].to(device).requires_grad_()
    expected = logits.double() @ mapping.weights.double() + (0 if mapping.bias is None else mapping.bias.double())
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        with torch.autocast(device, dtype=torch.bfloat16):
            mapped = mapping(logits.to(dtype))
        assert mapped.dtype is torch.float32
        tolerance = 1e-5 if dtype is torch.float32 else 2 ** -(10 if dtype is torch.float16 else 7) * 4
        torch.testing.assert_close(mapped, expected.float(), rtol=tolerance, atol=5 * tolerance)
    (gradient,) = torch.autograd.grad(mapping(logits).sum(), logits)
    torch.testing.assert_close(gradient, mapping.weights.sum(1).expand(9, 12))
    assert mapping.weights.shape == (12, 5) and mapping.weights.dtype is torch.float32


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_keeps_small_weights(dtype, device):
    mapping = build_mapping("blm", 32157, 3).to(device)
    mapping.observe(logits_of([0], 32157).to(device), torch.tensor([0], device=device))
    with pytest.warns(UserWarning, match="labels 1, 2;"):
        mapping.refresh()
    assert (mapping.weights[:, 1] == torch.tensor(1 / 32157)).all()
    logits = (20 + random_batch(4, 32157, 3)[0]).to(device, dtype)
    with torch.autocast(device, dtype=dtype):
        mapped = mapping(logits)
    expected = logits.double() @ mapping.weights.double()
    torch.testing.assert_close(mapped.double(), expected, rtol=1e-5, atol=0)


@pytest.mark.parametrize("name", ["rlm", "flm", "ilm"])
def test_one_to_one_weights_are_one_hot_and_not_stored(name):
    mapping = build_mapping(name, 6, 3)
    mapping.observe(*random_batch(100, 6, 3))
    mapping.refresh()
    index = mapping.source_index
    assert index.dtype is torch.int64 and len(set(index.tolist())) == 3
    assert mapping.weights.equal(torch.eye(6)[:, index])
    assert sum(buffer.numel() for buffer in mapping.buffers()) == 3


def test_random_mapping_depends_on_the_seed_alone():
    state = torch.get_rng_state()
    first, again, other = (build_mapping("rlm", 1000, 10, seed=seed).source_index for seed in (3, 3, 4))
    assert torch.get_rng_state().equal(state)
    assert first.equal(again) and not first.equal(other)
    assert len(set(first.tolist())) == 10
    assert build_mapping("blm", 4, 2).source_index is None


@pytest.mark.parametrize("variant", ["none", "nobias", "sigmoid"])
def test_linear(variant):
    state = torch.get_rng_state()
    mapping, again, other = (build_mapping("linear", 400, 30, seed=seed, linear_variant=variant) for seed in (3, 3, 4))
    assert torch.get_rng_state().equal(state)
    assert mapping.weights.equal(again.weights) and not mapping.weights.equal(other.weights)
    assert set(dict(mapping.named_parameters())) == ({"matrix", "offset"} if variant == "none" else {"matrix"})
    reference = torch.nn.Linear(400, 30)
    for ours, theirs in ((mapping.matrix, reference.weight), (mapping.offset, reference.bias)):
        if ours is not None:  # uniform in ±1/20, as theirs
            assert theirs.abs().max() <= 0.05 and 0.04 < ours.abs().max() <= 0.05
            assert float(ours.detach().std()) == pytest.approx(0.05 / math.sqrt(3), rel=0.3)

    weights = mapping.matrix.sigmoid() if variant == "sigmoid" else mapping.matrix
    assert mapping.weights.equal(weights.detach()) and not mapping.weights.requires_grad
    logits, labels = random_batch(8, 400, 30)
    expected = logits @ weights + (mapping.offset if variant == "none" else 0)
    torch.testing.assert_close(mapping(logits), expected)
    mapping.observe(logits, labels)
    mapping.refresh()
    mapping.all_reduce_statistics()
    assert mapping.weights.equal(weights.detach())
    torch.nn.functional.cross_entropy(mapping(logits), labels).backward()
    assert all(parameter.grad.abs().sum() > 0 for parameter in mapping.parameters())


def test_labels_that_get_equal_logits():
    mapping = estimated("blm", [[2, 1, 4, 0, 1], [0, 3, 0, 1, 3], [0, 0, 0, 0, 0]])
    assert mapping.weights[:, 0].equal(mapping.weights[:, 2])
    assert mapping.indistinct_labels() == [[0, 2], [1, 4]]
    predicted = mapping(random_batch(50, 3, 5)[0]).argmax(1)
    assert set(predicted.tolist()) == {0, 3}  # of equal logits the smallest label
    assert estimated("ilm", [[1, 1], [0, 0]]).indistinct_labels() == []
    assert build_mapping("linear", 4, 50).indistinct_labels() == []

    signed = MatrixMapping("signed", 1, 3, lambda counts: torch.tensor([[0.0, 1.0, -0.0]]))
    signed.observe(torch.zeros(1, 1), torch.tensor([0]))
    with pytest.warns(UserWarning, match="labels 1, 2;"):
        signed.refresh()
    assert signed.indistinct_labels() == [[0, 2]]


def test_equal_columns_with_another_bias_are_distinct():
    mapping = build_mapping("linear", 3, 4)
    with torch.no_grad():
        mapping.matrix.fill_(0.5)
        mapping.offset.copy_(torch.tensor([0.0, 1.0, -0.0, 2.0]))
    assert mapping.indistinct_labels() == [[0, 2]]
    assert mapping.bias.tolist() == [0, 1, 0, 2] and not mapping.bias.requires_grad


def test_ablations():
    logits, labels = torch.tensor([[0.5, 0.3, 0.2], [0.1, 0.6, 0.3]]).log(), torch.tensor([0, 1])
    mapping = build_mapping("blmpp", 3, 2, bayes=False, topk=False)
    assert mapping.k == 3
    mapping.observe(logits, labels)
    mapping.refresh()
    torch.testing.assert_close(mapping.weights, logits.exp().T)
    assert estimated("blm", [[2, 1], [2, 0]], bayes=False).weights.tolist() == [[0.5, 1], [0.5, 0]]


@pytest.mark.parametrize("layout", ["dense", "sparse"])
@pytest.mark.parametrize("name", MAPPINGS)
def test_state_goes_through_a_file_in_mid_epoch(name, layout, request):
    if layout == "sparse":
        request.getfixturevalue("sparse")
    batches = [random_batch(40, 20, 6, seed=seed) for seed in range(4)]
    whole = build_mapping(name, 20, 6, seed=1)
    whole.observe(*batches[0])
    whole.refresh()
    whole.observe(*batches[1])
    whole.observe(*batches[2])
    file = io.BytesIO()
    torch.save(whole.state_dict(), file)
    file.seek(0)
    resumed = build_mapping(name, 20, 6, seed=2)
    resumed.observe(*batches[0])  # what it held is replaced
    resumed.load_state_dict(torch.load(file, weights_only=True))
    assert resumed.weights.equal(whole.weights)
    for mapping in (whole, resumed):
        mapping.observe(*batches[3])
        mapping.refresh()
    assert resumed.weights.equal(whole.weights)


def test_state_before_the_first_estimate_and_of_another_shape():
    state = build_mapping("blm", 5, 3).state_dict()
    mapping = estimated("blm", [[1, 1, 1]] * 5)
    mapping.load_state_dict(state)
    assert not mapping.ready
    with pytest.raises(RuntimeError, match="size mismatch"):
        build_mapping("blm", 5, 4).load_state_dict(state)


# Memory and several processes


def peak_megabytes(num_samples, path):
    """Highest sum of CPU allocations alive at once while estimating at the size of SUN397 with CLIP."""
    logits = random_batch(256, 32157, 397)[0]
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        mapping = build_mapping("blmpp", 32157, 397)
        for first in range(0, num_samples, 256):
            size = min(256, num_samples - first)
            mapping.observe(logits[:size], torch.arange(first, first + size) % 397)
        mapping.refresh()
    profiler.export_chrome_trace(str(path))
    events = json.loads(path.read_text())["traceEvents"]
    allocated = [event["args"] for event in events if event["name"] == "[memory]"]
    totals = [entry["Total Allocated"] for entry in allocated]
    return (max(totals) - (totals[0] - allocated[0]["Bytes"])) / 1e6


def test_peak_memory_does_not_grow_with_the_samples(tmp_path):
    few, many = (peak_megabytes(n, tmp_path / f"{n}.json") for n in (2_000, 20_000))
    assert 200 < few < 250
    assert many == pytest.approx(few, rel=0.05)


LAYOUTS = {"dense": (2**30, 1), "sparse": (0, 1), "mixed": (0, 0.3)}  # mixed: dense where samples are many


def estimate_on_a_rank(rank, address, folder):
    """One of two processes: the first sees 80 of 90 samples, and NaN once."""
    dist.init_process_group("gloo", init_method=address, rank=rank, world_size=2)
    logits, labels = random_batch(90, 20, 6)
    share, nothing = slice(80 * rank, 80 + 10 * rank), slice(0, 0)
    weights = {}
    for layout, (statistics_module.DENSE_BYTES, statistics_module._DENSE_SHARE) in LAYOUTS.items():
        for name in ESTIMATED:
            mapping = build_mapping(name, 20, 6)
            mapping.observe(logits[share], labels[share])
            mapping.all_reduce_statistics()
            mapping.refresh()
            weights[layout, name] = mapping.weights.clone()
            mapping.observe(logits[nothing if rank else ...], labels[nothing if rank else ...])
            mapping.all_reduce_statistics()
            mapping.refresh()
            weights[layout, name, "one rank saw nothing"] = mapping.weights
    mapping.observe(logits * (math.nan if rank == 0 else 1), labels)
    mapping.all_reduce_statistics()
    with pytest.raises(FloatingPointError):
        mapping.refresh()
    torch.save(weights, f"{folder}/{rank}.pt")
    dist.destroy_process_group()


def test_ranks_share_their_statistics(tmp_path):
    arguments = f"file://{tmp_path}/rendezvous", str(tmp_path)
    torch.multiprocessing.spawn(estimate_on_a_rank, arguments, nprocs=2)
    first, second = (torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(2))
    assert len(first) == 2 * len(LAYOUTS) * len(ESTIMATED)
    for key, weights in first.items():
        assert weights.equal(second[key])
        expected = build_mapping(key[1], 20, 6)
        expected.observe(*random_batch(90, 20, 6))
        expected.all_reduce_statistics()  # no process group: nothing to do
        expected.refresh()
        torch.testing.assert_close(weights, expected.weights, rtol=2e-7, atol=0)
