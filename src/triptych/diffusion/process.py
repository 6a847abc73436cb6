"""The diffusion process x_t = alpha_t x_0 + sigma_t eps: its table, and conversions between what networks predict.

A denoiser is a function `(x, t) -> x_0`: from x (b, ...) at time t (b,) it estimates the clean data. Samplers and
guidance use denoisers only; `network_denoiser` makes one of a network that predicts noise, velocity or data.
"""

import bisect
import itertools
import math
import operator
from collections.abc import Callable
from typing import NamedTuple

import torch
from jaxtyping import Float, Shaped
from torch import Tensor

from triptych.diffusion.config import Prediction, ProcessConfig

Net = Callable[[Tensor, Tensor], Tensor]
"""(x, t) -> what the network predicts: noise, velocity or data."""
Denoiser = Callable[[Tensor, Tensor], Tensor]
"""(x, t) -> x_0."""


class NoiseLevel(NamedTuple):
    """A noise level: x = alpha x_0 + sigma eps, at time t of the network."""

    alpha: float
    sigma: float
    t: float

    def times(self, x: Tensor) -> Tensor:
        """Return t for each sample of the batch x, (b,)."""
        return x.new_full((len(x),), self.t)

    def noised(self, x0: Tensor, eps: Tensor) -> Tensor:
        return self.alpha * x0 + self.sigma * eps


def noise_ratio(level: NoiseLevel) -> float:
    """Return sigma / alpha, which k-diffusion calls sigma; infinite for pure noise."""
    return level.sigma / level.alpha if level.alpha else math.inf


class Process:
    """The table of a `ProcessConfig`, in double precision, and the conversions that need it.

    Times are those of the network: 0 to T - 1, or for flow t T with t in (0, 1], so that one embedding of times serves
    both. Between integer times log(sigma / alpha) is interpolated, as in k-diffusion.
    """

    def __init__(self, config: ProcessConfig):
        self.config = config
        self.first, self.last = (
            (1, config.num_timesteps) if config.schedule == "flow" else (0, config.num_timesteps - 1)
        )
        self.alphas, self.sigmas = _table(config)
        self._log_ratios = [
            math.log(s / a) if a else math.inf for a, s in zip(self.alphas, self.sigmas, strict=True)
        ]
        self._on: dict[tuple[torch.device, torch.dtype], Tensor] = {}

    def at(self, t: Shaped[Tensor, "*b"]) -> tuple[Float[Tensor, "*b"], Float[Tensor, "*b"]]:
        """Return alpha and sigma at the times t, integer or not, on t's device, in fp32 (fp64 for fp64 times)."""
        t = t.to(torch.promote_types(t.dtype, torch.float32))
        if self.config.schedule == "flow":
            sigma = t / self.config.num_timesteps
            return 1 - sigma, sigma
        alphas, sigmas, log_ratios = self._tables(t)
        low = t.long()
        high = (low + 1).clamp(max=self.last)
        part = t - low
        log_ratio = log_ratios[low] + part * (log_ratios[high] - log_ratios[low])
        exact = part == 0  # the table as it is, also where a ratio is infinite and cannot be interpolated
        return (
            torch.where(exact, alphas[low], torch.sigmoid(-2 * log_ratio).sqrt()),
            torch.where(exact, sigmas[low], torch.sigmoid(2 * log_ratio).sqrt()),
        )

    def level(self, t: float | int) -> NoiseLevel:
        """Return the level at time t, in double precision."""
        t = float(t)
        if self.config.schedule == "flow":
            return NoiseLevel(1 - t / self.config.num_timesteps, t / self.config.num_timesteps, t)
        low = int(t)
        if t == low:
            return NoiseLevel(self.alphas[low], self.sigmas[low], t)
        log_ratio = self._log_ratios[low] + (t - low) * (self._log_ratios[low + 1] - self._log_ratios[low])
        ratio = math.exp(log_ratio)
        return NoiseLevel(1 / math.hypot(1, ratio), 1 / math.hypot(1, 1 / ratio), t)

    def time(self, ratio: float) -> float:
        """Return the time at which sigma / alpha is `ratio`, or the nearest end of the schedule."""
        if self.config.schedule == "flow":
            return float(self.last) if ratio == math.inf else self.last * ratio / (1 + ratio)
        log_ratio = math.log(ratio) if ratio > 0 else -math.inf
        if log_ratio <= self._log_ratios[0]:
            return float(self.first)
        if log_ratio >= self._log_ratios[-1]:
            return float(self.last)
        high = bisect.bisect_right(self._log_ratios, log_ratio)
        before, after = self._log_ratios[high - 1], self._log_ratios[high]
        return high - 1 + (log_ratio - before) / (after - before)

    def snr(self, t: Shaped[Tensor, "*b"]) -> Float[Tensor, "*b"]:
        """Return the signal-to-noise ratio, alpha^2 / sigma^2 (Kingma et al. 2021, Equation 2)."""
        alpha, sigma = self.at(t)
        return (alpha / sigma) ** 2

    def noised(
        self, x0: Float[Tensor, "b *c"], eps: Float[Tensor, "b *c"], t: Shaped[Tensor, " b"]
    ) -> Float[Tensor, "b *c"]:
        """Return x_t = alpha_t x_0 + sigma_t eps, with a time for each sample."""
        alpha, sigma = self._along(x0, t)
        return alpha * x0 + sigma * eps

    def target(
        self, x0: Float[Tensor, "b *c"], eps: Float[Tensor, "b *c"], t: Shaped[Tensor, " b"]
    ) -> Float[Tensor, "b *c"]:
        """Return what the network should predict for x_t = alpha_t x_0 + sigma_t eps."""
        return target(self.config.prediction, x0, eps, *self._along(x0, t))

    def to_x0(
        self, x: Float[Tensor, "b *c"], output: Float[Tensor, "b *c"], t: Shaped[Tensor, " b"]
    ) -> Float[Tensor, "b *c"]:
        """Return the clean data that a network's output implies."""
        return to_x0(self.config.prediction, x, output, *self._along(x, t))

    def from_x0(
        self, x: Float[Tensor, "b *c"], x0: Float[Tensor, "b *c"], t: Shaped[Tensor, " b"]
    ) -> Float[Tensor, "b *c"]:
        """Return the output that implies x_0: the inverse of `to_x0`."""
        return from_x0(self.config.prediction, x, x0, *self._along(x, t))

    def _along(self, x: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        shape = (-1,) + (1,) * (x.ndim - 1)
        alpha, sigma = self.at(t.to(x.device))
        return alpha.reshape(shape), sigma.reshape(shape)

    def _tables(self, t: Tensor) -> Tensor:
        key = (t.device, t.dtype)
        if key not in self._on:
            rows = [self.alphas, self.sigmas, self._log_ratios]
            self._on[key] = torch.tensor(rows, dtype=t.dtype, device=t.device)
        return self._on[key]


def network_denoiser(net: Net, process: Process, dtype: torch.dtype | None = None) -> Denoiser:
    """Return the denoiser of a network that predicts what `process.config.prediction` names.

    The network gets x in `dtype` (in its own if None); its output is converted to x_0 in the dtype of x.
    """

    def denoise(x: Tensor, t: Tensor) -> Tensor:
        output = net(x if dtype is None else x.to(dtype), t)
        return process.to_x0(x, output.to(x.dtype), t)

    return denoise


# Predictions. With x = alpha x_0 + sigma eps, each is a linear function of x and x_0; alpha and sigma broadcast against
# x. Only noise prediction divides by alpha, so it needs a schedule that does not end in pure noise.


def target(prediction: Prediction, x0: Tensor, eps: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
    """Return the training target of this prediction."""
    if prediction == "eps":
        return eps
    if prediction == "v":
        return alpha * eps - sigma * x0
    return x0 if prediction == "x0" else eps - x0


def to_x0(prediction: Prediction, x: Tensor, output: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
    """Return x_0 from a network's output at x."""
    if prediction == "eps":
        return (x - sigma * output) / alpha
    if prediction == "v":
        return (alpha * x - sigma * output) / (alpha**2 + sigma**2)
    return output if prediction == "x0" else (x - sigma * output) / (alpha + sigma)


def from_x0(prediction: Prediction, x: Tensor, x0: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
    """Return the network's output at x that implies x_0, for sigma above 0."""
    return x0 if prediction == "x0" else target(prediction, x0, (x - alpha * x0) / sigma, alpha, sigma)


# The tables.


def betas(config: ProcessConfig) -> list[float]:
    """Return beta_t = 1 - alpha_t^2 / alpha_(t-1)^2, the noise variance that each step adds; flow has none."""
    size, low, high = config.num_timesteps, config.beta_start, config.beta_end
    if config.schedule == "linear":
        table = [low + (high - low) * i / (size - 1) for i in range(size)]
    elif config.schedule == "scaled_linear":
        table = [(low**0.5 + (high**0.5 - low**0.5) * i / (size - 1)) ** 2 for i in range(size)]
    else:
        # Nichol and Dhariwal 2021, Equation 17, with s = 0.008 and no beta above 0.999.
        f = [math.cos((i / size + 0.008) / 1.008 * math.pi / 2) ** 2 for i in range(size + 1)]
        table = [min(1 - after / before, 0.999) for before, after in itertools.pairwise(f)]
    if config.zero_terminal_snr:
        # Lin et al. 2023, Algorithm 1: shift the roots so that the last is 0, then scale so that the first is
        # unchanged.
        roots = [math.sqrt(a) for a in itertools.accumulate((1 - beta for beta in table), operator.mul)]
        scale = roots[0] / (roots[0] - roots[-1])
        squares = [((root - roots[-1]) * scale) ** 2 for root in roots]
        table = [1 - after / before for before, after in itertools.pairwise([1.0, *squares])]
    return table


def _table(config: ProcessConfig) -> tuple[tuple[float, ...], tuple[float, ...]]:
    if config.schedule == "flow":
        sigmas = [i / config.num_timesteps for i in range(1, config.num_timesteps + 1)]
        return tuple(1 - sigma for sigma in sigmas), tuple(sigmas)
    alpha_bars = list(itertools.accumulate((1 - beta for beta in betas(config)), operator.mul))
    return tuple(math.sqrt(a) for a in alpha_bars), tuple(math.sqrt(1 - a) for a in alpha_bars)
