"""What a network costs: parameters, and multiply-accumulates counted while it runs on shapes alone."""

import copy

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode


def count_parameters(net: nn.Module, trainable: bool = False) -> int:
    """Number of parameters; only those that learn with `trainable=True`."""
    return sum(p.numel() for p in net.parameters() if p.requires_grad or not trainable)


def count_macs(net: nn.Module, *shapes: tuple[int, ...]) -> int:
    """Multiply-accumulates of one forward pass for inputs of these shapes, such as (B, C, H, W).

    Matrix products, convolutions and attention, the convention of torchvision and of the papers' tables: no
    norms, no activations. Nothing is computed: a copy runs on the meta device.
    """
    ghost = copy.deepcopy(net).to("meta").eval()
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        ghost(*(torch.empty(shape, device="meta") for shape in shapes))
    return counter.get_total_flops() // 2
