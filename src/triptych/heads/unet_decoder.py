"""The expanding path of U-Net (Ronneberger et al. 2015, Figure 1), on any backbone's maps."""

import torch
from jaxtyping import Float
from torch import Tensor, nn

from triptych.heads.blocks import ConvNorm, resize_map


class UNetDecoder(nn.Module):
    """From the coarsest map to the finest: enlarge, concatenate the next finer map, convolve twice.

    Args:
        channels: channels of each map, finest first.
        width: channels after the first step; halved at each further one, at least 16.
        image_channels: channels of the image.
        image_branch_channels: if above 0, the image, convolved to this many channels, is concatenated last, at full
            size (as in Swin UNETR, Hatamizadeh et al. 2022).
    """

    def __init__(
        self, channels: list[int], width: int, image_channels: int = 3, image_branch_channels: int = 0
    ):
        super().__init__()
        self.image = ConvNorm(image_channels, image_branch_channels) if image_branch_channels else None
        skips = ([image_branch_channels] if image_branch_channels else []) + channels[:-1]
        self.steps = nn.ModuleList()
        inputs = channels[-1]
        for i, skip in enumerate(reversed(skips)):
            outputs = max(width // 2**i, 16)
            self.steps.append(nn.Sequential(ConvNorm(inputs + skip, outputs), ConvNorm(outputs, outputs)))
            inputs = outputs
        self.channels = inputs

    def forward(
        self, maps: list[Float[Tensor, "b _ _ _"]], images: Float[Tensor, "b c height width"]
    ) -> Float[Tensor, "b d h w"]:
        """Return a map of the finest size."""
        if self.image is not None:
            maps = [self.image(images), *maps]
        x = maps[-1]
        for step, skip in zip(self.steps, reversed(maps[:-1]), strict=True):
            x = step(torch.cat([resize_map(x, (skip.shape[-2], skip.shape[-1])), skip], dim=1))
        return x
