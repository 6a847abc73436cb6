"""Images with any number of bands and any depth: TIFF through tifffile, DICOM through pydicom, scaled to 8 bits."""

import functools
import io
import logging
import math
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Bool, Shaped, UInt8

from triptych.config import need
from triptych.data.image_formats import DICOM, TIFF_BANDS
from triptych.errors import DataError

log = logging.getLogger(__name__)

TIFF_HEADERS = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")
GDAL_NODATA = 42113  # https://www.awaresystems.be/imaging/tiff/tifftags/gdal_nodata.html
ALPHA = (1, 2)  # ExtraSamples that are an alpha channel: premultiplied or not
FAX = (2, 3, 4)  # compressions of black and white
MAX_STACK = 64  # pages that are taken as bands instead of as frames
WHITES = (255, 1023, 4095, 16383, 65535)  # largest values of 8, 10, 12, 14 and 16 bits


@dataclass(frozen=True, kw_only=True)
class ReadOptions:
    """How images are read that are not 8-bit RGB, and how large they may be."""

    max_pixels: int | None = None
    """Largest number of pixels; None is the limit of Pillow."""
    value_range: tuple[float, float] | None = None
    """Values that become black and white; None is the range of the image's depth."""
    bands: tuple[int, ...] | None = None
    """Indices of the three bands to take as red, green and blue, of one to take as gray, or of those of a network with
    another number of channels; None is the first three."""

    def __post_init__(self) -> None:
        need(self.max_pixels is None or self.max_pixels > 0, self, "max_pixels", "positive")
        low_high = self.value_range
        need(
            low_high is None or low_high[0] < low_high[1],
            self,
            "value_range",
            "two numbers, the smaller first",
        )
        fits = self.bands is None or min(self.bands, default=-1) >= 0
        need(fits, self, "bands", "indices from 0")

    @property
    def is_multiband(self) -> bool:
        """Whether images keep their chosen bands, instead of becoming RGB."""
        return is_multiband(self.bands)


def is_multiband(bands: Sequence[int] | None) -> bool:
    """Return whether these bands are neither gray nor RGB: then images have no alpha, and no color is changed."""
    return bands is not None and len(bands) not in (1, 3)


DEFAULT_OPTIONS = ReadOptions()


@dataclass(frozen=True)
class Bands:
    """Values of an image as they are stored, before they are scaled."""

    values: Shaped[np.ndarray, "H W C"]
    alpha: bool = False
    """Whether the last band is an alpha channel."""
    nodata: float | None = None
    """Value of pixels without data, in addition to NaN."""
    orientation: int = 1
    """Orientation as in EXIF."""
    value_range: tuple[float, float] | None = None
    """Values that the file wants to be shown as black and white."""
    inverted: bool = False
    """Whether the smallest value is white."""


def read_tiff(
    content: bytes, name: str, options: ReadOptions, check_size: Callable[[int], None]
) -> Bands | None:
    """Read the first image of a TIFF; None if it is left to Pillow, which reads 8 bits and up to 4 bands.

    Of arrays that tifffile wrote without naming their axes, the first or the last axis holds the bands, whichever is
    shorter.

    Args:
        name: name of the image in errors.
        check_size: raises an error for a number of pixels that is too large.

    Raises:
        DataError: its compression takes a package that is not installed.
    """
    if content[:4] not in TIFF_HEADERS or not TIFF_BANDS.is_readable:
        return None
    import tifffile

    with tifffile.TiffFile(io.BytesIO(content)) as file:
        page: Any = file.pages[0]
        stack = _stacked_bands(file)
        is_plain = page.dtype == np.uint8 and page.samplesperpixel <= 4 and options.bands is None
        if page.dtype is None or page.bitspersample < 8 or (is_plain and stack is None):
            return None
        shape = file.series[0].shape if stack is not None else page.shape
        check_size(math.prod(shape) // (page.samplesperpixel if stack is None else shape[stack]))
        try:
            values = page.asarray() if stack is None else np.moveaxis(file.series[0].asarray(), stack, -1)
        except ValueError as problem:
            if "imagecodecs" in str(problem) and (stack is not None or page.samplesperpixel > 4):
                raise DataError(
                    f"{name} is a TIFF with {page.compression.name} compression, which needs another package: "
                    "pip install imagecodecs"
                ) from problem
            raise
        if stack is not None:
            _log_once(f"{values.shape[2]} pages or columns of a TIFF are taken as bands")
        elif page.axes.startswith("S"):
            values = np.moveaxis(values, 0, -1)
        tags = {code: page.tags[code].value for code in (GDAL_NODATA, 274, 338) if code in page.tags}
        extra = tags.get(338, ())
        extra = extra if isinstance(extra, tuple) else (extra,)
        return Bands(
            values.reshape(*values.shape[:2], -1),
            alpha=bool(extra) and int(extra[-1]) in ALPHA,
            nodata=_number(tags.get(GDAL_NODATA)),
            orientation=int(tags.get(274, 1)),
            inverted=int(page.photometric) == 0,
        )


def read_tiff_numbers(source: bytes | str | os.PathLike[str], max_pixels: int) -> np.ndarray | None:
    """Return the numbers (H, W) that a TIFF with one channel stores, where Pillow shows others or reads none: integers
    and floats of 64 bits, as NumPy has them by default, and those whose zero is white. None for all others."""
    content = source if isinstance(source, bytes) else _read_if_tiff(source)
    if content[:4] not in TIFF_HEADERS or not TIFF_BANDS.is_readable:
        return None
    import tifffile

    try:
        with tifffile.TiffFile(io.BytesIO(content)) as tiff:
            page: Any = tiff.pages[0]
            is_upright = 274 not in page.tags or int(page.tags[274].value) == 1
            if page.dtype is None or page.ndim != 2 or page.size > max_pixels or not is_upright:
                return None
            bits = 8 * page.dtype.itemsize
            if int(page.compression) in FAX:  # whose zero is white by convention
                return None
            is_unusual = bits in (16, 64) if page.dtype.kind == "f" else bits >= 32
            return page.asarray() if is_unusual or int(page.photometric) == 0 else None
    except Exception:  # damaged: Pillow says how
        return None


def _read_if_tiff(path: str | os.PathLike[str]) -> bytes:
    try:
        with open(path, "rb") as file:
            header = file.read(4)
            return header + file.read() if header in TIFF_HEADERS else b""
    except OSError:
        return b""  # reported by the other readers


def _stacked_bands(file: Any) -> int | None:
    """Return the axis of the bands if they are stored as pages, as OME and ImageJ name it, or in an array of
    tifffile; None if a page is a full image."""
    series = file.series[0]
    if (file.is_ome or file.is_imagej) and series.axes == "CYX" and series.shape[0] <= MAX_STACK:
        return 0
    if not file.is_shaped or len(series.shape) != 3 or len(series.pages) == 1:
        return None
    axis = 0 if series.shape[0] <= series.shape[2] else 2
    return axis if series.shape[axis] <= MAX_STACK else None


def is_dicom(header: bytes) -> bool:
    """Return whether a file begins as DICOM (PS3.10, Section 7.1)."""
    return header[128:132] == b"DICM"


def read_dicom(content: bytes, name: str, check_size: Callable[[int], None]) -> Bands:
    """Read the first frame of a DICOM file in its modality's units, such as Hounsfield units, with its own window.

    Args:
        check_size: raises an error for a number of pixels that is too large.

    Raises:
        DataError: pydicom is not installed, or the file holds no image.
    """
    if not DICOM.is_readable:
        raise DataError(f"{name} is DICOM, which needs another package: {DICOM.advice}")
    import pydicom
    from pydicom.pixels.processing import apply_modality_lut

    data = pydicom.dcmread(io.BytesIO(content))
    if "PixelData" not in data:
        raise DataError(f"{name} is a DICOM file without an image; leave it out")
    check_size(int(data.Rows) * int(data.Columns))
    pixels = data.pixel_array
    samples = int(data.get("SamplesPerPixel", 1))
    if int(data.get("NumberOfFrames", 1) or 1) > 1:
        pixels = pixels[0]
    if samples > 1:
        return Bands(pixels)
    values = apply_modality_lut(pixels, data)
    center, width = (_first(data.get(key)) for key in ("WindowCenter", "WindowWidth"))
    shown = None
    if center is not None and width is not None and width > 1:  # PS3.3, C.11.2.1.2.1
        shown = (center - 0.5 - (width - 1) / 2, center - 0.5 + (width - 1) / 2)
    elif "RescaleSlope" not in data:
        shown = (0.0, float(2 ** int(data.BitsStored) - 1)) if not data.PixelRepresentation else None
    return Bands(
        values[..., None], value_range=shown, inverted=data.PhotometricInterpretation == "MONOCHROME1"
    )


def to_rgba(bands: Bands, options: ReadOptions, name: str) -> UInt8[np.ndarray, "H W C"]:
    """Choose and scale the bands of an image: uint8 (H, W, 3), or RGBA (H, W, 4) if some pixels have no data or there
    is an alpha channel. Of another number of bands than 1 and 3 all are returned, with 0 where there is no data.

    Raises:
        DataError: `options.bands` names a band that the image does not have.
    """
    values = bands.values
    count = values.shape[2]
    missing = np.zeros(values.shape[:2], bool)
    colors = values[..., :-1] if bands.alpha and count in (2, 4) else values
    if values.dtype.kind == "f":
        missing |= ~np.isfinite(colors).all(2)
    if bands.nodata is not None:
        missing |= (colors == bands.nodata).all(2)
    chosen = options.bands
    if chosen is not None and max(chosen) >= count:
        raise DataError(
            f"{name} has {count} bands, and band {max(chosen)} is requested; they are counted from 0"
        )
    if chosen is None:
        chosen = (0, 1, 2) if colors.shape[2] >= 3 else (0,)
        if colors.shape[2] not in (1, 3):
            _log_once(
                f"of {colors.shape[2]} bands the first {len(chosen)} are used; choose others with bands"
            )
    pixels = scale_to_8_bits(values[..., list(chosen)], ~missing, options.value_range or bands.value_range)
    if bands.inverted:
        pixels = 255 - pixels
    if options.is_multiband:
        return np.where(missing[..., None], 0, pixels).astype(np.uint8)
    pixels = np.broadcast_to(pixels, (*pixels.shape[:2], 3))
    if bands.alpha and count in (2, 4):
        opacity = scale_to_8_bits(values[..., -1:], ~missing, (0, _white_of(values.dtype)))
    elif missing.any():
        opacity = np.full((*missing.shape, 1), 255, np.uint8)
    else:
        return np.ascontiguousarray(pixels)
    return np.concatenate([pixels, np.where(missing[..., None], 0, opacity).astype(np.uint8)], axis=2)


def scale_to_8_bits(
    values: Shaped[np.ndarray, "H W *C"],
    valid: Bool[np.ndarray, "H W"] | None = None,
    value_range: tuple[float, float] | None = None,
) -> UInt8[np.ndarray, "H W *C"]:
    """Scale values linearly to 0 to 255, and round them.

    Without a range, values from 0 are divided by the largest value of their depth: of integers the smallest of 8, 10,
    12, 14 and 16 bits that holds them all, of floats 1 or 255. Others are scaled by their own smallest and largest.

    Args:
        values: integers or floats.
        valid: pixels that the range is taken from; None is all. Non-finite values are left out.
        value_range: values that become 0 and 255; values outside are clipped.
    """
    is_float = values.dtype.kind == "f"
    if value_range is None:
        sample = values if valid is None else values[valid]
        sample = sample[np.isfinite(sample)] if is_float else sample
        low, high = (float(sample.min()), float(sample.max())) if sample.size else (0.0, 1.0)
        if low >= 0:
            low = 0.0
            high = next((white for white in ((1, 255) if is_float else WHITES) if high <= white), high)
            if not is_float and values.dtype.itemsize == 2 and 255 < high < 65535:
                _log_once(
                    f"16-bit images without values above {high:.0f} are scaled by that; see value_range"
                )
        value_range = low, high
    low, high = value_range
    if high == 65535 and low == 0 and values.dtype == np.uint16:
        return ((values.astype(np.uint32) * 255 + 32767) // 65535).astype(np.uint8)
    fill = min(max(0.0, low), high)
    finite = np.nan_to_num(values.astype(np.float64), nan=fill, posinf=fill, neginf=fill)
    return np.rint((finite - low) * (255 / max(high - low, 1e-300))).clip(0, 255).astype(np.uint8)


def _white_of(dtype: np.dtype) -> float:
    return float(np.iinfo(dtype).max) if dtype.kind in "iu" else 1.0


def _number(text: Any) -> float | None:
    try:
        return float(text)
    except (TypeError, ValueError):
        return None


def _first(value: Any) -> float | None:
    """Return the first of several values of a DICOM element."""
    if value is None or value == "":
        return None
    return float(value if isinstance(value, int | float) or not hasattr(value, "__iter__") else value[0])


@functools.cache
def _log_once(note: str) -> None:
    log.warning(note)
