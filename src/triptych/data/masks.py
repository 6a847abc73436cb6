"""Segmentation masks: files with one number per pixel, and the classes that the numbers stand for.

A `LabelMap` turns the numbers in files into the values in batches: class indices, and the void value, which marks
pixels of unknown class and pixels outside of the image. The void is 255 for up to 255 classes, whose masks are uint8,
and 65,535 for more, whose masks are int32.
"""

import os
from collections.abc import Collection, Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Integer
from PIL import Image

from triptych.data.images import UNDO_ORIENTATION, exif_orientation, image_errors, open_image
from triptych.errors import DataError

# The void value of up to 255 classes; in files, too, unless there are more classes and 255 is the number of one.
VOID = 255
NUM_MASK_VALUES = 1 << 16  # values that a 16-bit mask can hold
MAX_MASK_CLASSES = NUM_MASK_VALUES - 1  # the last value is the void
INVALID = -1  # in a table: a value that must not occur

Color = tuple[int, int, int]


def void_label(count: int) -> int:
    """Return the value that marks unknown pixels and padding in masks of `count` classes."""
    return VOID if count <= VOID else NUM_MASK_VALUES - 1


def mask_dtype(count: int) -> type[np.integer]:
    """Return the dtype of masks of `count` classes."""
    return np.uint8 if count <= VOID else np.int32


class MaskFormatError(DataError):
    """The values of a mask cannot be class numbers, which is probably true of the other masks of its data set, too."""


@dataclass(frozen=True, eq=False)
class LabelMap:
    """The classes that the values in mask files stand for.

    Attributes:
        classes: class names, at most 65,535.
        table: for each value in a file its class index, the void value if it is ignored, or -1 if it must not occur.
        colors: RGB of each class, from 0 to 255; None if the data set defines none.
    """

    classes: tuple[str, ...]
    table: Integer[np.ndarray, "65536"]
    colors: tuple[Color, ...] | None = None

    def read(self, source: bytes | str | os.PathLike[str], name: str) -> Integer[np.ndarray, "H W"]:
        """Return the class index of each pixel of a mask.

        Args:
            source: a file's path or its bytes.
            name: name of the mask in errors.

        Raises:
            DataError: as `read_mask`, or the mask holds a value that is not the number of a class.
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
            f"{name} holds {value}, but the {len(self.classes)} classes are numbered {known}; correct the mask, name "
            "all classes in a classes.txt, or set ignore_index to the value to ignore"
        )


def identity_table(count: int, ignore_index: int = VOID, reduce_zero_label: bool = False) -> np.ndarray:
    """Return the table of masks whose values are class indices, for at most 255 classes.

    Args:
        count: number of classes.
        ignore_index: a value that is ignored, in addition to 255.
        reduce_zero_label: ignore 0 and take 1 as the first class.
    """
    first = int(reduce_zero_label)
    return lookup_table(range(first, first + count), INVALID, {*range(first), VOID, ignore_index})


def lookup_table(numbers: Sequence[int], others: int = VOID, void: Collection[int] = ()) -> np.ndarray:
    """Return the table of masks in which class k has the value `numbers[k]`.

    Args:
        numbers: value of each class.
        others: entry for all other values.
        void: values that are ignored.
    """
    count = len(numbers)
    table = np.full(NUM_MASK_VALUES, others, np.int16 if count <= VOID else np.int32)
    table[list(numbers)] = np.arange(count)
    table[list(void)] = void_label(count)
    return table


def orient_mask(
    mask: Integer[np.ndarray, "H W"], orientation: int, size: tuple[int, int], name: str
) -> Integer[np.ndarray, "h w"]:
    """Orient a mask as its image, which has been turned upright: turn it if its size is that of the image as stored,
    and return it unchanged if its size is that of the upright image.

    Args:
        orientation: EXIF orientation of the image.
        size: height and width of the upright image.
        name: name of the image in errors.

    Raises:
        DataError: the mask has neither size, or both sizes are equal.
    """
    (mask_height, mask_width), (height, width) = mask.shape, size
    stored = (width, height) if orientation >= 5 else size
    if orientation != 1 and mask.shape == size == stored:
        raise DataError(
            f"{name} has EXIF orientation {orientation}, and its mask fits it with and without the rotation; save the "
            "image as the mask is oriented, without the EXIF tag"
        )
    if mask.shape == size:
        return mask
    if mask.shape == stored:
        return np.asarray(Image.fromarray(mask).transpose(UNDO_ORIENTATION[orientation]))
    raise DataError(
        f"{name} is {width} x {height} pixels, but its mask is {mask_width} x {mask_height}; give it a mask of its size"
    )


def read_mask(source: bytes | str | os.PathLike[str], name: str) -> Integer[np.ndarray, "H W"]:
    """Return the values of a mask: grayscale of 1, 8, 16 or 32 bits, or the indices of a palette.

    Raises:
        DataError: a color image or a JPEG, which hold no class numbers; a file that is damaged or not an image; or a
            negative value.
    """
    with image_errors(name):
        values = np.asarray(_open_mask(source, name))
    if values.dtype == bool:
        return values.astype(np.uint8)
    if int(values.min(initial=0)) < 0:
        raise DataError(f"{name} holds {int(values.min())}, but class numbers start at 0; correct the mask")
    return values


def read_palette(source: bytes | str | os.PathLike[str], name: str) -> list[Color] | None:
    """Return the palette of a mask, RGB by index; None if it has none."""
    with image_errors(name):
        image = _open_mask(source, name)
        flat = image.getpalette("RGB") if image.mode == "P" else None
    return None if flat is None else list(zip(flat[::3], flat[1::3], flat[2::3], strict=True))


def _open_mask(source: bytes | str | os.PathLike[str], name: str) -> Image.Image:
    image = open_image(source, name)
    if image.format in ("JPEG", "MPO"):
        raise MaskFormatError(
            f"{name} is a JPEG, whose compression alters class numbers; save the original masks as PNG"
        )
    if image.mode not in ("1", "L", "P", "I", "I;16", "I;16B", "I;16L"):
        raise MaskFormatError(
            f"{name} has mode {image.mode}, but a mask holds one class number per pixel (mode L or P); convert its "
            "colors to numbers and save them with Image.fromarray(numbers.astype('uint8'))"
        )
    if exif_orientation(image) in UNDO_ORIENTATION:
        raise DataError(
            f"the mask {name} has EXIF orientation {exif_orientation(image)}; save it upright, without the EXIF tag"
        )
    image.load()
    return image
