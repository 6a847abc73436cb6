"""Grids of images in a run's folder: inputs above, outputs below."""

from pathlib import Path

import numpy as np
from jaxtyping import Float
from PIL import Image
from torch import Tensor

from triptych.atomic_write import write_atomically

GAP = 2  # white pixels between two images


def make_grid(*rows: Float[Tensor, "b 3 h w"]) -> Image.Image:
    """Return rows of images in [-1, 1], one row below the other, as one image."""
    count, _, height, width = rows[0].shape
    grid = np.full((len(rows) * (height + GAP) - GAP, count * (width + GAP) - GAP, 3), 255, np.uint8)
    for i, row in enumerate(rows):
        pixels = ((row.float().clamp(-1, 1) + 1) * 127.5).round().byte().permute(0, 2, 3, 1).numpy()
        for j, image in enumerate(pixels):
            top, left = i * (height + GAP), j * (width + GAP)
            grid[top : top + height, left : left + width] = image
    return Image.fromarray(grid)


def save_png(path: Path, image: Image.Image) -> None:
    """Write a PNG atomically."""
    write_atomically(path, lambda file: image.save(file, format="PNG"))
