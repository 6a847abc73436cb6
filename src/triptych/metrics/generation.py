"""Metrics that compare generated with real images in the features of a given network.

The metrics do not know the network, the preparation of images for it, or the data. Since a value is only meaningful
together with these three, store them with it, as `triptych.evaluation.reference_statistics` does.
"""

import logging
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from triptych.errors import ConfigError, DataError
from triptych.metrics.frechet_distance import FeatureMoments, Moments, frechet_distance, sampling_floor
from triptych.metrics.kernel_distance import kernel_distance, kernel_distance_of_subsets
from triptych.metrics.precision_recall import density_coverage, precision_recall
from triptych.metrics.torchmetrics_import import Metric, dim_zero_cat

log = logging.getLogger(__name__)


class ExtractorOutput(NamedTuple):
    """What a network returns for a batch of images."""

    features: Float[Tensor, "b d"]
    logits: Float[Tensor, "b classes"] | None = None
    """Logits for the Inception score; None for a network without classes."""


ExtractorFunction = Callable[[Any], ExtractorOutput]


class Statistics:
    """Statistics of one set of images: the moments of all features; and features for the kernel distance and nearest
    neighbors, either all or a random subset."""

    def __init__(self, moments: Moments, features: Float[Tensor, "n d"]) -> None:
        self.moments, self.features = moments, features

    def to(self, device: str | torch.device) -> "Statistics":
        """Return the statistics on a device."""
        m = self.moments
        return Statistics(Moments(m.count, m.mean.to(device), m.scatter.to(device)), self.features.to(device))


class InceptionScore(Metric):
    """exp(mean KL(p(y | x) || p(y))) (Salimans et al. 2016): mean and standard deviation over `splits` parts.

    Of every `splits` consecutive images, each part gets one at random. So parts are of equal size, memory is constant,
    and the order of classes does not matter. The implementation of torchmetrics stores all logits, and draws the parts
    from the global RNG.

    Args:
        classes: number of classes of the logits.
        splits: number of parts; 10 in the paper.
        seed: seed of the random division into parts.
    """

    full_state_update = False
    is_differentiable = False

    sums: Tensor
    entropies: Tensor
    counts: Tensor

    def __init__(self, classes: int, splits: int = 10, seed: int = 0) -> None:
        super().__init__()
        self.splits, self.seed = splits, seed
        double = torch.float64
        self.add_state("sums", torch.zeros(splits, classes, dtype=double), dist_reduce_fx="sum")
        self.add_state("entropies", torch.zeros(splits, dtype=double), dist_reduce_fx="sum")
        self.add_state("counts", torch.zeros(splits, dtype=torch.int64), dist_reduce_fx="sum")

    def update(self, logits: Float[Tensor, "b classes"]) -> None:
        """Add a batch."""
        p = logits.detach().to(self.sums.device).double().softmax(1)
        part = self.parts(int(self.counts.sum()), len(p)).to(p.device)
        self.sums.index_add_(0, part, p)
        self.entropies.index_add_(0, part, torch.special.entr(p).sum(1))
        self.counts += torch.bincount(part, minlength=self.splits)

    def compute(self) -> tuple[float, float]:
        """Return mean and standard deviation over the parts that have an image."""
        nonempty = self.counts > 0
        n = self.counts[nonempty]
        marginal = self.sums[nonempty] / n[:, None]
        scores = (torch.special.entr(marginal).sum(1) - self.entropies[nonempty] / n).exp()
        return float(scores.mean()), float(scores.std(unbiased=False))

    def parts(self, start: int, count: int) -> Tensor:
        """Return the part of each of `count` images, the first of which is number `start`."""
        first, last = start // self.splits, -(-(start + count) // self.splits)
        permutations = [
            np.random.default_rng([self.seed, row]).permutation(self.splits) for row in range(first, last)
        ]
        offset = start - first * self.splits
        return torch.from_numpy(
            np.concatenate([*permutations, np.empty(0, np.int64)])[offset : offset + count]
        )


class FeatureStatistics(Metric):
    """Accumulates the features of one set as `Statistics`.

    All features are stored in fp32: 400 MB for 50,000 images in the 2,048 dimensions of Inception.

    Args:
        features: dimensions of a feature.
    """

    full_state_update = False
    is_differentiable = False

    feature_batches: list[Tensor]

    def __init__(self, features: int) -> None:
        super().__init__()
        self.moments = FeatureMoments(features)
        self.add_state("feature_batches", default=[], dist_reduce_fx="cat")

    def update(self, features: Float[Tensor, "b d"]) -> None:
        """Add a batch.

        Raises:
            ConfigError: the features have another number of dimensions.
            DataError: a feature is NaN or infinite.
        """
        self.moments.update(features)
        self.feature_batches.append(features.detach().float().to(self.device))

    def compute(self) -> Statistics:
        """Return the statistics of all features so far."""
        return Statistics(self.moments.compute(), dim_zero_cat(self.feature_batches))

    def reset(self) -> None:
        """Remove all features."""
        super().reset()
        self.moments.reset()


class GenerationMetrics:
    """Accumulates real and generated images; `compute()` returns the metrics.

    ```python
    metrics = GenerationMetrics(extract)              # images -> ExtractorOutput
    for batch in real: metrics.update(batch, real=True)         # or GenerationMetrics(extract, reference=statistics)
    for batch in generated: metrics.update(batch)
    metrics.compute()["frechet"]
    ```

    Args:
        extract: maps the argument of `update` to features, and to logits for the Inception score.
        reference: statistics of the real images, in place of real images.
        seed: seed of random parts and subsets.
        device: device on which features are stored and compared; it needs fp64.
    """

    def __init__(
        self,
        extract: ExtractorFunction,
        reference: Statistics | None = None,
        *,
        seed: int = 0,
        device: str | torch.device = "cpu",
    ) -> None:
        self.extract, self.reference, self.seed, self.device = extract, reference, seed, device
        self.sides: dict[bool, FeatureStatistics] = {}
        self.score: InceptionScore | None = None

    @torch.no_grad()
    def update(self, images: Any, real: bool = False) -> ExtractorOutput:
        """Add a batch of real or generated images, and return what the network returned for them.

        Raises:
            ConfigError: there are real images and a reference.
            DataError: a feature is NaN or infinite.
        """
        if real and self.reference is not None:
            raise ConfigError("both a reference and real images are given; leave one of the two out")
        features, logits = output = self.extract(images)
        if real not in self.sides:
            self.sides[real] = FeatureStatistics(features.shape[1]).to(self.device)
        self.sides[real].update(features)
        if logits is not None and not real:
            if self.score is None:
                self.score = InceptionScore(logits.shape[1], seed=self.seed).to(self.device)
            self.score.update(logits)
        return output

    def compute(self) -> dict[str, Any]:
        """Return `compute_generation_metrics` of both sets; for a network with classes also `inception_score` and
        `inception_score_std`, over ten parts.

        Raises:
            DataError: a set has fewer than two images.
        """
        if False not in self.sides or (self.reference is None and True not in self.sides):
            raise DataError(
                "both generated and real images are needed, and one set is empty; add images to it"
            )
        real = self.reference or self.sides[True].compute()
        metrics = compute_generation_metrics(real.to(self.device), self.sides[False].compute(), self.seed)
        if self.score is not None:
            metrics["inception_score"], metrics["inception_score_std"] = self.score.compute()
        return metrics


def compute_generation_metrics(
    real: Statistics, generated: Statistics, seed: int = 0, neighbors: tuple[int, int] = (3, 5)
) -> dict[str, Any]:
    """Compare the features of generated images with those of real ones.

    Args:
        seed: seed of random subsets.
        neighbors: k of precision and recall, and k of density and coverage.

    Returns:
        count, real_count: number of generated and of real images.
        dimensions: dimensions of a feature.
        frechet: the Fréchet distance, which is FID in the features of Inception. Biased: compare equal counts only.
        frechet_floor: `sampling_floor` at this count.
        kernel, kernel_std, kernel_size: mean and standard deviation of the kernel distance over 100 subsets, and their
            size: 1,000 images, or half of the smaller set.
        kernel_exact: the kernel distance over all pairs.
        neighbors_count: number of images of each set that the following four compare, chosen at random from the larger
            set. Fewer than six are not compared.
        precision, recall, density, coverage: as in `precision_recall` and `density_coverage`.

    Raises:
        ConfigError: the two have different numbers of dimensions.
        DataError: a set has fewer than two images.
    """
    count, d = generated.moments.count, len(generated.moments.mean)
    metrics: dict[str, Any] = {
        "count": count,
        "real_count": real.moments.count,
        "dimensions": d,
        "frechet": frechet_distance(real.moments, generated.moments),
        "frechet_floor": sampling_floor(real.moments, count, seed),
    }
    if min(count, real.moments.count) <= d:
        smaller, side = min((count, "generated"), (real.moments.count, "real"))
        log.warning(
            "%d %s images are not more than the %d dimensions of a feature, so their covariance is rank-deficient and "
            "most of the Fréchet distance is bias (perfect samples would have %.3g at this count); compare it with "
            "values of equal counts only, or use the kernel distance, which is unbiased",
            *(smaller, side, d, metrics["frechet_floor"]),
        )
    # At most half of a set: subsets of all images would be equal and have no standard deviation.
    size = max(2, min(1000, len(real.features) // 2, len(generated.features) // 2))
    subsets = kernel_distance_of_subsets(real.features, generated.features, size=size, seed=seed)
    metrics |= {"kernel": subsets.mean, "kernel_std": subsets.std, "kernel_size": subsets.size}
    metrics["kernel_exact"] = kernel_distance(real.features, generated.features)
    equal_count = min(len(real.features), len(generated.features))
    if equal_count > max(neighbors):
        sides = [_random_rows(side.features, equal_count, seed) for side in (real, generated)]
        metrics["neighbors_count"] = equal_count
        metrics |= precision_recall(*sides, k=neighbors[0])._asdict()
        metrics |= density_coverage(*sides, k=neighbors[1])._asdict()
    return metrics


def _random_rows(features: Tensor, count: int, seed: int) -> Tensor:
    """Return `count` random rows, in their order."""
    if count == len(features):
        return features
    rows = np.random.default_rng(seed).choice(len(features), count, replace=False)
    return features[torch.from_numpy(np.sort(rows)).to(features.device)]
