"""Tables of the noise levels (alpha, sigma, t) that a sampler visits, one more than there are steps.

Sampling starts at the first level and ends at the last. Every spacing is such a table, so samplers do not depend on it;
image-to-image uses the tail of a table.
"""

import math
from collections.abc import Callable, Iterable

import numpy as np

from triptych.diffusion.config import SPACINGS
from triptych.diffusion.process import NoiseLevel, Process
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
    """Return `steps` + 1 levels, from the noisiest to the clean image.

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
        ConfigError: an unknown spacing (the message lists near names), steps out of range, or a shift without flow.
    """
    require_known(spacing, SPACINGS, "spacing")
    most = (
        _lcm_count(process) if spacing == "lcm" else process.config.num_timesteps - ("multistep" in spacing)
    )
    if not 1 <= steps <= most:
        raise ConfigError(f"steps is {steps}, which must be from 1 to {most} with the spacing {spacing!r}")
    is_flow, is_ramp = process.config.schedule == "flow", spacing in _RAMPS
    if shift <= 0 or (shift != 1 and (is_ramp or not is_flow)):
        raise ConfigError(
            f"shift is {shift}, which must be positive; other values than 1 need evenly spaced times of a flow schedule"
        )

    if is_ramp:
        root = rho if "karras" in spacing else math.inf
        ratios = _ramp(process, steps + ("multistep" in spacing), root)
        levels = [_at_ratio(process, ratio) for ratio in ratios[:steps]]
    else:
        times = _TIMES[spacing](process, steps, offset)
        if shift != 1:
            size = process.config.num_timesteps
            times = [size * shift * t / (size + (shift - 1) * t) for t in times]
        levels = [process.level(t) for t in times]
    last = process.level(process.first) if spacing == "compvis" else CLEAN
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


def _rounded(process: Process, t: float) -> float:
    return t if process.config.schedule == "flow" else float(round(t))


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
}

# Ratios sigma / alpha, largest first.

_RAMPS = ("karras", "exponential", "multistep-karras", "multistep-exponential")


def _ramp(process: Process, steps: int, rho: float) -> list[float]:
    """sigma_i = (sigma_max^(1/rho) + i / (n - 1) (sigma_min^(1/rho) - sigma_max^(1/rho)))^rho (Karras et al. 2022,
    Equation 5); its limit for an infinite rho is geometric.

    In a schedule that is noisier than the paper's widest ramp (infinitely at zero terminal SNR), sampling still starts
    at its last time; the ramp from sigma / alpha = 80 begins at the second step.
    """
    low, high = process.level(process.first), process.level(process.last)
    lowest, highest = low.sigma / low.alpha, high.sigma / high.alpha if high.alpha else math.inf
    if highest > _WIDEST:
        return [highest, *_between(_WIDEST, lowest, steps - 1, rho)]
    return _between(highest, lowest, steps, rho)


def _between(high: float, low: float, count: int, rho: float) -> list[float]:
    parts = [i / max(count - 1, 1) for i in range(count)]
    if rho == math.inf:
        return [high ** (1 - part) * low**part for part in parts]
    return [(high ** (1 / rho) + part * (low ** (1 / rho) - high ** (1 / rho))) ** rho for part in parts]


def _at_ratio(process: Process, ratio: float) -> NoiseLevel:
    return process.level(process.time(ratio))
