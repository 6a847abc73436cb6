"""Position of a GeoTIFF on Earth: read its tags, and write labels with the same tags (OGC GeoTIFF 1.1, Section 7)."""

import io
import os
from collections.abc import Mapping
from typing import Any, TypeAlias

import numpy as np
from jaxtyping import Integer
from PIL import Image, TiffImagePlugin

from triptych.data.bands import TIFF_HEADERS

GeoTags: TypeAlias = Mapping[int, Any]

# ModelPixelScale, ModelTiepoint, ModelTransformation, GeoKeyDirectory, GeoDoubleParams, GeoAsciiParams -> TIFF type
TYPES = {33550: 12, 33922: 12, 34264: 12, 34735: 3, 34736: 12, 34737: 2}


def read_geo_tags(source: Any) -> GeoTags:
    """Return the tags that place an image on Earth; {} for images other than GeoTIFF, or without orientation 1.

    Args:
        source: the path of a file or its bytes; of anything else there are no tags.
    """
    if not isinstance(source, bytes | str | os.PathLike):
        return {}
    try:
        with io.BytesIO(source) if isinstance(source, bytes) else open(source, "rb") as content:
            if content.read(4) not in TIFF_HEADERS:
                return {}
            content.seek(0)
            header = content.read(8)
            if header[2] == 43 or header[3] == 43:  # BigTIFF
                header += content.read(8)
            tags = TiffImagePlugin.ImageFileDirectory_v2(header)
            content.seek(tags.next)
            tags.load(content)
            if tags.get(274, 1) != 1:
                return {}
            return {code: tags[code] for code in TYPES if code in tags}
    except Exception:  # decoding the image reports what is damaged
        return {}


def geotiff(labels: Integer[np.ndarray, "H W"], tags: GeoTags) -> bytes:
    """Return a TIFF of class indices, compressed without loss, with the tags of `read_geo_tags`."""
    info = TiffImagePlugin.ImageFileDirectory_v2()
    for code, value in tags.items():
        info.tagtype[code] = TYPES[code]
        info[code] = value
    buffer = io.BytesIO()
    Image.fromarray(labels).save(buffer, "TIFF", compression="tiff_adobe_deflate", tiffinfo=info)
    return buffer.getvalue()
