"""A moving average of the weights, in fp32."""

import copy

import torch

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
    def update(self, net: Network, step: int) -> None:
        decay = min(self.decay, (1 + step) / (10 + step))
        torch._foreach_lerp_(list(self.net.parameters()), list(net.parameters()), 1 - decay)
        for mine, its in zip(self.net.buffers(), net.buffers(), strict=True):
            mine.copy_(its)
