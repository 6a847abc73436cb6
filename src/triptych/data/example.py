"""What every source of images hands out."""

from dataclasses import dataclass
from os import PathLike
from typing import NamedTuple, TypeAlias

import numpy as np
from PIL.Image import Image as PILImage

from triptych.errors import UserError

Image: TypeAlias = np.ndarray | PILImage | bytes | str | PathLike[str]
"""One picture before decoding: uint8 (H, W, 3 or 4), a PIL image, an encoded file's bytes, or its path."""


class Box(NamedTuple):
    """Where a thing is: the pixels x0 <= x < x1, y0 <= y < y1, and the class it belongs to."""

    label: int
    x0: int
    y0: int
    x1: int
    y1: int


@dataclass(frozen=True, slots=True)
class Example:
    """One picture and what is known of it.

    Attributes:
        image: see `Image`; `triptych.data.images.decode` makes an array of any of them.
        label: index into the source's `classes`, None where the source has no labels.
        caption: what the picture shows, in words, None where nobody said.
        id: names the example within its source; the same from run to run.
        mask: the class of each pixel (H, W): indices into the source's `mask_classes`, and the void of as many
            (`triptych.data.masks`) where nobody knows. None where the source has no masks.
        boxes: where each thing is, one whose class is in `mask_classes`; None where nobody said.
    """

    image: Image
    label: int | None
    caption: str | None
    id: str
    mask: np.ndarray | None = None
    boxes: tuple[Box, ...] | None = None


class Gone(UserError):
    """What examples lie in is there no more, or no more what it was: it is not one damaged picture, to be left out."""
