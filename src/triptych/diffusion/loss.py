"""The training loss of a denoising network: times, noise, and the weighted error of its prediction."""

import math
from collections.abc import Callable

import torch
from jaxtyping import Float, Shaped
from torch import Tensor

from triptych import distributed
from triptych.diffusion.config import NoiseConfig, Prediction
from triptych.diffusion.process import Process

Predict = Callable[[Tensor, Tensor], Tensor]
"""(x_t, t) -> what the network predicts."""


def diffusion_loss(
    predict: Predict,
    x0: Float[Tensor, "b *c"],
    process: Process,
    config: NoiseConfig,
    generator: torch.Generator,
) -> Float[Tensor, ""]:
    """Return w_t |target - prediction|^2, averaged over all numbers of a batch (Rombach et al. 2022, Equation 3), in
    fp32.

    Args:
        predict: the network, called with noisy latents of the shape of x0 and times (b,).
        x0: latents of unit variance.
        process: how they turn into noise, and what is predicted.
        config: times, weights and noise.
        generator: source of all random draws, on x0's device: first the times, then the noise.
    """
    t = draw_times(len(x0), process, config, generator)
    eps = draw_noise(x0, config, generator)
    return prediction_error(predict(process.noised(x0, eps, t), t), x0, eps, t, process, config)


def prediction_error(
    predicted: Float[Tensor, "b *c"],
    x0: Float[Tensor, "b *c"],
    eps: Float[Tensor, "b *c"],
    t: Shaped[Tensor, " b"],
    process: Process,
    config: NoiseConfig,
) -> Float[Tensor, ""]:
    """Return the weighted squared error of the prediction for x_t = alpha_t x_0 + sigma_t eps."""
    errors = (predicted.float() - process.target(x0, eps, t)).square().flatten(1).mean(1)
    if config.min_snr:
        errors = errors * min_snr_weight(process.config.prediction, *process.at(t), config.min_snr)
    return errors.mean()


def draw_times(
    count: int, process: Process, config: NoiseConfig, generator: torch.Generator
) -> Shaped[Tensor, " b"]:
    """Return a time for each sample: an integer step of a table, or any time of a flow. Each has the configured
    distribution, and together they are spread evenly over it, which lowers the variance of the mean (Kingma et al.
    2021, Appendix I.1)."""
    device = generator.device
    start = torch.rand((), generator=generator, device=device)

    def spread(n: int) -> Tensor:
        return (torch.randperm(n, generator=generator, device=device) + start) / n

    u = distributed.draw_rows(count, spread)  # in [0, 1), one in each 1 / count of it
    if config.times == "logit_normal":
        quantile = math.sqrt(2) * torch.erfinv((2 * u - 1).clamp(-1 + 1e-6, 1 - 1e-6))
        u = torch.sigmoid(config.logit_mean + config.logit_std * quantile)
    size = process.config.num_timesteps
    if process.config.schedule == "flow":
        return (size * u).clamp(min=1e-4 * size)  # at 0 there is no noise to predict
    return (u * size).long().clamp(max=size - 1).float()


def draw_noise(x0: Float[Tensor, "b c *s"], config: NoiseConfig, generator: torch.Generator) -> Tensor:
    """Return standard normal noise of the shape of x0, plus the offset of each channel."""

    def normal(*shape: int) -> Tensor:
        return distributed.draw_rows(
            len(x0), lambda n: torch.randn((n, *shape), generator=generator, device=x0.device)
        )

    eps = normal(*x0.shape[1:])
    if config.offset:
        eps = eps + config.offset * normal(x0.shape[1], *[1] * (x0.ndim - 2))
    return eps


def min_snr_weight(
    prediction: Prediction, alpha: Float[Tensor, "*b"], sigma: Float[Tensor, "*b"], gamma: float
) -> Float[Tensor, "*b"]:
    """Return the weight of a prediction's squared error for which the error of x_0 has the weight min(SNR, gamma) (Hang
    et al. 2023, Section 3.4).

    At a given x_t the error of a prediction is k times that of x_0, with k = alpha / sigma for eps, (alpha^2 + sigma^2)
    / sigma for v, 1 for x_0 and (alpha + sigma) / sigma for flow. So the weight is min(SNR, gamma) / k^2. In a process
    of unit variance that is min(SNR, gamma) / SNR for eps and min(SNR, gamma) / (SNR + 1) for v. Both are multiplied
    by sigma^2 here, so that neither end of a schedule divides by 0.
    """
    reach = {"eps": alpha, "v": alpha**2 + sigma**2, "x0": sigma, "flow": alpha + sigma}[
        prediction
    ]  # k sigma
    return torch.minimum(alpha**2, gamma * sigma**2) / reach**2
