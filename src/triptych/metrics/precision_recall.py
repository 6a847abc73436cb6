"""Quality and diversity of generated images as two separate metrics.

Precision and recall (Kynkäänniemi et al. 2019) and density and coverage (Naeem et al. 2020) count the features of one
set that are in the balls around features of the other set. The radius of a ball is the distance to the k-th nearest
neighbor in its own set.
"""

from typing import NamedTuple

import torch
from jaxtyping import Float, Float64
from torch import Tensor

from triptych.errors import DataError
from triptych.metrics.kernel_distance import blocks

# Added to squared radii, relative to the radius and to the mean squared length: so a feature on the edge of a ball, or
# the copy of an image that occurs twice, is inside however distances are rounded.
EDGE, COPY = 1e-9, 1e-12


class PrecisionRecall(NamedTuple):
    """Improved precision and recall."""

    precision: float
    """Fraction of generated features that are in the ball of a real one."""
    recall: float
    """Fraction of real features that are in the ball of a generated one."""


class DensityCoverage(NamedTuple):
    """Density and coverage."""

    density: float
    """Mean number of real balls that a generated feature is in, divided by k; 1 is expected for equal distributions."""
    coverage: float
    """Fraction of real features whose ball contains a generated one."""


def precision_recall(
    real: Float[Tensor, "n d"], generated: Float[Tensor, "m d"], k: int = 3
) -> PrecisionRecall:
    """Return improved precision and recall (Kynkäänniemi et al. 2019, Equations 1 and 2); the paper has k = 3.

    Raises:
        DataError: a set has k features or fewer.
    """
    real, generated = _center(real, generated, k)
    return PrecisionRecall(_fraction_inside(generated, real, k), _fraction_inside(real, generated, k))


def density_coverage(
    real: Float[Tensor, "n d"], generated: Float[Tensor, "m d"], k: int = 5
) -> DensityCoverage:
    """Return density and coverage (Naeem et al. 2020, Equations 4 and 5); the paper has k = 5.

    Unlike precision, density does not count every generated feature in the large ball of a real outlier as good.

    Raises:
        DataError: as `precision_recall`.
    """
    real, generated = _center(real, generated, k)
    real_radii = radii(real, k)
    num_inside, num_covered = 0, 0
    for rows in blocks(real, generated):
        inside = squared_distances(real[rows], generated) <= real_radii[rows, None]
        num_inside += int(inside.sum())
        num_covered += int(inside.any(1).sum())
    return DensityCoverage(num_inside / (k * len(generated)), num_covered / len(real))


def radii(x: Float64[Tensor, "n d"], k: int) -> Float64[Tensor, " n"]:
    """Return the squared distance of each feature to its k-th nearest neighbor other than itself, slightly enlarged."""
    nearest = []
    for rows in blocks(x, x):
        distances = squared_distances(x[rows], x)
        own = torch.arange(len(distances), device=x.device)
        distances[own, own + rows.start] = torch.inf
        nearest.append(distances.kthvalue(k, dim=1).values)
    scale = x.square().sum(1).mean()
    return torch.cat(nearest) * (1 + EDGE) + COPY * scale


def squared_distances(x: Float64[Tensor, "n d"], y: Float64[Tensor, "m d"]) -> Float64[Tensor, "n m"]:
    """Return the squared distance of each row of x to each row of y."""
    return (x.square().sum(1)[:, None] + y.square().sum(1) - 2 * x @ y.T).clamp_(min=0)


def _fraction_inside(x: Float64[Tensor, "n d"], centers: Float64[Tensor, "m d"], k: int) -> float:
    squared_radii = radii(centers, k)
    num_inside = sum(
        int((squared_distances(x[rows], centers) <= squared_radii).any(1).sum())
        for rows in blocks(x, centers)
    )
    return num_inside / len(x)


def _center(real: Tensor, generated: Tensor, k: int) -> tuple[Float64[Tensor, "n d"], Float64[Tensor, "m d"]]:
    """Return both in fp64, minus the mean of the real features: squared distances from products are then accurate."""
    if min(len(real), len(generated)) <= k or real.shape[1:] != generated.shape[1:]:
        raise DataError(
            f"features are {tuple(real.shape)} and {tuple(generated.shape)}; the {k} nearest neighbors need more than "
            f"{k} images of each set, and features of the same dimensions"
        )
    real = real.double()
    mean = real.mean(0)
    return real - mean, generated.to(real.device).double() - mean
