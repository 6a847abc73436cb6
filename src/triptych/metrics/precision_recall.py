"""Two questions that one distance mixes: are the pictures like real ones, and are all kinds of real ones there?

Precision and recall (Kynkäänniemi et al. 2019) and density and coverage (Naeem et al. 2020) ask which features lie in
the ball around another one that reaches to its k-th nearest neighbour on its own side.
"""

from typing import NamedTuple

import torch
from jaxtyping import Float, Float64
from torch import Tensor

from triptych.errors import UserError
from triptych.metrics.kernel_distance import blocks

# Added to squared radii, relative to them and to the mean squared length: a feature on a ball's edge is in it, and of a
# picture that is there twice its copy, however distances were rounded.
EDGE, COPY = 1e-9, 1e-12


class PrecisionRecall(NamedTuple):
    precision: float
    """Share of the generated that lie in the ball of a real one."""
    recall: float
    """Share of the real that lie in the ball of a generated one."""


class DensityCoverage(NamedTuple):
    density: float
    """Balls of real ones that a generated one lies in, on average, over k; 1 is expected of the same distribution."""
    coverage: float
    """Share of the real whose ball holds a generated one."""


def precision_recall(real: Float[Tensor, "n d"], made: Float[Tensor, "m d"], k: int = 3) -> PrecisionRecall:
    """Improved precision and recall (Kynkäänniemi et al. 2019, Equations 1 and 2), k = 3 there.

    Raises:
        UserError: no more than k features of a side.
    """
    real, made = _centred(real, made, k)
    return PrecisionRecall(_share_inside(made, real, k), _share_inside(real, made, k))


def density_coverage(real: Float[Tensor, "n d"], made: Float[Tensor, "m d"], k: int = 5) -> DensityCoverage:
    """Density and coverage (Naeem et al. 2020, Equations 4 and 5), k = 5 there: like precision and recall, but one
    real outlier with a wide ball does not make all that is generated precise.

    Raises:
        UserError: as `precision_recall`.
    """
    real, made = _centred(real, made, k)
    reach = radii(real, k)
    inside, covered = 0, 0
    for rows in blocks(real, made):
        found = squared_distances(real[rows], made) <= reach[rows, None]
        inside += int(found.sum())
        covered += int(found.any(1).sum())
    return DensityCoverage(inside / (k * len(made)), covered / len(real))


def radii(x: Float64[Tensor, "n d"], k: int) -> Float64[Tensor, " n"]:
    """The squared distance from each feature to its k-th nearest neighbour, itself not counted, a hair more."""
    found = []
    for rows in blocks(x, x):
        distances = squared_distances(x[rows], x)
        own = torch.arange(len(distances), device=x.device)
        distances[own, own + rows.start] = torch.inf
        found.append(distances.kthvalue(k, dim=1).values)
    scale = x.square().sum(1).mean()
    return torch.cat(found) * (1 + EDGE) + COPY * scale


def squared_distances(x: Float64[Tensor, "n d"], y: Float64[Tensor, "m d"]) -> Float64[Tensor, "n m"]:
    return (x.square().sum(1)[:, None] + y.square().sum(1) - 2 * x @ y.T).clamp_(min=0)


def _share_inside(x: Float64[Tensor, "n d"], balls: Float64[Tensor, "m d"], k: int) -> float:
    reach = radii(balls, k)
    inside = sum(int((squared_distances(x[rows], balls) <= reach).any(1).sum()) for rows in blocks(x, balls))
    return inside / len(x)


def _centred(real: Tensor, made: Tensor, k: int) -> tuple[Float64[Tensor, "n d"], Float64[Tensor, "m d"]]:
    """In fp64 and about the real ones' mean, which squared distances by products need to be exact."""
    if min(len(real), len(made)) <= k or real.shape[1:] != made.shape[1:]:
        raise UserError(
            f"features are {tuple(real.shape)} and {tuple(made.shape)}; the {k} nearest neighbours need more than {k} "
            "pictures of each side and features of one length"
        )
    real = real.double()
    mean = real.mean(0)
    return real - mean, made.to(real.device).double() - mean
