"""The grid of learned positions, which all readers of ViTs infer."""

import math
from dataclasses import replace

from triptych.errors import CheckpointError
from triptych.model_card import Preprocess
from triptych.weights.mapping.defaults import square_grid
from triptych.weights.mapping.format import Hints, StateDictKeys

Size = tuple[int, int]


def cut_preprocess(preprocess: Preprocess, image_size: Size) -> Preprocess:
    """Return preprocessing for images that are up to a patch smaller than those of the config, at the same scale."""
    if (
        preprocess.size == image_size
        or max(a - b for a, b in zip(preprocess.size, image_size, strict=True)) > 32
    ):
        return preprocess
    if any(a < b for a, b in zip(preprocess.size, image_size, strict=True)):
        return preprocess
    crop = preprocess.crop * min(image_size) / min(preprocess.size)
    return replace(preprocess, size=image_size, crop=crop)


def learned_grid(
    keys: StateDictKeys, positions: str, prefix: int, stride: int, configured: Size | None, hints: Hints
) -> tuple[Size, str]:
    """Return the image size of learned positions, and its origin in words.

    Args:
        positions: key of the positions, of shape (1, prefix + rows * columns, D).
        prefix: number of tokens in front of the patches that have positions.
        stride: side of a patch in pixels.
        configured: the size in the config next to the file, which must agree with the positions.
        hints: the size passed to the call, for a rectangular grid that nothing else describes.

    Raises:
        CheckpointError: the config disagrees with the positions, or the patches form no square and there is no hint.
    """
    count = keys.shape(positions, 3)[1] - prefix

    def fits(size: Size | None) -> bool:
        return size is not None and math.prod(max(side // stride, 1) for side in size) == count

    if configured is not None:
        if not fits(configured):
            raise CheckpointError(
                f"{keys.path}: config.json says image_size {configured}, which does not have the {count} "
                f"patches of {positions}; put the config that belongs to the weights next to them"
            )
        # What is left over at the bottom and the right is not read there.
        height, width = (max(side // stride, 1) * stride for side in configured)
        return (height, width), "config.json"
    side = math.isqrt(max(count, 0))
    if side * side != count and fits(hints.image_size):
        return hints.image_size, "image_size of the call"  # type: ignore[return-value]
    rows, columns = square_grid(count, str(keys.path))
    return (rows * stride, columns * stride), "the number of positions"
