"""The pieces that dense heads share."""

import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from triptych.layers.norm import BatchNorm


class ConvNorm(nn.Module):
    """Convolution, batch norm, ReLU; the map keeps its size."""

    def __init__(self, inputs: int, outputs: int, kernel: int = 3):
        super().__init__()
        self.conv = nn.Conv2d(inputs, outputs, kernel, padding=kernel // 2, bias=False)
        self.norm = BatchNorm(outputs)

    def forward(self, x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b d h w"]:
        return F.relu(self.norm(self.conv(x)))


def resize(x: Float[Tensor, "b c h w"], size: tuple[int, int]) -> Float[Tensor, "b c rows columns"]:
    """A map at another size, bilinearly; cells are areas (corners are not aligned)."""
    if all(isinstance(side, int) for side in size) and tuple(x.shape[-2:]) == tuple(size):
        return x
    return F.interpolate(x, size=size, mode="bilinear", align_corners=False)


class Pyramid(nn.Module):
    """Maps of one size, such as those of a ViT's blocks, as a pyramid of strides 4, 8, 16 and 32 (or as many as there
    are): each is projected, resized and smoothed, as the multi-level neck of SETR's and MAE's segmenters does."""

    def __init__(self, channels: list[int], strides: list[int], width: int):
        super().__init__()
        self.before = nn.ModuleList(ConvNorm(c, width, 1) for c in channels)
        self.after = nn.ModuleList(ConvNorm(width, width) for _ in channels)
        self.strides = [4 * 2**i for i in range(len(channels))]
        self.factors = [old / new for old, new in zip(strides, self.strides, strict=True)]
        self.channels = [width] * len(channels)

    def forward(self, maps: list[Float[Tensor, "b _ _ _"]]) -> list[Float[Tensor, "b _ _ _"]]:
        made = []
        for x, before, after, factor in zip(maps, self.before, self.after, self.factors, strict=True):
            rows, columns = (max(1, int(side * factor)) for side in x.shape[-2:])
            made.append(after(resize(before(x), (rows, columns))))
        return made
