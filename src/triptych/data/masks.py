"""Masks: files of one number a pixel, and what the numbers mean.

A `Legend` is all that a source knows of its masks. What it returns is what batches hold: uint8 indices into its
classes, and 255 where nobody knows.
"""

import os
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Int16, Integer, UInt8
from PIL import Image

from triptych.data.images import open_image, reading
from triptych.errors import UserError

IGNORED = 255  # what nobody knows, and what lies beside the picture
MOST_CLASSES = 255
VALUES = 1 << 16  # that a mask of 16 bits can hold
OUTSIDE = -1

Colour = tuple[int, int, int]


class WrongKind(UserError):
    """A mask whose numbers cannot be classes, as likely are all masks beside it."""


@dataclass(frozen=True, eq=False)
class Legend:
    """What the numbers in masks mean.

    Attributes:
        classes: names, at most 255.
        table: for each number a mask may hold the index of its class, 255 for what is ignored, -1 for what must
            not occur.
        colours: RGB of each class, from 0 to 255, None where nobody chose any.
    """

    classes: tuple[str, ...]
    table: Int16[np.ndarray, "65536"]
    colours: tuple[Colour, ...] | None = None

    def read(self, source: bytes | str | os.PathLike[str], name: str) -> UInt8[np.ndarray, "H W"]:
        """The classes of a mask's pixels.

        Raises:
            UserError: as `read_values`, or a number that is no class; names the mask.
        """
        values = read_values(source, name)
        if int(values.max(initial=0)) >= VALUES:
            self._refuse(int(values.max()), name)
        found = self.table[values]
        if int(found.min(initial=0)) < 0:
            self._refuse(int(values[found < 0].min()), name)
        return found.astype(np.uint8)

    def _refuse(self, value: int, name: str) -> None:
        classes = np.flatnonzero((self.table != OUTSIDE) & (self.table != IGNORED))
        known = f"{classes[0]}..{classes[-1]}" if len(classes) else "none"
        raise WrongKind(
            f"{name} holds {value}, and the numbers of the {len(self.classes)} classes are {known}; correct the "
            "mask, name all classes in a classes.txt, or choose the value to leave out with ignore_index"
        )


def plain_table(count: int, ignore_index: int = IGNORED, reduce_zero_label: bool = False) -> np.ndarray:
    """The table of masks whose numbers are class indices from 0, or from 1 where 0 is to be ignored."""
    table = np.full(VALUES, OUTSIDE, np.int16)
    first = int(reduce_zero_label)
    table[first : first + count] = np.arange(count)
    table[:first] = IGNORED
    table[[IGNORED, ignore_index]] = IGNORED
    return table


def table_of(values: Sequence[int]) -> np.ndarray:
    """The table of masks where class k is the number `values[k]`, and all other numbers are ignored."""
    table = np.full(VALUES, IGNORED, np.int16)
    table[list(values)] = np.arange(len(values))
    return table


def read_values(source: bytes | str | os.PathLike[str], name: str) -> Integer[np.ndarray, "H W"]:
    """The numbers of a mask: grey of 1, 8, 16 or 32 bits, or the indices of a palette.

    Raises:
        UserError: colours or a JPEG, which hold no class numbers; no image, damaged, or below 0.
    """
    with reading(name):
        values = np.asarray(_open_mask(source, name))
    if values.dtype == bool:
        return values.astype(np.uint8)
    if int(values.min(initial=0)) < 0:
        raise UserError(f"{name} holds {int(values.min())}, and class numbers start from 0; correct the mask")
    return values


def read_palette(source: bytes | str | os.PathLike[str], name: str) -> list[Colour] | None:
    """The colours of a mask with a palette, by index; None for others."""
    with reading(name):
        image = _open_mask(source, name)
        flat = image.getpalette("RGB") if image.mode == "P" else None
    return None if flat is None else list(zip(flat[::3], flat[1::3], flat[2::3], strict=True))


def _open_mask(source: bytes | str | os.PathLike[str], name: str) -> Image.Image:
    image = open_image(source, name)
    if image.format in ("JPEG", "MPO"):
        raise WrongKind(
            f"{name} is a JPEG, which blurs the class numbers of a mask; save the masks as PNG, from the original"
        )
    if image.mode not in ("1", "L", "P", "I", "I;16", "I;16B", "I;16L"):
        raise WrongKind(
            f"{name} is {image.mode}, and a mask holds one class number a pixel (mode L or P); turn its colours "
            "into numbers and save them with Image.fromarray(numbers.astype('uint8'))"
        )
    image.load()
    return image
