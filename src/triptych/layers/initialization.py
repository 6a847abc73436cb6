"""Initialization of weights."""

from torch import nn


def initialize_weights(net: nn.Module) -> None:
    """Initialize the layers of `net` in place: linear layers with truncated normals of standard deviation 0.02, as in
    DeiT, convolutions of 1 / sqrt(inputs). A module with parameters of its own initializes them in its method
    `fill`."""
    for part in net.modules():
        if isinstance(part, nn.Linear | nn.Conv2d):
            std = 0.02 if isinstance(part, nn.Linear) else part.weight[0].numel() ** -0.5
            nn.init.trunc_normal_(part.weight, std=std)
            if part.bias is not None:
                nn.init.zeros_(part.bias)
        elif isinstance(part, nn.LayerNorm | nn.GroupNorm | nn.BatchNorm2d):
            nn.init.ones_(part.weight)
            nn.init.zeros_(part.bias)
        elif part is not net and hasattr(part, "fill"):
            part.fill()  # type: ignore[operator]
