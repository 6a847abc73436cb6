"""UPerNet (Xiao et al. 2018, Figure 4): pyramid pooling on the coarsest map, a feature pyramid, all levels fused."""

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from triptych.heads.blocks import ConvNorm, resize_map


class PyramidPooling(nn.Module):
    """Averages over grids of several sizes, concatenated with the map (PSPNet, Zhao et al. 2017, Figure 3)."""

    def __init__(self, channels: int, width: int, scales: tuple[int, ...]):
        super().__init__()
        self.scales = scales
        self.pools = nn.ModuleList(ConvNorm(channels, width, 1) for _ in scales)
        self.join = ConvNorm(channels + len(scales) * width, width)

    def forward(self, x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b d h w"]:
        size = (x.shape[-2], x.shape[-1])
        pooled = [
            resize_map(pool(F.adaptive_avg_pool2d(x, scale)), size)
            for pool, scale in zip(self.pools, self.scales, strict=True)
        ]
        return self.join(torch.cat([x, *pooled], dim=1))


class UPerNet(nn.Module):
    """Lateral projections, pyramid pooling of the coarsest map, a top-down sum, smoothing, and one convolution of all
    levels at the finest size."""

    def __init__(self, channels: list[int], width: int, scales: tuple[int, ...]):
        super().__init__()
        self.pooling = PyramidPooling(channels[-1], width, scales)
        self.lateral = nn.ModuleList(ConvNorm(c, width, 1) for c in channels[:-1])
        self.smooth = nn.ModuleList(ConvNorm(width, width) for _ in channels[:-1])
        self.join = ConvNorm(len(channels) * width, width)
        self.channels = width

    def forward(self, maps: list[Float[Tensor, "b _ _ _"]]) -> Float[Tensor, "b d h w"]:
        levels = [lateral(x) for lateral, x in zip(self.lateral, maps[:-1], strict=True)]
        levels.append(self.pooling(maps[-1]))
        for i in range(len(levels) - 1, 0, -1):
            size = (levels[i - 1].shape[-2], levels[i - 1].shape[-1])
            levels[i - 1] = levels[i - 1] + resize_map(levels[i], size)
        fused = [smooth(x) for smooth, x in zip(self.smooth, levels[:-1], strict=True)] + [levels[-1]]
        finest = (fused[0].shape[-2], fused[0].shape[-1])
        return self.join(torch.cat([resize_map(x, finest) for x in fused], dim=1))
