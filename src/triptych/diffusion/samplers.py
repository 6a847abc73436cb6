"""Samplers: generators over `(denoise, x, levels)` that walk a table of levels from noise to data.

Progress bars, previews, films and cancelling all just iterate. What a sampler knows of the process is the table:
alpha, sigma and the time of each level. Between two levels, lambda = log(alpha / sigma) grows by h, and

    e^-h = (alpha sigma') / (sigma alpha')

is 0 both where a schedule starts in pure noise (alpha = 0) and where it ends in the clean image (sigma' = 0), so
formulas that keep to it need no exception at either end. A prime marks the level that a step goes to.

State is kept in fp32 (fp64 if x is), whatever the network computes in. No gradient is recorded.
"""

import itertools
import math
from collections.abc import Iterator
from typing import NamedTuple, Protocol, runtime_checkable

import torch
from torch import Tensor

from triptych.diffusion.noise import Noise
from triptych.diffusion.process import Denoiser, Level
from triptych.diffusion.schedule import Levels
from triptych.errors import require_known


class Step(NamedTuple):
    """What a sampler yields after each step."""

    index: int
    """Of this step, from 0."""
    count: int
    """Of all steps."""
    x: Tensor
    """The state, now at `level`; after the last step the sample."""
    x0: Tensor
    """The clean data that the network saw at the level before."""
    level: Level


@runtime_checkable
class Sampler(Protocol):
    """Walks x (b, ...) from `levels[0]` to `levels[-1]`. Stochastic samplers call `noise(index)` for step `index`."""

    def __call__(self, denoise: Denoiser, x: Tensor, levels: Levels, *, noise: Noise) -> Iterator[Step]: ...


def ddim(
    denoise: Denoiser, x: Tensor, levels: Levels, *, noise: Noise | None = None, eta: float = 0.0
) -> Iterator[Step]:
    """Denoising diffusion implicit models (Song et al. 2021, Equation 12), which is Euler's method on the ODE of
    sigma / alpha; `eta` in (0, 1] adds noise (Equation 16), as much as DDPM does at 1."""
    x = _precise(x)
    for index, now, then in _walk(levels):
        x0 = _see(denoise, x, now)
        new = eta * then.sigma * math.sqrt(1 - _decay(now, then) ** 2)
        kept = math.sqrt(then.sigma**2 - new**2)  # sigma' is made of old and of new noise
        x = kept / now.sigma * x + (then.alpha - kept * now.alpha / now.sigma) * x0
        if new > 0:
            if noise is None:
                raise TypeError("ddim with eta above 0 needs noise")
            x = x + new * _like(x, noise(index))
        yield Step(index, len(levels) - 1, x, x0, then)


def euler(denoise: Denoiser, x: Tensor, levels: Levels, *, noise: Noise | None = None) -> Iterator[Step]:
    """Euler's method on the ODE of sigma / alpha: Karras et al. 2022, Algorithm 1, without its correction.

    Where x_0 stays, the ODE's paths are straight lines, which DDIM follows as well, and so does Euler's method in the
    time of flow matching: all three are the same sampler.
    """
    return ddim(denoise, x, levels)


def ancestral(denoise: Denoiser, x: Tensor, levels: Levels, *, noise: Noise) -> Iterator[Step]:
    """The posterior q(x' | x, x_0) of the forward process (Ho et al. 2020, Equations 6 and 7), sampled.

    k-diffusion's "Euler ancestral" takes an Euler step below the next level and adds noise up to it, which comes to
    the same: `ddpm` and `euler-ancestral` differ in the levels that they are usually given.
    """
    x = _precise(x)
    for index, now, then in _walk(levels):
        x0 = _see(denoise, x, now)
        x = _reverse_sde(x, x0, now, then, noise, index)
        yield Step(index, len(levels) - 1, x, x0, then)


def heun(denoise: Denoiser, x: Tensor, levels: Levels, *, noise: Noise | None = None) -> Iterator[Step]:
    """Heun's method on the ODE of sigma / alpha (Karras et al. 2022, Algorithm 1): two calls a step, at its two ends.

    Steps from pure noise, where sigma / alpha is infinite, and to the clean image are Euler's."""
    x = _precise(x)
    for index, now, then in _walk(levels):
        x0 = _see(denoise, x, now)
        eps = _eps(x, x0, now)
        inner = now.alpha > 0 and then.sigma > 0
        slope = _heun_slope(denoise, x0, eps, now, then) if inner else eps
        x = _follow(x0, eps, slope, now, then)
        yield Step(index, len(levels) - 1, x, x0, then)


def plms(denoise: Denoiser, x: Tensor, levels: Levels, *, noise: Noise | None = None) -> Iterator[Step]:
    """Pseudo linear multistep (PNDM, Liu et al. 2022, Equations 9 and 12): Adams and Bashforth's average of the last
    four noises. The first step is Heun's, so there is one call more than there are steps."""
    weights = [(1.0,), (3 / 2, -1 / 2), (23 / 12, -16 / 12, 5 / 12), (55 / 24, -59 / 24, 37 / 24, -9 / 24)]
    x = _precise(x)
    last: list[Tensor] = []  # eps of the latest steps, newest first
    for index, now, then in _walk(levels):
        x0 = _see(denoise, x, now)
        eps = _eps(x, x0, now)
        last = [eps, *last[:3]]
        if now.alpha == 0:  # nothing to average yet
            slope = eps
        elif len(last) == 1 and then.sigma > 0:
            slope = _heun_slope(denoise, x0, eps, now, then)
        else:
            slope = _weighted(weights[len(last) - 1], last)
        x = _follow(x0, eps, slope, now, then)
        yield Step(index, len(levels) - 1, x, x0, then)


def dpmpp_2m(denoise: Denoiser, x: Tensor, levels: Levels, *, noise: Noise | None = None) -> Iterator[Step]:
    """DPM-Solver++(2M) (Lu et al. 2022, Algorithm 2): x_0 is continued in lambda from the last two calls."""
    x, before = _precise(x), None
    for index, now, then in _walk(levels):
        x0 = _see(denoise, x, now)
        ahead = _midway(x0, before, levels, index)
        x = then.sigma / now.sigma * x + then.alpha * (1 - _decay(now, then)) * ahead
        before = x0
        yield Step(index, len(levels) - 1, x, x0, then)


def dpmpp_2m_sde(denoise: Denoiser, x: Tensor, levels: Levels, *, noise: Noise) -> Iterator[Step]:
    """SDE-DPM-Solver++(2M) (Lu et al. 2022, Section 6): the same continuation in the reverse SDE."""
    x, before = _precise(x), None
    for index, now, then in _walk(levels):
        x0 = _see(denoise, x, now)
        x = _reverse_sde(x, _midway(x0, before, levels, index), now, then, noise, index)
        before = x0
        yield Step(index, len(levels) - 1, x, x0, then)


def unipc(denoise: Denoiser, x: Tensor, levels: Levels, *, noise: Noise | None = None) -> Iterator[Step]:
    """UniPC-2 on x_0 with B(h) = e^h - 1 (Zhao et al. 2023, Algorithms 1 and 2, for data prediction).

    Each call's x_0 first corrects the step that led to it (UniC), then predicts the next (UniP, which at order 2 is
    DPM-Solver++(2M)).
    """
    x = start = _precise(x)  # start: x one level before
    seen: list[Tensor] = []  # x_0 of the last two calls, newest first
    for index, now, then in _walk(levels):
        x0 = _see(denoise, x, now)
        if index:
            x = _correct(start, x0, seen, levels, index)
        ahead = _midway(x0, seen[0] if seen else None, levels, index)
        start, seen = x, [x0, *seen[:1]]
        x = then.sigma / now.sigma * x + then.alpha * (1 - _decay(now, then)) * ahead
        yield Step(index, len(levels) - 1, x, x0, then)


def lcm(denoise: Denoiser, x: Tensor, levels: Levels, *, noise: Noise) -> Iterator[Step]:
    """Multistep consistency sampling (Song et al. 2023, Algorithm 1), the consistency function being
    f = c_skip x + c_out x_0 (Luo et al. 2023, Section 4.1, with sigma_data = 0.5 and times ten times as large)."""
    x = _precise(x)
    for index, now, then in _walk(levels):
        x0 = _see(denoise, x, now)
        scaled, data = 10 * now.t, 0.5
        x0 = data**2 / (scaled**2 + data**2) * x + scaled / math.sqrt(scaled**2 + data**2) * x0
        x = then.alpha * x0
        if then.sigma > 0:
            x = x + then.sigma * _like(x, noise(index))
        yield Step(index, len(levels) - 1, x, x0, then)


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
    """The sampler of that name.

    Raises:
        UserError: there is none; near names are listed.
    """
    return SAMPLERS[require_known(name, SAMPLERS, "sampler")]


def _walk(levels: Levels) -> Iterator[tuple[int, Level, Level]]:
    return ((index, now, then) for index, (now, then) in enumerate(itertools.pairwise(levels)))


def _precise(x: Tensor) -> Tensor:
    return x.detach().to(torch.promote_types(x.dtype, torch.float32))


def _see(denoise: Denoiser, x: Tensor, level: Level) -> Tensor:
    """x_0, without the graph behind it, of which thirty would not fit in memory."""
    with torch.no_grad():
        return denoise(x, level.times(x)).to(x.dtype)


def _like(x: Tensor, noise: Tensor) -> Tensor:
    return noise.to(x.device, x.dtype)


def _decay(now: Level, then: Level) -> float:
    """e^-h."""
    return now.alpha * then.sigma / (now.sigma * then.alpha)


def _h(now: Level, then: Level) -> float:
    decay = _decay(now, then)
    return -math.log(decay) if decay > 0 else math.inf


def _eps(x: Tensor, x0: Tensor, level: Level) -> Tensor:
    return (x - level.alpha * x0) / level.sigma


def _follow(x0: Tensor, eps: Tensor, slope: Tensor, now: Level, then: Level) -> Tensor:
    """x' / alpha' = x / alpha + (sigma' / alpha' - sigma / alpha) slope, for x = alpha x_0 + sigma eps.

    From pure noise only eps itself can be the slope.
    """
    x = then.alpha * x0 + then.sigma * eps
    if slope is not eps:
        x = x + (then.sigma - then.alpha * now.sigma / now.alpha) * (slope - eps)
    return x


def _heun_slope(denoise: Denoiser, x0: Tensor, eps: Tensor, now: Level, then: Level) -> Tensor:
    ahead = then.alpha * x0 + then.sigma * eps
    return (eps + _eps(ahead, _see(denoise, ahead, then), then)) / 2


def _weighted(weights: tuple[float, ...], terms: list[Tensor]) -> Tensor:
    total = weights[0] * terms[0]
    for weight, term in zip(weights[1:], terms[1:], strict=True):
        total = total + weight * term
    return total


def _reverse_sde(x: Tensor, x0: Tensor, now: Level, then: Level, noise: Noise, index: int) -> Tensor:
    """The reverse SDE from one level to the next, solved exactly for an x_0 that stays (Lu et al. 2022,
    Section 6)."""
    decay = _decay(now, then)
    x = then.sigma / now.sigma * decay * x + then.alpha * (1 - decay**2) * x0
    if then.sigma > 0:
        x = x + then.sigma * math.sqrt(1 - decay**2) * _like(x, noise(index))
    return x


def _midway(x0: Tensor, before: Tensor | None, levels: Levels, index: int) -> Tensor:
    """x_0 half a step ahead in lambda, on the line through the last two: x_0 + h / (2 h_before) (x_0 - before).

    The clean image is infinitely far ahead; the step to it takes x_0 as it is.
    """
    if before is None or levels[index + 1].sigma == 0:
        return x0
    ahead = _h(levels[index], levels[index + 1]) / (2 * _h(levels[index - 1], levels[index]))
    return x0 + ahead * (x0 - before)


def _correct(start: Tensor, x0: Tensor, seen: list[Tensor], levels: Levels, index: int) -> Tensor:
    """x at `levels[index]` once more, from the level before, now that x_0 is known at both ends (UniC): of order 1
    with these two alone, of order 2 with one more."""
    then, now = levels[index], levels[index - 1]
    h = _h(now, then)
    change = x0 - seen[0]
    if len(seen) == 1:
        ahead = seen[0] + change / 2
    else:
        # The two weights solve rho_1 + rho_2 = b_1 and r rho_1 + rho_2 = b_2, the conditions of order.
        r = -_h(levels[index - 2], now) / h
        grown = math.expm1(-h)
        b_1 = (grown / -h - 1) / grown
        b_2 = 2 * ((grown / -h - 1) / -h - 0.5) / grown
        rho_1 = (b_1 - b_2) / (1 - r)
        ahead = seen[0] + rho_1 / r * (seen[1] - seen[0]) + (b_1 - rho_1) * change
    return then.sigma / now.sigma * start + then.alpha * (1 - _decay(now, then)) * ahead
