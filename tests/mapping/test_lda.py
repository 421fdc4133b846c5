"""The discriminant mapping by hand, against scikit-learn, against brute force, and at its edges."""

import io
import math
import multiprocessing
import re
import sys
import warnings
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from sklearn.discriminant_analysis import LinearDiscriminantAnalysis

from mapping import build_mapping, discriminant, moments
from mapping.discriminant import CANDIDATES, lda, leave_one_out, tuned_lda, within_covariance
from mapping.moments import Moments

DEVICES = ["cpu"] + ["cuda"] * torch.cuda.is_available()
SHRINKAGES = (0.01, 0.3, "auto")


def task(seed, n=200, num_source=12, num_target=5, distance=1.0):
    """Gaussian classes with a covariance in common and more samples of the later labels."""
    generator = torch.Generator().manual_seed(seed)
    labels = (num_target * torch.rand(n, generator=generator).sqrt()).long()
    means = 2 + distance * torch.randn(num_target, num_source, generator=generator)
    mixed = torch.randn(num_source, num_source, generator=generator)
    return means[labels] + torch.randn(n, num_source, generator=generator) @ mixed, labels


def estimated(logits, labels, num_target, batch_size=1000, device="cpu", **settings):
    mapping = build_mapping("lda", logits.shape[1], num_target, **settings).to(device)
    for batch in zip(logits.split(batch_size), labels.split(batch_size), strict=True):
        mapping.observe(*batch)
    mapping.refresh()
    return mapping


def observed(logits, labels, num_target, batch_size=1000, sampled=False):
    statistics = Moments(logits.shape[1], num_target, sampled)
    for batch in zip(logits.split(batch_size), labels.split(batch_size), strict=True):
        statistics.observe(*batch)
    return statistics.table()


def direct(logits, labels, num_target):
    """Counts, means and covariance in the obvious way."""
    logits = logits.double()
    means = torch.stack([logits[labels == t].mean(0) for t in range(num_target)])
    distance = logits - means[labels]
    return labels.bincount(minlength=num_target), means, distance.T @ distance / len(logits)


@pytest.mark.parametrize("shrinkage, weights, squares", [
    # Σ = diag(1, 0), tr(Σ)/2 = 1/2, means (1, 0) and (1, 4).
    (0.5, [[4 / 3, 4 / 3], [0, 16]], [4 / 3, 4 / 3 + 64]),  # Σ_ρ = diag(3/4, 1/4)
    (1.0, [[2.0, 2.0], [0, 8]], [2, 34]),  # 1/2 I
    (0.0, [[1.0, 1.0], [0, 0]], [1, 1]),  # singular: nothing of the direction without spread
])  # fmt: skip
def test_by_hand(shrinkage, weights, squares):
    logits = torch.tensor([[0.0, 0], [2, 0], [0, 4], [2, 4], [0, 4], [2, 4]])
    mapping = estimated(logits, torch.tensor([0, 0, 1, 1, 1, 1]), 2, shrinkage=shrinkage)
    bias = torch.tensor([math.log(1 / 3), math.log(2 / 3)]) - torch.tensor(squares) / 2
    torch.testing.assert_close(mapping.weights, torch.tensor(weights))
    torch.testing.assert_close(mapping.bias, bias)
    torch.testing.assert_close(mapping(logits), logits @ torch.tensor(weights) + bias)
    assert (mapping.shrinkage, mapping.temperature) == (shrinkage, 1)


@pytest.mark.filterwarnings("ignore:Only one sample available")
@pytest.mark.parametrize("shrinkage", [0.001, 0.1, 0.7, 1.0])
@pytest.mark.parametrize("shape", [(200, 12, 5), (60, 100, 7), (300, 40, 2)], ids=str)
def test_equals_scikit_learn(shape, shrinkage):
    n, num_source, num_target = shape
    logits, labels = task(num_source, n, num_source, num_target)
    theirs = LinearDiscriminantAnalysis(solver="lsqr", shrinkage=shrinkage).fit(logits.double().numpy(), labels.numpy())
    logits_of_new, _ = task(1, 50, num_source, num_target)
    expected = torch.from_numpy(theirs.decision_function(logits_of_new.double().numpy()))

    def decisions(logits):
        """As theirs: of two classes the difference; up to a constant for each sample."""
        logits = logits.double()
        return logits[:, 1] - logits[:, 0] if num_target == 2 else logits - logits.mean(1, keepdim=True)

    if num_target > 2:
        expected -= expected.mean(1, keepdim=True)
    weights, bias = lda(*direct(logits, labels, num_target), shrinkage)
    got = decisions(logits_of_new.double() @ weights + bias)
    torch.testing.assert_close(got, expected, rtol=1e-6, atol=1e-6)
    mapping = estimated(logits, labels, num_target, batch_size=17, shrinkage=shrinkage)
    predicted = torch.from_numpy(theirs.predict(logits_of_new.double().numpy()))
    assert mapping(logits_of_new).argmax(1).equal(predicted)
    largest = float(expected.abs().max())
    torch.testing.assert_close(decisions(mapping(logits_of_new)), expected, rtol=1e-6, atol=2e-6 * largest)


def test_statistics_are_those_of_the_obvious_way():
    logits, labels = task(0)
    counts, means, covariance = direct(logits, labels, 5)
    for batch_size in (1000, 12, 1):
        table = observed(logits, labels, 5, batch_size)
        assert table.counts.equal(counts)
        torch.testing.assert_close(table.means, means, rtol=1e-12, atol=1e-14)
        torch.testing.assert_close(table.scatter, len(logits) * covariance, rtol=1e-12, atol=1e-10)
        torch.testing.assert_close(within_covariance(*table[:3]), covariance, rtol=1e-12, atol=1e-12)


def test_scatter_far_from_zero_loses_no_digits():
    logits, labels = task(0)
    far = (4096 * logits).round() / 4096  # so that adding 1000 rounds nothing
    near, distant = observed(far, labels, 5, 12), observed(far + 1000, labels, 5, 12)
    torch.testing.assert_close(distant.scatter, near.scatter, rtol=1e-11, atol=1e-8)


@pytest.mark.parametrize("shrinkage", SHRINKAGES)
@pytest.mark.parametrize("device", DEVICES)
def test_one_batch_or_seventeen(shrinkage, device):
    logits, labels = task(3)
    whole = estimated(logits, labels, 5, shrinkage=shrinkage)
    parts = estimated(logits.to(device), labels.to(device), 5, batch_size=12, shrinkage=shrinkage)
    torch.testing.assert_close(parts.weights, whole.weights, rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(parts.bias, whole.bias, rtol=1e-6, atol=1e-7)
    there = estimated(logits.to(device), labels.to(device), 5, device=device, shrinkage=shrinkage)
    assert there.weights.device.type == there.bias.device.type == device
    torch.testing.assert_close(there.weights.cpu(), whole.weights, rtol=1e-6, atol=1e-7)
    assert (parts.shrinkage, parts.temperature) == (whole.shrinkage, pytest.approx(whole.temperature))


@pytest.mark.parametrize("sample_size", [30, 100, 2048])
def test_the_sample_depends_on_neither_batches_nor_order(sample_size, monkeypatch):
    monkeypatch.setattr(moments, "SAMPLE_SIZE", sample_size)
    logits, labels = task(4)
    logits[50:60], labels[50:60] = logits[40:50], labels[40:50]  # what occurs twice may be drawn twice
    order = torch.randperm(200, generator=torch.Generator().manual_seed(1))
    first = observed(logits, labels, 5, 7, sampled=True)
    second = observed(logits[order], labels[order], 5, 90, sampled=True)
    assert len(first.rows) == min(200, sample_size)
    assert first.rows.equal(second.rows) and first.labels.equal(second.labels)
    pairs = {(*row, label) for row, label in zip(logits.tolist(), labels.tolist(), strict=True)}
    assert pairs >= {(*row, label) for row, label in zip(first.rows.tolist(), first.labels.tolist(), strict=True)}
    assert len(first.labels.unique()) >= 4


@pytest.mark.parametrize("shrinkage", [0.01, 0.5])
@pytest.mark.parametrize("block", [1, 2**22])
def test_leave_one_out_is_leaving_one_out(shrinkage, block, monkeypatch):
    monkeypatch.setattr(discriminant, "_BLOCK_CELLS", block)
    logits, labels = task(5, n=40)
    counts, means, covariance = direct(logits, labels, 5)
    logits, n = logits.double(), len(logits)
    values, vectors = torch.linalg.eigh(covariance)
    judged = counts[labels] > 1
    got = leave_one_out(counts, means @ vectors, values, logits[judged] @ vectors, labels[judged], shrinkage)
    expected = []
    for left_out in judged.nonzero().flatten().tolist():
        z, label = logits[left_out], labels[left_out]
        others = torch.arange(n) != left_out
        centres = torch.stack([logits[others & (labels == t)].mean(0) for t in range(5)])
        distance = logits[others] - centres[labels[others]]
        shrunk = (1 - shrinkage) * distance.T @ distance / n
        shrunk += shrinkage * covariance.diagonal().mean() * torch.eye(len(z))
        offset = z - means
        offset[label] *= ((counts[label] + 1) / (counts[label] - 1)).double().sqrt()
        expected.append((counts / n).log() - (offset @ torch.linalg.inv(shrunk) * offset).sum(1) / 2)
    torch.testing.assert_close(got, torch.stack(expected).double(), rtol=1e-5, atol=1e-5)


def test_shrinkage_and_temperature_are_the_best_of_their_kind():
    logits, labels = task(6, n=150, num_source=40)
    counts, means, covariance = direct(logits, labels, 5)
    values, vectors = torch.linalg.eigh(covariance)
    weights, bias, shrinkage, temperature = tuned_lda(counts, means, covariance, logits, labels)

    def judged(candidate):
        return leave_one_out(counts, means @ vectors, values, logits.double() @ vectors, labels, candidate)

    errors = {candidate: int((judged(candidate).argmax(1) != labels).sum()) for candidate in CANDIDATES}
    assert errors[shrinkage] == min(errors.values()) < max(errors.values())

    def loss(temperature):
        return float(torch.nn.functional.cross_entropy(judged(shrinkage) / temperature, labels))

    assert temperature > 2 and loss(temperature) < min(loss(1), loss(0.99 * temperature), loss(1.01 * temperature))
    expected_weights, expected_bias = lda(counts, means, covariance, shrinkage)
    torch.testing.assert_close(weights * temperature, expected_weights)
    torch.testing.assert_close(bias * temperature, expected_bias)


def test_tuning_serves_samples_that_were_not_seen():
    logits, labels = task(7, n=1200, num_source=60, distance=0.3)
    new_logits, new_labels = logits[200:], labels[200:]
    outcomes = {}
    for shrinkage in (0.001, 0.99, "auto"):
        scores = estimated(logits[:200], labels[:200], 5, shrinkage=shrinkage)(new_logits)
        accuracy = float((scores.argmax(1) == new_labels).float().mean())
        outcomes[shrinkage] = accuracy, float(torch.nn.functional.cross_entropy(scores, new_labels))
    accuracy, loss = outcomes["auto"]
    assert accuracy > max(outcomes[0.001][0], outcomes[0.99][0]) - 0.02
    assert loss < min(outcomes[0.001][1], outcomes[0.99][1])


# Edges


@pytest.mark.parametrize("shrinkage", [0, *SHRINKAGES])
def test_absent_labels_are_never_predicted(shrinkage):
    logits, labels = task(8, num_target=3)
    mapping = build_mapping("lda", 12, 6, shrinkage=shrinkage)
    mapping.observe(logits, 2 * labels)
    with pytest.warns(UserWarning, match="lda: no training sample of .* labels 1, 3, 5; they are never predicted"):
        mapping.refresh()
    present = estimated(logits, labels, 3, shrinkage=shrinkage)
    assert mapping.weights[:, ::2].equal(present.weights) and mapping.bias[::2].equal(present.bias)
    mapped = mapping(1000 * logits)
    assert mapped.isfinite().all() and set(mapped.argmax(1).tolist()) <= {0, 2, 4}
    assert mapping.weights[:, 1].tolist() == [torch.tensor(1 / 12).item()] * 12


@pytest.mark.parametrize("shrinkage", [0, *SHRINKAGES])
@pytest.mark.parametrize("n, num_source, num_target", [(1, 4, 3), (2, 4, 1), (5, 3, 40), (20, 50, 4), (30, 1, 2)])
@pytest.mark.filterwarnings("ignore:lda")
def test_few_samples_labels_or_logits(n, num_source, num_target, shrinkage):
    logits, labels = task(9, n, num_source, num_target)
    mapping = estimated(logits, labels, num_target, shrinkage=shrinkage)
    assert mapping.weights.isfinite().all() and mapping.bias.isfinite().all()
    assert set(mapping(logits).argmax(1).tolist()) <= set(labels.tolist())


@pytest.mark.parametrize("shrinkage", [0, *SHRINKAGES])
def test_logits_that_are_all_alike_leave_the_shares(shrinkage):
    mapping = estimated(torch.full((6, 4), 0.1), torch.tensor([0, 1, 1, 1, 2, 2]), 3, shrinkage=shrinkage)
    expected = torch.tensor([1 / 6, 1 / 2, 1 / 3]).expand(2, 3)
    torch.testing.assert_close(mapping(torch.full((2, 4), 0.1)).softmax(1), expected, rtol=1e-5, atol=0)


@pytest.mark.parametrize("shrinkage", [0, *SHRINKAGES])
@pytest.mark.parametrize("copies", [1, 3])
def test_without_spread_the_nearest_mean_is_predicted(shrinkage, copies):
    logits = torch.randn(5, 20, generator=torch.Generator().manual_seed(0))
    mapping = estimated(logits.repeat(copies, 1), torch.arange(5).repeat(copies), 5, shrinkage=shrinkage)
    new = logits.mean(0) + torch.randn(200, 20, generator=torch.Generator().manual_seed(1))
    nearest = torch.cdist(new, logits).argmin(1)
    assert mapping(new).argmax(1).equal(nearest) and len(nearest.unique()) == 5


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_logits_that_are_not_finite(value):
    logits, labels = task(0)
    mapping = estimated(logits, labels, 5)
    before = mapping.weights
    bad = logits.clone()
    bad[3, 2] = value
    mapping.observe(bad, labels)
    with pytest.raises(FloatingPointError, match="logits were not finite"):
        mapping.refresh()
    assert mapping.weights.equal(before)
    mapping.observe(logits, labels)
    mapping.refresh()
    assert mapping.weights.equal(before)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_precision_of_logits(dtype):
    logits, labels = task(0)
    logits = logits.to(dtype)
    expected = estimated(logits.float(), labels, 5)
    assert estimated(logits, labels, 5).weights.allclose(expected.weights, rtol=1e-4)


def peak_of_an_estimate(num_source, num_target, shrinkage):
    """By how many bytes the process exceeds, at its highest, what it holds after a small estimate."""
    torch.set_num_threads(1)
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(3000, num_source, generator=generator)
    labels = torch.randint(num_target, (3000,), generator=generator)
    warnings.simplefilter("ignore")

    def peak():
        return 1024 * int(re.search(r"VmHWM:\s*(\d+) kB", Path("/proc/self/status").read_text())[1])

    estimated(logits[:, :50], labels % 10, 10, shrinkage=shrinkage)
    Path("/proc/self/clear_refs").write_text("5")
    before = peak()
    estimated(logits, labels, num_target, shrinkage=shrinkage)
    return peak() - before


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize("shrinkage", [0.1, "auto"])
@pytest.mark.parametrize("num_source, num_target", [(1000, 20), (300, 600)])
def test_memory_is_what_it_says(num_source, num_target, shrinkage):
    mapping = build_mapping("lda", num_source, num_target, shrinkage=shrinkage)
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        peak = pool.apply(peak_of_an_estimate, (num_source, num_target, shrinkage))
    assert peak < mapping.memory_needed < 4 * peak + 2**28


def test_memory_of_21841_pretrained_labels_is_known_beforehand():
    assert 25e9 < build_mapping("lda", 21841, 10, shrinkage=0.1).memory_needed < 30e9
    assert 35e9 < build_mapping("lda", 21841, 10).memory_needed < 45e9
    assert build_mapping("blm", 21841, 10).memory_needed == 0


# State and several processes


@pytest.mark.parametrize("shrinkage", SHRINKAGES)
@pytest.mark.parametrize("sample_size", [30, 2048])
def test_resumed_in_mid_epoch(shrinkage, sample_size, monkeypatch):
    monkeypatch.setattr(moments, "SAMPLE_SIZE", sample_size)
    logits, labels = task(10)
    whole = build_mapping("lda", 12, 5, shrinkage=shrinkage)
    for batch in zip(logits[:100].split(20), labels[:100].split(20), strict=True):
        whole.observe(*batch)
    file = io.BytesIO()
    torch.save(whole.state_dict(), file)
    file.seek(0)
    resumed = build_mapping("lda", 12, 5, shrinkage=shrinkage)
    resumed.observe(logits, labels)  # what it held is replaced
    resumed.load_state_dict(torch.load(file, weights_only=True))
    for mapping in (whole, resumed):
        mapping.observe(logits[100:], labels[100:])
        mapping.refresh()
    assert resumed.weights.equal(whole.weights) and resumed.bias.equal(whole.bias)
    assert (resumed.shrinkage, resumed.temperature) == (whole.shrinkage, whole.temperature)


@pytest.mark.parametrize("name, value", [
    ("counts", torch.tensor([1, 2, 3, 4, 5])), ("counts", torch.tensor([-1, 51, 50, 50, 50])),
    ("sums", torch.zeros(4, 12, dtype=torch.float64)), ("scatter", torch.zeros(12, 12)),
    ("rows", torch.zeros(7, 12)), ("labels", torch.full((200,), 5)), ("labels", torch.zeros(200)),
])  # fmt: skip
def test_state_that_is_not_one_of_this_mapping(name, value):
    mapping = build_mapping("lda", 12, 5)
    mapping.observe(*task(10))
    state = mapping.state_dict()
    state["_extra_state"]["statistics"][name] = value
    with pytest.raises(ValueError, match="not the statistics of 12 pretrained and 5 labels"):
        build_mapping("lda", 12, 5).load_state_dict(state)


def estimate_on_a_rank(rank, address, folder):
    """One of three processes: the last sees nothing."""
    dist.init_process_group("gloo", init_method=address, rank=rank, world_size=3)
    logits, labels = task(11)
    share = (slice(0, 130), slice(130, 200), slice(0, 0))[rank]
    results = []
    for moments.SAMPLE_SIZE in (30, 2048):
        for shrinkage in SHRINKAGES:
            mapping = build_mapping("lda", 12, 5, shrinkage=shrinkage)
            mapping.observe(logits[share], labels[share])
            mapping.all_reduce_statistics()
            mapping.refresh()
            results.append((mapping.weights, mapping.bias, mapping.shrinkage))
    torch.save(results, f"{folder}/{rank}.pt")
    dist.destroy_process_group()


def test_one_process_or_three(tmp_path, monkeypatch):
    arguments = f"file://{tmp_path}/rendezvous", str(tmp_path)
    torch.multiprocessing.spawn(estimate_on_a_rank, arguments, nprocs=3)
    ranks = [torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(3)]
    results = iter(zip(*ranks, strict=True))
    for sample_size in (30, 2048):
        monkeypatch.setattr(moments, "SAMPLE_SIZE", sample_size)
        for shrinkage in SHRINKAGES:
            expected = estimated(*task(11), 5, shrinkage=shrinkage)
            (weights, bias, chosen), *others = next(results)
            assert all(weights.equal(w) and bias.equal(b) for w, b, _ in others)
            torch.testing.assert_close(weights, expected.weights, rtol=1e-6, atol=1e-7)
            torch.testing.assert_close(bias, expected.bias, rtol=1e-6, atol=1e-7)
            assert chosen == expected.shrinkage
