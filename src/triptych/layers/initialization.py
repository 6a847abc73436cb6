"""Random weights to start from."""

from torch import nn


def fill(net: nn.Module) -> None:
    """Random weights for the known layers of `net`: truncated normals of 0.02 for products, as DeiT has them, and of
    1 / sqrt(inputs) for convolutions. A layer with parameters of its own fills them in its `fill`."""
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
