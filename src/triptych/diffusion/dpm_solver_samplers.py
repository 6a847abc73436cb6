"""DPM-Solver (Lu et al. 2022) with steps of its own, even in log(sigma / alpha) or adaptive, as in k-diffusion.

Of the table of levels only the ends count: these samplers go from the first level to the schedule's first time, where
the noise that is left (sigma / alpha = 0.03 in Stable Diffusion) stays in the sample. A start in pure noise, where
sigma / alpha is infinite, is left by Euler's step to the second level.

Each call of the network yields a `SamplerStep`; between two calls of a solver's step, x is the solver's estimate.
"""

import math
from collections.abc import Callable, Generator, Iterator

from torch import Tensor

from triptych.diffusion.noise import Noise
from triptych.diffusion.process import Denoiser, NoiseLevel, noise_ratio
from triptych.diffusion.sampler_steps import (
    Sampler,
    SamplerStep,
    implied_eps,
    initial_state,
    noise_like,
    predict_x0,
)
from triptych.diffusion.schedule import Levels, level_at

# k-diffusion's settings of the adaptive solver.
_RELATIVE_TOLERANCE, _ABSOLUTE_TOLERANCE = 0.05, 0.0078
_FIRST_STEP = 0.05  # in log(sigma / alpha)
_LEAST_GROWTH = 0.81  # of the step's length, at which the step is accepted


class _Walk:
    """The state y = x / alpha on its way to `end`, and what is reported of it.

    Args:
        denoise: the network's denoiser.
        x: noisy data at `levels[0]`.
        levels: the table.
    """

    def __init__(self, denoise: Denoiser, x: Tensor, levels: Levels):
        self.denoise, self.levels = denoise, levels
        self.num_steps, self.calls = len(levels) - 1, 0
        self.ratio, self.y = math.inf, initial_state(x)
        if levels[0].alpha > 0:
            self.ratio, self.y = noise_ratio(levels[0]), self.y / levels[0].alpha
        last = levels[-1]
        self.end = noise_ratio(last if last.sigma > 0 else levels.process.level(levels.process.first))
        if self.ratio <= self.end:  # a single step, at the first time
            self.end = 0.0

    def leave_pure_noise(self) -> Iterator[SamplerStep]:
        """Yield Euler's step to the second level."""
        if self.ratio == math.inf:
            level, next_level = self.levels[:2]
            x0 = predict_x0(self.denoise, self.y, level)
            self.ratio = noise_ratio(next_level)
            self.y = x0 + self.ratio * implied_eps(self.y, x0, level)
            yield self.step(self.y, x0, level, self.ratio)

    def eps(self, y: Tensor, ratio: float) -> tuple[Tensor, Tensor, NoiseLevel]:
        """Return eps and x_0 at y, and its level."""
        level = level_at(self.levels.process, ratio)
        x0 = predict_x0(self.denoise, level.alpha * y, level)
        return (y - x0) / ratio, x0, level

    def step(self, y: Tensor, x0: Tensor, level: NoiseLevel, ratio: float) -> SamplerStep:
        """Return the report of a call at `level`, after which y is at `ratio`."""
        done = ratio <= self.end
        next_level = self.levels[-1] if done else level_at(self.levels.process, ratio)
        self.calls += 1
        return SamplerStep(self.calls - 1, self.num_steps, next_level.alpha * y, x0, next_level, level)

    def solve(
        self, end: float, order: int, low_order_place: float = 1 / 2
    ) -> Generator[SamplerStep, None, tuple[Tensor, Tensor, Tensor, NoiseLevel]]:
        """Yield the calls of a step from `ratio` to `end` (Lu et al. 2022, Algorithms 1 and 2) but the last.

        Args:
            order: 1, 2 or 3, as many as there are calls.
            low_order_place: where the second call of order 2 is, as a part of the step.

        Returns:
            y at the end by this order and by the order below; x_0 and the level of the last call.
        """
        y, ratio = self.y, self.ratio
        h = math.log(ratio / end) if end else math.inf
        place = low_order_place if order == 2 else 1 / 3
        eps, x0, level = self.eps(y, ratio)
        first = y + (end - ratio) * eps
        if order == 1:
            return first, first, x0, level
        middle = ratio * math.exp(-place * h)
        y_middle = y + (middle - ratio) * eps
        yield self.step(y_middle, x0, level, middle)
        eps_middle, x0, level = self.eps(y_middle, middle)
        second = first + (end - ratio) / (2 * place) * (eps_middle - eps)
        if order == 2:
            return second, first, x0, level
        late = ratio * math.exp(-2 / 3 * h)
        bend = 2 * late * _mean_growth(2 / 3 * h)
        y_late = y + (late - ratio) * eps - bend * (eps_middle - eps)
        yield self.step(y_late, x0, level, late)
        eps_late, x0, level = self.eps(y_late, late)
        return first - 1.5 * end * _mean_growth(h) * (eps_late - eps), second, x0, level


def dpm_fast(
    denoise: Denoiser, x: Tensor, levels: Levels, *, noise: Noise | None = None, ancestral: bool = False
) -> Iterator[SamplerStep]:
    """k-diffusion's "DPM fast": DPM-Solver-fast (Lu et al. 2022, Section 3.4), steps of order 3, then of order 2 or 1,
    with as many calls in all as the table has steps.

    Args:
        ancestral: whether each step goes below its level and adds noise up to it, as by default in AUTOMATIC1111's web
            UI (k-diffusion's eta = 1).
    """
    walk = _Walk(denoise, x, levels)
    yield from walk.leave_pure_noise()
    calls = walk.num_steps - walk.calls
    if not calls:
        return
    rest = calls % 3
    orders = [3] * (calls // 3) + [rest] if rest else [3] * (calls // 3 - 1) + [2, 1]
    start, end = walk.ratio, walk.end
    for index, order in enumerate(orders):
        part = (index + 1) / len(orders)
        next_ratio = end if part == 1 else start ** (1 - part) * end**part
        below = max(next_ratio**2 / walk.ratio, end) if ancestral else next_ratio
        walk.y, _, x0, level = yield from walk.solve(below, order)
        walk.y, walk.ratio = _renoised(walk.y, below, next_ratio, noise, index), next_ratio
        yield walk.step(walk.y, x0, level, next_ratio)


def dpm_adaptive(
    denoise: Denoiser, x: Tensor, levels: Levels, *, noise: Noise | None = None, ancestral: bool = False
) -> Iterator[SamplerStep]:
    """k-diffusion's "DPM adaptive": DPM-Solver-23 (Lu et al. 2022, Algorithm 3), whose steps are as long as the
    difference of orders 2 and 3, over the whole batch, allows. Three calls a step, as many steps as that takes; the
    number of steps of the table is not used.

    Args:
        ancestral: as of `dpm_fast`.
    """
    walk = _Walk(denoise, x, levels)
    yield from walk.leave_pure_noise()
    if walk.num_steps == walk.calls:
        return
    h, accepted, previous = _FIRST_STEP, 0, walk.y
    while walk.end == 0 or math.log(walk.ratio / walk.end) > 1e-5:
        next_ratio = max(walk.ratio * math.exp(-h), walk.end)
        if walk.end == 0:
            next_ratio = 0.0
        below = max(next_ratio**2 / walk.ratio, walk.end) if ancestral else next_ratio
        high, low, x0, level = yield from walk.solve(below, 3 if below else 1, low_order_place=1 / 3)
        error = _error(high, low, previous)
        # With NaN no step would ever be accepted: this one is the last, and the caller reports the sample.
        growth = 1 + math.atan((1 / (error + 1e-8)) ** (1 / (1.5 if ancestral else 3)) - 1)
        if growth >= _LEAST_GROWTH or not math.isfinite(error):
            next_ratio = next_ratio if math.isfinite(error) else walk.end
            walk.y = _renoised(high, below, next_ratio, noise, accepted)
            walk.ratio, previous, accepted = next_ratio, low, accepted + 1
        h *= growth
        yield walk.step(walk.y, x0, level, walk.ratio)
        if walk.ratio == 0:
            return


def with_noise(sampler: Callable[..., Iterator[SamplerStep]]) -> Sampler:
    """Return the ancestral variant of a sampler of this module."""

    def ancestral(denoise: Denoiser, x: Tensor, levels: Levels, *, noise: Noise) -> Iterator[SamplerStep]:
        return sampler(denoise, x, levels, noise=noise, ancestral=True)

    return ancestral


def _mean_growth(h: float) -> float:
    """Return (e^h - 1) / h - 1."""
    return math.expm1(h) / h - 1


def _renoised(y: Tensor, below: float, ratio: float, noise: Noise | None, index: int) -> Tensor:
    """Return y at `ratio`, from `below` it."""
    if below >= ratio:
        return y
    if noise is None:
        raise TypeError("an ancestral sampler needs noise")
    return y + math.sqrt(ratio**2 - below**2) * noise_like(y, noise(index))


def _error(high: Tensor, low: Tensor, previous: Tensor) -> float:
    """Return the root mean square of the difference of both orders, as a part of what is tolerated."""
    tolerance = (_RELATIVE_TOLERANCE * low.abs().maximum(previous.abs())).clamp(min=_ABSOLUTE_TOLERANCE)
    return float(((low - high) / tolerance).square().mean().sqrt())
