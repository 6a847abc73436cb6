"""Cost of a network: number of parameters and of multiply-accumulates."""

import copy

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode


def count_parameters(net: nn.Module, trainable: bool = False) -> int:
    """Return the number of parameters; with `trainable`, only of those that require a gradient."""
    return sum(p.numel() for p in net.parameters() if p.requires_grad or not trainable)


def count_macs(net: nn.Module, *shapes: tuple[int, ...]) -> int:
    """Return the multiply-accumulates of one forward pass for inputs of these shapes, such as (B, C, H, W).

    Matrix products, convolutions and attention are counted, norms and activations are not, as in torchvision and in the
    tables of papers. Nothing is computed: a copy of the network runs on the meta device.
    """
    meta_net = copy.deepcopy(net).to("meta").eval()
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        meta_net(*(torch.empty(shape, device="meta") for shape in shapes))
    return counter.get_total_flops() // 2
