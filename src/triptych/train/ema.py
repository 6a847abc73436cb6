"""A moving average of the weights, in fp32."""

import copy

import torch
from torch import Tensor

from triptych.kernels.foreach import lerp_
from triptych.network import Network


class Ema:
    """`net` is a copy of the trained network whose parameters trail it: w <- d w + (1 - d) w'.

    The decay d rises to `decay` as min(decay, (1 + step) / (10 + step)), so that the random start is soon
    forgotten. Buffers (running statistics) are taken over as they are.
    """

    def __init__(self, net: Network, decay: float):
        self.decay = decay
        self.net = copy.deepcopy(net).requires_grad_(False)

    @torch.no_grad()
    def update(self, net: Network, step: int, skipped: Tensor) -> None:
        """After a step of the optimiser; where `skipped` (as in `optim.update`) is 1, everything stays as it is.

        At once, before a forward pass moves buffers or a codebook, and so without knowing: the device decides.
        """
        share = 1 - min(self.decay, (1 + step) / (10 + step))
        mine, its = ([_shard(p) for p in one.parameters()] for one in (self.net, net))
        lerp_(mine, its, share * (1 - skipped))
        for mine, its in zip(self.net.buffers(), net.buffers(), strict=True):
            mine.copy_(torch.where(skipped > 0, mine, its))


def _shard(parameter: Tensor) -> Tensor:
    """This process's part of it: both networks are divided alike."""
    return parameter.to_local() if hasattr(parameter, "to_local") else parameter  # type: ignore[operator]
