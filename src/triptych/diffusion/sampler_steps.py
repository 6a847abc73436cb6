"""What samplers share: their protocol, and the formulas of one step.

A sampler knows the process by its table only: alpha, sigma and the time of each level. Between two levels,
lambda = log(alpha / sigma) grows by h, and

    e^-h = (alpha sigma') / (sigma alpha')

is 0 both where a schedule starts in pure noise (alpha = 0) and where it ends in the clean image (sigma' = 0), so
formulas in e^-h need no special case at either end. A prime marks the level that a step goes to: `next_level`.

The state is fp32 (fp64 if x is), in whatever dtype the network computes. No gradient is recorded.
"""

import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor

from triptych.diffusion.noise import Noise
from triptych.diffusion.process import Denoiser, NoiseLevel
from triptych.diffusion.schedule import Levels


@dataclass(frozen=True)
class SamplerStep:
    """State of a sampler after a step."""

    index: int
    """Number of the step, from 0."""
    num_steps: int
    x: Tensor
    """The noisy data at `level`; after the last step the sample."""
    x0: Tensor
    """The clean data that the network predicted at the previous level."""
    level: NoiseLevel
    x0_level: NoiseLevel | None = None
    """Where the network predicted `x0`; None for the level of the table before `level`."""


@runtime_checkable
class Sampler(Protocol):
    """Takes x (b, ...) from `levels[0]` to `levels[-1]`.

    Stochastic samplers call `noise(index)` in step `index`, and `noise(num_steps + index)` if they need a second draw.
    """

    def __call__(
        self, denoise: Denoiser, x: Tensor, levels: Levels, *, noise: Noise
    ) -> Iterator[SamplerStep]: ...


def walk(levels: Levels) -> Iterator[tuple[int, NoiseLevel, NoiseLevel]]:
    """Yield (index, level, next_level) of each step."""
    return ((index, *pair) for index, pair in enumerate(itertools.pairwise(levels)))


def initial_state(x: Tensor) -> Tensor:
    """Return x in at least fp32, off the graph."""
    return x.detach().to(torch.promote_types(x.dtype, torch.float32))


def predict_x0(denoise: Denoiser, x: Tensor, level: NoiseLevel) -> Tensor:
    """Return x_0 as predicted at `level`, without its graph, of which thirty would not fit in memory."""
    with torch.no_grad():
        return denoise(x, level.times(x)).to(x.dtype)


def noise_like(x: Tensor, noise: Tensor) -> Tensor:
    """Return the noise in x's dtype on its device."""
    return noise.to(x.device, x.dtype)


def decay(level: NoiseLevel, next_level: NoiseLevel) -> float:
    """Return e^-h."""
    return level.alpha * next_level.sigma / (level.sigma * next_level.alpha)


def log_snr_step(level: NoiseLevel, next_level: NoiseLevel) -> float:
    """Return h, by which lambda = log(alpha / sigma) grows."""
    shrink = decay(level, next_level)
    return -math.log(shrink) if shrink > 0 else math.inf


def implied_eps(x: Tensor, x0: Tensor, level: NoiseLevel) -> Tensor:
    """Return eps of x = alpha x_0 + sigma eps."""
    return (x - level.alpha * x0) / level.sigma


def ode_step(x0: Tensor, eps: Tensor, slope: Tensor, level: NoiseLevel, next_level: NoiseLevel) -> Tensor:
    """Return x' with x' / alpha' = x / alpha + (sigma' / alpha' - sigma / alpha) slope, for x = alpha x_0 + sigma eps.

    From pure noise only eps itself can be the slope.
    """
    x = next_level.alpha * x0 + next_level.sigma * eps
    if slope is not eps:
        x = x + (next_level.sigma - next_level.alpha * level.sigma / level.alpha) * (slope - eps)
    return x


def heun_slope(
    denoise: Denoiser, x0: Tensor, eps: Tensor, level: NoiseLevel, next_level: NoiseLevel
) -> Tensor:
    """Return the mean of eps at both ends of an Euler step to `next_level`."""
    end = next_level.alpha * x0 + next_level.sigma * eps
    return (eps + implied_eps(end, predict_x0(denoise, end, next_level), next_level)) / 2


def reverse_sde_step(
    x: Tensor, x0: Tensor, level: NoiseLevel, next_level: NoiseLevel, noise: Tensor | None
) -> Tensor:
    """Return a step of the reverse SDE, solved exactly for a constant x_0 (Lu et al. 2022, Section 6).

    Args:
        noise: standard normal noise; None if there is none at the next level.
    """
    shrink = decay(level, next_level)
    x = next_level.sigma / level.sigma * shrink * x + next_level.alpha * (1 - shrink**2) * x0
    if noise is not None:
        x = x + next_level.sigma * math.sqrt(1 - shrink**2) * noise_like(x, noise)
    return x


def step_noise(noise: Noise, index: int, next_level: NoiseLevel) -> Tensor | None:
    """Return the noise of step `index`; None for the step to the clean image."""
    return noise(index) if next_level.sigma > 0 else None


def weighted_sum(weights: Sequence[float], terms: Sequence[Tensor]) -> Tensor:
    """Return the sum of weight times term."""
    total = weights[0] * terms[0]
    for weight, term in zip(weights[1:], terms[1:], strict=True):
        total = total + weight * term
    return total
