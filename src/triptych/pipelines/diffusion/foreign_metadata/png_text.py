"""Text chunks of a PNG file, wherever they stand and whatever their size.

Pillow reads those before the pixels alone until it decodes them, stops at 1 MB, and takes every `tEXt` chunk for
Latin-1, which the standard asks for and many programs do not write.
"""

import zlib
from collections.abc import Iterator

SIGNATURE = b"\x89PNG\r\n\x1a\n"
LARGEST_TEXT = 2**26  # bytes of a text once it is decompressed


def png_texts(data: bytes) -> dict[str, str]:
    """Return the texts of a PNG file by their keys, the first of each; damaged ones are left out."""
    texts: dict[str, str] = {}
    for chunk_type, body in _chunks(data):
        if chunk_type in _READERS:
            key, separator, rest = body.partition(b"\0")
            text = _READERS[chunk_type](rest) if separator else None
            if text is not None:
                texts.setdefault(key.decode("latin-1"), text)
    return texts


def decoded_text(text: bytes) -> str:
    """Return UTF-8 text, or Latin-1 where the bytes are no UTF-8."""
    try:
        return text.decode("utf-8")
    except UnicodeDecodeError:
        return text.decode("latin-1")


def _chunks(data: bytes) -> Iterator[tuple[bytes, bytes]]:
    """Yield type and body of each chunk, up to where the file is cut."""
    position = len(SIGNATURE) if data.startswith(SIGNATURE) else len(data)
    while position + 8 <= len(data):
        size = int.from_bytes(data[position : position + 4], "big")
        chunk_type, start = data[position + 4 : position + 8], position + 8
        if start + size > len(data):
            return
        yield chunk_type, data[start : start + size]
        position = start + size + 4  # the checksum


def _text(rest: bytes) -> str:
    return decoded_text(rest)


def _compressed(rest: bytes) -> str | None:
    plain = _inflated(rest[1:])
    return None if plain is None else decoded_text(plain)


def _international(rest: bytes) -> str | None:
    if len(rest) < 2:
        return None
    body = rest[2:].split(b"\0", 2)  # language, translated key, text
    plain = (_inflated(body[-1]) if rest[0] else body[-1]) if len(body) == 3 else None
    return None if plain is None else decoded_text(plain)


def _inflated(data: bytes) -> bytes | None:
    inflate = zlib.decompressobj()
    try:
        plain = inflate.decompress(data, LARGEST_TEXT)
    except zlib.error:
        return None
    return None if inflate.unconsumed_tail else plain


_READERS = {b"tEXt": _text, b"zTXt": _compressed, b"iTXt": _international}
