"""The windows of a Swin in the image, and the attention inside them.

`capture` gives the attention of a block as (windows, heads, cells, cells) of the padded and rolled map. The functions
here assign each weight to its cell of the map. Attention to padding is left out, and the rest is rescaled to sum to 1.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from triptych.errors import ConfigError
from triptych.heads.segmenter import Segmenter
from triptych.layers.window import shift_along, window_slots, window_sources, windows_along
from triptych.models.configs.swin import maps_at
from triptych.models.swin import Swin
from triptych.pipelines.explain.result import Point, check_point


@dataclass(frozen=True, kw_only=True)
class BlockWindows:
    """The windows of one block."""

    name: str
    """Name of its attention module, as in `capture`."""
    stage: int
    """Index of the stage, from 0."""
    size: tuple[int, int]
    """Rows and columns of the map."""
    stride: int
    """Pixels from one cell to the next."""
    window: tuple[int, int]
    shift: tuple[int, int]
    """Cells by which the map is rolled up and to the left; (0, 0) is W-MSA."""

    @property
    def windows(self) -> tuple[int, int]:
        """Number of windows in a column and in a row."""
        return windows_along(self.size[0], self.window[0]), windows_along(self.size[1], self.window[1])

    def sources(self) -> Int[Tensor, "n m"]:
        """Return the cell of the map, row by row, in each slot of each window; H * W for padding."""
        return window_sources(*self.size, *self.windows, self.window, self.shift)

    def places(self) -> Int[Tensor, "h w"]:
        """Return each cell's slot in the list of all windows' cells."""
        return window_slots(*self.size, *self.windows, self.window, self.shift)

    def cell(self, point: Point) -> tuple[int, int]:
        """Return row and column of the cell that contains a point."""
        return int(point[1] // self.stride), int(point[0] // self.stride)

    def borders(self) -> tuple[list[int], list[int]]:
        """Return the borders between regions of attention in pixels, of rows and of columns, without outer edges."""
        return tuple(
            [side * self.stride for side in range(shift or window, size, window)]
            for size, window, shift in zip(self.size, self.window, self.shift, strict=True)
        )  # type: ignore[return-value]


def backbone_of(net: nn.Module) -> tuple[str, nn.Module]:
    """Return the backbone of a segmenter, or the network itself, and the prefix of its modules' names."""
    return ("backbone.", net.backbone) if isinstance(net, Segmenter) else ("", net)


def block_windows(net: nn.Module, image_size: tuple[int, int]) -> list[BlockWindows]:
    """Return the windows of every block of a Swin, or a segmenter's Swin, for images of height and width `image_size`.

    Raises:
        ConfigError: the network has no windows.
    """
    before, swin = backbone_of(net)
    if not isinstance(swin, Swin):
        raise ConfigError(f"{type(swin).__name__} has no windows; give a Swin, or a segmenter on one")
    windows = []
    for s, size in enumerate(maps_at(swin.config, image_size)):
        blocks: Any = swin.stages[s].blocks
        for b, block in enumerate(blocks):
            window: tuple[int, int] = block.attn.window
            single = block.shift_single
            shift = (shift_along(size[0], window[0], single), shift_along(size[1], window[1], single))
            windows.append(
                BlockWindows(
                    name=f"{before}stages.{s}.blocks.{b}.attn",
                    stage=s,
                    size=size,
                    stride=swin.config.strides[s],
                    window=window,
                    shift=shift if block.shifted else (0, 0),
                )
            )
    return windows


def window_attention_at(
    maps: Mapping[str, Tensor], net: nn.Module, image_size: tuple[int, int], block: int, point: Point
) -> Float[np.ndarray, "h w"]:
    """Return the attention of the cell at a point in one block, on the block's map; zero outside its window, sums to 1.

    ```python
    with tp.capture(net) as maps:
        net(x)                                             # (1, 3, 128, 128)
    light = window_attention_at(maps, net, (128, 128), -1, (40, 90))
    ```

    Args:
        maps: the maps that `capture` collected; the first image is used, and the mean of the heads.
        net: a Swin, or a segmenter on one.
        image_size: height and width of the network's input.
        block: index of the block, from 0 over all stages; negative ones count from the last.
        point: x and y in pixels of those images.

    Raises:
        ConfigError: not a Swin, a point outside the image, or no such block.
    """
    blocks = block_windows(net, image_size)
    if not -len(blocks) <= block < len(blocks):
        raise ConfigError(f"block is {block}; the network has {len(blocks)}, counted from 0")
    check_point(point, image_size)
    weights, _ = attention_at(maps[blocks[block].name][0], blocks[block], point)
    return weights.mean(0).cpu().numpy()


def attention_at(
    weights: Float[Tensor, "n heads m m"], block: BlockWindows, point: Point
) -> tuple[Float[Tensor, "heads h w"], Float[Tensor, " heads"]]:
    """Return each head's attention of the cell at a point, on the map, and the share that went to padding."""
    row, column = block.cell(point)
    n, m = divmod(int(block.places()[row, column]), weights.shape[-1])
    source = block.sources()[n].to(weights.device)
    real = source < block.size[0] * block.size[1]
    seen = weights[n, :, m, real]  # heads, real
    cells = seen.new_zeros(len(seen), block.size[0] * block.size[1])
    cells[:, source[real]] = _normalized(seen)
    return cells.unflatten(1, block.size), 1 - seen.sum(-1)


# Rollout (Abnar and Zuidema 2020, Equation 1) in a hierarchy. Only a few rows of the product of all blocks' matrices
# are needed, so these are multiplied from the last block to the first, without any matrix between full maps.


def rollout(
    attention: Sequence[Float[Tensor, "n heads m m"]],
    blocks: Sequence[BlockWindows],
    rows: Float[Tensor, "r h w"],
) -> Float[Tensor, "r rows columns"]:
    """Return the contribution of each cell of the first map to weighted sums of the last map's cells.

    Args:
        attention: attention of the blocks, for one image.
        blocks: the blocks up to the map that is read, which may be that of an earlier stage.
        rows: weights of that map's cells, each row summing to 1. A single cell is a row of zeros and a one.

    Returns:
        Rows that sum to 1, on the map of the first block.
    """
    for weights, block in zip(reversed(attention), reversed(blocks), strict=True):
        if rows.shape[1:] != block.size:
            rows = before_merging(rows, block.size)
        rows = before_block(rows, weights, block)
    return rows


def before_block(
    rows: Float[Tensor, "r h w"], weights: Float[Tensor, "n heads m m"], block: BlockWindows
) -> Float[Tensor, "r h w"]:
    """Return rows (0.5 A + 0.5 I): A is the mean of the heads, I the residual connection."""
    source = block.sources().to(rows.device)  # n m
    real = source < block.size[0] * block.size[1]
    A = _normalized(weights.to(rows) * real[:, None, None, :]).mean(1)  # n m m
    cells = F.pad(rows.flatten(1), (0, 1))  # r hw+1: padding has weight 0
    pulled = torch.einsum("rnq,nqk->rnk", cells[:, source], A).flatten(1)  # r nm
    back = pulled[:, block.places().to(rows.device)]  # r h w
    return 0.5 * back + 0.5 * rows


def before_merging(rows: Float[Tensor, "r h w"], size: tuple[int, int]) -> Float[Tensor, "r rows columns"]:
    """Distribute the weight of a merged cell evenly over the four cells that it was made of, except padding."""
    height, width = rows.shape[1:]
    tall, wide = torch.full((height, 1), 2.0), torch.full((1, width), 2.0)
    tall[-1], wide[:, -1] = 2 - size[0] % 2, 2 - size[1] % 2
    rows = rows / (tall * wide).to(rows)
    return rows.repeat_interleave(2, 1).repeat_interleave(2, 2)[:, : size[0], : size[1]]


def _normalized(shares: Tensor) -> Tensor:
    """Rescale to sum to 1 along the last axis; all zeros stay zeros."""
    return shares / shares.sum(-1, keepdim=True).clamp_min(torch.finfo(shares.dtype).tiny)
