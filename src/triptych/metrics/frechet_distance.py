"""Fréchet distance between two sets of features, modeled as Gaussians (Heusel et al. 2017): FID, for any network.

The implementation of torchmetrics contains the network and the sums of both sets, so a reference cannot be stored in a
file; and it uses eigenvalues of an unsymmetric product, which are noise if a covariance is rank-deficient. Here moments
are a value that can be stored and merged, and the trace is computed from singular values.
"""

import torch
from jaxtyping import Float, Float64
from torch import Tensor

from triptych.errors import ConfigError, DataError
from triptych.metrics.torchmetrics_import import Metric

DRAW_BLOCK = 4096  # samples of a Gaussian that are drawn at a time


class Moments:
    """Count, mean and scatter, the sum of (x - mean)(x - mean)^T, of a set of features, in fp64.

    Not a dataclass, since torchmetrics would take it apart, and a mean of one number would no longer be a vector.
    """

    def __init__(self, count: int, mean: Float64[Tensor, " d"], scatter: Float64[Tensor, "d d"]) -> None:
        self.count, self.mean, self.scatter = count, mean, scatter

    @classmethod
    def of(cls, features: Float[Tensor, "n d"]) -> "Moments":
        """Return the moments of features."""
        x = features.detach().double()
        mean = x.mean(0) if len(x) else x.new_zeros(x.shape[1])
        return cls(len(x), mean, (x - mean).T @ (x - mean))

    @property
    def covariance(self) -> Float64[Tensor, "d d"]:
        """The unbiased covariance (divided by n - 1), as in `numpy.cov` and FID.

        Raises:
            DataError: there are fewer than two features.
        """
        if self.count < 2:
            raise DataError(
                f"{self.count} images have no covariance, and a Fréchet distance needs at least 2; use 10,000 or more "
                "for a meaningful value"
            )
        return self.scatter / (self.count - 1)

    def merge(self, other: "Moments") -> "Moments":
        """Return the moments of both sets together (Chan et al. 1983, Equation 1.5 in matrix form)."""
        n, m = self.count, other.count
        if n == 0 or m == 0:
            return other if n == 0 else self
        step = other.mean - self.mean
        scatter = self.scatter + other.scatter + torch.outer(step, step) * (n * m / (n + m))
        return Moments(n + m, self.mean + step * (m / (n + m)), scatter)


class FeatureMoments(Metric):
    """Accumulates features of any number of images as `Moments`, in constant memory.

    Args:
        features: dimensions of a feature.
    """

    full_state_update = False
    is_differentiable = False

    count: Tensor
    mean: Tensor
    scatter: Tensor

    def __init__(self, features: int) -> None:
        super().__init__()
        # Without a reduction, the states of processes are stacked; `compute` merges them.
        self.add_state("count", torch.zeros((), dtype=torch.int64), dist_reduce_fx=None)
        self.add_state("mean", torch.zeros(features, dtype=torch.float64), dist_reduce_fx=None)
        self.add_state("scatter", torch.zeros(features, features, dtype=torch.float64), dist_reduce_fx=None)

    def update(self, features: Float[Tensor, "n d"]) -> None:
        """Add a batch.

        Raises:
            ConfigError: the features have another number of dimensions.
            DataError: a feature is NaN or infinite.
        """
        d = len(self.mean)
        if features.ndim != 2 or features.shape[1] != d:
            raise ConfigError(f"features are {tuple(features.shape)}, which must be (n, {d})")
        if not features.isfinite().all():
            raise DataError("features are NaN or infinite; extract them in fp32")
        moments = self._current().merge(Moments.of(features.to(self.mean.device)))
        self.count = torch.as_tensor(moments.count, device=self.mean.device)
        self.mean, self.scatter = moments.mean, moments.scatter

    def compute(self) -> Moments:
        """Return the moments of all features so far, over all processes."""
        return self._current()

    def _current(self) -> Moments:
        if self.count.ndim == 0:
            return Moments(int(self.count), self.mean, self.scatter)
        moments = Moments(0, torch.zeros_like(self.mean[0]), torch.zeros_like(self.scatter[0]))
        for count, mean, scatter in zip(self.count.tolist(), self.mean, self.scatter, strict=True):
            moments = moments.merge(Moments(count, mean, scatter))
        return moments


def frechet_distance(a: Moments, b: Moments) -> float:
    """Return |mu_a - mu_b|^2 + tr(C_a + C_b - 2 (C_a C_b)^(1/2)) (Dowson and Landau 1982, Equation 6).

    With C = R^T R, the trace of the root is the sum of the singular values of R_a R_b^T. So no matrix is inverted, no
    root of an unsymmetric or indefinite matrix is taken, and the rank-deficient covariances of fewer images than
    dimensions need no regularization.

    Raises:
        ConfigError: the two have different numbers of dimensions.
        DataError: one has fewer than two features.
    """
    if a.mean.shape != b.mean.shape:
        raise ConfigError(
            f"features have {len(a.mean)} and {len(b.mean)} dimensions; extract both with the same network"
        )
    b_mean, b_covariance = b.mean.to(a.mean), b.covariance.to(a.mean)
    root = torch.linalg.svdvals(_root(a.covariance) @ _root(b_covariance).T).sum()
    traces = a.covariance.trace() + b_covariance.trace()
    return max(0.0, float((a.mean - b_mean).square().sum() + traces - 2 * root))


def sampling_floor(reference: Moments, count: int, seed: int = 0) -> float:
    """Return the Fréchet distance that a perfect generator would get for `count` samples: the distance of that many
    draws from the reference's Gaussian to the reference.

    The Fréchet distance is biased (Chong and Forsyth 2020): the floor decreases to 0 as `count` grows, so distances of
    different counts cannot be compared.
    """
    root = _root(reference.covariance)
    generator = torch.Generator().manual_seed(seed)
    drawn = Moments.of(reference.mean[None][:0])
    for at in range(0, count, DRAW_BLOCK):
        normal = torch.randn(min(DRAW_BLOCK, count - at), len(root), generator=generator, dtype=torch.float64)
        drawn = drawn.merge(Moments.of(normal.to(root) @ root + reference.mean))
    return frechet_distance(drawn, reference)


def _root(covariance: Float64[Tensor, "d d"]) -> Float64[Tensor, "r d"]:
    """Return R with R^T R = covariance and as many rows as its rank."""
    values, vectors = torch.linalg.eigh(covariance)
    # Rounding changes eigenvalues of 0 to about this size, and their roots would be 1e8 times as large.
    positive = values > len(values) * torch.finfo(values.dtype).eps * values.max().clamp(min=0)
    return values[positive].sqrt()[:, None] * vectors[:, positive].T
