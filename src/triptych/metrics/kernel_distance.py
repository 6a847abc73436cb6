"""The kernel distance between two sets of features: KID (Binkowski et al. 2018), whatever the network they come from.

Unlike a Fréchet distance it is unbiased: the expected figure does not depend on the number of pictures.
"""

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Float64
from torch import Tensor

from triptych.errors import UserError

BLOCK = 1 << 23  # numbers of a kernel or distance matrix that are held at once: 64 MiB


class KernelDistance(NamedTuple):
    mean: float
    std: float
    """Over the subsets, not of the mean."""
    size: int
    """Of a subset."""


def kernel_distance(x: Float[Tensor, "n d"], y: Float[Tensor, "m d"]) -> float:
    """The squared maximum mean discrepancy under the kernel (x . y / d + 1)^3, by its unbiased estimate (Gretton et al.
    2012, Equation 3), of all pairs. It may be a little below 0. Memory does not grow with the number of pictures.

    Raises:
        UserError: fewer than two of either.
    """
    x, y = _checked(x, y)
    n, m = len(x), len(y)
    within = _kernel_sum(x, x) - _kernel(x.square().sum(1), x.shape[1]).sum()
    within_y = _kernel_sum(y, y) - _kernel(y.square().sum(1), y.shape[1]).sum()
    return float(within / (n * (n - 1)) + within_y / (m * (m - 1)) - 2 * _kernel_sum(x, y) / (n * m))


def kernel_distance_of_subsets(
    x: Float[Tensor, "n d"], y: Float[Tensor, "m d"], subsets: int = 100, size: int = 1000, seed: int = 0
) -> KernelDistance:
    """The same of `subsets` random parts of `size` features of each side, as KID is usually given.

    Args:
        size: of a part; of smaller sets as many as both have.
        seed: of the choice.
    """
    x, y = _checked(x, y)
    rng = np.random.default_rng(seed)
    size = min(size, len(x), len(y))
    found = [
        kernel_distance(*(z[torch.from_numpy(rng.choice(len(z), size, replace=False))] for z in (x, y)))
        for _ in range(subsets)
    ]
    return KernelDistance(float(np.mean(found)), float(np.std(found)), size)


def blocks(x: Tensor, y: Tensor) -> Iterator[slice]:
    """Rows of x by the piece, so that a matrix of a piece by all of y stays small."""
    step = max(1, BLOCK // len(y))
    return (slice(at, at + step) for at in range(0, len(x), step))


def _kernel(products: Float64[Tensor, "..."], d: int) -> Float64[Tensor, "..."]:
    return (products / d + 1) ** 3


def _kernel_sum(x: Float64[Tensor, "n d"], y: Float64[Tensor, "m d"]) -> Float64[Tensor, ""]:
    return torch.stack([_kernel(x[rows] @ y.T, x.shape[1]).sum() for rows in blocks(x, y)]).sum()


def _checked(x: Tensor, y: Tensor) -> tuple[Float64[Tensor, "n d"], Float64[Tensor, "m d"]]:
    if min(len(x), len(y)) < 2 or x.shape[1:] != y.shape[1:]:
        raise UserError(
            f"features are {tuple(x.shape)} and {tuple(y.shape)}; a kernel distance needs two pictures of each side "
            "and features of one length"
        )
    return x.double(), y.to(x.device).double()
