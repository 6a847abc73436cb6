"""Position embeddings: sin-cos tables, rotary angles, and learned tables resampled to another grid."""

import math
from typing import Literal

import torch
import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Float
from torch import Tensor, nn

Grid = tuple[int, int]
"""Rows and columns of patches."""
Resampling = Literal["antialiased", "bicubic", "aligned", "dino"]


def resample_positions(
    table: Float[Tensor, "1 n d"], old: Grid, new: Grid, prefix: int = 0, resampling: Resampling = "antialiased"
) -> Float[Tensor, "1 m d"]:
    """Resample a table of positions from one grid of patches to another by bicubic interpolation (ViT, Section 3.2).

    The first `prefix` entries (class token) stay as they are. For the same grid the table itself is returned.

    Args:
        table: positions of the prefix, then of the patches row by row.
        old: grid of the table.
        new: grid to return.
        prefix: number of entries that have no place in the grid.
        resampling: see `ViTConfig.position_resampling`. Antialiased, a smaller grid averages neighbors instead of
            skipping them.
    """
    # A dynamic size of torch.export is not an int: comparing it with `old` would specialize the graph to the example.
    if all(isinstance(side, int) for side in new) and old == new:
        return table
    first, grid = table[:, :prefix], table[:, prefix:]
    grid = rearrange(grid, "1 (h w) d -> 1 d h w", h=old[0], w=old[1])
    # PyTorch 2.13 resamples wrongly to a grid one column wide, unless the format is channels-last.
    grid = grid.float().clone(memory_format=torch.channels_last)
    if resampling == "dino":
        scale = [(n + 0.1) / o for n, o in zip(new, old, strict=True)]
        grid = F.interpolate(grid, scale_factor=scale, mode="bicubic", align_corners=False)
    else:
        aligned, smooth = resampling == "aligned", resampling == "antialiased"
        grid = F.interpolate(grid, size=new, mode="bicubic", align_corners=aligned, antialias=smooth)
    return torch.cat([first, rearrange(grid, "1 d h w -> 1 (h w) d").to(first.dtype)], dim=1)


def sincos_positions(
    grid: Grid, dim: int, temperature: float = 10_000.0, closed: bool = True, steps: tuple[float, float] = (1.0, 1.0)
) -> Float[Tensor, "1 n d"]:
    """The fixed table of Chen et al. 2021 (MoCo v3, "2-D sine-cosine"), in big_vision's order:
    sin x, cos x, sin y, cos y, a quarter of `dim` each.

    Args:
        grid: rows and columns.
        dim: channels of a position; a multiple of 4.
        temperature: inverse of the lowest frequency.
        closed: whether the lowest frequency is 1 / temperature (big_vision), or the last one before it (MAE, DiT).
        steps: distance between rows and between columns.
    """
    omega = temperature ** -(torch.arange(dim // 4, dtype=torch.float64) / max(dim // 4 - closed, 1))
    rows, columns = (torch.arange(n, dtype=torch.float64) * step for n, step in zip(grid, steps, strict=True))
    y, x = torch.meshgrid(rows, columns, indexing="ij")
    x, y = x.reshape(-1, 1) * omega, y.reshape(-1, 1) * omega                            # n D/4
    return torch.cat([x.sin(), x.cos(), y.sin(), y.cos()], dim=1)[None].float()


class RotaryPositions(nn.Module):
    """Axial rotary positions as in DINOv3: patch centers in [-1, 1] on both axes, for each axis as many frequencies as
    a quarter of the head's channels, with periods from 1 to `base`.

    Tokens before the patches (class, registers) are not rotated.
    """

    def __init__(self, head_dim: int, base: float = 100.0):
        super().__init__()
        self.head_dim, self.base = head_dim, base

    def angles(self, grid: Grid, device: torch.device) -> Float[Tensor, "n d"]:
        exponents = torch.arange(0, 1, 4 / self.head_dim, dtype=torch.float32, device=device)
        frequencies = 2 * math.pi / self.base**exponents                                 # d/4
        y, x = (2 * (torch.arange(n, dtype=torch.float32, device=device) + 0.5) / n - 1 for n in grid)
        centers = torch.stack(torch.meshgrid(y, x, indexing="ij"), dim=-1)               # h w 2
        angles = rearrange(centers[..., None] * frequencies, "h w two f -> (h w) (two f)")
        return torch.cat([angles, angles], dim=-1)                                       # n d

    def forward(self, x: Float[Tensor, "b heads n d"], angles: Float[Tensor, "m d"]) -> Float[Tensor, "b heads n d"]:
        prefix = x.shape[-2] - angles.shape[-2]
        head, body = x[..., :prefix, :], x[..., prefix:, :].float()
        first, second = body.chunk(2, dim=-1)
        body = body * angles.cos() + torch.cat([-second, first], dim=-1) * angles.sin()
        return torch.cat([head, body.to(x.dtype)], dim=-2)


def resample_bias_table(
    table: Float[Tensor, "n heads"], old: tuple[int, int], new: tuple[int, int]
) -> Float[Tensor, "m heads"]:
    """Resample a table of relative position biases from one window to another: bicubic over its (2 M_h - 1, 2 M_w - 1)
    differences, as Swin's own code does to fine-tune with a larger window. For the same window the table itself is
    returned."""
    if old == new:
        return table
    grid = rearrange(table, "(h w) heads -> 1 heads h w", h=2 * old[0] - 1, w=2 * old[1] - 1)
    size = (2 * new[0] - 1, 2 * new[1] - 1)
    # Memory format: see `resample_positions`.
    grid = grid.float().clone(memory_format=torch.channels_last)
    grid = F.interpolate(grid, size=size, mode="bicubic", align_corners=False)
    return rearrange(grid, "1 heads h w -> (h w) heads").to(table.dtype)
