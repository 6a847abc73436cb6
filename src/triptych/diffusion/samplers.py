"""Samplers: generators over `(denoise, x, levels)` that follow a table of noise levels from noise to data.

Progress bars, previews, animations and cancellation just iterate. Here are those that look at one step at a time;
`multistep_samplers` also use the predictions of earlier steps, `heun_samplers` those at the end of a step, and
`dpm_solver_samplers` choose steps of their own. `sampler_steps` has the formulas that they share.
"""

import math
from collections.abc import Iterator

from torch import Tensor

from triptych.diffusion.dpm_solver_samplers import dpm_adaptive, dpm_fast, with_noise
from triptych.diffusion.heun_samplers import heun, heunpp2, restart
from triptych.diffusion.multistep_samplers import (
    deis,
    dpmpp_2m,
    dpmpp_2m_sde,
    dpmpp_2m_sde_heun,
    dpmpp_3m_sde,
    lms,
    plms,
    unipc,
)
from triptych.diffusion.noise import Noise
from triptych.diffusion.process import Denoiser, noise_ratio
from triptych.diffusion.sampler_steps import (
    Sampler,
    SamplerStep,
    decay,
    implied_eps,
    initial_state,
    noise_like,
    ode_step,
    predict_x0,
    reverse_sde_step,
    step_noise,
    walk,
)
from triptych.diffusion.schedule import Levels
from triptych.errors import require_known


def ddim(
    denoise: Denoiser, x: Tensor, levels: Levels, *, noise: Noise | None = None, eta: float = 0.0
) -> Iterator[SamplerStep]:
    """Denoising diffusion implicit models (Song et al. 2021, Equation 12), which is Euler's method on the ODE of
    sigma / alpha; `eta` in (0, 1] adds noise (Equation 16), as much as DDPM does at 1."""
    x = initial_state(x)
    for index, level, next_level in walk(levels):
        x0 = predict_x0(denoise, x, level)
        new = eta * next_level.sigma * math.sqrt(1 - decay(level, next_level) ** 2)
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
    x = initial_state(x)
    for index, level, next_level in walk(levels):
        x0 = predict_x0(denoise, x, level)
        x = reverse_sde_step(x, x0, level, next_level, step_noise(noise, index, next_level))
        yield SamplerStep(index, len(levels) - 1, x, x0, next_level)


def dpm2(
    denoise: Denoiser, x: Tensor, levels: Levels, *, noise: Noise | None = None
) -> Iterator[SamplerStep]:
    """k-diffusion's "DPM2", DPM-Solver-2 (Lu et al. 2022) for the ODE of sigma / alpha: the slope of a step is eps
    halfway in lambda. Two calls a step, one where `heun` needs one."""
    x = initial_state(x)
    for index, level, next_level in walk(levels):
        x0 = predict_x0(denoise, x, level)
        eps = slope = implied_eps(x, x0, level)
        if level.alpha > 0 and next_level.sigma > 0:
            middle = levels.between(level, next_level)
            x_middle = middle.noised(x0, eps)
            slope = implied_eps(x_middle, predict_x0(denoise, x_middle, middle), middle)
        x = ode_step(x0, eps, slope, level, next_level)
        yield SamplerStep(index, len(levels) - 1, x, x0, next_level)


def dpm2_ancestral(denoise: Denoiser, x: Tensor, levels: Levels, *, noise: Noise) -> Iterator[SamplerStep]:
    """k-diffusion's "DPM2 ancestral": `dpm2` below the next level, then noise up to it.

    A step ends at sigma / alpha = (sigma' / alpha')^2 / (sigma / alpha) before the noise, so that halfway in lambda is
    the next level itself.
    """
    x = initial_state(x)
    for index, level, next_level in walk(levels):
        x0 = predict_x0(denoise, x, level)
        eps = slope = implied_eps(x, x0, level)
        shrink = decay(level, next_level)
        if shrink > 0:
            x_middle = next_level.noised(x0, eps)
            slope = implied_eps(x_middle, predict_x0(denoise, x_middle, next_level), next_level)
        x = ode_step(x0, eps, slope, level, next_level._replace(sigma=next_level.sigma * shrink))
        if next_level.sigma > 0:
            x = x + next_level.sigma * math.sqrt(1 - shrink**2) * noise_like(x, noise(index))
        yield SamplerStep(index, len(levels) - 1, x, x0, next_level)


def dpmpp_2s_ancestral(
    denoise: Denoiser, x: Tensor, levels: Levels, *, noise: Noise
) -> Iterator[SamplerStep]:
    """k-diffusion's "DPM++ 2S ancestral": DPM-Solver++(2S) (Lu et al. 2022, Algorithm 1) below the next level, then
    noise up to it. Halfway in lambda is the next level, as in `dpm2_ancestral`."""
    x = initial_state(x)
    for index, level, next_level in walk(levels):
        x0 = x0_middle = predict_x0(denoise, x, level)
        if level.alpha > 0 and next_level.sigma > 0:
            x_middle = next_level.noised(x0, implied_eps(x, x0, level))
            x0_middle = predict_x0(denoise, x_middle, next_level)
        x = reverse_sde_step(x, x0_middle, level, next_level, step_noise(noise, index, next_level))
        yield SamplerStep(index, len(levels) - 1, x, x0, next_level)


def dpmpp_sde(denoise: Denoiser, x: Tensor, levels: Levels, *, noise: Noise) -> Iterator[SamplerStep]:
    """k-diffusion's "DPM++ SDE": the reverse SDE with x_0 taken halfway in lambda; two calls a step.

    Both noises of a step are increments of one Brownian motion in sigma / alpha: that of the whole step contains that
    of its first half. Twice as many draws, the second ones at `noise(num_steps + index)`.
    """
    x, num_steps = initial_state(x), len(levels) - 1
    for index, level, next_level in walk(levels):
        x0 = x0_middle = predict_x0(denoise, x, level)
        increment = step_noise(noise, index, next_level)
        if increment is not None and level.alpha > 0:
            middle = levels.between(level, next_level)
            x_middle = reverse_sde_step(x, x0, level, middle, increment)
            x0_middle = predict_x0(denoise, x_middle, middle)
            start, half, end = (noise_ratio(one) for one in (level, middle, next_level))
            part = (start - half) / (start - end)
            increment = math.sqrt(part) * increment + math.sqrt(1 - part) * noise(num_steps + index)
        x = reverse_sde_step(x, x0_middle, level, next_level, increment)
        yield SamplerStep(index, num_steps, x, x0, next_level)


def lcm(denoise: Denoiser, x: Tensor, levels: Levels, *, noise: Noise) -> Iterator[SamplerStep]:
    """Multistep consistency sampling (Song et al. 2023, Algorithm 1), the consistency function being
    f = c_skip x + c_out x_0 (Luo et al. 2023, Section 4.1, with sigma_data = 0.5 and times ten times as large)."""
    x = initial_state(x)
    for index, level, next_level in walk(levels):
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
    "heun++2": heunpp2,
    "restart": restart,
    "lms": lms,
    "dpm2": dpm2,
    "dpm2-ancestral": dpm2_ancestral,
    "dpm-fast": dpm_fast,
    "dpm-fast-ancestral": with_noise(dpm_fast),
    "dpm-adaptive": dpm_adaptive,
    "dpm-adaptive-ancestral": with_noise(dpm_adaptive),
    "dpm++2s-ancestral": dpmpp_2s_ancestral,
    "dpm++sde": dpmpp_sde,
    "dpm++2m": dpmpp_2m,
    "dpm++2m-sde": dpmpp_2m_sde,
    "dpm++2m-sde-heun": dpmpp_2m_sde_heun,
    "dpm++3m-sde": dpmpp_3m_sde,
    "deis": deis,
    "unipc": unipc,
    "lcm": lcm,
}


def sampler(name: str) -> Sampler:
    """Return the sampler of that name.

    Raises:
        ConfigError: there is none; the message lists near names.
    """
    return SAMPLERS[require_known(name, SAMPLERS, "sampler")]
