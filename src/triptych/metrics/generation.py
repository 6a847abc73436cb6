"""Figures of generated pictures beside real ones, in the features of a network that is passed in.

Nothing here knows what that network is, how pictures were prepared for it, or which pictures they are; without these
three a figure says nothing, so whoever keeps one keeps them with it (`triptych.evaluation.reference_statistics` does).
"""

import logging
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from triptych.errors import UserError
from triptych.metrics.frechet_distance import FeatureMoments, Moments, frechet_distance, sampling_floor
from triptych.metrics.kernel_distance import kernel_distance, kernel_distance_of_subsets
from triptych.metrics.precision_recall import density_coverage, precision_recall
from triptych.metrics.torchmetrics_import import Metric, dim_zero_cat

log = logging.getLogger(__name__)


class Extracted(NamedTuple):
    """What a network makes of a batch of pictures."""

    features: Float[Tensor, "b d"]
    logits: Float[Tensor, "b classes"] | None = None
    """For the Inception score; none of a network without classes."""


Extract = Callable[[Any], Extracted]


class Statistics:
    """What is kept of one side: the moments of all its features, and the features themselves, which kernel and
    neighbours need; all of them, or a random part."""

    def __init__(self, moments: Moments, features: Float[Tensor, "n d"]) -> None:
        self.moments, self.features = moments, features

    def to(self, device: str | torch.device) -> "Statistics":
        """The same on a device."""
        m = self.moments
        return Statistics(Moments(m.count, m.mean.to(device), m.scatter.to(device)), self.features.to(device))


class InceptionScore(Metric):
    """exp(mean KL(p(y | x) || p(y))) (Salimans et al. 2016), of `splits` parts: their mean and standard deviation.

    Every `splits` pictures in a row are dealt out at random, one to each part: the parts are even, memory does not grow
    with the pictures, and the order of classes does not matter. torchmetrics' keeps all logits, and draws the parts
    from the global random stream.

    Args:
        classes: of the logits.
        splits: 10 in the paper.
        seed: of the dealing.
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
        """Mean and standard deviation over the parts; of fewer pictures than parts, over those that have one."""
        there = self.counts > 0
        n = self.counts[there]
        marginal = self.sums[there] / n[:, None]
        scores = (torch.special.entr(marginal).sum(1) - self.entropies[there] / n).exp()
        return float(scores.mean()), float(scores.std(unbiased=False))

    def parts(self, start: int, count: int) -> Tensor:
        """The part of each of `count` pictures from number `start` on."""
        first, last = start // self.splits, -(-(start + count) // self.splits)
        dealt = [
            np.random.default_rng([self.seed, row]).permutation(self.splits) for row in range(first, last)
        ]
        at = start - first * self.splits
        return torch.from_numpy(np.concatenate([*dealt, np.empty(0, np.int64)])[at : at + count])


class FeatureStatistics(Metric):
    """Accumulates the features of one side as `Statistics`. The features are kept, in fp32: 400 MB of 50,000 pictures
    in Inception's 2,048 numbers.

    Args:
        features: length of a feature.
    """

    full_state_update = False
    is_differentiable = False

    kept: list[Tensor]

    def __init__(self, features: int) -> None:
        super().__init__()
        self.moments = FeatureMoments(features)
        self.add_state("kept", default=[], dist_reduce_fx="cat")

    def update(self, features: Float[Tensor, "b d"]) -> None:
        """Add a batch.

        Raises:
            UserError: of another length, or not finite.
        """
        self.moments.update(features)
        self.kept.append(features.detach().float().to(self.device))

    def compute(self) -> Statistics:
        """The statistics so far."""
        return Statistics(self.moments.compute(), dim_zero_cat(self.kept))

    def reset(self) -> None:
        super().reset()
        self.moments.reset()


class GenerationMetrics:
    """Accumulates pictures, real and generated; `compute()` gives the figures.

    ```python
    metrics = GenerationMetrics(extract)              # pictures -> Extracted
    for batch in real: metrics.update(batch, real=True)         # or GenerationMetrics(extract, reference=statistics)
    for batch in generated: metrics.update(batch)
    metrics.compute()["frechet"]
    ```

    Args:
        extract: from whatever `update` is given to features, and logits for the Inception score.
        reference: statistics of the real side that are there already.
        seed: of all that is drawn: parts, subsets.
        device: where features are kept and compared; fp64 is needed there.
    """

    def __init__(
        self,
        extract: Extract,
        reference: Statistics | None = None,
        *,
        seed: int = 0,
        device: str | torch.device = "cpu",
    ) -> None:
        self.extract, self.reference, self.seed, self.device = extract, reference, seed, device
        self.sides: dict[bool, FeatureStatistics] = {}
        self.score: InceptionScore | None = None

    @torch.no_grad()
    def update(self, pictures: Any, real: bool = False) -> Extracted:
        """Add a batch of real or of generated pictures; what the network made of them is handed on.

        Raises:
            UserError: real pictures beside a reference, or features that are not finite.
        """
        if real and self.reference is not None:
            raise UserError("there is a reference already; leave it out, or the real pictures")
        features, logits = found = self.extract(pictures)
        if real not in self.sides:
            self.sides[real] = FeatureStatistics(features.shape[1]).to(self.device)
        self.sides[real].update(features)
        if logits is not None and not real:
            if self.score is None:
                self.score = InceptionScore(logits.shape[1], seed=self.seed).to(self.device)
            self.score.update(logits)
        return found

    def compute(self) -> dict[str, Any]:
        """`generation_figures` of both sides, and `inception_score` and its `inception_score_std` over ten parts where
        the network has classes.

        Raises:
            UserError: a side has fewer than two pictures.
        """
        if False not in self.sides or (self.reference is None and True not in self.sides):
            raise UserError("generated and real pictures are needed; one side has none")
        real = self.reference or self.sides[True].compute()
        figures = generation_figures(real.to(self.device), self.sides[False].compute(), self.seed)
        if self.score is not None:
            figures["inception_score"], figures["inception_score_std"] = self.score.compute()
        return figures


def generation_figures(
    real: Statistics, made: Statistics, seed: int = 0, neighbours: tuple[int, int] = (3, 5)
) -> dict[str, Any]:
    """How far generated pictures are from real ones.

    Args:
        seed: of the subsets that are drawn.
        neighbours: k of precision and recall, and of density and coverage.

    Returns:
        count, real_count: pictures of either side.
        dimensions: of a feature.
        frechet: the Fréchet distance, which in Inception's features is FID. Biased: compare equal counts only.
        frechet_floor: `sampling_floor` at this count.
        kernel, kernel_std, kernel_size: the kernel distance as the mean of 100 subsets, their spread and size (1,000,
            or half of what there is).
        kernel_exact: the same of all pairs.
        precision, recall, density, coverage: of as many pictures of either side, at random the `neighbours_count` that
            both have; absent below six.

    Raises:
        UserError: fewer than two pictures of a side, or features of other networks.
    """
    count, d = made.moments.count, len(made.moments.mean)
    figures: dict[str, Any] = {
        "count": count,
        "real_count": real.moments.count,
        "dimensions": d,
        "frechet": frechet_distance(real.moments, made.moments),
        "frechet_floor": sampling_floor(real.moments, count, seed),
    }
    if min(count, real.moments.count) <= d:
        few, side = min((count, "generated"), (real.moments.count, "real"))
        log.warning(
            "%d %s pictures are not more than the %d numbers of a feature: their covariance lacks rank, and most of "
            "the Fréchet distance is that (perfect ones would be given %.3g at this count); compare it with figures "
            "of equal counts only, or read the kernel distance, which is unbiased",
            *(few, side, d, figures["frechet_floor"]),
        )
    # Of half of what there is at most: parts that are all of it would have no spread, and the mean is the same.
    size = max(2, min(1000, len(real.features) // 2, len(made.features) // 2))
    subsets = kernel_distance_of_subsets(real.features, made.features, size=size, seed=seed)
    figures |= {"kernel": subsets.mean, "kernel_std": subsets.std, "kernel_size": subsets.size}
    figures["kernel_exact"] = kernel_distance(real.features, made.features)
    equal = min(len(real.features), len(made.features))
    if equal > max(neighbours):
        sides = [_some(side.features, equal, seed) for side in (real, made)]
        figures["neighbours_count"] = equal
        figures |= precision_recall(*sides, k=neighbours[0])._asdict()
        figures |= density_coverage(*sides, k=neighbours[1])._asdict()
    return figures


def _some(features: Tensor, count: int, seed: int) -> Tensor:
    """`count` of them at random, in their order."""
    if count == len(features):
        return features
    rows = np.random.default_rng(seed).choice(len(features), count, replace=False)
    return features[torch.from_numpy(np.sort(rows)).to(features.device)]
