"""Semantic FPN (Kirillov et al. 2019, Figure 3): a top-down pyramid whose levels are summed at the finest."""

from jaxtyping import Float
from torch import Tensor, nn

from triptych.heads.blocks import ConvNorm, resize_map


class Fpn(nn.Module):
    """Feature pyramid (Lin et al. 2017): each map is projected to `width` channels, added to the coarser one,
    smoothed."""

    def __init__(self, channels: list[int], width: int):
        super().__init__()
        self.lateral = nn.ModuleList(nn.Conv2d(c, width, 1) for c in channels)
        self.smooth = nn.ModuleList(ConvNorm(width, width) for _ in channels)
        self.channels = width

    def forward(self, maps: list[Float[Tensor, "b _ _ _"]]) -> Float[Tensor, "b d h w"]:
        """Return the sum of all levels, at the first map's size."""
        levels = [lateral(x) for lateral, x in zip(self.lateral, maps, strict=True)]
        for i in range(len(levels) - 1, 0, -1):
            levels[i - 1] = levels[i - 1] + resize_map(levels[i], _size(levels[i - 1]))
        smoothed = [smooth(x) for smooth, x in zip(self.smooth, levels, strict=True)]
        finest = smoothed[0]
        for x in smoothed[1:]:
            finest = finest + resize_map(x, _size(smoothed[0]))
        return finest


def _size(x: Tensor) -> tuple[int, int]:
    return x.shape[-2], x.shape[-1]
