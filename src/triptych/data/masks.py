"""Masks: files of one number a pixel, and what the numbers mean.

A `Legend` is all that a source knows of its masks. What it returns is what batches hold: indices into its classes,
and the void where nobody knows or nothing is. The void is a number that no class can have: 255 of up to 255 classes,
whose masks are uint8, and 65,535 of more, whose masks are int32.
"""

import os
from collections.abc import Collection, Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Integer
from PIL import Image

from triptych.data.images import UNDO_ORIENTATION, exif_orientation, image_errors, open_image
from triptych.errors import UserError

VOID = (
    255  # the void of up to as many classes; in files too, where it is not the number of one of more classes
)
NUM_MASK_VALUES = 1 << 16  # that a mask of 16 bits can hold
MAX_MASK_CLASSES = NUM_MASK_VALUES - 1  # the last number is their void
INVALID = -1

Color = tuple[int, int, int]


def void_label(count: int) -> int:
    """What masks of so many classes hold where the class is unknown, and beside the picture."""
    return VOID if count <= VOID else NUM_MASK_VALUES - 1


def mask_dtype(count: int) -> type[np.integer]:
    """The type of masks of so many classes."""
    return np.uint8 if count <= VOID else np.int32


class MaskFormatError(UserError):
    """A mask whose numbers cannot be classes, as likely are all masks beside it."""


@dataclass(frozen=True, eq=False)
class LabelMap:
    """What the numbers in masks mean.

    Attributes:
        classes: names, at most 65,535.
        table: for each number a mask may hold the index of its class, the void for what is ignored, -1 for what must
            not occur.
        colors: RGB of each class, from 0 to 255, None where nobody chose any.
    """

    classes: tuple[str, ...]
    table: Integer[np.ndarray, "65536"]
    colors: tuple[Color, ...] | None = None

    def read(self, source: bytes | str | os.PathLike[str], name: str) -> Integer[np.ndarray, "H W"]:
        """The classes of a mask's pixels.

        Raises:
            UserError: as `read_values`, or a number that is no class; names the mask.
        """
        values = read_mask(source, name)
        if int(values.max(initial=0)) >= NUM_MASK_VALUES:
            self._refuse(int(values.max()), name)
        classes = self.table[values]
        if int(classes.min(initial=0)) < 0:
            self._refuse(int(values[classes < 0].min()), name)
        return classes.astype(mask_dtype(len(self.classes)))

    def _refuse(self, value: int, name: str) -> None:
        classes = np.flatnonzero((self.table != INVALID) & (self.table != void_label(len(self.classes))))
        known = f"{classes[0]}..{classes[-1]}" if len(classes) else "none"
        raise MaskFormatError(
            f"{name} holds {value}, and the numbers of the {len(self.classes)} classes are {known}; correct the "
            "mask, name all classes in a classes.txt, or choose the value to leave out with ignore_index"
        )


def identity_table(count: int, ignore_index: int = VOID, reduce_zero_label: bool = False) -> np.ndarray:
    """The table of masks whose numbers are class indices from 0, or from 1 where 0 is to be ignored; 255 classes at
    most."""
    first = int(reduce_zero_label)
    return lookup_table(range(first, first + count), INVALID, {*range(first), VOID, ignore_index})


def lookup_table(numbers: Sequence[int], others: int = VOID, void: Collection[int] = ()) -> np.ndarray:
    """The table of masks where class k is the number `numbers[k]`, `void` is ignored, and `others` is what all other
    numbers are."""
    count = len(numbers)
    table = np.full(NUM_MASK_VALUES, others, np.int16 if count <= VOID else np.int32)
    table[list(numbers)] = np.arange(count)
    table[list(void)] = void_label(count)
    return table


def orient_mask(
    mask: Integer[np.ndarray, "H W"], orientation: int, size: tuple[int, int], name: str
) -> Integer[np.ndarray, "h w"]:
    """The mask of a picture of EXIF orientation `turn` that was turned upright to `size` (height, width): turned with
    it if it lies as the picture was stored, as it is if it lies as the picture is shown.

    Raises:
        UserError: it is of another size, or could be either; names the picture.
    """
    (tall, wide), (height, width) = mask.shape, size
    stored = (width, height) if orientation >= 5 else size
    if orientation != 1 and mask.shape == size == stored:
        raise UserError(
            f"{name} is stored turned (EXIF orientation {orientation}), and its mask fits it as stored and as shown; "
            "save it upright, as the mask lies, without the tag"
        )
    if mask.shape == size:
        return mask
    if mask.shape == stored:
        return np.asarray(Image.fromarray(mask).transpose(UNDO_ORIENTATION[orientation]))
    raise UserError(
        f"{name} is {width} x {height} pixels and its mask {wide} x {tall}; they must be of one size"
    )


def read_mask(source: bytes | str | os.PathLike[str], name: str) -> Integer[np.ndarray, "H W"]:
    """The numbers of a mask: grey of 1, 8, 16 or 32 bits, or the indices of a palette.

    Raises:
        UserError: colors or a JPEG, which hold no class numbers; no image, damaged, or below 0.
    """
    with image_errors(name):
        values = np.asarray(_open_mask(source, name))
    if values.dtype == bool:
        return values.astype(np.uint8)
    if int(values.min(initial=0)) < 0:
        raise UserError(f"{name} holds {int(values.min())}, and class numbers start from 0; correct the mask")
    return values


def read_palette(source: bytes | str | os.PathLike[str], name: str) -> list[Color] | None:
    """The colors of a mask with a palette, by index; None for others."""
    with image_errors(name):
        image = _open_mask(source, name)
        flat = image.getpalette("RGB") if image.mode == "P" else None
    return None if flat is None else list(zip(flat[::3], flat[1::3], flat[2::3], strict=True))


def _open_mask(source: bytes | str | os.PathLike[str], name: str) -> Image.Image:
    image = open_image(source, name)
    if image.format in ("JPEG", "MPO"):
        raise MaskFormatError(
            f"{name} is a JPEG, which blurs the class numbers of a mask; save the masks as PNG, from the original"
        )
    if image.mode not in ("1", "L", "P", "I", "I;16", "I;16B", "I;16L"):
        raise MaskFormatError(
            f"{name} is {image.mode}, and a mask holds one class number a pixel (mode L or P); turn its colors "
            "into numbers and save them with Image.fromarray(numbers.astype('uint8'))"
        )
    if exif_orientation(image) in UNDO_ORIENTATION:
        raise UserError(
            f"{name} is a mask stored turned (EXIF orientation {exif_orientation(image)}); save it upright"
        )
    image.load()
    return image
