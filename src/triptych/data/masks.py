"""Segmentation masks: files with one number per pixel, and the classes that the numbers stand for.

A `LabelMap` turns the numbers in files into the values in batches: class indices, and the void value, which marks
pixels of unknown class and pixels outside of the image. The void is 255 for up to 255 classes, whose masks are uint8,
and 65,535 for more, whose masks are int32.
"""

import os
from collections.abc import Collection, Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float, Integer, UInt8
from PIL import Image

from triptych.data import drawn_masks
from triptych.data.bands import read_tiff_numbers
from triptych.data.images import MAX_PIXELS, UNDO_ORIENTATION, exif_orientation, image_errors, open_image
from triptych.errors import DataError

# The void value of up to 255 classes; in files, too, unless there are more classes and 255 is the number of one.
VOID = 255
NUM_MASK_VALUES = 1 << 16  # values that a 16-bit mask can hold
MAX_MASK_CLASSES = NUM_MASK_VALUES - 1  # the last value is the void
INVALID = -1  # in a table: a value that must not occur

GRAY_MODES = ("1", "L", "I", "I;16", "I;16B", "I;16L", "F")  # of Pillow, with one channel and no palette

Color = tuple[int, int, int]


def void_label(count: int) -> int:
    """Return the value that marks unknown pixels and padding in masks of `count` classes."""
    return VOID if count <= VOID else NUM_MASK_VALUES - 1


def mask_dtype(count: int) -> type[np.integer]:
    """Return the dtype of masks of `count` classes."""
    return np.uint8 if count <= VOID else np.int32


class MaskFormatError(DataError):
    """The values of a mask cannot be class numbers, which is probably true of the other masks of its data set, too."""


@dataclass(frozen=True)
class MaskOptions:
    """What a user says about masks, as in `triptych.data.config.DataConfig`.

    Attributes:
        ignore_index: a value that is ignored, in addition to 255.
        reduce_zero_label: ignore 0 and take 1 as the first class.
        threshold: masks have two classes, and values above it are the second one. For JPEG masks and soft edges.
        palette: file with the name and color of each class, for masks of colors.
    """

    ignore_index: int = VOID
    reduce_zero_label: bool = False
    threshold: float | None = None
    palette: str | os.PathLike[str] | None = None


@dataclass(frozen=True)
class MaskEncoding:
    """How mask files encode their numbers if the pixels are not the numbers themselves.

    Attributes:
        threshold: a pixel is 1 if it is brighter, else 0. Colors count by their luma (ITU-R BT.601), and transparent
            pixels as black.
        colors: the number of a pixel is the index of its color.
    """

    threshold: float | None = None
    colors: tuple[Color, ...] | None = None


NUMBERS = MaskEncoding()
"""Pixels are class numbers."""


@dataclass(frozen=True, eq=False)
class LabelMap:
    """The classes that the values in mask files stand for.

    Attributes:
        classes: class names, at most 65,535.
        table: for each value in a file its class index, the void value if it is ignored, or -1 if it must not occur.
        colors: RGB of each class, from 0 to 255; None if the data set defines none.
        encoding: how files encode the values.
    """

    classes: tuple[str, ...]
    table: Integer[np.ndarray, "65536"]
    colors: tuple[Color, ...] | None = None
    encoding: MaskEncoding = NUMBERS

    def read(self, source: bytes | str | os.PathLike[str], name: str) -> Integer[np.ndarray, "H W"]:
        """Return the class index of each pixel of a mask.

        Args:
            source: a file's path or its bytes.
            name: name of the mask in errors.

        Raises:
            DataError: as `read_mask`, or the mask holds a value that is not the number of a class.
        """
        values = read_mask(source, name, self.encoding)
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


def read_mask(
    source: bytes | str | os.PathLike[str], name: str, encoding: MaskEncoding = NUMBERS
) -> Integer[np.ndarray, "H W"]:
    """Return the values of a mask: grayscale of 1 to 32 bits, the indices of a palette, or colors if `encoding` has
    them. Color files whose channels are equal count as grayscale, and floats that are whole numbers as integers.

    Raises:
        DataError: colors or fractions that `encoding` does not cover; a JPEG without a threshold; a file that is
            damaged or not an image; or a negative value.
    """
    if drawn_masks.is_drawn(source):
        return drawn_masks.draw(source, name)
    with image_errors(name):
        if encoding == NUMBERS and (numbers := read_tiff_numbers(source, MAX_PIXELS)) is not None:
            return _checked_numbers(
                _whole_numbers(numbers, name) if numbers.dtype.kind == "f" else numbers, name
            )
        image, gray_step = _open_mask(source, name, encoding)
        image.load()
        if encoding.threshold is not None:
            return (_brightness(image) > encoding.threshold).astype(np.uint8)
        if encoding.colors is not None:
            return _numbers_of_colors(np.asarray(image.convert("RGB")), encoding.colors, name)
        values = _single_channel(image, name)
    values = _checked_numbers(values, name)
    return values // gray_step if gray_step > 1 else values


def _checked_numbers(values: np.ndarray, name: str) -> Integer[np.ndarray, "H W"]:
    if values.dtype == bool:
        return values.astype(np.uint8)
    if int(values.min(initial=0)) < 0:
        raise DataError(f"{name} holds {int(values.min())}, but class numbers start at 0; correct the mask")
    return values


def read_palette(source: bytes | str | os.PathLike[str], name: str) -> list[Color] | None:
    """Return the palette of a mask, RGB by index; None if it has none."""
    if drawn_masks.is_drawn(source):
        return None
    with image_errors(name):
        image, _ = _open_mask(source, name, NUMBERS)
        image.load()
        flat = image.getpalette("RGB") if image.mode == "P" else None
    return None if flat is None else list(zip(flat[::3], flat[1::3], flat[2::3], strict=True))


def used_colors(source: bytes | str | os.PathLike[str], name: str) -> dict[int, Color] | None:
    """Return the color of each palette index that occurs in a mask; None if it has no palette."""
    palette = read_palette(source, name)
    if palette is None:
        return None
    indices = np.unique(read_mask(source, name))
    return {int(k): palette[k] for k in indices if k < len(palette)}


def uses_colors(source: bytes | str | os.PathLike[str], name: str, colors: Collection[Color]) -> bool:
    """Return whether a mask holds colors in place of numbers: one with a palette if all its colors are among `colors`,
    another one, too, if its channels differ."""
    if drawn_masks.is_drawn(source):
        return False
    with image_errors(name):
        image, _ = _open_mask(source, name, NUMBERS)
        if image.mode in GRAY_MODES:
            return False
        unique = np.unique(np.asarray(image.convert("RGB")).reshape(-1, 3), axis=0)
    all_known = all((int(r), int(g), int(b)) in colors for r, g, b in unique)
    return all_known or (image.mode != "P" and bool((unique != unique[:, :1]).any()))


def _open_mask(
    source: bytes | str | os.PathLike[str], name: str, encoding: MaskEncoding
) -> tuple[Image.Image, int]:
    """Open a mask; also return the factor by which Pillow multiplies grayscale of 2 and 4 bits, to make it 8 bits."""
    image = open_image(source, name)
    raw_mode = _raw_mode(image)  # Pillow forgets it when it loads the image, as for EXIF tags of a PNG
    if image.format in ("JPEG", "MPO") and encoding.threshold is None:
        raise MaskFormatError(
            f"{name} is a JPEG, whose compression alters class numbers; save the original masks as PNG, or, if there "
            "are two classes, set mask_threshold to a brightness between them, such as 127"
        )
    if exif_orientation(image) in UNDO_ORIENTATION:
        raise DataError(
            f"the mask {name} has EXIF orientation {exif_orientation(image)}; save it upright, without the EXIF tag"
        )
    if image.mode not in GRAY_MODES and ";16" in raw_mode:
        raise MaskFormatError(
            f"{name} is a color image of 16 bits per channel; save the masks as grayscale of 16 bits"
        )
    return image, {"L;2": 85, "L;4": 17}.get(raw_mode[:3], 1)


def _raw_mode(image: Image.Image) -> str:
    """Return how the pixels are packed in the file, such as "L;4"; "" if Pillow does not say."""
    tiles = getattr(image, "tile", None)  # of the subclasses for files
    arguments = tiles[0][3] if tiles else ""
    mode = arguments[0] if isinstance(arguments, tuple) and arguments else arguments
    return mode if isinstance(mode, str) else ""


def _single_channel(image: Image.Image, name: str) -> np.ndarray:
    """Return the values of an image that has one channel, equal color channels, or whole numbers as floats."""
    values = np.asarray(image)
    if image.mode in GRAY_MODES or image.mode == "P":
        return _whole_numbers(values, name) if image.mode == "F" else values
    if image.mode not in ("LA", "PA", "RGB", "RGBA", "RGBX"):
        raise MaskFormatError(
            f"{name} has mode {image.mode}, but a mask holds one class number per pixel (mode L or P)"
        )
    gray = values[..., 0]
    if image.mode.startswith("RGB") and (values[..., :3] != gray[..., None]).any():
        raise MaskFormatError(_color_message(values[..., :3], name))
    if image.mode.endswith("A") and np.ptp(gray) == 0 and np.ptp(values[..., -1]) > 0:
        raise MaskFormatError(
            f"{name} has the same color everywhere, and only its transparency varies; save that channel as the mask, "
            "or, if there are two classes, set mask_threshold to a brightness between them, such as 127"
        )
    return gray


def _whole_numbers(values: Float[np.ndarray, "H W"], name: str) -> Integer[np.ndarray, "H W"]:
    if not np.isfinite(values).all():
        raise MaskFormatError(f"{name} holds values that are NaN or infinite; give each pixel a class number")
    rounded = np.rint(values)
    if (wrong := rounded != values).any():
        raise MaskFormatError(
            f"{name} holds fractions such as {values[wrong][0]:.3g}; save class numbers, or, if there are two classes, "
            f"set mask_threshold to a value between them, such as {(values.min() + values.max()) / 2:.2g}"
        )
    return rounded.astype(np.int64)


def _brightness(image: Image.Image) -> np.ndarray:
    """Return the brightness of each pixel: values of grayscale, the luma of colors; transparent is black."""
    if image.mode == "1":
        return np.asarray(image).astype(np.uint8)
    if image.mode in GRAY_MODES:
        return np.asarray(image)
    if image.has_transparency_data:
        visible = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", visible.size, (0, 0, 0, 255)), visible)
    return np.asarray(image.convert("L"))


def _numbers_of_colors(
    pixels: UInt8[np.ndarray, "H W 3"], colors: tuple[Color, ...], name: str
) -> Integer[np.ndarray, "H W"]:
    """Return the index of each pixel's color."""
    codes = _color_codes(pixels)
    known = _color_codes(np.array(colors, np.uint8))
    order = np.argsort(known, kind="stable")
    place = np.searchsorted(known[order], codes).clip(max=len(colors) - 1)
    wrong = known[order][place] != codes
    if wrong.any():
        color = tuple(map(int, pixels[wrong][0]))
        raise MaskFormatError(
            f"{name} holds the color {color} in {wrong.mean():.1%} of its pixels, which is not among the colors of the "
            f"{len(colors)} classes; add it to the file with the colors, or save the masks without smoothed edges"
        )
    return order[place].astype(np.int32)


def _color_codes(colors: np.ndarray) -> np.ndarray:
    return colors.astype(np.int64) @ np.array([1 << 16, 1 << 8, 1])


def _color_message(pixels: np.ndarray, name: str) -> str:
    colors = np.unique(pixels.reshape(-1, 3), axis=0)
    listed = ", ".join(str(tuple(map(int, color))) for color in colors[:4])
    return (
        f"{name} has {len(colors)} colors ({listed}{' ...' if len(colors) > 4 else ''}), and what they stand for is "
        "unknown; write a class_dict.csv with the columns name, r, g, b next to the masks' folder, or give such a file "
        "as mask_palette"
    )
