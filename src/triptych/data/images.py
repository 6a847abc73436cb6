"""Decode images of any mode, orientation and format to uint8 RGB, and report damaged ones in one line."""

import io
import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from jaxtyping import UInt8
from PIL import Image, PngImagePlugin, UnidentifiedImageError

from triptych.data.bands import (
    DEFAULT_OPTIONS,
    TIFF_HEADERS,
    Bands,
    ReadOptions,
    is_dicom,
    read_dicom,
    read_tiff,
    scale_to_8_bits,
    to_rgba,
)
from triptych.data.image_formats import TIFF_BANDS, exif_is_applied, optional_format, pillow_formats
from triptych.data.resizing import map_channels
from triptych.errors import DataError, TriptychError

MAX_PIXELS = 178_956_970  # above this size Pillow takes an image for a decompression bomb
STRIP_OFFSETS, ROWS_PER_STRIP, IMAGE_LENGTH = 273, 278, 257  # tags of TIFF
MAX_TEXT_BYTES = 2**26  # of one text in a PNG, decompressed
# EXIF orientation (EXIF 2.3, tag 0x0112) -> the transposition that undoes it.
UNDO_ORIENTATION = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
ORIENTATION_TAG = 0x0112


def decode(
    source: bytes | str | os.PathLike[str] | Image.Image | np.ndarray,
    alpha: bool = False,
    *,
    name: str | None = None,
    min_size: tuple[int, int] | None = None,
    options: ReadOptions = DEFAULT_OPTIONS,
) -> UInt8[np.ndarray, "H W C"]:
    """Decode an image to uint8 (H, W, 3), upright RGB. Of an animation it returns the first frame.

    Color profiles are ignored. Other depths than 8 bits are scaled (`scale_to_8_bits`). Of more than 4 bands the first
    three are used, and pixels without data (NaN, or GDAL's no-data value) are transparent. If `options.bands` names
    another number of bands than 1 and 3, the result is (H, W, number of bands), without alpha and 0 without data.

    Args:
        source: the path of a file, its bytes, a PIL image, or a uint8 array (H, W), (H, W, 3) or (H, W, 4).
        alpha: return RGBA (H, W, 4), which is opaque if the image has no alpha. Otherwise images are composited over
            white.
        name: name of the image in errors; by default its path.
        min_size: height and width that suffice. A JPEG is decoded at 1/2, 1/4 or 1/8 of its size if that is enough.
        options: bands and range of values, and how large images may be.

    Raises:
        DataError: the file does not exist, is empty, is not an image, is damaged or truncated, or has more than 178
            megapixels (or `options.max_pixels`).
    """
    return decode_with_orientation(source, alpha, name=name, min_size=min_size, options=options)[0]


def decode_with_orientation(
    source: bytes | str | os.PathLike[str] | Image.Image | np.ndarray,
    alpha: bool = False,
    *,
    name: str | None = None,
    min_size: tuple[int, int] | None = None,
    options: ReadOptions = DEFAULT_OPTIONS,
) -> tuple[UInt8[np.ndarray, "H W C"], int]:
    """As `decode`, and also return the EXIF orientation that was undone, from 1 (upright) to 8."""
    if isinstance(source, np.ndarray):
        if options.is_multiband:
            return _chosen_bands(source, options, name or "array"), 1
        return _from_array(source, alpha, name or "array"), 1
    if name is None:
        name = "image" if isinstance(source, bytes | Image.Image) else os.fspath(source)
    with image_errors(name):
        if not isinstance(source, Image.Image):
            source = _read_content(source, name)
            if (bands := _read_bands(source, name, options)) is not None:
                pixels = to_rgba(bands, options, name)
                if options.is_multiband:
                    turn = UNDO_ORIENTATION.get(bands.orientation)
                    return map_channels(
                        pixels, lambda band: band if turn is None else band.transpose(turn)
                    ), (1 if turn is None else bands.orientation)
                image = Image.fromarray(pixels)
                if bands.orientation in UNDO_ORIENTATION:
                    image = image.transpose(UNDO_ORIENTATION[bands.orientation])
                return _pixels(
                    image, alpha
                ), bands.orientation if bands.orientation in UNDO_ORIENTATION else 1
        image = source if isinstance(source, Image.Image) else open_image(source, name, options.max_pixels)
        _check_pixel_count(image.width * image.height, name, options.max_pixels)
        if min_size is not None and image is not source and image.format in ("JPEG", "MPO"):
            height, width = min_size
            turned = exif_orientation(image) >= 5
            image.draft(None, (height, width) if turned else (width, height))
        orientation = exif_orientation(
            image
        )  # before loading, since Pillow turns a TIFF upright when it loads it
        image.load()
        if options.is_multiband:
            turn = UNDO_ORIENTATION.get(orientation)
            image = image if image.mode in ("L", "RGB", "RGBA", "CMYK") else image.convert("RGB")
            image = image if turn is None else image.transpose(turn)
            return _chosen_bands(np.asarray(image), options, name), 1 if turn is None else orientation
        return _pixels(
            image, alpha, options.value_range
        ), orientation if orientation in UNDO_ORIENTATION else 1


def read_image_size(
    source: bytes | str | os.PathLike[str] | Image.Image | np.ndarray,
) -> tuple[int, int] | None:
    """Return height and width of the upright image, from the header alone; None if the header cannot be read."""
    if isinstance(source, np.ndarray):
        return source.shape[0], source.shape[1]
    if isinstance(source, Image.Image):
        return source.height, source.width
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            image = Image.open(
                io.BytesIO(source) if isinstance(source, bytes) else source,
                formats=pillow_formats(_read_header(source)),
            )
        except Exception:  # Pillow's readers raise many types; decoding the image reports the error
            return None
        with image:
            turned = exif_orientation(image) >= 5
            return (image.width, image.height) if turned else (image.height, image.width)


def _read_header(source: bytes | str | os.PathLike[str]) -> bytes:
    if isinstance(source, bytes):
        return source[:64]
    with open(source, "rb") as file:
        return file.read(64)


@contextmanager
def image_errors(name: str) -> Iterator[None]:
    """Turn every exception of Pillow's readers into a `DataError` that names the file `name`."""
    _allow_long_texts()
    with warnings.catch_warnings():
        # Pillow warns about large, unusual and slightly damaged files; what matters raises the errors below.
        warnings.simplefilter("ignore")
        try:
            yield
        except (MemoryError, TriptychError):
            raise
        except Image.DecompressionBombError as problem:  # a frame that is larger than the file's header says
            raise DataError(f"{name} holds a decompression bomb ({problem}); leave it out") from problem
        except Exception as problem:  # on damaged bytes Pillow's readers raise many types
            reason = str(problem).strip().split("\n")[0] or type(problem).__name__
            raise DataError(
                f"{name} is damaged or truncated ({reason}); replace it or leave it out"
            ) from problem


def _allow_long_texts() -> None:
    """Let Pillow open PNG files with texts over 1 MB, such as graphs of ComfyUI; its limits are for the whole process
    and are only raised."""
    PngImagePlugin.MAX_TEXT_CHUNK = max(PngImagePlugin.MAX_TEXT_CHUNK, MAX_TEXT_BYTES)
    PngImagePlugin.MAX_TEXT_MEMORY = max(PngImagePlugin.MAX_TEXT_MEMORY, 2 * MAX_TEXT_BYTES)


def _read_content(source: bytes | str | os.PathLike[str], name: str) -> bytes:
    """Return the bytes of a file."""
    if not isinstance(source, bytes):
        path = Path(source)
        if not path.exists():
            raise DataError(f"{name} does not exist; check the path")
        if path.is_dir():
            raise DataError(f"{name} is a folder, but an image file is needed; give a file in it")
        try:
            source = path.read_bytes()
        except OSError as problem:
            raise DataError(f"{name} cannot be read ({problem.strerror}); check its permissions") from problem
    if not source:
        raise DataError(f"{name} is empty (0 bytes); replace it or leave it out")
    return source


def _read_bands(content: bytes, name: str, options: ReadOptions) -> Bands | None:
    """Return what tifffile or pydicom reads of a file; None if it is left to Pillow."""

    def check_size(pixels: int) -> None:
        _check_pixel_count(pixels, name, options.max_pixels)

    if is_dicom(content[:132]):
        return read_dicom(content, name, check_size)
    if content[:4] in TIFF_HEADERS:
        try:
            return read_tiff(content, name, options, check_size)
        except (MemoryError, DataError):
            raise
        except Exception:  # Pillow may read it, or reports what is wrong
            return None
    return None


def open_image(
    source: bytes | str | os.PathLike[str], name: str, max_pixels: int | None = None
) -> Image.Image:
    """Open a file or its bytes with Pillow, without decoding it. Call it within `image_errors`.

    Args:
        name: name of the image in errors.
        max_pixels: as in `ReadOptions`.
    """
    source = _read_content(source, name)
    form = optional_format(source[:64])
    if form is not None and not form.is_readable:
        raise DataError(f"{name} is {form.title}, which needs another package: {form.advice}")
    if max_pixels is not None and Image.MAX_IMAGE_PIXELS is not None:  # of the process, and only raised
        Image.MAX_IMAGE_PIXELS = max(Image.MAX_IMAGE_PIXELS, max_pixels)
    try:
        image = Image.open(io.BytesIO(source), formats=pillow_formats(source[:64]))
        _check_strips(image, name)
        return image
    except DataError:
        raise
    except Image.DecompressionBombError as problem:
        pixels = next((int(word.strip("(")) for word in str(problem).split() if word.strip("(").isdigit()), 0)
        _check_pixel_count(max(pixels, MAX_PIXELS + 1), name, max_pixels)
        raise  # not reached
    except UnidentifiedImageError as problem:
        if source[:4] in TIFF_HEADERS and not TIFF_BANDS.is_readable:
            raise DataError(
                f"{name} is a {TIFF_BANDS.title}, which needs another package: {TIFF_BANDS.advice}"
            ) from problem
        raise DataError(f"{name} {_what_it_is(source)}") from problem
    except Exception as problem:
        raise DataError(f"{name} is a damaged image ({problem}); replace it or leave it out") from problem


def _what_it_is(content: bytes) -> str:
    """Return what a file is that is no image, and what to do."""
    head = content[:300].lstrip().lower()
    if head.startswith(b"version https://git-lfs"):
        return "is a pointer of Git LFS, not the image; run git lfs pull"
    if head.startswith((b"<!doctype html", b"<html", b"<?xml")):
        return "is a web page or XML, not an image; download it again"
    return "is damaged or not an image of a known format; replace it with a PNG or JPEG"


def _check_strips(image: Image.Image, name: str) -> None:
    """Raise an error for a TIFF that lacks strips of rows: Pillow would allocate its whole size, and leave it black."""
    tags = getattr(image, "tag_v2", {}) if image.format == "TIFF" else {}
    offsets, rows = tags.get(STRIP_OFFSETS), tags.get(ROWS_PER_STRIP)
    if offsets is None or not rows:
        return
    needed = -(-tags.get(IMAGE_LENGTH, image.height) // rows)
    if len(offsets) < needed:
        raise DataError(
            f"{name} is a damaged image ({len(offsets)} of {needed} strips are there); replace it or leave it out"
        )


def _check_pixel_count(pixels: int, name: str, max_pixels: int | None = None) -> None:
    limit = MAX_PIXELS if max_pixels is None else max_pixels
    if pixels > limit:
        size, most = (
            (f"{pixels / 1e6:.0f} megapixels", f"{limit // 10**6}")
            if limit >= 10**6
            else (f"{pixels:,} pixels", f"{limit:,}")
        )
        raise DataError(
            f"{name} has {size}, but at most {most} are allowed; make it smaller, or raise the limit with --max-pixels"
        )


def exif_orientation(image: Image.Image) -> int:
    """Return the EXIF orientation of an image; 1 (upright) if it has none."""
    if exif_is_applied(image):
        return 1
    try:
        return int(image.getexif().get(ORIENTATION_TAG, 1))
    except Exception:  # the image is usable even if its EXIF block is damaged
        return 1


def _pixels(image: Image.Image, alpha: bool, value_range: tuple[float, float] | None = None) -> np.ndarray:
    """Convert a loaded image to upright uint8 (H, W, 3 or 4)."""
    orientation = exif_orientation(image)
    if image.mode in ("I", "F") or image.mode.startswith("I;16"):
        values = np.asarray(image)
        image = Image.fromarray(scale_to_8_bits(values, value_range=value_range))
    if orientation in UNDO_ORIENTATION:
        image = image.transpose(UNDO_ORIENTATION[orientation])
    if image.mode == "LAB":
        image = _lab_to_rgb(image)
    if image.mode == "La":
        image = image.convert("LA")
    if image.mode in ("RGBA", "LA", "PA", "RGBa") or "transparency" in image.info:
        image = image.convert("RGBA")
        if not alpha:
            image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return np.array(image.convert("RGBA" if alpha else "RGB"))


def _chosen_bands(array: np.ndarray, options: ReadOptions, name: str) -> np.ndarray:
    """Return the bands of an array (H, W) or (H, W, C) that `options` name."""
    array = array[..., None] if array.ndim == 2 else array
    if array.dtype != np.uint8 or array.ndim != 3 or array.size == 0:
        raise DataError(
            f"{name} is {array.dtype} of shape {array.shape}; convert it to uint8 of shape (height, width, bands)"
        )
    chosen = options.bands or ()
    if max(chosen) >= array.shape[2]:
        raise DataError(
            f"{name} has {array.shape[2]} bands, and band {max(chosen)} is requested; they are counted from 0"
        )
    return np.ascontiguousarray(array[..., list(chosen)])


def _lab_to_rgb(image: Image.Image) -> Image.Image:
    from PIL import ImageCms

    lab, rgb = ImageCms.createProfile("LAB"), ImageCms.createProfile("sRGB")
    out = ImageCms.profileToProfile(image, lab, rgb, outputMode="RGB")
    assert out is not None  # it is None only if the conversion is done in place
    return out


def _from_array(array: np.ndarray, alpha: bool, name: str) -> np.ndarray:
    channels = 1 if array.ndim == 2 else array.shape[-1] if array.ndim == 3 else 0
    if array.dtype != np.uint8 or channels not in (1, 3, 4) or array.size == 0:
        raise DataError(
            f"{name} is {array.dtype} of shape {array.shape}; convert it to uint8 of shape (height, width, 3 or 4)"
        )
    if channels == (4 if alpha else 3):
        return array
    return _pixels(Image.fromarray(array[..., 0] if array.ndim == 3 and channels == 1 else array), alpha)
