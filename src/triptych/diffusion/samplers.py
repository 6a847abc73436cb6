"""Samplers: generators over `(denoise, x, levels)` that follow a table of noise levels from noise to data.

Progress bars, previews, animations and cancellation just iterate. A sampler knows the process by its table only: alpha,
sigma and the time of each level. Between two levels, lambda = log(alpha / sigma) grows by h, and

    e^-h = (alpha sigma') / (sigma alpha')

is 0 both where a schedule starts in pure noise (alpha = 0) and where it ends in the clean image (sigma' = 0), so
formulas in e^-h need no special case at either end. A prime marks the level that a step goes to: `next_level`.

The state is fp32 (fp64 if x is), in whatever dtype the network computes. No gradient is recorded.
"""

import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor

from triptych.diffusion.noise import Noise
from triptych.diffusion.process import Denoiser, NoiseLevel
from triptych.diffusion.schedule import Levels
from triptych.errors import require_known


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


@runtime_checkable
class Sampler(Protocol):
    """Takes x (b, ...) from `levels[0]` to `levels[-1]`. Stochastic samplers call `noise(index)` in step `index`."""

    def __call__(
        self, denoise: Denoiser, x: Tensor, levels: Levels, *, noise: Noise
    ) -> Iterator[SamplerStep]: ...


def ddim(
    denoise: Denoiser, x: Tensor, levels: Levels, *, noise: Noise | None = None, eta: float = 0.0
) -> Iterator[SamplerStep]:
    """Denoising diffusion implicit models (Song et al. 2021, Equation 12), which is Euler's method on the ODE of
    sigma / alpha; `eta` in (0, 1] adds noise (Equation 16), as much as DDPM does at 1."""
    x = _precise(x)
    for index, level, next_level in _walk(levels):
        x0 = predict_x0(denoise, x, level)
        new = eta * next_level.sigma * math.sqrt(1 - _decay(level, next_level) ** 2)
        old = math.sqrt(next_level.sigma**2 - new**2)  # sigma'^2 is the sum of old and new variance
        x = old / level.sigma * x + (next_level.alpha - old * level.alpha / level.sigma) * x0
        if new > 0:
            if noise is None:
                raise TypeError("ddim with eta above 0 needs noise")
            x = x + new * noise_like(x, noise(index))
        yield SamplerStep(index, len(levels) - 1, x, x0, next_level)


def euler(
    denoise: Denoiser, x: Tensor, levels: Levels, *, noise: Noise | None = None
) -> Iterator[SamplerStep]:
    """Euler's method on the ODE of sigma / alpha: Karras et al. 2022, Algorithm 1, without its correction.

    Where x_0 is constant, the ODE's paths are straight lines, which DDIM and Euler's method in the time of flow
    matching follow as well: all three are the same sampler.
    """
    return ddim(denoise, x, levels)


def ancestral(denoise: Denoiser, x: Tensor, levels: Levels, *, noise: Noise) -> Iterator[SamplerStep]:
    """Samples of the posterior q(x' | x, x_0) of the forward process (Ho et al. 2020, Equations 6 and 7).

    k-diffusion's "Euler ancestral" takes an Euler step below the next level and adds noise up to it, which is the
    same: `ddpm` and `euler-ancestral` differ in their default levels only.
    """
    x = _precise(x)
    for index, level, next_level in _walk(levels):
        x0 = predict_x0(denoise, x, level)
        x = _reverse_sde(x, x0, level, next_level, noise, index)
        yield SamplerStep(index, len(levels) - 1, x, x0, next_level)


def heun(
    denoise: Denoiser, x: Tensor, levels: Levels, *, noise: Noise | None = None
) -> Iterator[SamplerStep]:
    """Heun's method on the ODE of sigma / alpha (Karras et al. 2022, Algorithm 1): two calls a step, at its two ends.

    Steps from pure noise, where sigma / alpha is infinite, and to the clean image are Euler's."""
    x = _precise(x)
    for index, level, next_level in _walk(levels):
        x0 = predict_x0(denoise, x, level)
        eps = _eps(x, x0, level)
        inner = level.alpha > 0 and next_level.sigma > 0
        slope = _heun_slope(denoise, x0, eps, level, next_level) if inner else eps
        x = ode_step(x0, eps, slope, level, next_level)
        yield SamplerStep(index, len(levels) - 1, x, x0, next_level)


def plms(
    denoise: Denoiser, x: Tensor, levels: Levels, *, noise: Noise | None = None
) -> Iterator[SamplerStep]:
    """Pseudo linear multistep (PNDM, Liu et al. 2022, Equations 9 and 12): Adams and Bashforth's average of the last
    four noises. The first step is Heun's, so there is one call more than there are steps."""
    weights = [(1.0,), (3 / 2, -1 / 2), (23 / 12, -16 / 12, 5 / 12), (55 / 24, -59 / 24, 37 / 24, -9 / 24)]
    x = _precise(x)
    history: list[Tensor] = []  # eps of the last steps, newest first
    for index, level, next_level in _walk(levels):
        x0 = predict_x0(denoise, x, level)
        eps = _eps(x, x0, level)
        history = [eps, *history[:3]]
        if level.alpha == 0:  # nothing to average yet
            slope = eps
        elif len(history) == 1 and next_level.sigma > 0:
            slope = _heun_slope(denoise, x0, eps, level, next_level)
        else:
            slope = _weighted(weights[len(history) - 1], history)
        x = ode_step(x0, eps, slope, level, next_level)
        yield SamplerStep(index, len(levels) - 1, x, x0, next_level)


def dpmpp_2m(
    denoise: Denoiser, x: Tensor, levels: Levels, *, noise: Noise | None = None
) -> Iterator[SamplerStep]:
    """DPM-Solver++(2M) (Lu et al. 2022, Algorithm 2): x_0 is extrapolated in lambda from the last two calls."""
    x, previous_x0 = _precise(x), None
    for index, level, next_level in _walk(levels):
        x0 = predict_x0(denoise, x, level)
        midpoint = extrapolate_x0(x0, previous_x0, levels, index)
        x = next_level.sigma / level.sigma * x + next_level.alpha * (1 - _decay(level, next_level)) * midpoint
        previous_x0 = x0
        yield SamplerStep(index, len(levels) - 1, x, x0, next_level)


def dpmpp_2m_sde(denoise: Denoiser, x: Tensor, levels: Levels, *, noise: Noise) -> Iterator[SamplerStep]:
    """SDE-DPM-Solver++(2M) (Lu et al. 2022, Section 6): the same extrapolation in the reverse SDE."""
    x, previous_x0 = _precise(x), None
    for index, level, next_level in _walk(levels):
        x0 = predict_x0(denoise, x, level)
        x = _reverse_sde(x, extrapolate_x0(x0, previous_x0, levels, index), level, next_level, noise, index)
        previous_x0 = x0
        yield SamplerStep(index, len(levels) - 1, x, x0, next_level)


def unipc(
    denoise: Denoiser, x: Tensor, levels: Levels, *, noise: Noise | None = None
) -> Iterator[SamplerStep]:
    """UniPC-2 on x_0 with B(h) = e^h - 1 (Zhao et al. 2023, Algorithms 1 and 2, for data prediction).

    Each call's x_0 first corrects the step that led to it (UniC), then predicts the next (UniP, which at order 2 is
    DPM-Solver++(2M)).
    """
    x = start = _precise(x)  # start: x at the previous level
    history: list[Tensor] = []  # x_0 of the last two calls, newest first
    for index, level, next_level in _walk(levels):
        x0 = predict_x0(denoise, x, level)
        if index:
            x = _correct(start, x0, history, levels, index)
        midpoint = extrapolate_x0(x0, history[0] if history else None, levels, index)
        start, history = x, [x0, *history[:1]]
        x = next_level.sigma / level.sigma * x + next_level.alpha * (1 - _decay(level, next_level)) * midpoint
        yield SamplerStep(index, len(levels) - 1, x, x0, next_level)


def lcm(denoise: Denoiser, x: Tensor, levels: Levels, *, noise: Noise) -> Iterator[SamplerStep]:
    """Multistep consistency sampling (Song et al. 2023, Algorithm 1), the consistency function being
    f = c_skip x + c_out x_0 (Luo et al. 2023, Section 4.1, with sigma_data = 0.5 and times ten times as large)."""
    x = _precise(x)
    for index, level, next_level in _walk(levels):
        x0 = predict_x0(denoise, x, level)
        scaled, data = 10 * level.t, 0.5
        x0 = data**2 / (scaled**2 + data**2) * x + scaled / math.sqrt(scaled**2 + data**2) * x0
        x = next_level.alpha * x0
        if next_level.sigma > 0:
            x = x + next_level.sigma * noise_like(x, noise(index))
        yield SamplerStep(index, len(levels) - 1, x, x0, next_level)


SAMPLERS: dict[str, Sampler] = {
    "ddpm": ancestral,
    "ddim": ddim,
    "plms": plms,
    "euler": euler,
    "euler-ancestral": ancestral,
    "heun": heun,
    "dpm++2m": dpmpp_2m,
    "dpm++2m-sde": dpmpp_2m_sde,
    "unipc": unipc,
    "lcm": lcm,
}


def sampler(name: str) -> Sampler:
    """Return the sampler of that name.

    Raises:
        UserError: there is none; the message lists near names.
    """
    return SAMPLERS[require_known(name, SAMPLERS, "sampler")]


def _walk(levels: Levels) -> Iterator[tuple[int, NoiseLevel, NoiseLevel]]:
    return ((index, *pair) for index, pair in enumerate(itertools.pairwise(levels)))


def _precise(x: Tensor) -> Tensor:
    return x.detach().to(torch.promote_types(x.dtype, torch.float32))


def predict_x0(denoise: Denoiser, x: Tensor, level: NoiseLevel) -> Tensor:
    """Return x_0 as predicted at `level`, without its graph, of which thirty would not fit in memory."""
    with torch.no_grad():
        return denoise(x, level.times(x)).to(x.dtype)


def noise_like(x: Tensor, noise: Tensor) -> Tensor:
    """Return the noise in x's dtype on its device."""
    return noise.to(x.device, x.dtype)


def _decay(level: NoiseLevel, next_level: NoiseLevel) -> float:
    """e^-h."""
    return level.alpha * next_level.sigma / (level.sigma * next_level.alpha)


def _h(level: NoiseLevel, next_level: NoiseLevel) -> float:
    decay = _decay(level, next_level)
    return -math.log(decay) if decay > 0 else math.inf


def _eps(x: Tensor, x0: Tensor, level: NoiseLevel) -> Tensor:
    return (x - level.alpha * x0) / level.sigma


def ode_step(x0: Tensor, eps: Tensor, slope: Tensor, level: NoiseLevel, next_level: NoiseLevel) -> Tensor:
    """Return x' with x' / alpha' = x / alpha + (sigma' / alpha' - sigma / alpha) slope, for x = alpha x_0 + sigma eps.

    From pure noise only eps itself can be the slope.
    """
    x = next_level.alpha * x0 + next_level.sigma * eps
    if slope is not eps:
        x = x + (next_level.sigma - next_level.alpha * level.sigma / level.alpha) * (slope - eps)
    return x


def _heun_slope(
    denoise: Denoiser, x0: Tensor, eps: Tensor, level: NoiseLevel, next_level: NoiseLevel
) -> Tensor:
    end = next_level.alpha * x0 + next_level.sigma * eps
    return (eps + _eps(end, predict_x0(denoise, end, next_level), next_level)) / 2


def _weighted(weights: tuple[float, ...], terms: list[Tensor]) -> Tensor:
    total = weights[0] * terms[0]
    for weight, term in zip(weights[1:], terms[1:], strict=True):
        total = total + weight * term
    return total


def _reverse_sde(
    x: Tensor, x0: Tensor, level: NoiseLevel, next_level: NoiseLevel, noise: Noise, index: int
) -> Tensor:
    """Return a step of the reverse SDE, solved exactly for a constant x_0 (Lu et al. 2022, Section 6)."""
    decay = _decay(level, next_level)
    x = next_level.sigma / level.sigma * decay * x + next_level.alpha * (1 - decay**2) * x0
    if next_level.sigma > 0:
        x = x + next_level.sigma * math.sqrt(1 - decay**2) * noise_like(x, noise(index))
    return x


def extrapolate_x0(x0: Tensor, previous_x0: Tensor | None, levels: Levels, index: int) -> Tensor:
    """Return x_0 half a step ahead in lambda, on the line through the last two: x_0 + h / (2 h_-1) (x_0 - x_0,-1).

    The clean image is infinitely far ahead in lambda; the step to it takes x_0 as it is.
    """
    if previous_x0 is None or levels[index + 1].sigma == 0:
        return x0
    ahead = _h(levels[index], levels[index + 1]) / (2 * _h(levels[index - 1], levels[index]))
    return x0 + ahead * (x0 - previous_x0)


def _correct(start: Tensor, x0: Tensor, history: list[Tensor], levels: Levels, index: int) -> Tensor:
    """Return x at `levels[index]` again, from the previous level, with x_0 known at both ends (UniC): of order 1 with
    these two alone, of order 2 with one more."""
    level, next_level = levels[index - 1], levels[index]
    h = _h(level, next_level)
    change = x0 - history[0]
    if len(history) == 1:
        midpoint = history[0] + change / 2
    else:
        # The two weights solve rho_1 + rho_2 = b_1 and r rho_1 + rho_2 = b_2, the order conditions.
        r = -_h(levels[index - 2], level) / h
        growth = math.expm1(-h)
        b_1 = (growth / -h - 1) / growth
        b_2 = 2 * ((growth / -h - 1) / -h - 0.5) / growth
        rho_1 = (b_1 - b_2) / (1 - r)
        midpoint = history[0] + rho_1 / r * (history[1] - history[0]) + (b_1 - rho_1) * change
    return (
        next_level.sigma / level.sigma * start + next_level.alpha * (1 - _decay(level, next_level)) * midpoint
    )
