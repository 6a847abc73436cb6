"""Guidance: functions from denoiser to denoiser.

Each takes a denoiser of a batch twice as long, prompt first: `denoise(cat(x, x), cat(t, t))` gives x_0 under the prompt
and x_0 under the negative prompt (or none). So there is one call of the network in a step, and a negative prompt is
just the context of the second half.

Both halves share x, alpha and sigma, so mixing x_0 equals mixing noise or velocity: x_0 is a linear function of either.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from triptych.diffusion.process import Denoiser, Process


def guided(
    denoise: Denoiser, scale: float, *, process: Process | None = None, rescale: float = 0.0
) -> Denoiser:
    """Classifier-free guidance (Ho and Salimans 2022, Equation 6, with `scale` = 1 + w); at 1 the negative prompt has
    no effect.

    Args:
        denoise: denoiser of a batch twice as long.
        scale: weight of the difference between the predictions for the prompt and for the negative prompt.
        process: the process, needed only to rescale.
        rescale: phi of Lin et al. 2023, Equations 15 and 16: how much of the growth in standard deviation to undo. As
            in the paper and in diffusers it is measured on what the network predicts.
    """
    if rescale and process is None:
        raise TypeError("to rescale, guided needs the process")

    def denoise_guided(x: Tensor, t: Tensor) -> Tensor:
        positive, negative = _both(denoise, x, t)
        x0 = positive + (scale - 1) * (positive - negative)
        if rescale and process is not None:
            output = process.from_x0(x, x0, t)
            growth = _std(process.from_x0(x, positive, t)) / _std(output)
            x0 = process.to_x0(x, (1 - rescale + rescale * growth) * output, t)
        return x0

    return denoise_guided


def composed(denoise: Denoiser, weights: Sequence[float]) -> Denoiser:
    """Return a denoiser of a batch twice as long, as guidance takes it, from one of several prompts (Liu et al. 2022,
    Equation 11): its first half is negative + the sum of weight * (prompt - negative).

    Args:
        denoise: denoiser of a batch len(weights) + 1 times as long: the prompts, then the negative prompt.
        weights: one for each prompt. A single 1 changes nothing.
    """
    if list(weights) == [1]:
        return denoise
    count = len(weights) + 1

    def denoise_composed(x: Tensor, t: Tensor) -> Tensor:
        x, t = x[: len(x) // 2], t[: len(t) // 2]
        *prompts, negative = denoise(torch.cat([x] * count), torch.cat([t] * count)).chunk(count)
        total = negative
        for weight, prompt in zip(weights, prompts, strict=True):
            total = total + weight * (prompt - negative)
        return torch.cat([total, negative])

    return denoise_composed


def projected(
    denoise: Denoiser,
    scale: float,
    *,
    eta: float = 0.0,
    threshold: float | None = None,
    momentum: float = 0.0,
) -> Denoiser:
    """Adaptive projected guidance (Sadat et al. 2024, Section 4), on x_0 as in the paper.

    It stores the guidance of earlier calls, so make a new one for each run of a sampler.

    Args:
        denoise: denoiser of a batch twice as long.
        scale: as in `guided`, which this equals for eta = 1 without threshold and momentum.
        eta: weight of the part of the guidance that is parallel to the prompt's prediction, which saturates images.
        threshold: r, the largest norm of the guidance over an image's channels and pixels; None is no limit.
        momentum: beta, weight of the guidance of earlier calls; negative values push away from it.
    """
    average: Tensor | float = 0.0

    def denoise_guided(x: Tensor, t: Tensor) -> Tensor:
        nonlocal average
        positive, negative = _both(denoise, x, t)
        average = positive - negative + momentum * average
        change = average
        if threshold is not None:
            change = change * (threshold / _norm(change)).clamp(max=1)
        direction = positive / _norm(positive).clamp(min=1e-12)
        parallel = (change * direction).flatten(1).sum(1).reshape(_column(x)) * direction
        return positive + (scale - 1) * (change - parallel + eta * parallel)

    return denoise_guided


def within(inside: Denoiser, outside: Denoiser, process: Process, low: float, high: float) -> Denoiser:
    """Return a denoiser with a guidance interval (Kynkäänniemi et al. 2024, Section 3): `inside` where low < sigma /
    alpha <= high, `outside` elsewhere. With the unguided denoiser as `outside`, steps there cost half."""

    def denoise_guided(x: Tensor, t: Tensor) -> Tensor:
        alpha, sigma = process.at(t[:1])
        return (inside if low < float(sigma / alpha) <= high else outside)(x, t)

    return denoise_guided


def _both(denoise: Denoiser, x: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
    positive, negative = denoise(torch.cat([x, x]), torch.cat([t, t])).chunk(2)
    return positive, negative


def _column(x: Tensor) -> tuple[int, ...]:
    return (len(x),) + (1,) * (x.ndim - 1)


def _std(x: Tensor) -> Tensor:
    return x.flatten(1).std(1).reshape(_column(x))


def _norm(x: Tensor) -> Tensor:
    return x.flatten(1).norm(dim=1).reshape(_column(x))
