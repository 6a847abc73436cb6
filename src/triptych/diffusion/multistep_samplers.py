"""Samplers that use the predictions of earlier steps: one call of the network a step (but the first of `plms`)."""

import math
from collections.abc import Iterator, Sequence

from torch import Tensor

from triptych.diffusion.noise import Noise
from triptych.diffusion.process import Denoiser, noise_ratio
from triptych.diffusion.sampler_steps import (
    SamplerStep,
    decay,
    heun_slope,
    implied_eps,
    initial_state,
    log_snr_step,
    ode_step,
    predict_x0,
    reverse_sde_step,
    step_noise,
    walk,
    weighted_sum,
)
from triptych.diffusion.schedule import Levels


def plms(
    denoise: Denoiser, x: Tensor, levels: Levels, *, noise: Noise | None = None
) -> Iterator[SamplerStep]:
    """Pseudo linear multistep (PNDM, Liu et al. 2022, Equations 9 and 12): Adams and Bashforth's average of the last
    four noises. The first step is Heun's, so there is one call more than there are steps."""
    weights = [(1.0,), (3 / 2, -1 / 2), (23 / 12, -16 / 12, 5 / 12), (55 / 24, -59 / 24, 37 / 24, -9 / 24)]
    x = initial_state(x)
    history: list[Tensor] = []  # eps of the last steps, newest first
    for index, level, next_level in walk(levels):
        x0 = predict_x0(denoise, x, level)
        eps = implied_eps(x, x0, level)
        history = [eps, *history[:3]]
        if level.alpha == 0:  # nothing to average yet
            slope = eps
        elif len(history) == 1 and next_level.sigma > 0:
            slope = heun_slope(denoise, x0, eps, level, next_level)
        else:
            slope = weighted_sum(weights[len(history) - 1], history)
        x = ode_step(x0, eps, slope, level, next_level)
        yield SamplerStep(index, len(levels) - 1, x, x0, next_level)


def lms(denoise: Denoiser, x: Tensor, levels: Levels, *, noise: Noise | None = None) -> Iterator[SamplerStep]:
    """Linear multistep: Adams and Bashforth's method of order 4 on the ODE of sigma / alpha, whose weights follow the
    uneven steps (k-diffusion's "LMS")."""
    x = initial_state(x)
    history: list[tuple[float, Tensor]] = []  # sigma / alpha and eps of the last steps, newest first
    for index, level, next_level in walk(levels):
        x0 = predict_x0(denoise, x, level)
        eps = slope = implied_eps(x, x0, level)
        if level.alpha > 0:  # pure noise has no place on the axis
            history = [(noise_ratio(level), eps), *history[:3]]
            nodes, terms = zip(*history, strict=True)
            slope = weighted_sum(_adams_weights(nodes, noise_ratio(next_level)), terms)
        x = ode_step(x0, eps, slope, level, next_level)
        yield SamplerStep(index, len(levels) - 1, x, x0, next_level)


def deis(
    denoise: Denoiser, x: Tensor, levels: Levels, *, noise: Noise | None = None
) -> Iterator[SamplerStep]:
    """DEIS of order 2 (Zhang and Chen 2023, Equation 14) as in diffusers: eps on the line through the last two calls
    in log(sigma / alpha), integrated exactly over the step. The step to the clean image is Euler's."""
    x, previous = initial_state(x), None  # log(sigma / alpha) and eps of the last step
    for index, level, next_level in walk(levels):
        x0 = predict_x0(denoise, x, level)
        eps = slope = implied_eps(x, x0, level)
        start, end = noise_ratio(level), noise_ratio(next_level)
        if previous is not None and end > 0:
            log_previous, eps_previous = previous
            log_mean = (end * math.log(end) - start * math.log(start)) / (end - start) - 1  # over the step
            weight = (log_mean - log_previous) / (math.log(start) - log_previous)
            slope = weight * eps + (1 - weight) * eps_previous
        previous = (math.log(start), eps) if level.alpha > 0 else None
        x = ode_step(x0, eps, slope, level, next_level)
        yield SamplerStep(index, len(levels) - 1, x, x0, next_level)


def dpmpp_2m(
    denoise: Denoiser, x: Tensor, levels: Levels, *, noise: Noise | None = None
) -> Iterator[SamplerStep]:
    """DPM-Solver++(2M) (Lu et al. 2022, Algorithm 2): x_0 is extrapolated in lambda from the last two calls."""
    x, previous_x0 = initial_state(x), None
    for index, level, next_level in walk(levels):
        x0 = predict_x0(denoise, x, level)
        midpoint = extrapolate_x0(x0, previous_x0, levels, index)
        x = next_level.sigma / level.sigma * x + next_level.alpha * (1 - decay(level, next_level)) * midpoint
        previous_x0 = x0
        yield SamplerStep(index, len(levels) - 1, x, x0, next_level)


def dpmpp_2m_sde(denoise: Denoiser, x: Tensor, levels: Levels, *, noise: Noise) -> Iterator[SamplerStep]:
    """SDE-DPM-Solver++(2M) (Lu et al. 2022, Section 6): the same extrapolation in the reverse SDE."""
    x, previous_x0 = initial_state(x), None
    for index, level, next_level in walk(levels):
        x0 = predict_x0(denoise, x, level)
        x = reverse_sde_step(
            x,
            extrapolate_x0(x0, previous_x0, levels, index),
            level,
            next_level,
            step_noise(noise, index, next_level),
        )
        previous_x0 = x0
        yield SamplerStep(index, len(levels) - 1, x, x0, next_level)


def dpmpp_3m_sde(
    denoise: Denoiser, x: Tensor, levels: Levels, *, noise: Noise, order: int = 3
) -> Iterator[SamplerStep]:
    """k-diffusion's "DPM++ 3M SDE": x_0 in the reverse SDE as a Taylor polynomial of degree `order` - 1 in lambda,
    from the last `order` calls, each power integrated exactly (phi_2 and phi_3 of exponential integrators)."""
    x = initial_state(x)
    history: list[tuple[float, Tensor]] = []  # h of the last steps, and x_0 where they started, newest first
    for index, level, next_level in walk(levels):
        x0 = predict_x0(denoise, x, level)
        h = log_snr_step(level, next_level)
        effective_x0 = x0
        if history and next_level.sigma > 0:
            growth = -math.expm1(-2 * h)
            phi_2 = 1 - growth / (2 * h)
            phi_3 = phi_2 / (2 * h) - 0.5
            slope, curvature = _derivatives(x0, h, history[: order - 1])
            effective_x0 = x0 + phi_2 / growth * slope
            if curvature is not None:
                effective_x0 = effective_x0 - phi_3 / growth * curvature
        x = reverse_sde_step(x, effective_x0, level, next_level, step_noise(noise, index, next_level))
        history = [(h, x0), *history[:1]]
        yield SamplerStep(index, len(levels) - 1, x, x0, next_level)


def dpmpp_2m_sde_heun(denoise: Denoiser, x: Tensor, levels: Levels, *, noise: Noise) -> Iterator[SamplerStep]:
    """k-diffusion's "DPM++ 2M SDE Heun": as `dpmpp_2m_sde`, with the line of x_0 integrated over the step instead of
    taken at its middle. It is `dpmpp_3m_sde` of order 2."""
    return dpmpp_3m_sde(denoise, x, levels, noise=noise, order=2)


def unipc(
    denoise: Denoiser, x: Tensor, levels: Levels, *, noise: Noise | None = None
) -> Iterator[SamplerStep]:
    """UniPC-2 on x_0 with B(h) = e^h - 1 (Zhao et al. 2023, Algorithms 1 and 2, for data prediction).

    Each call's x_0 first corrects the step that led to it (UniC), then predicts the next (UniP, which at order 2 is
    DPM-Solver++(2M)).
    """
    x = start = initial_state(x)  # start: x at the previous level
    history: list[Tensor] = []  # x_0 of the last two calls, newest first
    for index, level, next_level in walk(levels):
        x0 = predict_x0(denoise, x, level)
        if index:
            x = _correct(start, x0, history, levels, index)
        midpoint = extrapolate_x0(x0, history[0] if history else None, levels, index)
        start, history = x, [x0, *history[:1]]
        x = next_level.sigma / level.sigma * x + next_level.alpha * (1 - decay(level, next_level)) * midpoint
        yield SamplerStep(index, len(levels) - 1, x, x0, next_level)


def extrapolate_x0(x0: Tensor, previous_x0: Tensor | None, levels: Levels, index: int) -> Tensor:
    """Return x_0 half a step ahead in lambda, on the line through the last two: x_0 + h / (2 h_-1) (x_0 - x_0,-1).

    The clean image is infinitely far ahead in lambda; the step to it takes x_0 as it is.
    """
    if previous_x0 is None or levels[index + 1].sigma == 0:
        return x0
    ahead = log_snr_step(levels[index], levels[index + 1]) / (
        2 * log_snr_step(levels[index - 1], levels[index])
    )
    return x0 + ahead * (x0 - previous_x0)


def _correct(start: Tensor, x0: Tensor, history: list[Tensor], levels: Levels, index: int) -> Tensor:
    """Return x at `levels[index]` again, from the previous level, with x_0 known at both ends (UniC): of order 1 with
    these two alone, of order 2 with one more."""
    level, next_level = levels[index - 1], levels[index]
    h = log_snr_step(level, next_level)
    change = x0 - history[0]
    if len(history) == 1:
        midpoint = history[0] + change / 2
    else:
        # The two weights solve rho_1 + rho_2 = b_1 and r rho_1 + rho_2 = b_2, the order conditions.
        r = -log_snr_step(levels[index - 2], level) / h
        growth = math.expm1(-h)
        b_1 = (growth / -h - 1) / growth
        b_2 = 2 * ((growth / -h - 1) / -h - 0.5) / growth
        rho_1 = (b_1 - b_2) / (1 - r)
        midpoint = history[0] + rho_1 / r * (history[1] - history[0]) + (b_1 - rho_1) * change
    return (
        next_level.sigma / level.sigma * start + next_level.alpha * (1 - decay(level, next_level)) * midpoint
    )


def _adams_weights(nodes: Sequence[float], end: float) -> list[float]:
    """Return the weight of each node, newest first: the mean, from the newest node to `end`, of the polynomial that is
    1 there and 0 at the others. Two points of Gauss and Legendre are exact up to four nodes."""
    middle, half = (end + nodes[0]) / 2, (end - nodes[0]) / 2
    points = (middle - half / math.sqrt(3), middle + half / math.sqrt(3))
    return [
        sum(
            math.prod((point - other) / (node - other) for other in nodes if other != node)
            for point in points
        )
        / 2
        for node in nodes
    ]


def _derivatives(
    x0: Tensor, h: float, history: Sequence[tuple[float, Tensor]]
) -> tuple[Tensor, Tensor | None]:
    """Return the first and second derivative of x_0 in lambda / h, from divided differences; no second one without
    two earlier calls."""
    h_1, x0_1 = history[0]
    r_1 = h_1 / h
    slope = (x0 - x0_1) / r_1
    if len(history) == 1:
        return slope, None
    h_2, x0_2 = history[1]
    r_2 = h_2 / h
    curvature = (slope - (x0_1 - x0_2) / r_2) / (r_1 + r_2)
    return slope + r_1 * curvature, curvature
