"""Conditioning on images: functions from network to network, and from denoiser to denoiser."""

import torch
from torch import Tensor

from triptych.diffusion.process import Denoiser, Net, Process


def concat_channels(net: Net, extra: Tensor) -> Net:
    """Return the network with `extra` concatenated to its input: an inpainting network's mask and masked latents, a
    depth map, or a small image to be upscaled.

    Args:
        net: takes c + e channels.
        extra: (b, e, ...), repeated for a batch that is a multiple of b, as under guidance.
    """

    def answer(x: Tensor, t: Tensor) -> Tensor:
        times = len(x) // len(extra)
        more = extra.to(x.device, x.dtype).repeat(times, *[1] * (extra.ndim - 1))
        return net(torch.cat([x, more], dim=1), t)

    return answer


def masked(
    denoise: Denoiser,
    process: Process,
    known: Tensor,
    mask: Tensor,
    noise: Tensor,
    *,
    start: float | None = None,
) -> Denoiser:
    """Return a denoiser for inpainting with a network that was not trained for it (Lugmayr et al. 2022, Equation 8).

    Outside the mask the network's input is `known` with `noise` of the level, and its output is `known`, so every
    sampler ends in exactly `known` there. Inside the result equals that of diffusers' inpainting pipeline, which
    overwrites the sample after each step of its scheduler.

    Args:
        denoise: the network's denoiser.
        process: its process.
        known: (b, c, h, w) or (1, c, h, w), latents to keep.
        mask: (b or 1, 1, h, w), 1 where to generate, 0 where to keep.
        noise: the noise that sampling starts from, of the shape of `known`.
        start: time of the first level, if x is to be left as it is there: sampling then starts from pure noise
            everywhere, as in diffusers at strength 1.
    """

    def answer(x: Tensor, t: Tensor) -> Tensor:
        if start is None or float(t[0]) != start:
            x = mask * x + (1 - mask) * process.noised(known.expand_as(x), noise.expand_as(x), t)
        return mask * denoise(x, t) + (1 - mask) * known

    return answer
