"""Guidance: functions from denoiser to denoiser.

All of them take one denoiser that answers for a batch twice as long, prompt first: `denoise(cat(x, x), cat(t, t))`
gives x_0 under the prompt and x_0 under the negative prompt (or none). So there is one call of the network a step, and
a negative prompt is nothing but the second half's context.

Both halves share x, alpha and sigma, so mixing x_0 is mixing noise or velocity: x_0 is a linear function of either.
"""

import torch
from torch import Tensor

from triptych.diffusion.process import Denoiser, Process


def guided(
    denoise: Denoiser, scale: float, *, process: Process | None = None, rescale: float = 0.0
) -> Denoiser:
    """Classifier-free guidance (Ho and Salimans 2022, Equation 6, with `scale` = 1 + w): 1 is the prompt alone.

    Args:
        denoise: of a batch twice as long.
        scale: how far to go from the negative prompt's answer to the prompt's, and beyond.
        process: which is only needed to rescale.
        rescale: phi of Lin et al. 2023, Equations 15 and 16: how much of the growth in standard deviation to take
            back. It is measured, as in the paper and in diffusers, on what the network predicts.
    """
    if rescale and process is None:
        raise TypeError("to rescale, guided needs the process")

    def answer(x: Tensor, t: Tensor) -> Tensor:
        positive, negative = _both(denoise, x, t)
        x0 = positive + (scale - 1) * (positive - negative)
        if rescale and process is not None:
            output = process.from_x0(x, x0, t)
            growth = _std(process.from_x0(x, positive, t)) / _std(output)
            x0 = process.to_x0(x, (1 - rescale + rescale * growth) * output, t)
        return x0

    return answer


def projected(
    denoise: Denoiser,
    scale: float,
    *,
    eta: float = 0.0,
    threshold: float | None = None,
    momentum: float = 0.0,
) -> Denoiser:
    """Adaptive projected guidance (Sadat et al. 2024, Section 4), on x_0 as in the paper.

    It remembers the guidance of earlier calls: make one for each run of a sampler.

    Args:
        denoise: of a batch twice as long.
        scale: as in `guided`, which this is for eta = 1 without threshold and momentum.
        eta: how much to keep of the part of the guidance that is parallel to the prompt's answer and saturates it.
        threshold: r, the largest norm of the guidance, over an image's channels and pixels; none if None.
        momentum: beta, how much of the guidance of the calls before to add; negative to be pushed away from it.
    """
    average: Tensor | float = 0.0

    def answer(x: Tensor, t: Tensor) -> Tensor:
        nonlocal average
        positive, negative = _both(denoise, x, t)
        average = positive - negative + momentum * average
        change = average
        if threshold is not None:
            change = change * (threshold / _norm(change)).clamp(max=1)
        direction = positive / _norm(positive).clamp(min=1e-12)
        parallel = (change * direction).flatten(1).sum(1).reshape(_column(x)) * direction
        return positive + (scale - 1) * (change - parallel + eta * parallel)

    return answer


def within(inside: Denoiser, outside: Denoiser, process: Process, low: float, high: float) -> Denoiser:
    """A guidance interval (Kynkäänniemi et al. 2024, Section 3): `inside` where low < sigma / alpha <= high,
    `outside` elsewhere. With the prompt's own denoiser as `outside`, its steps cost half."""

    def answer(x: Tensor, t: Tensor) -> Tensor:
        alpha, sigma = process.at(t[:1])
        return (inside if low < float(sigma / alpha) <= high else outside)(x, t)

    return answer


def _both(denoise: Denoiser, x: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
    positive, negative = denoise(torch.cat([x, x]), torch.cat([t, t])).chunk(2)
    return positive, negative


def _column(x: Tensor) -> tuple[int, ...]:
    return (len(x),) + (1,) * (x.ndim - 1)


def _std(x: Tensor) -> Tensor:
    return x.flatten(1).std(1).reshape(_column(x))


def _norm(x: Tensor) -> Tensor:
    return x.flatten(1).norm(dim=1).reshape(_column(x))
