"""Tables of the noise levels (alpha, sigma, t) that a sampler visits, one more than there are steps.

Sampling starts at the first level and ends at the last. Every spacing is such a table, so samplers do not depend on it;
image-to-image uses the tail of a table.
"""

import math
from collections.abc import Callable, Iterable
from functools import partial

import numpy as np

from triptych.diffusion.beta_distribution import beta_quantile
from triptych.diffusion.config import SPACINGS
from triptych.diffusion.process import NoiseLevel, Process, noise_ratio
from triptych.errors import ConfigError, require_known


class Levels(tuple[NoiseLevel, ...]):
    """A table of noise levels, from the noisiest on, and the process between its rows."""

    process: Process

    def __new__(cls, process: Process, levels: Iterable[NoiseLevel]):
        table = super().__new__(cls, levels)
        table.process = process
        return table

    def between(self, level: NoiseLevel, next_level: NoiseLevel) -> NoiseLevel:
        """Return the level halfway in log(alpha / sigma), for alpha and sigma' above 0."""
        ratio = math.sqrt(level.sigma / level.alpha * next_level.sigma / next_level.alpha)
        return self.process.level(self.process.time(ratio))


CLEAN = NoiseLevel(1.0, 0.0, 0.0)
_WIDEST = 80.0  # the largest sigma / alpha of Karras et al. 2022, Table 1


def spaced_levels(
    process: Process,
    steps: int,
    spacing: str = "trailing",
    *,
    offset: int = 1,
    rho: float = 7.0,
    shift: float = 1.0,
) -> Levels:
    """Return `steps` + 1 levels, from the noisiest to the clean image; fewer with "beta-times" where rounded times
    coincide.

    Args:
        process: the process of the network.
        steps: number of steps, from 1 to the number of times that the spacing can choose from.
        spacing: a name in `SPACINGS`.
        offset: how far "leading" and the spacings based on it start above the first time, as far as there is room
            (diffusers' `steps_offset`; Stable Diffusion has 1).
        rho: exponent of "karras".
        shift: for flow only, moves levels toward noise, as larger images need: sigma becomes
            shift sigma / (1 + (shift - 1) sigma) (Esser et al. 2024, Equation 23).

    Raises:
        ConfigError: an unknown spacing (the message lists near names), steps out of range, a shift without flow, or a
            process without the levels that "align-your-steps" lists.
    """
    require_known(spacing, SPACINGS, "spacing")
    most = (
        _lcm_count(process) if spacing == "lcm" else process.config.num_timesteps - ("multistep" in spacing)
    )
    if not 1 <= steps <= most:
        raise ConfigError(f"steps is {steps}, which must be from 1 to {most} with the spacing {spacing!r}")
    ramp = _RAMPS.get(spacing) or _RAMPS.get(spacing.removeprefix("multistep-"))
    is_flow, is_ramp = process.config.schedule == "flow", ramp is not None
    if shift <= 0 or (shift != 1 and (is_ramp or not is_flow)):
        raise ConfigError(
            f"shift is {shift}, which must be positive; other values than 1 need evenly spaced times of a flow schedule"
        )

    if ramp is not None:
        first, last = process.level(process.first), process.level(process.last)
        count = steps + ("multistep" in spacing or spacing in _TO_FIRST)
        ratios = bounded_ramp(partial(ramp, rho=rho), noise_ratio(last), noise_ratio(first), count)
        levels = [level_at(process, ratio) for ratio in ratios[:steps]]
    else:
        times = _TIMES[spacing](process, steps, offset)
        if shift != 1:
            size = process.config.num_timesteps
            times = [size * shift * t / (size + (shift - 1) * t) for t in times]
        levels = [process.level(t) for t in times]
    last = process.level(process.first) if spacing in _TO_FIRST else CLEAN
    return Levels(process, [*levels, last])


def from_strength(levels: Levels, strength: float) -> Levels:
    """Return the tail of a table for image-to-image: `strength` is the share of the steps that are taken, 1 all, 0
    none.

    Raises:
        ConfigError: a strength outside 0 to 1.
    """
    if not 0 <= strength <= 1:
        raise ConfigError(f"strength is {strength}, which must be from 0 (the image as it is) to 1 (all new)")
    steps = len(levels) - 1
    return Levels(levels.process, levels[steps - int(steps * strength) :])


# Times, highest first. A process counts from `first` to `last`: 0 to T - 1, in flow 1 to T. Even steps are numpy's, as
# in diffusers, so that a time halfway between two integers is rounded to the same side.


def _leading(process: Process, steps: int, offset: int) -> list[float]:
    stride = process.config.num_timesteps // steps
    room = process.last - process.first - (steps - 1) * stride
    return [float(process.first + min(offset, room) + i * stride) for i in reversed(range(steps))]


def _trailing(process: Process, steps: int, offset: int) -> list[float]:
    size = process.config.num_timesteps
    times = np.arange(size, 0, -size / steps)[:steps].tolist()
    return [_rounded(process, t) + process.first - 1 for t in times]


def _uniform(process: Process, steps: int, offset: int) -> list[float]:
    if steps == 1:
        return [float(process.last)]
    return np.linspace(process.first, process.last, steps)[::-1].tolist()


def _linspace(process: Process, steps: int, offset: int) -> list[float]:
    return [_rounded(process, t) for t in _uniform(process, steps, offset)]


def _multistep(process: Process, steps: int, offset: int) -> list[float]:
    return _linspace(process, steps + 1, offset)[:-1]


def _sgm_uniform(process: Process, steps: int, offset: int) -> list[float]:
    return _uniform(process, steps + 1, offset)[:-1]


def _simple(process: Process, steps: int, offset: int) -> list[float]:
    size = process.config.num_timesteps
    return [float(process.last - int(i * size / steps)) for i in range(steps)]


def _multistep_leading(process: Process, steps: int, offset: int) -> list[float]:
    return _leading(process, steps + 1, offset)[:-1]


def _compvis(process: Process, steps: int, offset: int) -> list[float]:
    # Where T is not a multiple of `steps`, CompVis' own code takes more steps than requested; we do not.
    return _leading(process, steps, 1)


def _lcm_count(process: Process) -> int:
    return min(50, process.config.num_timesteps)


def _lcm(process: Process, steps: int, offset: int) -> list[float]:
    """Even picks among the 50 times T - 1, T - 1 - k, ... of the distillation (Luo et al. 2023, Section 4.3)."""
    count = _lcm_count(process)
    k = process.config.num_timesteps // count
    times = [float(process.first + i * k - 1) for i in range(count, 0, -1)]
    return [times[i * count // steps] for i in range(steps)]


def _beta_times(process: Process, steps: int, offset: int) -> list[float]:
    """Quantiles of a beta distribution over the times (Lee et al. 2024), rounded; a time that occurs again is left
    out, as in ComfyUI."""
    size = process.last - process.first
    picks = [round(beta_quantile(1 - i / steps, *_BETA) * size) for i in range(steps)]
    return [float(process.first + pick) for pick in dict.fromkeys(picks)]


def _rounded(process: Process, t: float) -> float:
    return t if process.config.schedule == "flow" else float(round(t))


def _multistep_beta_times(process: Process, steps: int, offset: int) -> list[float]:
    return _beta_times(process, steps + 1, offset)[:-1]


_TIMES: dict[str, Callable[[Process, int, int], list[float]]] = {
    "leading": _leading,
    "trailing": _trailing,
    "linspace": _linspace,
    "uniform": _uniform,
    "multistep": _multistep,
    "sgm-uniform": _sgm_uniform,
    "simple": _simple,
    "multistep-leading": _multistep_leading,
    "compvis": _compvis,
    "lcm": _lcm,
    "beta-times": _beta_times,
    "multistep-beta-times": _multistep_beta_times,
}

# Ratios sigma / alpha, largest first: functions (high, low, count) of which some have an exponent rho.

Ramp = Callable[[float, float, int], list[float]]


def bounded_ramp(ramp: Ramp, high: float, low: float, count: int) -> list[float]:
    """Return `count` ratios from `high` to `low`.

    In a schedule that is noisier than the widest ramp of Karras et al. (infinitely at zero terminal SNR), sampling
    still starts at its last time; the ramp from sigma / alpha = 80 begins at the second step.
    """
    if high > _WIDEST:
        return [high, *ramp(_WIDEST, low, count - 1)]
    return ramp(high, low, count)


def karras_ramp(high: float, low: float, count: int, *, rho: float = 7.0) -> list[float]:
    """sigma_i = (sigma_max^(1/rho) + i / (n - 1) (sigma_min^(1/rho) - sigma_max^(1/rho)))^rho (Karras et al. 2022,
    Equation 5)."""
    start, end = high ** (1 / rho), low ** (1 / rho)
    return [(start + part * (end - start)) ** rho for part in _parts(count)]


def _exponential_ramp(high: float, low: float, count: int, *, rho: float) -> list[float]:
    """Geometric: the limit of Karras' ramp for an infinite rho."""
    return [high ** (1 - part) * low**part for part in _parts(count)]


def _beta_ramp(high: float, low: float, count: int, *, rho: float) -> list[float]:
    """Quantiles of a beta distribution (Lee et al. 2024), as in diffusers and AUTOMATIC1111's web UI."""
    return [low + (high - low) * beta_quantile(1 - part, *_BETA) for part in _parts(count)]


def _kl_optimal_ramp(high: float, low: float, count: int, *, rho: float) -> list[float]:
    """Evenly spaced arctangents (Sabour et al. 2024, Theorem 3.1)."""
    start, end = math.atan(high), math.atan(low)
    return [math.tan(start + part * (end - start)) for part in _parts(count)]


def _interpolated(table: tuple[float, ...]) -> Callable[..., list[float]]:
    """Return the ramp of a table, between whose entries logarithms are interpolated."""

    def ramp(high: float, low: float, count: int, *, rho: float) -> list[float]:
        if high < 0.9 * table[0] or low > 1.1 * table[-1]:
            raise ConfigError(
                f"the noise levels of 'align-your-steps' have sigma / alpha from {table[-1]:g} to {table[0]:g}, and "
                f"this model's are from {low:.3g} to {high:.3g}; use another schedule, such as 'karras'"
            )
        places = np.linspace(0, 1, len(table))
        return np.exp(np.interp(_parts(count), places, np.log(table))).tolist()

    return ramp


def _parts(count: int) -> list[float]:
    return [i / max(count - 1, 1) for i in range(count)]


def level_at(process: Process, ratio: float) -> NoiseLevel:
    """Return the level at which sigma / alpha is `ratio`."""
    return process.level(process.time(ratio))


_BETA = (0.6, 0.6)  # the shapes that Lee et al. chose and all programs use
_TO_FIRST = ("compvis", "kl-optimal-to-first")  # end at the first level of the schedule
# Sabour et al. 2024 for Stable Diffusion 1: rounded as they published it, and as ComfyUI has it.
_ALIGN_YOUR_STEPS = (14.615, 6.475, 3.861, 2.697, 1.886, 1.396, 0.963, 0.652, 0.399, 0.152, 0.029)
_ALIGN_YOUR_STEPS_UNROUNDED = (
    *(14.6146412293, 6.4745760956, 3.8636745985, 2.6946151520, 1.8841921177, 1.3943805092),
    *(0.9642583904, 0.6523686016, 0.3977456272, 0.1515232662, 0.0291671582),
)
_RAMPS: dict[str, Callable[..., list[float]]] = {
    "karras": karras_ramp,
    "exponential": _exponential_ramp,
    "beta": _beta_ramp,
    "kl-optimal": _kl_optimal_ramp,
    "kl-optimal-to-first": _kl_optimal_ramp,
    "align-your-steps": _interpolated(_ALIGN_YOUR_STEPS),
    "multistep-align-your-steps": _interpolated(_ALIGN_YOUR_STEPS_UNROUNDED),
}
