"""A map too large for the memory, run in tiles that overlap and are blended."""

from collections.abc import Callable

import torch
from jaxtyping import Float
from torch import Tensor

from triptych.errors import UserError


def in_tiles(
    run: Callable[[Tensor], Tensor],
    x: Float[Tensor, "b i h w"],
    tile: int,
    overlap: int,
    taken: int = 1,
    given: int = 1,
) -> Float[Tensor, "b o rows columns"]:
    """`run(x)`, tile by tile. One tile that holds all of `x` is `run(x)` itself.

    Tiles are all of one size and evenly spread. Near an edge that a tile has with another it knows too little of what
    is around: the last quarter of the overlap is not used. Before it the share of each falls linearly, and the shares
    of a pixel sum to one. So a network that looks no further than a quarter of the overlap gives exactly the whole.

    Args:
        tile: side of a tile in cells.
        overlap: of two neighbours in cells, at least.
        taken: pixels of `x` a cell.
        given: pixels of the result a cell.

    Raises:
        UserError: `overlap` is not below `tile`.
    """
    if not 0 <= overlap < tile:
        raise UserError(f"overlap is {overlap}, which must be 0 or more and below the tile's side, which is {tile}")
    rows, columns = x.shape[-2] // taken, x.shape[-1] // taken
    if rows <= tile and columns <= tile:
        return run(x)
    height, width = min(tile, rows), min(tile, columns)
    tops, lefts = starts(rows, tile, overlap), starts(columns, tile, overlap)
    down = shares(tops, rows, height, overlap // 4, given)
    across = shares(lefts, columns, width, overlap // 4, given)
    out = None
    for top, by_row in zip(tops, down, strict=True):
        for left, by_column in zip(lefts, across, strict=True):
            part = run(x[..., top * taken : (top + height) * taken, left * taken : (left + width) * taken])
            if out is None:                              # sums of halves are rounded once, at the end
                dtype = torch.promote_types(part.dtype, torch.float32)
                out = part.new_zeros((*part.shape[:2], rows * given, columns * given), dtype=dtype)
            share = by_row.to(out)[:, None] * by_column.to(out)
            place = out[..., top * given : (top + height) * given, left * given : (left + width) * given]
            place += part * share
    assert out is not None
    return out.to(part.dtype)


def starts(size: int, tile: int, overlap: int) -> list[int]:
    """Where the fewest tiles begin that cover `size` cells with that overlap: evenly from the first to the last."""
    count = 1 + max(-(-(size - tile) // (tile - overlap)), 0)
    return [round(i * (size - tile) / max(count - 1, 1)) for i in range(count)]


def shares(begins: list[int], size: int, tile: int, unused: int, given: int = 1) -> list[Float[Tensor, "_"]]:
    """For each tile its share of each of its pixels: the distance to the nearest edge that it has with another, less
    the `unused` cells there; over the sum of all tiles'."""
    at = torch.arange(tile * given) + 0.5
    places, near = [], []
    total = torch.zeros(size * given)
    for begin in begins:
        before = at if begin > 0 else torch.full_like(at, size * given)
        after = at.flip(0) if begin + tile < size else torch.full_like(at, size * given)
        near.append((torch.minimum(before, after) - unused * given).clamp(min=0))
        places.append(slice(begin * given, (begin + tile) * given))
        total[places[-1]] += near[-1]
    return [part / total[place] for part, place in zip(near, places, strict=True)]
