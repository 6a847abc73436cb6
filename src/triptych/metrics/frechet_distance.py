"""The Fréchet distance between two sets of features, each taken as a Gaussian: FID (Heusel et al. 2017), whatever the
network that the features come from.

torchmetrics' own holds the network and both sides' sums inside, so a reference cannot be kept in a file, and takes the
eigenvalues of an unsymmetric product, which of a covariance that lacks rank are noise. Here the moments are a value
that can be stored and merged, and the trace comes from singular values.
"""

import torch
from jaxtyping import Float, Float64
from torch import Tensor

from triptych.errors import UserError
from triptych.metrics.torchmetrics_import import Metric

DRAWN = 4096  # numbers of a Gaussian at a time


class Moments:
    """What a Gaussian remembers of a set of features, in fp64: their count, their mean, and the scatter, which is the
    sum of (x - mean)(x - mean)^T.

    No dataclass: torchmetrics would take one apart, and a mean of one number would no longer be a vector.
    """

    def __init__(self, count: int, mean: Float64[Tensor, " d"], scatter: Float64[Tensor, "d d"]) -> None:
        self.count, self.mean, self.scatter = count, mean, scatter

    @classmethod
    def of(cls, features: Float[Tensor, "n d"]) -> "Moments":
        x = features.detach().double()
        mean = x.mean(0) if len(x) else x.new_zeros(x.shape[1])
        return cls(len(x), mean, (x - mean).T @ (x - mean))

    @property
    def covariance(self) -> Float64[Tensor, "d d"]:
        """With n - 1 below, as numpy's `cov` and everybody's FID has it.

        Raises:
            UserError: there are fewer than two features.
        """
        if self.count < 2:
            raise UserError(
                f"{self.count} pictures have no covariance; a Fréchet distance needs 2, and means little below 10,000"
            )
        return self.scatter / (self.count - 1)

    def merged(self, other: "Moments") -> "Moments":
        """Of both sets together (Chan et al. 1983, Equation 1.5 and its matrix form)."""
        n, m = self.count, other.count
        if n == 0 or m == 0:
            return other if n == 0 else self
        step = other.mean - self.mean
        scatter = self.scatter + other.scatter + torch.outer(step, step) * (n * m / (n + m))
        return Moments(n + m, self.mean + step * (m / (n + m)), scatter)


class FeatureMoments(Metric):
    """Accumulates features of any number of pictures as `Moments`; memory does not grow with them.

    Args:
        features: length of a feature.
    """

    full_state_update = False
    is_differentiable = False

    count: Tensor
    mean: Tensor
    scatter: Tensor

    def __init__(self, features: int) -> None:
        super().__init__()
        # Without a reduction processes are stacked, and merged in `compute`.
        self.add_state("count", torch.zeros((), dtype=torch.int64), dist_reduce_fx=None)
        self.add_state("mean", torch.zeros(features, dtype=torch.float64), dist_reduce_fx=None)
        self.add_state("scatter", torch.zeros(features, features, dtype=torch.float64), dist_reduce_fx=None)

    def update(self, features: Float[Tensor, "n d"]) -> None:
        """Add a batch.

        Raises:
            UserError: of another length, or not finite.
        """
        d = len(self.mean)
        if features.ndim != 2 or features.shape[1] != d:
            raise UserError(f"features are {tuple(features.shape)}, which must be (n, {d})")
        if not features.isfinite().all():
            raise UserError("features are not finite numbers; extract them in fp32")
        moments = self._now().merged(Moments.of(features.to(self.mean.device)))
        self.count = torch.as_tensor(moments.count, device=self.mean.device)
        self.mean, self.scatter = moments.mean, moments.scatter

    def compute(self) -> Moments:
        """The moments so far, of all processes."""
        return self._now()

    def _now(self) -> Moments:
        if self.count.ndim == 0:
            return Moments(int(self.count), self.mean, self.scatter)
        made = Moments(0, torch.zeros_like(self.mean[0]), torch.zeros_like(self.scatter[0]))
        for count, mean, scatter in zip(self.count.tolist(), self.mean, self.scatter, strict=True):
            made = made.merged(Moments(count, mean, scatter))
        return made


def frechet_distance(a: Moments, b: Moments) -> float:
    """|mu_a - mu_b|^2 + tr(C_a + C_b - 2 (C_a C_b)^(1/2)) (Dowson and Landau 1982, Equation 6).

    With C = R^T R the last trace is the sum of the singular values of R_a R_b^T: nothing is inverted, no root is taken
    of an unsymmetric or indefinite matrix, and covariances that lack rank, as those of fewer pictures than dimensions
    do, need no help.

    Raises:
        UserError: features of different lengths, or of fewer than two pictures.
    """
    if a.mean.shape != b.mean.shape:
        raise UserError(
            f"features have {len(a.mean)} and {len(b.mean)} numbers; extract both with one network"
        )
    b_mean, b_covariance = b.mean.to(a.mean), b.covariance.to(a.mean)
    root = torch.linalg.svdvals(_root(a.covariance) @ _root(b_covariance).T).sum()
    traces = a.covariance.trace() + b_covariance.trace()
    return max(0.0, float((a.mean - b_mean).square().sum() + traces - 2 * root))


def sampling_floor(reference: Moments, count: int, seed: int = 0) -> float:
    """The Fréchet distance of `count` draws from the reference's own Gaussian to the reference: what a perfect
    generator would be given for painting no more pictures than that.

    The estimate is biased (Chong and Forsyth 2020): it falls towards 0 as `count` grows, and figures of different
    counts are of different things.
    """
    root = _root(reference.covariance)
    generator = torch.Generator().manual_seed(seed)
    drawn = Moments.of(reference.mean[None][:0])
    for at in range(0, count, DRAWN):
        normal = torch.randn(min(DRAWN, count - at), len(root), generator=generator, dtype=torch.float64)
        drawn = drawn.merged(Moments.of(normal.to(root) @ root + reference.mean))
    return frechet_distance(drawn, reference)


def _root(covariance: Float64[Tensor, "d d"]) -> Float64[Tensor, "r d"]:
    """R with R^T R = covariance, and as many rows as it has rank."""
    values, vectors = torch.linalg.eigh(covariance)
    # Rounding leaves eigenvalues about this far from zero; their roots would be 1e8 times as large as they.
    kept = values > len(values) * torch.finfo(values.dtype).eps * values.max().clamp(min=0)
    return values[kept].sqrt()[:, None] * vectors[:, kept].T
