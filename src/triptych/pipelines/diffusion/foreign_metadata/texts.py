"""All texts in an image's file that may hold generation metadata, by name."""

import contextlib
import html
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from PIL import Image, PngImagePlugin

from triptych.data.images import image_errors, open_image
from triptych.errors import DataError
from triptych.pipelines.diffusion.foreign_metadata.hidden_text import hidden_texts
from triptych.pipelines.diffusion.foreign_metadata.png_text import SIGNATURE, decoded_text, png_texts
from triptych.pipelines.image_input import ImageInput, name_of

PARAMETERS = "parameters"
USER_COMMENT = "UserComment"
_EXIF_BLOCK, _COMMENT = 0x8769, 0x9286
# Tags in which ComfyUI's nodes put "prompt:{...}" and "workflow:{...}" in WebP and JPEG files.
_GRAPH_TAGS = (0x010F, 0x0110, 0x010E)  # Make, Model, ImageDescription
_DESCRIPTION, _WINDOWS_COMMENT = 0x010E, 0x9C9C
# Elements of XMP -> names of their texts.
_XMP_TEXTS = {"exif:UserComment": USER_COMMENT, "dc:description": "XMP description"}
_GRAPH = re.compile(r"\s*(prompt|workflow)\s*:\s*(?=\{)", re.IGNORECASE)


def image_texts(image: ImageInput) -> Mapping[str, str]:
    """Return the texts of an image's file by name: a PNG's chunks, the comment of a JPEG or GIF, the comment of EXIF
    or XMP as `parameters` where there is no such chunk, graphs of ComfyUI from EXIF as `prompt` and `workflow`, and
    where there is no text at all, that in the pixels' lowest bits.

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
        if isinstance(comment := opened.info.get("comment"), bytes):  # of JPEG and GIF
            texts.setdefault("comment", decoded_text(comment))
        for key in ("xmp", "XML:com.adobe.xmp"):
            for name_of_text, text in _xmp_texts(opened.info.get(key)).items():
                texts.setdefault(name_of_text, text)
        _add_exif(texts, opened.getexif())
        text = texts.get(USER_COMMENT, "")
        # Cameras and screenshots have comments too.
        if not texts.get(PARAMETERS, "").strip() and ("Steps:" in text or text.lstrip().startswith("{")):
            texts[PARAMETERS] = text
        if not texts.keys() & {PARAMETERS, "prompt", "workflow", "Comment", "Description"} and (
            opened.format in ("PNG", "WEBP")
        ):
            texts |= hidden_texts(opened)
    return texts


def _add_exif(texts: dict[str, str], exif: Image.Exif) -> None:
    """Add the texts of EXIF that are not there."""
    comment = exif.get_ifd(_EXIF_BLOCK).get(_COMMENT) or exif.get(_COMMENT)
    if isinstance(comment, bytes | str) and comment:
        texts[USER_COMMENT] = decoded_comment(comment)
    for tag in _GRAPH_TAGS:
        value = exif.get(tag)
        if isinstance(value, str) and (match := _GRAPH.match(value)):
            texts.setdefault(match[1].lower(), value[match.end() :].rstrip("\0"))
    description, windows = exif.get(_DESCRIPTION), exif.get(_WINDOWS_COMMENT)
    if isinstance(description, str):
        texts.setdefault("ImageDescription", _unmangled(description).rstrip("\0"))
    if isinstance(windows, bytes | tuple):
        with contextlib.suppress(TypeError, ValueError):
            texts.setdefault("XPComment", bytes(windows).decode("utf-16-le", "replace").rstrip("\0"))
    software = exif.get(0x0131)
    if isinstance(software, str):
        texts.setdefault("Software", software)


def _xmp_texts(xmp: Any) -> dict[str, str]:
    """Return the texts of an XMP packet that programs put their settings in."""
    packet = decoded_text(xmp) if isinstance(xmp, bytes) else xmp if isinstance(xmp, str) else ""
    texts = {}
    for element, name in _XMP_TEXTS.items():
        start = packet.find(f"<{element}")
        end = packet.find(f"</{element}>", start)
        if start >= 0 and end >= 0:
            plain = re.sub(r"<[^<>]*>", "", packet[start:end])  # the list of languages around it
            texts[name] = html.unescape(plain).strip()
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
