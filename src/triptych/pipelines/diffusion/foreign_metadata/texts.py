"""All texts in an image's file that may hold generation metadata, by name."""

import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from PIL import Image, PngImagePlugin

from triptych.data.images import image_errors, open_image
from triptych.errors import DataError
from triptych.pipelines.diffusion.foreign_metadata.png_text import SIGNATURE, decoded_text, png_texts
from triptych.pipelines.image_input import ImageInput, name_of

PARAMETERS = "parameters"
USER_COMMENT = "UserComment"
_EXIF_BLOCK, _COMMENT = 0x8769, 0x9286
# Tags in which ComfyUI's nodes put "prompt:{...}" and "workflow:{...}" in WebP and JPEG files.
_GRAPH_TAGS = (0x010F, 0x0110, 0x010E)  # Make, Model, ImageDescription
_GRAPH = re.compile(r"\s*(prompt|workflow)\s*:\s*(?=\{)", re.IGNORECASE)


def image_texts(image: ImageInput) -> Mapping[str, str]:
    """Return the texts of an image's file by name: a PNG's chunks, EXIF's UserComment as `parameters` where there is
    no such chunk, and graphs of ComfyUI from EXIF as `prompt` and `workflow`.

    Raises:
        DataError: no image, or one without a file.
    """
    name = name_of(image)
    if not isinstance(image, Image.Image | str | os.PathLike | bytes):
        raise DataError("an array has no generation metadata; give an image file")
    with image_errors(name):
        opened = image if isinstance(image, Image.Image) else open_image(image, name)
        if isinstance(image, PngImagePlugin.PngImageFile) and image.fp is not None:
            image.load()  # Pillow reads the texts after the pixels then
        texts = {str(key): _unmangled(value) for key, value in opened.info.items() if isinstance(value, str)}
        if not isinstance(image, Image.Image):
            texts |= _chunks(image)
        exif = opened.getexif()
        comment = exif.get_ifd(_EXIF_BLOCK).get(_COMMENT) or exif.get(_COMMENT)
        if isinstance(comment, bytes | str) and comment:
            text = decoded_comment(comment)
            texts.setdefault(USER_COMMENT, text)
            # Cameras and screenshots have comments too.
            if not texts.get(PARAMETERS, "").strip() and ("Steps:" in text or text.lstrip().startswith("{")):
                texts[PARAMETERS] = text
        for tag in _GRAPH_TAGS:
            value = exif.get(tag)
            if isinstance(value, str) and (match := _GRAPH.match(value)):
                texts.setdefault(match[1].lower(), value[match.end() :].rstrip("\0"))
        software = exif.get(0x0131)
        if isinstance(software, str):
            texts.setdefault("Software", software)
    return texts


def decoded_comment(comment: bytes | str) -> str:
    """Return EXIF's UserComment: eight bytes that name the encoding, then the text."""
    if isinstance(comment, str):
        return comment.strip("\0")
    encoding, text = comment[:8], comment[8:]
    if encoding == b"UNICODE\0":
        # The standard asks for the file's byte order; most write big-endian. The wrong one gives Chinese, and some
        # programs write UTF-8.
        orders = [text.decode(f"utf-16-{order}", "replace") for order in ("be", "le")]
        best = max([*orders, decoded_text(text)], key=lambda decoded: _latin_share(decoded))
        return best.strip("\0")
    known = encoding in (b"ASCII\0\0\0", b"\0" * 8)
    return decoded_text(text if known else comment).strip("\0")


def _latin_share(text: str) -> float:
    """Share of characters that are Latin letters, digits or punctuation; of two readings the right one has more."""
    return sum("\t" <= letter < "\u0250" for letter in text) / max(len(text), 1)


def _chunks(image: str | os.PathLike[str] | bytes) -> dict[str, str]:
    data = image
    if not isinstance(data, bytes):
        with Path(data).open("rb") as file:
            if file.read(len(SIGNATURE)) != SIGNATURE:
                return {}
            file.seek(0)
            data = file.read()
    return png_texts(data)


def _unmangled(text: Any) -> str:
    """Return the text of a `tEXt` chunk that Pillow took for Latin-1 though it was UTF-8."""
    if isinstance(text, PngImagePlugin.iTXt) or text.isascii():
        return str(text)
    try:
        return text.encode("latin-1").decode("utf-8")
    except UnicodeError:
        return str(text)
