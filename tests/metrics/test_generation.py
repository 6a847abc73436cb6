"""Distances between sets of features, against torch-fidelity, clean-fid and prdc, slow loops and closed forms.

The pinned values were printed by torch-fidelity 0.4.0 (Fréchet, kernel, precision and recall, Inception score),
clean-fid 0.1.35 (Fréchet and kernel, equal to 12 digits) and prdc 0.2, for the features that `sets` returns.
"""

import logging
import math
import warnings

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from triptych.errors import ConfigError, DataError
from triptych.metrics import kernel_distance as kernel
from triptych.metrics.frechet_distance import FeatureMoments, Moments, frechet_distance, sampling_floor
from triptych.metrics.generation import (
    ExtractorOutput,
    FeatureStatistics,
    GenerationMetrics,
    InceptionScore,
    Statistics,
    compute_generation_metrics,
)
from triptych.metrics.kernel_distance import kernel_distance, kernel_distance_of_subsets
from triptych.metrics.precision_recall import density_coverage, precision_recall


def sets(n, m, d, rank, seed):
    """Return two sets of features of rank `rank` that differ in mean and variance."""
    rng = np.random.default_rng(seed)
    mix = rng.standard_normal((rank, d)) / np.sqrt(rank)
    x = rng.standard_normal((n, rank)) @ mix + 0.3
    y = (rng.standard_normal((m, rank)) * np.linspace(0.6, 1.4, rank)) @ mix
    y = y + 0.3 + 0.1 * rng.standard_normal(d)
    return torch.from_numpy(x), torch.from_numpy(y)


FULL, FEWER_THAN_DIMENSIONS, FLAT = (400, 300, 24, 24, 0), (60, 50, 96, 96, 1), (200, 200, 32, 10, 2)
PINNED = {
    FULL: {"frechet": 1.722600763913988, "kernel": 0.05425798374171675, "nearest": (0.71, 0.75),
           "spread": (0.8173333333333335, 0.895), "score": (3.6517144068667697, 0.12700401595601377)},
    FEWER_THAN_DIMENSIONS: {"frechet": 56.51240974723518, "kernel": 0.03205120254165683, "nearest": (0.66, 0.85),
           "spread": (0.6120000000000001, 0.8833333333333333), "score": (4.142407356789414, 0.38398627106813593)},
    FLAT: {"frechet": 3.560887857154171, "kernel": 0.16366976681311307, "nearest": (0.825, 0.725),
           "spread": (0.907, 0.925), "score": (3.517200130866419, 0.30301847482737243)},
}  # fmt: skip


@pytest.mark.parametrize("which", PINNED)
def test_equal_to_torch_fidelity_clean_fid_and_prdc(which):
    x, y = sets(*which)
    known, n = PINNED[which], min(len(x), len(y))
    # Theirs include roots of eigenvalues that should be 0 if covariances are rank-deficient: 1e-6 too little.
    rank_deficient = which != FULL
    frechet = frechet_distance(Moments.of(x), Moments.of(y))
    assert frechet == pytest.approx(known["frechet"], rel=1e-6 if rank_deficient else 1e-9)
    assert kernel_distance(x[:n], y[:n]) == pytest.approx(known["kernel"], rel=1e-10)
    assert kernel_distance_of_subsets(x[:n], y[:n], 3, n).mean == pytest.approx(known["kernel"], rel=1e-10)
    assert precision_recall(x, y, 3) == pytest.approx(known["nearest"], abs=1e-7)
    assert density_coverage(x, y, 5) == pytest.approx(known["spread"], abs=1e-12)

    logits = x @ torch.from_numpy(np.random.default_rng(9).standard_normal((x.shape[1], 7)))
    score = InceptionScore(7, splits=4)
    dealt = torch.empty_like(logits)
    dealt[torch.argsort(score.parts(0, len(x)), stable=True)] = logits  # in order of the parts
    score.update(dealt)
    assert score.compute() == pytest.approx(known["score"], rel=1e-12)


def test_equal_to_torchmetrics():
    from torchmetrics.image.fid import FrechetInceptionDistance
    from torchmetrics.image.kid import KernelInceptionDistance

    x, y = sets(*FULL)
    as_it_is = torch.nn.Identity()
    as_it_is.num_features = x.shape[1]
    theirs = FrechetInceptionDistance(as_it_is).set_dtype(torch.float64)
    theirs.update(x, real=True)
    theirs.update(y, real=False)
    assert frechet_distance(Moments.of(x), Moments.of(y)) == pytest.approx(theirs.compute().item(), rel=1e-8)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about memory: it stores all features
        kid = KernelInceptionDistance(as_it_is, subsets=1, subset_size=300).set_dtype(torch.float64)
    kid.update(x[:300], real=True)
    kid.update(y, real=False)
    assert kernel_distance(x[:300], y) == pytest.approx(kid.compute()[0].item(), rel=1e-6)


@pytest.mark.parametrize("which", PINNED)
def test_equal_to_the_distance_computed_without_covariances(which):
    """The trace is the nuclear norm of X Y^T of the centered features, without squares and roots."""
    x, y = sets(*which)
    a, b = x - x.mean(0), y - y.mean(0)
    trace = torch.linalg.svdvals(a @ b.T).sum() / math.sqrt((len(x) - 1) * (len(y) - 1))
    spread = a.square().sum() / (len(x) - 1) + b.square().sum() / (len(y) - 1)
    known = float((x.mean(0) - y.mean(0)).square().sum() + spread - 2 * trace)
    assert frechet_distance(Moments.of(x), Moments.of(y)) == pytest.approx(known, rel=1e-12)


# The Fréchet distance in closed form


def gaussian(mean, covariance):
    covariance = torch.as_tensor(covariance, dtype=torch.float64)
    return Moments(1001, torch.as_tensor(mean, dtype=torch.float64), covariance * 1000)


def test_frechet_of_diagonal_gaussians():
    rng = np.random.default_rng(0)
    a, b, m, n = rng.uniform(0.1, 3, (4, 12))
    known = ((m - n) ** 2).sum() + ((np.sqrt(a) - np.sqrt(b)) ** 2).sum()
    distance = frechet_distance(gaussian(m, np.diag(a)), gaussian(n, np.diag(b)))
    assert distance == pytest.approx(known, rel=1e-12)


def test_frechet_of_scaled_rotated_and_flat_gaussians():
    rng = np.random.default_rng(1)
    turn, _ = np.linalg.qr(rng.standard_normal((9, 9)))
    spread = np.array([4.0, 1.0, 0.25, 1e-6, 1e-9, 0, 0, 0, 0])
    covariance = turn @ np.diag(spread) @ turn.T
    zero = np.zeros(9)
    # C and 4C: tr(C + 4C - 2 * 2C); of rank 5
    distance = frechet_distance(gaussian(zero, covariance), gaussian(zero, 4 * covariance))
    assert distance == pytest.approx(spread.sum(), rel=1e-9)
    assert frechet_distance(gaussian(zero, covariance), gaussian(zero, covariance)) < 1e-9
    # Orthogonal supports: the range of one covariance is the null space of the other
    reversed_covariance = turn @ np.diag(spread[::-1]) @ turn.T
    alone = np.diag([1.0, 0]), np.diag([0, 1.0])
    assert frechet_distance(*(gaussian([0, 0], c) for c in alone)) == pytest.approx(2, rel=1e-12)
    middle = 2 * spread.sum() - 2 * np.sqrt(spread * spread[::-1]).sum()
    assert frechet_distance(gaussian(zero, covariance), gaussian(zero, reversed_covariance)) == pytest.approx(
        middle, rel=1e-7
    )
    # A point against a Gaussian: |mean|^2 + tr C
    point = gaussian(np.ones(9), np.zeros((9, 9)))
    assert frechet_distance(point, gaussian(zero, covariance)) == pytest.approx(9 + spread.sum(), rel=1e-12)


@settings(max_examples=25, deadline=None)
@given(st.integers(2, 40), st.integers(2, 40), st.integers(1, 12), st.integers(0, 1000))
def test_frechet_is_a_distance(n, m, d, seed):
    x, y = sets(n, m, d, d, seed)
    a, b = Moments.of(x), Moments.of(y)
    forth = frechet_distance(a, b)
    assert forth == pytest.approx(frechet_distance(b, a), rel=1e-6, abs=1e-9)
    assert forth >= 0
    assert frechet_distance(a, a) < 1e-9 * float(a.covariance.trace()) + 1e-12
    turn = torch.linalg.qr(torch.from_numpy(np.random.default_rng(seed).standard_normal((d, d))))[0]
    turned = frechet_distance(Moments.of(x @ turn), Moments.of(y @ turn))
    assert turned == pytest.approx(forth, rel=1e-6, abs=1e-9)


def test_the_floor_is_the_distance_of_draws_from_the_reference():
    """It is tr(C) / N for the mean plus a term of the covariance, and decreases as 1 / N."""
    reference = Moments.of(sets(*FULL)[0])
    floors = {n: sampling_floor(reference, n) for n in (200, 2000, 20_000)}
    assert floors[200] > float(reference.covariance.trace()) / 200
    # Second order of the trace, for a Wishart of n: sum_ij l_i l_j (1 + [i = j]) / (2 n (l_i + l_j))
    values = torch.linalg.eigvalsh(reference.covariance)
    pairs = torch.outer(values, values) / (values[:, None] + values)
    for n in (2000, 20_000):
        expected = float(values.sum() + (pairs.sum() + pairs.trace()) / 2) / n
        assert floors[n] == pytest.approx(expected, rel=0.15)
    assert sampling_floor(reference, 200) == floors[200]
    assert sampling_floor(reference, 200, seed=1) != floors[200]


# Moments


@given(st.lists(st.integers(0, 60), max_size=6))
@settings(max_examples=20, deadline=None)
def test_moments_of_batches_are_those_of_the_whole(cuts):
    x = sets(60, 2, 5, 5, 0)[0] + 1e4  # far from 0, where sums of squares lose digits
    metric = FeatureMoments(5)
    for part in torch.tensor_split(x, sorted(cuts)):
        metric.update(part)
    moments = metric.compute()
    assert moments.count == 60
    np.testing.assert_allclose(moments.mean, x.mean(0), rtol=1e-14)
    np.testing.assert_allclose(moments.covariance, np.cov(x.T.numpy()), rtol=1e-7, atol=1e-9)


def test_moments_of_processes_are_merged():
    """The stacked states that torchmetrics gathers from three processes are merged."""
    parts = torch.tensor_split(sets(*FULL)[0], 3)
    metrics = []
    for part in parts:
        metric = FeatureMoments(24)
        metric.update(part)
        metrics.append(metric)
    order = iter(("count", "mean", "scatter"))
    gathering = FeatureMoments(24)
    gathering.update(parts[0])
    gathering.dist_sync_fn = lambda state, group=None: [
        getattr(m, name) for name in [next(order)] for m in metrics
    ]
    gathering.distributed_available_fn = lambda: True
    merged, known = gathering.compute(), Moments.of(torch.cat(parts))
    assert merged.count == known.count
    np.testing.assert_allclose(merged.scatter, known.scatter, rtol=1e-10, atol=1e-10)
    assert int(gathering.count) == len(parts[0])  # afterwards it is its own again


# Slow twins, and bounded memory


def slow_kernel_distance(x, y):
    def k(a, b):
        return (float(a @ b) / len(a) + 1) ** 3

    n, m = len(x), len(y)
    within = sum(k(x[i], x[j]) for i in range(n) for j in range(n) if i != j) / (n * (n - 1))
    within += sum(k(y[i], y[j]) for i in range(m) for j in range(m) if i != j) / (m * (m - 1))
    return within - 2 * sum(k(a, b) for a in x for b in y) / (n * m)


def slow_precision_recall(real, generated, k):
    def reach(points, i):
        return sorted(math.dist(points[i], other) for j, other in enumerate(points) if j != i)[k - 1]

    real, generated = real.tolist(), generated.tolist()
    balls, ours = (
        [reach(real, i) for i in range(len(real))],
        [reach(generated, i) for i in range(len(generated))],
    )
    inside = [[math.dist(r, m) <= ball for m in generated] for r, ball in zip(real, balls, strict=True)]
    precision = sum(any(column) for column in zip(*inside, strict=True)) / len(generated)
    recall = sum(any(math.dist(r, m) <= b for m, b in zip(generated, ours, strict=True)) for r in real) / len(
        real
    )
    return precision, recall, sum(map(sum, inside)) / (k * len(generated)), sum(map(any, inside)) / len(real)


@pytest.mark.parametrize("block", [1, 100, 1 << 23])
def test_equal_to_slow_loops_for_any_block_size(block, monkeypatch):
    monkeypatch.setattr(kernel, "BLOCK", block)
    x, y = sets(31, 23, 6, 6, 3)
    assert kernel_distance(x, y) == pytest.approx(slow_kernel_distance(x, y), rel=1e-10)
    for k in (1, 4):
        precision, recall, density, coverage = slow_precision_recall(x, y, k)
        assert precision_recall(x, y, k) == (precision, recall)
        assert density_coverage(x, y, k) == pytest.approx((density, coverage), rel=1e-14)


def test_kernel_distance_is_unbiased():
    """For two sets of one distribution it is 0 on average at any count; the Fréchet distance is not."""
    rng = np.random.default_rng(5)
    kernels, frechet = [], []
    for _ in range(200):
        x, y = torch.from_numpy(rng.standard_normal((2, 10, 8)))
        kernels.append(kernel_distance(x, y))
        frechet.append(frechet_distance(Moments.of(x), Moments.of(y)))
    assert abs(np.mean(kernels)) < 3 * np.std(kernels) / math.sqrt(200)
    assert np.mean(frechet) > 5 * np.std(frechet) / math.sqrt(200)


def test_subsets_come_from_the_seed_alone():
    x, y = sets(*FULL)
    distance = kernel_distance_of_subsets(x, y, 20, 50)
    torch.manual_seed(9)
    np.random.seed(9)
    assert kernel_distance_of_subsets(x, y, 20, 50) == distance
    assert kernel_distance_of_subsets(x, y, 20, 50, seed=1) != distance
    assert distance.mean == pytest.approx(kernel_distance(x, y), abs=4 * distance.std / math.sqrt(20))


def test_precision_and_recall_of_equal_distant_and_repeated_features():
    x = sets(50, 2, 8, 8, 0)[0]
    assert precision_recall(x, x) == (1, 1)
    assert density_coverage(x, x).coverage == 1
    assert precision_recall(x, x + 100) == (0, 0)
    assert density_coverage(x, x + 100) == (0, 0)
    # A missing mode lowers recall and coverage, not precision
    both = torch.cat([x, x + 100])
    assert precision_recall(both, x) == (1, 0.5)
    assert density_coverage(both, x).coverage == 0.5
    # Balls around repeated features have radius 0, and contain copies
    doubled = (x[:10].repeat(6, 1) + 5).float()
    assert precision_recall(doubled, doubled[:20]) == (1, 1)


def test_density_of_one_distribution_is_one():
    rng = np.random.default_rng(0)
    x, y = torch.from_numpy(rng.standard_normal((2, 1500, 6)))
    result = density_coverage(x, y)
    assert result.density == pytest.approx(1, abs=0.05)
    # Naeem et al., Equation 9, for M = N: 1 - (N-1)...(N-k) / ((2N-1)...(2N-k))
    expected = 1 - math.prod((1500 - i) / (3000 - i) for i in range(1, 6))
    assert result.coverage == pytest.approx(expected, abs=0.02)


# The Inception score


def test_score_of_certain_uniform_and_cycling_classes():
    """Certain predictions give the number of classes, uniform ones 1; the order of classes does not matter, even in
    step with the parts."""
    certain = torch.eye(20).repeat(60, 1) * 200
    score = InceptionScore(20)
    score.update(certain)
    mean, _ = score.compute()
    assert 17 < mean <= 20 + 1e-9  # a part of 120 does not have each class 6 times
    undivided = InceptionScore(20, splits=1)
    undivided.update(certain)
    assert undivided.compute() == pytest.approx((20, 0), abs=1e-9)
    nothing = InceptionScore(20)
    nothing.update(torch.zeros(100, 20))
    assert nothing.compute() == pytest.approx((1, 0), abs=1e-9)


@given(st.lists(st.integers(0, 103), max_size=4))
@settings(max_examples=20, deadline=None)
def test_score_is_the_same_for_any_batches(cuts):
    logits = torch.randn(103, 6, generator=torch.Generator().manual_seed(0)) * 3
    single, parts = InceptionScore(6), InceptionScore(6)
    single.update(logits)
    for part in torch.tensor_split(logits, sorted(cuts)):
        parts.update(part)
    assert parts.compute() == pytest.approx(single.compute(), rel=1e-12)
    assert parts.counts.tolist() == single.counts.tolist()
    assert max(parts.counts) - min(parts.counts) <= 1


# All together


class Network(torch.nn.Module):
    """Features and logits of images."""

    def __init__(self):
        super().__init__()
        self.features, self.head = torch.nn.Linear(12, 5), torch.nn.Linear(5, 3)

    def forward(self, images):
        features = self.features(images)
        return ExtractorOutput(features, self.head(features))


def test_all_metrics_of_real_and_generated_images():
    torch.manual_seed(0)
    extract = Network()
    real, generated = (z.float() for z in sets(90, 70, 12, 12, 4))
    metrics = GenerationMetrics(extract)
    for part in real.split(32):
        metrics.update(part, real=True)
    for part in generated.split(25):
        metrics.update(part)
    values = metrics.compute()
    with torch.no_grad():
        x, y, logits = extract(real).features, extract(generated).features, extract(generated).logits
    assert values["frechet"] == pytest.approx(frechet_distance(Moments.of(x), Moments.of(y)), rel=1e-9)
    assert values["kernel_exact"] == pytest.approx(kernel_distance(x, y), rel=1e-9)
    assert (values["count"], values["real_count"], values["dimensions"]) == (70, 90, 5)
    assert (values["kernel_size"], values["neighbors_count"]) == (35, 70)
    score = InceptionScore(3)
    score.update(logits)
    assert (values["inception_score"], values["inception_score_std"]) == pytest.approx(
        score.compute(), rel=1e-6
    )
    assert {"precision", "recall", "density", "coverage", "frechet_floor", "kernel_std"} <= values.keys()

    # Stored statistics replace the real images
    statistics = FeatureStatistics(5)
    statistics.update(x)
    again = GenerationMetrics(extract, statistics.compute())
    again.update(generated)
    assert again.compute() == pytest.approx(values, rel=1e-6)
    with pytest.raises(ConfigError, match="both a reference and real images"):
        again.update(real, real=True)


def test_fewer_images_than_dimensions_give_a_warning(caplog):
    x, y = sets(*FEWER_THAN_DIMENSIONS)
    sides = [Statistics(Moments.of(z), z) for z in (x, y)]
    with caplog.at_level(logging.WARNING):
        values = compute_generation_metrics(*sides)
    warning = " ".join(caplog.text.split())
    assert "50 generated images are not more than the 96 dimensions of a feature" in warning
    assert f"would have {values['frechet_floor']:.3g} at this count" in warning
    caplog.clear()
    compute_generation_metrics(*(Statistics(Moments.of(z), z) for z in sets(*FULL)))
    assert not caplog.records


def test_what_cannot_be_compared_is_refused():
    x, y = sets(10, 8, 4, 4, 0)
    with pytest.raises(ConfigError, match="extract both with the same network"):
        frechet_distance(Moments.of(x), Moments.of(y[:, :3]))
    with pytest.raises(DataError, match="1 images have no covariance"):
        frechet_distance(Moments.of(x), Moments.of(y[:1]))
    with pytest.raises(DataError, match="two images of each set"):
        kernel_distance(x, y[:1])
    with pytest.raises(DataError, match="more than 3 images of each set"):
        precision_recall(x, y[:3])
    with pytest.raises(DataError, match="NaN or infinite"):
        FeatureMoments(4).update(x * torch.nan)
    with pytest.raises(ConfigError, match=r"which must be \(n, 5\)"):
        FeatureMoments(5).update(x)
    with pytest.raises(DataError, match="one set is empty"):
        GenerationMetrics(Network()).compute()
