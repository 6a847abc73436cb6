"""Questions that every reader of a ViT asks: which grid a table of positions is laid out for."""

import math

from triptych.errors import UserError
from triptych.weights.mapping.defaults import square_grid
from triptych.weights.mapping.format import Hints, Names

Size = tuple[int, int]


def learned_grid(
    names: Names, positions: str, prefix: int, stride: int, configured: Size | None, hints: Hints
) -> tuple[Size, str]:
    """The image size of a table of positions, and the words that say where it came from.

    Args:
        positions: the table's name; its shape is (1, prefix + rows * columns, D).
        configured: the size in a config beside the file, which must agree with the table.
        hints: the size given in the call, for a rectangular grid that nothing else describes.

    Raises:
        UserError: the config disagrees with the table, or the patches form no square and nothing says more.
    """
    count = names.shape(positions, 3)[1] - prefix

    def fits(size: Size | None) -> bool:
        return size is not None and math.prod(max(side // stride, 1) for side in size) == count

    if configured is not None:
        if not fits(configured):
            raise UserError(
                f"{names.path}: config.json says image_size {configured}, which does not have the {count} "
                f"patches of {positions}; put the config that belongs to the weights beside them"
            )
        return configured, "config.json"
    side = math.isqrt(max(count, 0))
    if side * side != count and fits(hints.image_size):
        return hints.image_size, "image_size of the call"  # type: ignore[return-value]
    rows, columns = square_grid(count, str(names.path))
    return (rows * stride, columns * stride), "the number of positions"
