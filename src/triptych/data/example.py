"""What every source of images hands out."""

from dataclasses import dataclass
from os import PathLike
from typing import TypeAlias

import numpy as np
from PIL.Image import Image as PILImage

Image: TypeAlias = np.ndarray | PILImage | bytes | str | PathLike[str]
"""One picture before decoding: uint8 (H, W, 3 or 4), a PIL image, an encoded file's bytes, or its path."""


@dataclass(frozen=True, slots=True)
class Example:
    """One picture and what is known of it.

    Attributes:
        image: see `Image`; `triptych.data.images.decode` makes an array of any of them.
        label: index into the source's `classes`, None where the source has no labels.
        caption: what the picture shows, in words, None where nobody said.
        id: names the example within its source; the same from run to run.
    """

    image: Image
    label: int | None
    caption: str | None
    id: str
