"""The discriminant mapping by hand, against scikit-learn, against brute force, and at its edges."""

import io
import itertools
import math
import multiprocessing
import re
import sys
import warnings
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from scipy.optimize import minimize
from sklearn.covariance import OAS
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


def relative(values):
    """To the mean over the labels, the last axis: a mapping leaves out what all of them have in common."""
    return values - values.mean(-1, keepdim=True)


def smoothed_loss(scores, labels):
    smoothing = 1 / (len(labels) + 2)
    return float(torch.nn.functional.cross_entropy(scores, labels, label_smoothing=smoothing))


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
    torch.testing.assert_close(mapping.weights, relative(torch.tensor(weights)))
    torch.testing.assert_close(mapping.bias, relative(bias))
    torch.testing.assert_close(mapping(logits), relative(logits @ torch.tensor(weights) + bias))
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
        torch.testing.assert_close(within_covariance(*table[:3])[0], covariance, rtol=1e-12, atol=1e-12)


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


@pytest.mark.parametrize("shrinkage", [CANDIDATES[0], 0.01, 0.5])
@pytest.mark.parametrize("num_source, block", [(12, 1), (12, 2**22), (60, 2**22)])
def test_leave_one_out_is_leaving_one_out(num_source, block, shrinkage, monkeypatch):
    monkeypatch.setattr(discriminant, "_BLOCK_CELLS", block)
    logits, labels = task(5, n=40, num_source=num_source)
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
        shrunk += shrinkage * covariance.diagonal().mean() * torch.eye(len(z), dtype=torch.float64)
        offset = z - means
        size = int(counts[label])
        offset[label] *= math.sqrt((size + 1) / (size - 1))
        expected.append((counts.double() / n).log() - (offset @ torch.linalg.inv(shrunk) * offset).sum(1) / 2)
    torch.testing.assert_close(got, torch.stack(expected), rtol=1e-8, atol=1e-8)


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
        return smoothed_loss(judged(shrinkage) / temperature, labels)

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


# With a prior


def helpful_prior(logits, labels, num_target, share=0.7, scale=3.0):
    """A classifier that is right on about this share of the samples, by way of logits that are its own."""
    generator = torch.Generator().manual_seed(12)
    said = torch.where(
        torch.rand(len(labels), generator=generator) < share,
        labels,
        torch.randint(num_target, labels.shape, generator=generator),
    )
    hints = torch.nn.functional.one_hot(said, num_target).float()
    prior = torch.cat([torch.zeros(logits.shape[1], num_target), scale * torch.eye(num_target)])
    return torch.cat([logits, hints], 1), prior


def test_prior_by_hand_where_nothing_can_be_left_out():
    """Four classes of one image: the means' covariance is diag(4, 4), Σ_ρ the same for any ρ, τ = 8/4."""
    logits = torch.tensor([[2.0, 2], [2, -2], [-2, 2], [-2, -2]])
    prior = torch.tensor([[0.5, 0.5, -0.5, -0.5], [0.5, -0.5, 0.5, -0.5]])
    for shrinkage in ("auto", 1.0):
        mapping = estimated(logits, torch.arange(4), 4, shrinkage=shrinkage, prior=prior)
        # Their own logit is 2, of the others' one is -2 and two are 0: surer is better, up to β = 1.
        torch.testing.assert_close(mapping.weights, logits.T / 4 / 2 + prior)
        torch.testing.assert_close(mapping.bias, torch.zeros(4))
        chosen = mapping.shrinkage, mapping.temperature, mapping.prior_weight
        assert chosen == (1, pytest.approx(2), pytest.approx(1))
    wrong = estimated(logits, torch.arange(4), 4, prior=-prior)
    assert wrong.prior_weight == 0 and "_prior" not in wrong.state_dict()


def test_weighing_by_hand():
    """Rows on which one of the two speaks alone: right three times in four, less a tenth of the way to one half."""
    scores, prior, labels = torch.zeros(8, 2).double(), torch.zeros(8, 2).double(), torch.zeros(8).long()
    scores[:4, 0], prior[4:, 0] = 5, 2
    labels[[0, 4]] = 1
    loss, temperature, prior_weight = discriminant._weigh(scores, prior, labels)
    odds = math.log(0.725 / 0.275)
    assert (temperature, prior_weight) == (pytest.approx(5 / odds), pytest.approx(odds / 2))
    assert loss == pytest.approx(-0.725 * math.log(0.725) - 0.275 * math.log(0.275))


@pytest.mark.parametrize("scale", [0.1, 1.0, 1e3])
@pytest.mark.parametrize("truth", [(0.0, 0.0), (0.3, 0.7), (0.05, 0.0), (0.0, 0.6), (4.0, 0.5), (0.2, 3.0)])
def test_weights_are_those_of_the_least_log_loss(truth, scale):
    generator = torch.Generator().manual_seed(round(10 * scale))
    scores, prior = torch.randn(2, 300, 7, generator=generator, dtype=torch.float64)
    prior = (prior + scores) * 2
    labels = (truth[0] * scores + truth[1] * prior).softmax(1).multinomial(1, generator=generator)[:, 0]
    scores = scale * scores
    loss, temperature, prior_weight = discriminant._weigh(scores, prior, labels)

    def at(point):
        logits = torch.from_numpy(point[0] * scores.numpy() + point[1] * prior.numpy())
        return smoothed_loss(logits, labels)

    assert loss == pytest.approx(at((1 / temperature, prior_weight)), abs=1e-9)
    assert 1 <= temperature <= 1000001 and 0 <= prior_weight <= 1
    theirs = [minimize(at, (x, y), bounds=((1e-6, 1), (0, 1)), tol=1e-12).fun for x, y in ((0.01, 0.1), (0.5, 0.9))]
    assert loss < min(theirs) + 1e-7


@pytest.mark.parametrize("shrinkage", ["auto", 0.3])
def test_prior_and_images_together_beat_each_alone(shrinkage):
    generator = torch.Generator().manual_seed(13)
    labels = torch.randint(5, (1200,), generator=generator)
    images = torch.randn(5, 30, generator=generator)[labels] * 0.4 + torch.randn(1200, 30, generator=generator)
    logits, prior = helpful_prior(images, labels, 5, share=0.5)
    mapping = estimated(logits[:200], labels[:200], 5, shrinkage=shrinkage, prior=prior)
    alone = estimated(images[:200], labels[:200], 5, shrinkage=shrinkage)
    new, truth = logits[200:], labels[200:]
    outcomes = [
        (float((scores.argmax(1) == truth).double().mean()), float(torch.nn.functional.cross_entropy(scores, truth)))
        for scores in (mapping(new), alone(images[200:]), new @ prior)
    ]
    assert outcomes[0][0] > max(accuracy for accuracy, _ in outcomes[1:]) + 0.02
    assert outcomes[0][1] < min(loss for _, loss in outcomes[1:])
    assert mapping.temperature > 1 and 0 < mapping.prior_weight < 1 and (shrinkage in ("auto", mapping.shrinkage))
    counts, means, covariance = direct(logits[:200], labels[:200], 5)
    weights, bias = lda(counts, means, covariance, mapping.shrinkage)
    expected = weights / mapping.temperature + mapping.prior_weight * prior
    torch.testing.assert_close(mapping.weights.double(), relative(expected), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(mapping.bias.double(), relative(bias) / mapping.temperature, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("shrinkage", [1e-6, 1e-4, 0.1])
def test_float32_loses_no_decision_to_what_labels_have_in_common(shrinkage):
    logits, labels = task(3, 90, 300, 5)
    logits = logits + 30
    weights, bias = lda(*direct(logits, labels, 5), shrinkage)
    new = task(4, 200, 300, 5)[0] + 30
    expected = relative(new.double() @ weights + bias)
    got = estimated(logits, labels, 5, shrinkage=shrinkage)(new).double()
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-4 * float(expected.abs().max()))


def test_a_prior_of_noise_is_left_out():
    logits, labels = task(14, n=2000, distance=0.5)
    prior = 5 * torch.randn(12, 5, generator=torch.Generator().manual_seed(2))
    with_prior, without = estimated(logits, labels, 5, prior=prior), estimated(logits, labels, 5)
    assert with_prior.prior_weight < 0.02
    agree = with_prior(logits).argmax(1) == without(logits).argmax(1)
    assert float(agree.double().mean()) > 0.98


def test_images_of_noise_leave_nothing_to_be_sure_of():
    _, labels = task(15, n=2000)
    noise, prior = torch.randn(2000, 12, generator=torch.Generator().manual_seed(3)), torch.randn(12, 5)
    mapping = estimated(noise, labels, 5, prior=prior)
    assert mapping.prior_weight < 0.05
    shares = labels.bincount(minlength=5) / 2000
    assert float((mapping(noise).softmax(1) - shares).abs().max()) < 0.15


def test_few_images_do_not_harm_a_good_prior():
    """Two samples of each of ten classes in 400 dimensions, and a prior that is right nine times in ten."""
    labels = torch.arange(10).repeat(100)
    noise = torch.randn(1000, 400, generator=torch.Generator().manual_seed(4))
    logits, prior = helpful_prior(noise, labels, 10, share=0.9)
    mapping = estimated(logits[:20], labels[:20], 10, prior=prior)
    accuracy = [float((scores.argmax(1) == labels).double().mean()) for scores in (mapping(logits), logits @ prior)]
    assert accuracy[0] > accuracy[1] - 0.01 and mapping.prior_weight > 0.3 and mapping.temperature > 2


# Edges


@pytest.mark.parametrize("with_prior", [False, True])
@pytest.mark.parametrize("shrinkage", [0, *SHRINKAGES])
def test_absent_labels_are_never_predicted(shrinkage, with_prior):
    logits, labels = task(8, num_target=3)
    prior = torch.randn(12, 6, generator=torch.Generator().manual_seed(5)) if with_prior else None
    mapping = build_mapping("lda", 12, 6, shrinkage=shrinkage, prior=prior)
    mapping.observe(logits, 2 * labels)
    with pytest.warns(UserWarning, match="lda: no training sample of .* labels 1, 3, 5; they are never predicted"):
        mapping.refresh()
    present = estimated(logits, labels, 3, shrinkage=shrinkage, prior=prior[:, ::2] if with_prior else None)
    assert mapping.weights[:, ::2].equal(present.weights) and mapping.bias[::2].equal(present.bias)
    mapped = mapping(1000 * logits)
    assert mapped.isfinite().all() and set(mapped.argmax(1).tolist()) <= {0, 2, 4}
    assert mapping.weights[:, 1].tolist() == [torch.tensor(1 / 12).item()] * 12


@pytest.mark.parametrize("shrinkage", [0, *SHRINKAGES])
@pytest.mark.parametrize("n, num_source, num_target", [(1, 4, 3), (2, 4, 1), (5, 3, 40), (20, 50, 4), (30, 1, 2)])
@pytest.mark.parametrize("with_prior", [False, True])
@pytest.mark.filterwarnings("ignore:lda")
def test_few_samples_labels_or_logits(n, num_source, num_target, shrinkage, with_prior):
    logits, labels = task(9, n, num_source, num_target)
    prior = torch.ones(num_source, num_target) if with_prior else None
    mapping = estimated(logits, labels, num_target, shrinkage=shrinkage, prior=prior)
    assert mapping.weights.isfinite().all() and mapping.bias.isfinite().all()
    assert set(mapping(logits).argmax(1).tolist()) <= set(labels.tolist())


@pytest.mark.parametrize("shrinkage", [0, *SHRINKAGES])
def test_logits_that_are_all_alike_leave_the_shares(shrinkage):
    mapping = estimated(torch.full((6, 4), 0.1), torch.tensor([0, 1, 1, 1, 2, 2]), 3, shrinkage=shrinkage)
    expected = torch.tensor([1 / 6, 1 / 2, 1 / 3]).expand(2, 3)
    torch.testing.assert_close(mapping(torch.full((2, 4), 0.1)).softmax(1), expected, rtol=1e-5, atol=0)


@pytest.mark.parametrize("shrinkage", SHRINKAGES)
@pytest.mark.parametrize("copies", [1, 3])
def test_without_spread_the_class_means_tell_of_it(shrinkage, copies):
    logits = torch.randn(5, 20, generator=torch.Generator().manual_seed(0))
    mapping = estimated(logits.repeat(copies, 1), torch.arange(5).repeat(copies), 5, shrinkage=shrinkage)
    new = logits.mean(0) + torch.randn(200, 20, generator=torch.Generator().manual_seed(1))
    counts, means = torch.ones(5), logits.double()
    covariance = torch.cov(means.T, correction=0)
    weights, bias = lda(counts, means, covariance, mapping.shrinkage)
    expected = ((new.double() @ weights + bias) / mapping.temperature).log_softmax(1)
    torch.testing.assert_close(mapping(new).double().log_softmax(1), expected, rtol=1e-4, atol=1e-4)
    assert (mapping.temperature > 1) == (shrinkage == "auto")
    assert shrinkage in ("auto", mapping.shrinkage)
    assert mapping(logits).argmax(1).tolist() == [0, 1, 2, 3, 4]


def test_shrinkage_without_spread_follows_the_means():
    """One sample of each of 40 classes, which differ in few directions, or in all alike."""
    few = torch.randn(40, 60, generator=torch.Generator().manual_seed(0)) / torch.arange(1, 61) ** 2
    alike = torch.randn(40, 60, generator=torch.Generator().manual_seed(0))
    for logits in (few, alike):  # scikit-learn's form leaves out a term or two of the order of 1/60
        expected = OAS().fit(logits.double().numpy()).shrinkage_
        assert estimated(logits, torch.arange(40), 40).shrinkage == pytest.approx(expected, abs=2e-3)


@pytest.mark.parametrize("num_target, each", [(2, 2), (2, 8), (5, 4)])
@pytest.mark.parametrize("with_prior", [False, True])
def test_few_samples_without_an_error_do_not_make_it_sure(num_target, each, with_prior):
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(num_target).repeat(400)
    logits = torch.randn(len(labels), 200, generator=generator)
    logits += 0.3 * torch.randn(num_target, 200, generator=generator)[labels]
    prior = torch.zeros(200, num_target) if with_prior else None
    for start in range(0, 400, 40):
        train = slice(start, start + num_target * each)
        scores = estimated(logits[train], labels[train], num_target, prior=prior)(logits)
        assert float(torch.nn.functional.cross_entropy(scores, labels)) < 0.65


def test_one_pair_of_samples_makes_it_no_surer_than_chance():
    generator = torch.Generator().manual_seed(1)
    labels = torch.arange(50).repeat(10)
    logits = torch.randn(50, 300, generator=generator)[labels]
    logits += 30 * torch.randn(500, 300, generator=generator) / torch.arange(1, 301)
    chosen = torch.cat([torch.arange(50), torch.tensor([50])])
    scores = estimated(logits[chosen], labels[chosen], 50)(logits)
    assert float(torch.nn.functional.cross_entropy(scores, labels)) < math.log(50) + 0.5


def test_means_far_from_zero_leave_no_direction_behind():
    logits = 3 * torch.randn(7, 50, generator=torch.Generator().manual_seed(0)) + 100
    mapping = estimated(logits.repeat(6, 1), torch.arange(7).repeat(6), 7, shrinkage=0)
    assert mapping.weights.abs().max() < 100  # a direction of rounding errors has weights of 1e11
    assert mapping(logits).argmax(1).tolist() == list(range(7))


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_logits_that_are_not_finite(value):
    logits, labels = task(0)
    mapping = estimated(logits, labels, 5)
    before = mapping.weights.clone()
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


def peak_of_an_estimate(num_source, num_target, shrinkage, prior):
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
    estimated(logits, labels, num_target, shrinkage=shrinkage, prior=prior)
    return peak() - before


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize("num_source, num_target, shrinkage, with_prior", [
    (1000, 20, 0.1, False), (1000, 20, "auto", False), (300, 600, "auto", False), (300, 1500, "auto", True),
    (300, 600, 0.1, True),
])  # fmt: skip
def test_memory_is_what_it_says(num_source, num_target, shrinkage, with_prior):
    prior = torch.zeros(num_source, num_target) if with_prior else None
    mapping = build_mapping("lda", num_source, num_target, shrinkage=shrinkage, prior=prior)
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        peak = pool.apply(peak_of_an_estimate, (num_source, num_target, shrinkage, prior))
    assert peak < mapping.memory_needed < 4 * peak + 2**28


def test_memory_of_21841_pretrained_labels_is_known_beforehand():
    assert 25e9 < build_mapping("lda", 21841, 10, shrinkage=0.1).memory_needed < 30e9
    assert 35e9 < build_mapping("lda", 21841, 10).memory_needed < 45e9
    assert build_mapping("blm", 21841, 10).memory_needed == 0


# State and several processes


@pytest.mark.parametrize("shrinkage", SHRINKAGES)
@pytest.mark.parametrize("sample_size", [30, 2048])
@pytest.mark.parametrize("prior", [None, torch.eye(12, 5)], ids=["alone", "prior"])
def test_resumed_in_mid_epoch(shrinkage, sample_size, prior, monkeypatch):
    monkeypatch.setattr(moments, "SAMPLE_SIZE", sample_size)
    logits, labels = task(10)
    whole = build_mapping("lda", 12, 5, shrinkage=shrinkage, prior=prior)
    for batch in zip(logits[:100].split(20), labels[:100].split(20), strict=True):
        whole.observe(*batch)
    file = io.BytesIO()
    torch.save(whole.state_dict(), file)
    file.seek(0)
    resumed = build_mapping("lda", 12, 5, shrinkage=shrinkage, prior=prior)
    resumed.observe(logits, labels)  # what it held is replaced
    resumed.load_state_dict(torch.load(file, weights_only=True))
    for mapping in (whole, resumed):
        mapping.observe(logits[100:], labels[100:])
        mapping.refresh()
    assert resumed.weights.equal(whole.weights) and resumed.bias.equal(whole.bias)
    for name in ("shrinkage", "temperature", "prior_weight"):
        assert getattr(resumed, name) == getattr(whole, name)


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
        for shrinkage, prior in itertools.product(SHRINKAGES, (None, torch.eye(12, 5))):
            mapping = build_mapping("lda", 12, 5, shrinkage=shrinkage, prior=prior)
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
        for shrinkage, prior in itertools.product(SHRINKAGES, (None, torch.eye(12, 5))):
            expected = estimated(*task(11), 5, shrinkage=shrinkage, prior=prior)
            (weights, bias, chosen), *others = next(results)
            assert all(weights.equal(w) and bias.equal(b) for w, b, _ in others)
            torch.testing.assert_close(weights, expected.weights, rtol=1e-6, atol=1e-7)
            torch.testing.assert_close(bias, expected.bias, rtol=1e-6, atol=1e-7)
            assert chosen == expected.shrinkage
