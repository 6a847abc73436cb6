"""Exponential moving average of the weights, in fp32."""

import copy

import torch
from torch import Tensor

from triptych.kernels.foreach import lerp_
from triptych.network import Network


class Ema:
    """A copy `net` of the trained network whose parameters are a moving average: w <- d w + (1 - d) w'.

    The decay d rises to `decay` as min(decay, (1 + step) / (10 + step)), so that the random initialization is soon
    forgotten. Buffers, such as running statistics, are copied.
    """

    def __init__(self, net: Network, decay: float):
        self.decay = decay
        self.net = copy.deepcopy(net).requires_grad_(False)

    @torch.no_grad()
    def update(self, net: Network, step: int, skipped: Tensor) -> None:
        """Update the average after a step of the optimizer; leave it as it is if `skipped` (as in `optim.update`) is 1.

        It is called right after the step, before a forward pass changes buffers or a codebook, so the host does not
        know `skipped` yet; the device decides.
        """
        weight = 1 - min(self.decay, (1 + step) / (10 + step))
        averages, parameters = ([_local(p) for p in network.parameters()] for network in (self.net, net))
        lerp_(averages, parameters, weight * (1 - skipped))
        for average, buffer in zip(self.net.buffers(), net.buffers(), strict=True):
            average.copy_(torch.where(skipped > 0, average, buffer))


def _local(parameter: Tensor) -> Tensor:
    """Return this process's shard; both networks are sharded alike."""
    return parameter.to_local() if hasattr(parameter, "to_local") else parameter  # type: ignore[operator]
