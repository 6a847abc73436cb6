"""Pictures into a run's folder: what went in above, what came out below."""

from pathlib import Path

import numpy as np
from jaxtyping import Float
from PIL import Image
from torch import Tensor

from triptych.atomic_write import write_atomically

GAP = 2  # white pixels between two pictures


def make_grid(*rows: Float[Tensor, "b 3 h w"]) -> Image.Image:
    """Rows of images in [-1, 1], one below the other, as a picture."""
    count, _, height, width = rows[0].shape
    sheet = np.full((len(rows) * (height + GAP) - GAP, count * (width + GAP) - GAP, 3), 255, np.uint8)
    for i, row in enumerate(rows):
        pixels = ((row.float().clamp(-1, 1) + 1) * 127.5).round().byte().permute(0, 2, 3, 1).numpy()
        for j, picture in enumerate(pixels):
            top, left = i * (height + GAP), j * (width + GAP)
            sheet[top : top + height, left : left + width] = picture
    return Image.fromarray(sheet)


def save_png(path: Path, picture: Image.Image) -> None:
    """A PNG, whole or not at all."""
    write_atomically(path, lambda file: picture.save(file, format="PNG"))
