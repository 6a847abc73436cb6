"""Kernel distance between two sets of features: KID (Binkowski et al. 2018), for any network.

Unlike the Fréchet distance it is unbiased: its expected value does not depend on the number of images.
"""

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Float64
from torch import Tensor

from triptych.errors import DataError

BLOCK = 1 << 23  # entries of a kernel or distance matrix that are in memory at once: 64 MiB


class KernelDistance(NamedTuple):
    """The kernel distances of random subsets."""

    mean: float
    std: float
    """Standard deviation over the subsets, not of the mean."""
    size: int
    """Number of features in a subset."""


def kernel_distance(x: Float[Tensor, "n d"], y: Float[Tensor, "m d"]) -> float:
    """Return the squared maximum mean discrepancy under the kernel (x . y / d + 1)^3, by its unbiased estimate over all
    pairs (Gretton et al. 2012, Equation 3). It may be slightly below 0. Uses constant memory.

    Raises:
        DataError: a set has fewer than two features, or the two have different dimensions.
    """
    x, y = _checked(x, y)
    n, m = len(x), len(y)
    within = _kernel_sum(x, x) - _kernel(x.square().sum(1), x.shape[1]).sum()
    within_y = _kernel_sum(y, y) - _kernel(y.square().sum(1), y.shape[1]).sum()
    return float(within / (n * (n - 1)) + within_y / (m * (m - 1)) - 2 * _kernel_sum(x, y) / (n * m))


def kernel_distance_of_subsets(
    x: Float[Tensor, "n d"], y: Float[Tensor, "m d"], subsets: int = 100, size: int = 1000, seed: int = 0
) -> KernelDistance:
    """Return mean and standard deviation of the kernel distance over random subsets, as KID is usually reported.

    Args:
        subsets: number of subsets.
        size: features of each set in a subset; at most as many as the smaller set has.
        seed: seed of the random choice.
    """
    x, y = _checked(x, y)
    rng = np.random.default_rng(seed)
    size = min(size, len(x), len(y))
    distances = [
        kernel_distance(*(z[torch.from_numpy(rng.choice(len(z), size, replace=False))] for z in (x, y)))
        for _ in range(subsets)
    ]
    return KernelDistance(float(np.mean(distances)), float(np.std(distances)), size)


def blocks(x: Tensor, y: Tensor) -> Iterator[slice]:
    """Yield slices of the rows of x, such that the matrix of a slice by all of y has at most `BLOCK` entries."""
    step = max(1, BLOCK // len(y))
    return (slice(start, start + step) for start in range(0, len(x), step))


def _kernel(products: Float64[Tensor, "..."], d: int) -> Float64[Tensor, "..."]:
    return (products / d + 1) ** 3


def _kernel_sum(x: Float64[Tensor, "n d"], y: Float64[Tensor, "m d"]) -> Float64[Tensor, ""]:
    return torch.stack([_kernel(x[rows] @ y.T, x.shape[1]).sum() for rows in blocks(x, y)]).sum()


def _checked(x: Tensor, y: Tensor) -> tuple[Float64[Tensor, "n d"], Float64[Tensor, "m d"]]:
    if min(len(x), len(y)) < 2 or x.shape[1:] != y.shape[1:]:
        raise DataError(
            f"features are {tuple(x.shape)} and {tuple(y.shape)}; a kernel distance needs at least two images of each "
            "set, and features of the same dimensions"
        )
    return x.double(), y.to(x.device).double()
