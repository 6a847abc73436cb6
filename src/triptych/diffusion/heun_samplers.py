"""Heun's method and samplers built on it: slopes of the ODE of sigma / alpha at both ends of a step."""

import itertools
import math
from collections.abc import Iterator, Sequence

from torch import Tensor

from triptych.diffusion.noise import Noise
from triptych.diffusion.process import Denoiser, NoiseLevel, noise_ratio
from triptych.diffusion.sampler_steps import (
    SamplerStep,
    heun_slope,
    implied_eps,
    initial_state,
    noise_like,
    ode_step,
    predict_x0,
    walk,
    weighted_sum,
)
from triptych.diffusion.schedule import CLEAN, Levels, bounded_ramp, karras_ramp, level_at


def heun(
    denoise: Denoiser, x: Tensor, levels: Levels, *, noise: Noise | None = None
) -> Iterator[SamplerStep]:
    """Heun's method on the ODE of sigma / alpha (Karras et al. 2022, Algorithm 1): two calls a step, at its two ends.

    Steps from pure noise, where sigma / alpha is infinite, and to the clean image are Euler's."""
    x = initial_state(x)
    for index, level, next_level in walk(levels):
        x, x0 = _heun_step(denoise, x, level, next_level)
        yield SamplerStep(index, len(levels) - 1, x, x0, next_level)


def heunpp2(
    denoise: Denoiser, x: Tensor, levels: Levels, *, noise: Noise | None = None
) -> Iterator[SamplerStep]:
    """ComfyUI's `heunpp2`, "HeunPP2": the slope of a step is eps at its start and its end and one step further, whose
    weights are their sigma / alpha as parts of three times the first one; the start has the rest. Up to three calls a
    step; the last step is Euler's, the one before it has two of these slopes."""
    x, largest = initial_state(x), noise_ratio(levels[0])
    for index, level, next_level in walk(levels):
        x0 = predict_x0(denoise, x, level)
        eps = slope = implied_eps(x, x0, level)
        ahead = levels[index + 1 : -1][:2]  # levels of further slopes
        if ahead and level.alpha > 0:
            x_ahead, slopes = next_level.noised(x0, eps), [eps]
            for place, here in enumerate(ahead):
                x0_ahead = predict_x0(denoise, x_ahead, here)
                slopes.append(implied_eps(x_ahead, x0_ahead, here))
                if place + 1 < len(ahead):
                    x_ahead = ahead[place + 1].noised(x0_ahead, slopes[-1])
            weights = [noise_ratio(here) / largest / (len(ahead) + 1) for here in ahead]
            slope = weighted_sum([1 - sum(weights), *weights], slopes)
        x = ode_step(x0, eps, slope, level, next_level)
        yield SamplerStep(index, len(levels) - 1, x, x0, next_level)


def restart(denoise: Denoiser, x: Tensor, levels: Levels, *, noise: Noise) -> Iterator[SamplerStep]:
    """Restart sampling (Xu et al. 2023, Algorithm 1) as in AUTOMATIC1111's web UI, which chooses the intervals: from 20
    steps on, 9 of them, or from 36 on twice a quarter of them, run from sigma / alpha near 2 to near 0.1 again, with
    noise that leads back there; the others are Karras' levels between those of `levels`. Fewer steps are `heun`.

    The noise of the first restart is `noise(0)`, that of the second `noise(1)`.
    """
    x, restarts = initial_state(x), 0
    steps = _restart_steps(levels)
    end = steps[0][0]
    for index, (level, next_level) in enumerate(steps):
        if level.sigma * end.alpha > end.sigma * level.alpha:  # noisier than where the last step ended
            shrink = level.alpha / end.alpha
            added = math.sqrt(level.sigma**2 - (shrink * end.sigma) ** 2)
            x = shrink * x + added * noise_like(x, noise(restarts))
            restarts += 1
        x, x0 = _heun_step(denoise, x, level, next_level)
        end = next_level
        yield SamplerStep(index, len(steps), x, x0, next_level, level)


def _heun_step(
    denoise: Denoiser, x: Tensor, level: NoiseLevel, next_level: NoiseLevel
) -> tuple[Tensor, Tensor]:
    """Return x at the next level, and x_0 as predicted at this one."""
    x0 = predict_x0(denoise, x, level)
    eps = implied_eps(x, x0, level)
    inner = level.alpha > 0 and next_level.sigma > 0
    slope = heun_slope(denoise, x0, eps, level, next_level) if inner else eps
    return ode_step(x0, eps, slope, level, next_level), x0


def _restart_steps(levels: Levels) -> list[tuple[NoiseLevel, NoiseLevel]]:
    """Return the start and the end of each step."""
    count = len(levels) - 1
    if count < 20:
        return list(itertools.pairwise(levels))
    repeats, length = (1, 9) if count < 36 else (2, count // 4)
    high, low = noise_ratio(levels[0]), noise_ratio(levels[-2])
    ratios = bounded_ramp(karras_ramp, high, low, count - repeats * length)
    table = [levels[0], *(level_at(levels.process, ratio) for ratio in ratios[1:]), CLEAN]
    top, bottom = _nearest(ratios, 2.0), _nearest([*ratios, 0.0], 0.1)
    again: list[tuple[NoiseLevel, NoiseLevel]] = []
    if top < bottom < len(ratios):
        ramp = karras_ramp(ratios[top], ratios[bottom], length + 1)
        again = list(itertools.pairwise(level_at(levels.process, ratio) for ratio in ramp))
    pairs = list(itertools.pairwise(table))
    return [*pairs[:bottom], *again * repeats, *pairs[bottom:]]


def _nearest(values: Sequence[float], target: float) -> int:
    return min(range(len(values)), key=lambda index: abs(values[index] - target))
