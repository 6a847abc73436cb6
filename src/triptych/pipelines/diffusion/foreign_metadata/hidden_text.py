"""Text in the lowest bits of an image's pixels, as NovelAI and the web UI's extension "stealth pnginfo" hide it.

Column by column, the lowest bit of alpha, or of red, green and blue, gives bytes: 15 letters that name the form, the
number of bits as a 32-bit integer, and the text, compressed by gzip or plain.
"""

import json
import zlib

import numpy as np
from PIL import Image

FORMS = {
    b"stealth_pnginfo": ("A", False),
    b"stealth_pngcomp": ("A", True),
    b"stealth_rgbinfo": ("RGB", False),
    b"stealth_rgbcomp": ("RGB", True),
}
LARGEST_HIDDEN_TEXT = 2**24  # bytes once decompressed
MOST_PIXELS = 2**26
_NAME, _SIZE = 15, 4  # bytes


def hidden_texts(image: Image.Image) -> dict[str, str]:
    """Return the texts that are hidden in an image by name: those of a JSON object, else `parameters`; none if there
    are none."""
    if image.mode not in ("RGBA", "RGB") or image.width * image.height > MOST_PIXELS:
        return {}
    for bands in ("A", "RGB") if image.mode == "RGBA" else ("RGB",):
        if (text := _hidden_text(image, bands)) is not None:
            return _by_name(text)
    return {}


def _hidden_text(image: Image.Image, bands: str) -> str | None:
    head = _low_bytes(image, bands, _NAME + _SIZE)
    form = FORMS.get(head[:_NAME])
    if form is None or form[0] != bands or len(head) < _NAME + _SIZE:
        return None
    size = int.from_bytes(head[_NAME:], "big") // 8
    body = _low_bytes(image, bands, _NAME + _SIZE + size)[_NAME + _SIZE :]
    if len(body) < size:
        return None
    if form[1]:
        inflate = zlib.decompressobj(wbits=31)
        try:
            body = inflate.decompress(body, LARGEST_HIDDEN_TEXT)
        except zlib.error:
            return None
        if not inflate.eof:
            return None
    return body.decode("utf-8", "replace")


def _low_bytes(image: Image.Image, bands: str, count: int) -> bytes:
    """Return the first `count` bytes of the lowest bits, fewer in a small image."""
    columns = min(image.width, -(-8 * count // (image.height * len(bands))))
    pixels = np.asarray(image.crop((0, 0, columns, image.height)))
    pixels = pixels[..., 3:] if bands == "A" else pixels[..., :3]
    bits = pixels.swapaxes(0, 1).reshape(-1)[: 8 * count] & 1
    return np.packbits(bits[: len(bits) // 8 * 8]).tobytes()


def _by_name(text: str) -> dict[str, str]:
    try:
        values = json.loads(text)
    except (ValueError, RecursionError):
        values = None
    if not isinstance(values, dict) or not any(isinstance(value, str) for value in values.values()):
        return {"parameters": text}
    if "Comment" not in values and "parameters" not in values:
        return {"parameters": text}
    return {name: value for name, value in values.items() if isinstance(value, str)}
