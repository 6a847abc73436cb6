"""Process a map that is too large for memory in overlapping tiles, which are blended."""

from collections.abc import Callable

import torch
from jaxtyping import Float
from torch import Tensor

from triptych.errors import ConfigError


def run_in_tiles(
    run: Callable[[Tensor], Tensor],
    x: Float[Tensor, "b i h w"],
    tile: int,
    overlap: int,
    input_cell: int = 1,
    output_cell: int = 1,
) -> Float[Tensor, "b o rows columns"]:
    """Return `run(x)`, computed tile by tile; `run(x)` itself where one tile holds all of `x`.

    Tiles have one size and are evenly spread. Near the edge of a tile the context is missing, so the last quarter of
    the overlap has weight 0; from there weights rise linearly, and the weights of a pixel sum to one. A network whose
    receptive field reaches no further than a quarter of the overlap gives exactly `run(x)`.

    Args:
        run: maps (b, i, h, w) to (b, o, rows, columns).
        tile: side of a tile in cells.
        overlap: cells that neighboring tiles share, at least.
        input_cell: pixels of `x` in a cell, along one axis.
        output_cell: pixels of the result in a cell, along one axis.

    Raises:
        ConfigError: `overlap` is not below `tile`.
    """
    if not 0 <= overlap < tile:
        raise ConfigError(f"overlap is {overlap}, which must be 0 or more and below the tile's side, which is {tile}")
    rows, columns = x.shape[-2] // input_cell, x.shape[-1] // input_cell
    if rows <= tile and columns <= tile:
        return run(x)
    height, width = min(tile, rows), min(tile, columns)
    tops, lefts = tile_starts(rows, tile, overlap), tile_starts(columns, tile, overlap)
    down = blend_weights(tops, rows, height, overlap // 4, output_cell)
    across = blend_weights(lefts, columns, width, overlap // 4, output_cell)
    out = dtype = None
    for top, by_row in zip(tops, down, strict=True):
        for left, by_column in zip(lefts, across, strict=True):
            rows_in = slice(top * input_cell, (top + height) * input_cell)
            columns_in = slice(left * input_cell, (left + width) * input_cell)
            part = run(x[..., rows_in, columns_in])
            if out is None:                              # sums of half-precision values are rounded once, at the end
                dtype, size = part.dtype, (*part.shape[:2], rows * output_cell, columns * output_cell)
                out = part.new_zeros(size, dtype=torch.promote_types(dtype, torch.float32))
            rows_out = slice(top * output_cell, (top + height) * output_cell)
            columns_out = slice(left * output_cell, (left + width) * output_cell)
            out[..., rows_out, columns_out] += part * (by_row.to(out)[:, None] * by_column.to(out))
    assert out is not None
    return out.to(dtype)


def tile_starts(size: int, tile: int, overlap: int) -> list[int]:
    """Return the first cells of the fewest tiles that cover `size` cells with that overlap, evenly spread."""
    count = 1 + max(-(-(size - tile) // (tile - overlap)), 0)
    return [round(i * (size - tile) / max(count - 1, 1)) for i in range(count)]


def blend_weights(starts: list[int], size: int, tile: int, unused: int, scale: int = 1) -> list[Float[Tensor, "_"]]:
    """Return for each tile its weight in each of its pixels: the distance to the nearest edge inside the map, less the
    `unused` cells there, over the sum of all tiles'."""
    at = torch.arange(tile * scale) + 0.5
    places, near = [], []
    total = torch.zeros(size * scale)
    for begin in starts:
        before = at if begin > 0 else torch.full_like(at, size * scale)
        after = at.flip(0) if begin + tile < size else torch.full_like(at, size * scale)
        near.append((torch.minimum(before, after) - unused * scale).clamp(min=0))
        places.append(slice(begin * scale, (begin + tile) * scale))
        total[places[-1]] += near[-1]
    return [part / total[place] for part, place in zip(near, places, strict=True)]
