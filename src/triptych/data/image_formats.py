"""Formats of image files: those that Pillow reads itself, and those that need another package."""

import functools
import importlib.util
import logging
import os
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from PIL import Image, features

log = logging.getLogger(__name__)

# Not all formats of Pillow: EPS would run Ghostscript, and TGA has no magic number, so that any bytes could be one.
PILLOW_FORMATS = (
    *("BMP", "DIB", "GIF", "ICNS", "ICO", "JPEG", "JPEG2000"),
    *("PCX", "PNG", "PPM", "QOI", "SGI", "TIFF", "WEBP"),
)
PILLOW_SUFFIXES = frozenset(
    f".{name}"
    for names in (
        ("apng", "bmp", "dib", "gif", "icns", "ico", "j2k", "jfif", "jp2", "jpe", "jpeg", "jpg"),
        ("mpo", "pbm", "pcx", "pgm", "png", "pnm", "ppm", "qoi", "sgi", "tif", "tiff", "webp"),
    )
    for name in names
)
# Images that no reader is used for: camera raw files, drawings, layers, and arrays without a color space.
OTHER_SUFFIXES = frozenset(
    f".{name}"
    for names in (
        ("arw", "cr2", "cr3", "dng", "nef", "orf", "raf", "raw", "rw2"),
        ("ai", "eps", "exr", "hdr", "jxr", "nii", "npy", "psd", "svg", "tga", "xcf"),
    )
    for name in names
)


@dataclass(frozen=True)
class OptionalFormat:
    """A format that is read with a package of the extra "formats"."""

    title: str
    suffixes: tuple[str, ...]
    package: str
    module: str

    @property
    def is_readable(self) -> bool:
        """Whether the package is installed, or Pillow reads the format itself."""
        if self is AVIF and features.check("avif"):
            return True
        return importlib.util.find_spec(self.module) is not None

    @property
    def advice(self) -> str:
        """What to do to read the format."""
        return f"pip install {self.package}"

    @functools.cached_property
    def pillow_name(self) -> str:
        """Name of the format in Pillow, after its reader has been registered."""
        if self is HEIF:
            import pillow_heif

            pillow_heif.register_heif_opener()
        elif self is JXL or (self is AVIF and not features.check("avif")):
            importlib.import_module(self.module)  # registers itself
        return self.title


HEIF = OptionalFormat("HEIF", (".heic", ".heics", ".heif", ".heifs", ".hif"), "pillow-heif", "pillow_heif")
AVIF = OptionalFormat("AVIF", (".avif", ".avifs"), "'pillow>=11.3'", "pillow_avif")
JXL = OptionalFormat("JXL", (".jxl",), "pillow-jxl-plugin", "pillow_jxl")
DICOM = OptionalFormat("DICOM", (".dcm", ".dicom"), "pydicom", "pydicom")
TIFF_BANDS = OptionalFormat("TIFF of this depth or number of bands", (), "tifffile", "tifffile")
OPTIONAL_FORMATS = (HEIF, AVIF, JXL, DICOM)
KNOWN_SUFFIXES = PILLOW_SUFFIXES.union(*(form.suffixes for form in OPTIONAL_FORMATS))


def optional_format(header: bytes) -> OptionalFormat | None:
    """Return the optional format that a file begins as; None for all others.

    HEIF and AVIF are boxes of ISO/IEC 14496-12, whose brands follow "ftyp"; JPEG XL is a bare codestream or a container
    (ISO/IEC 18181-2).
    """
    if header[4:8] == b"ftyp":
        brands = header[8 : max(16, min(int.from_bytes(header[:4], "big"), 64))]
        return AVIF if b"avif" in brands or b"avis" in brands else HEIF
    if header[:2] == b"\xff\x0a" or header[:8] == b"\x00\x00\x00\x0cJXL ":
        return JXL
    return None


@functools.cache
def readable_suffixes() -> frozenset[str]:
    """Return the suffixes of the formats that can be read with what is installed."""
    return PILLOW_SUFFIXES.union(*(form.suffixes for form in OPTIONAL_FORMATS if form.is_readable))


def is_image_name(name: str) -> bool:
    """Return whether a file is an image that can be read, by its suffix; hidden files are none."""
    return not name.startswith(".") and os.path.splitext(name)[1].lower() in readable_suffixes()


def is_unreadable_image(name: str) -> bool:
    """Return whether a file is an image that cannot be read with what is installed, by its suffix."""
    suffix = os.path.splitext(name)[1].lower()
    return not name.startswith(".") and suffix in (KNOWN_SUFFIXES | OTHER_SUFFIXES) - readable_suffixes()


def describe_left_out(names: Iterable[str] | Mapping[str, int]) -> str:
    """Return a clause about images that cannot be read: how many of each suffix, and what to install.

    Args:
        names: names of the files, or the number of files of each suffix.
    """
    if not isinstance(names, Mapping):
        names = Counter(os.path.splitext(name)[1].lower() for name in names)
    parts = []
    for suffix, count in sorted(names.items()):
        form = next((form for form in OPTIONAL_FORMATS if suffix in form.suffixes), None)
        parts.append(f"{count} {suffix} ({'convert them to PNG' if form is None else form.advice})")
    return ", ".join(parts)


def log_left_out(folders: Mapping[str, Path]) -> None:
    """Log for each split how many images in its folder cannot be read, and of which format they are."""
    for split, folder in folders.items():
        names: Counter[str] = Counter()
        for _, below, files in os.walk(folder, followlinks=True):
            below[:] = [name for name in below if not name.startswith((".", "__MACOSX"))]
            names.update(os.path.splitext(name)[1].lower() for name in files if is_unreadable_image(name))
        if names:
            where = f"{folder} (split {split})" if split else str(folder)
            log.warning("%s: images are left out: %s", where, describe_left_out(names))


def pillow_formats(header: bytes) -> tuple[str, ...]:
    """Return the formats to try for a file, as Pillow calls them.

    Args:
        header: first bytes of the file.
    """
    form = optional_format(header)
    return (form.pillow_name,) if form is not None and form.is_readable else PILLOW_FORMATS


def exif_is_applied(image: Image.Image) -> bool:
    """Return whether an image is upright despite its EXIF orientation: JPEG XL is turned by its own header (ISO/IEC
    18181-2), except where it stores a JPEG bit by bit."""
    return image.format == "JXL" and not getattr(image, "jpeg", False)
