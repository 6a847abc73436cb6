"""Images as conditions: functions from network to network, and from denoiser to denoiser."""

import torch
from torch import Tensor

from triptych.diffusion.process import Denoiser, Net, Process


def concatenated(net: Net, extra: Tensor) -> Net:
    """The network with `extra` as further input channels: an inpainting network's mask and masked latents, a depth
    map, a small image to be upscaled.

    Args:
        net: of c + e channels.
        extra: (b, e, ...), repeated where the network is given a multiple of b (guidance's batch is twice as long).
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
    """Inpainting with a network that was not trained for it (Lugmayr et al. 2022, Equation 8).

    Outside the mask the network is always shown `known` with `noise` added for the level, and its answer there is
    `known`: any sampler comes to exactly `known` outside. diffusers' inpainting pipeline, which overwrites the sample
    after each step of its scheduler, gives the same inside.

    Args:
        denoise: of the network.
        process: its process.
        known: (b, c, h, w) or (1, c, h, w), the latents to keep.
        mask: (b or 1, 1, h, w), 1 where to paint, 0 where to keep.
        noise: like known, the noise that sampling starts from.
        start: the time of the first level, if x is to be taken there as it is: then painting starts from pure noise
            everywhere, which is diffusers' way at strength 1.
    """

    def answer(x: Tensor, t: Tensor) -> Tensor:
        if start is None or float(t[0]) != start:
            x = mask * x + (1 - mask) * process.noised(known.expand_as(x), noise.expand_as(x), t)
        return mask * denoise(x, t) + (1 - mask) * known

    return answer
