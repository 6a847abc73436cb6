"""Building blocks of dense heads."""

import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from triptych.layers.norm import BatchNorm


class ConvNorm(nn.Module):
    """Convolution, batch norm and ReLU at constant map size."""

    def __init__(self, inputs: int, outputs: int, kernel: int = 3):
        super().__init__()
        self.conv = nn.Conv2d(inputs, outputs, kernel, padding=kernel // 2, bias=False)
        self.norm = BatchNorm(outputs)

    def forward(self, x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b d h w"]:
        return F.relu(self.norm(self.conv(x)))


def resize_map(x: Float[Tensor, "b c h w"], size: tuple[int, int]) -> Float[Tensor, "b c rows columns"]:
    """Return a map resized bilinearly, without aligned corners."""
    if all(isinstance(side, int) for side in size) and tuple(x.shape[-2:]) == tuple(size):
        return x
    return F.interpolate(x, size=size, mode="bilinear", align_corners=False)


class Pyramid(nn.Module):
    """A pyramid of strides 4, 8, 16, 32 and so on from maps of one size, such as those of a ViT's blocks: each is
    projected, resized and smoothed, as in the multi-level neck of SETR's and MAE's segmenters."""

    def __init__(self, channels: list[int], strides: list[int], width: int):
        super().__init__()
        self.before = nn.ModuleList(ConvNorm(c, width, 1) for c in channels)
        self.after = nn.ModuleList(ConvNorm(width, width) for _ in channels)
        self.strides = [4 * 2**i for i in range(len(channels))]
        self.factors = [old / new for old, new in zip(strides, self.strides, strict=True)]
        self.channels = [width] * len(channels)

    def forward(self, maps: list[Float[Tensor, "b _ _ _"]]) -> list[Float[Tensor, "b _ _ _"]]:
        pyramid = []
        for x, before, after, factor in zip(maps, self.before, self.after, self.factors, strict=True):
            rows, columns = (max(1, int(side * factor)) for side in x.shape[-2:])
            pyramid.append(after(resize_map(before(x), (rows, columns))))
        return pyramid
