"""Masks that annotation files describe by shapes: polygons, run lengths, rectangles. They are drawn when they are read.

In a table such a mask is a short text in place of an encoded image (`describe`), so that opening a data set draws
nothing. Which pixels a shape covers is the rule of the program that the file is from:

- polygons of COCO and YOLO are filled as by pycocotools (`rleFrPoly`): corners are rounded to fifths of a pixel, and
  a pixel is inside if its center is;
- shapes of labelme are filled by Pillow's `ImageDraw` with their outline, as by labelme.
"""

import base64
import io
import json
import math
import os
import zlib
from collections.abc import Sequence
from typing import Any, Literal, TypeGuard

import numpy as np
from jaxtyping import Bool, Int32
from PIL import Image, ImageDraw

from triptych.data.images import MAX_PIXELS, image_errors, read_image_size
from triptych.errors import DataError

MAGIC = b"triptych shapes\n"
MAX_COORDINATE = 1e6  # of a polygon in pixels; the length of its outline determines the memory to fill it
UPSAMPLING = 5  # of pycocotools, for corners of polygons
LINE_WIDTH, POINT_RADIUS = 10, 5  # of labelme, in pixels

Shape = dict[str, Any]
"""A shape: its class "number", "type", and what the type needs (`polygons`, `run_lengths`, `labelme`)."""


def polygons(number: int, rings: list[list[float]], *, relative: bool = False) -> Shape:
    """Return the union of polygons, each x0, y0, x1, y1 ... in pixels or, if `relative`, in widths and heights."""
    return {"number": number, "type": "polygons", "rings": rings, "relative": relative}


def run_lengths(number: int, counts: list[int] | str, size: Sequence[int], *, crowd: bool = False) -> Shape:
    """Return run lengths of COCO down the columns, the first of them outside; a string is compressed as by pycocotools.

    Args:
        size: height and width.
        crowd: the region of many objects, which lies below all others.
    """
    return {
        "number": number,
        "type": "run lengths",
        "counts": counts,
        "size": list(map(int, size)),
        "crowd": crowd,
    }


def labelme(number: int, shape_type: str, points: list[list[float]], mask: str | None = None) -> Shape:
    """Return a shape of labelme; the type "mask" has two corners and a PNG in base64."""
    return {"number": number, "type": shape_type, "points": points, "mask": mask}


def describe(
    shapes: list[Shape],
    *,
    size: tuple[int, int] | None = None,
    image: str | None = None,
    order: Literal["area", "listed"],
) -> bytes:
    """Return the description of a mask, which `draw` reads.

    Args:
        size: height and width of the mask.
        image: image whose upright size the mask has, if `size` is None.
        order: "listed" draws later shapes over earlier ones, "area" small ones over large ones and over crowds.
    """
    return MAGIC + json.dumps({"size": size, "order": order, "shapes": shapes, "image": image}).encode()


def checksum(description: bytes) -> int:
    """Return the CRC-32 of a description without the path of its image, so that data may be moved."""
    return zlib.crc32(description[: description.rindex(b', "image": ')])


def is_drawn(source: object) -> TypeGuard[bytes]:
    """Return whether the source of a mask is a description."""
    return isinstance(source, bytes) and source.startswith(MAGIC)


def draw(description: bytes, name: str) -> Int32[np.ndarray, "H W"]:
    """Draw the mask of a description: the class number of the uppermost shape, 0 where there is none.

    Args:
        name: name of the mask in errors.

    Raises:
        DataError: a shape is malformed, or the size of the image cannot be read.
    """
    mask = json.loads(description.removeprefix(MAGIC))
    height, width = mask["size"] or _size_of(mask["image"])
    if height < 1 or width < 1 or height * width > MAX_PIXELS:
        raise DataError(f"{name} is {width} x {height} pixels by its annotations; correct them")
    with image_errors(f"an annotation of {name}"):
        canvas = np.zeros((height, width), np.int32)
        if mask["order"] == "listed":
            return _draw_with_pillow(mask["shapes"], canvas)
        for shape in sorted(mask["shapes"], key=lambda shape: (not shape.get("crowd"), -_area(shape))):
            if shape["type"] == "run lengths":
                canvas[_decode_run_lengths(shape, (height, width), name)] = shape["number"]
            for ring in shape.get("rings", ()):
                scale = np.array([width, height] if shape["relative"] else [1, 1], np.float64)
                _fill(canvas, np.asarray(ring, np.float64).reshape(-1, 2) * scale, shape["number"])
    return canvas


def _size_of(image: str) -> tuple[int, int]:
    size = read_image_size(image) if os.path.exists(image) else None
    if size is None:
        raise DataError(f"{image} is missing or damaged, so the size of its mask is unknown; replace it")
    return size


def _area(shape: Shape) -> float:
    """Return the area of polygons or run lengths, which only has to be comparable within one image."""
    if shape["type"] == "run lengths":
        counts = shape["counts"]
        return float(sum((parse_run_lengths(counts) if isinstance(counts, str) else counts)[1::2]))
    area = 0.0
    for ring in shape["rings"]:
        x, y = np.asarray(ring, np.float64).reshape(-1, 2).T
        area += abs(float(x @ np.roll(y, 1) - y @ np.roll(x, 1))) / 2
    return area


def parse_run_lengths(text: str) -> list[int]:
    """Return the run lengths in a string of pycocotools (`rleToString`).

    A number is written in groups of 5 bits, the lowest first, as characters from 48 on; 32 marks that another group
    follows, and the highest bit of the last group is the sign. From the fourth on, numbers are differences to the
    second before.
    """
    counts: list[int] = []
    value = shift = 0
    for code in text.encode():
        group = code - 48
        value |= (group & 0x1F) << shift
        shift += 5
        if group & 0x20:
            continue
        if group & 0x10:
            value -= 1 << shift
        counts.append(value + counts[-2] if len(counts) > 2 else value)
        value = shift = 0
    return counts


def _decode_run_lengths(shape: Shape, size: tuple[int, int], name: str) -> Bool[np.ndarray, "H W"]:
    counts = shape["counts"]
    counts = np.array(parse_run_lengths(counts) if isinstance(counts, str) else counts, np.int64)
    height, width = shape["size"]
    if (height, width) != size or counts.min(initial=0) < 0 or counts.sum() != height * width:
        raise DataError(
            f"the run lengths of an annotation of {name} cover {counts.sum()} pixels of {width} x {height}, but the "
            f"image has {size[1]} x {size[0]}; correct the annotation"
        )
    inside = np.repeat(np.arange(len(counts)) % 2 == 1, counts)
    return inside.reshape(width, height).T


def _fill(canvas: Int32[np.ndarray, "H W"], corners: np.ndarray, number: int) -> None:
    """Fill a polygon as `rleFrPoly` of pycocotools does, within its bounding box.

    It walks along the upsampled outline. Each step from one column of upsampled pixels to the next that crosses the
    center of a column of pixels toggles inside and outside from there on downward.
    """
    height, width = canvas.shape
    if not (np.abs(corners) < MAX_COORDINATE).all():
        raise DataError(f"a polygon has the coordinate {np.abs(corners).max():.3g}; correct the annotation")
    left, top = (max(0, math.floor(low)) for low in corners.min(axis=0))
    right, bottom = (math.ceil(high) + 1 for high in corners.max(axis=0))
    part = canvas[top : max(top, bottom), left : max(left, right)]
    if part.size == 0:
        return
    x, y = _upsampled_outline(corners)
    step = np.flatnonzero(np.diff(x))
    column = (np.minimum(x[step], x[step + 1]) + 0.5) / UPSAMPLING - 0.5
    row = np.ceil(((np.minimum(y[step], y[step + 1]) + 0.5) / UPSAMPLING - 0.5).clip(0, height))
    centered = (column == np.floor(column)) & (column >= 0) & (column <= width - 1)
    height, width = part.shape
    toggles = ((column - left) * height + row - top)[centered].astype(np.int64)
    inside = np.cumsum(np.bincount(toggles, minlength=height * width + 1))[: height * width] % 2 == 1
    part[inside.reshape(width, height).T] = number


def _upsampled_outline(corners: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the points along a polygon's outline, one for each upsampled pixel along the longer axis of each edge."""
    points = (UPSAMPLING * corners + 0.5).astype(np.int64)  # truncates toward 0, as C does
    xs, ys = [], []
    for (x0, y0), (x1, y1) in zip(points, np.roll(points, -1, axis=0), strict=True):
        dx, dy = abs(x1 - x0), abs(y1 - y0)
        length = max(dx, dy)
        t = np.arange(length + 1)
        # The slope is measured from the end with the smaller coordinate, so that rounding is the same both ways.
        if (dx >= dy and x0 > x1) or (dx < dy and y0 > y1):
            x0, y0, x1, y1, t = x1, y1, x0, y0, t[::-1]
        if dx >= dy:
            slope = (y1 - y0) / dx if dx else 0.0
            xs.append(x0 + t)
            ys.append((y0 + slope * t + 0.5).astype(np.int64))
        else:
            xs.append((x0 + (x1 - x0) / dy * t + 0.5).astype(np.int64))
            ys.append(y0 + t)
    return np.concatenate(xs), np.concatenate(ys)


def _draw_with_pillow(shapes: list[Shape], canvas: Int32[np.ndarray, "H W"]) -> Int32[np.ndarray, "H W"]:
    image = Image.fromarray(canvas)
    pen = ImageDraw.Draw(image)
    for shape in shapes:
        number, points = shape["number"], [(float(x), float(y)) for x, y in shape["points"]]
        match shape["type"]:
            case "rectangle":
                (x0, y0), (x1, y1) = points
                box = (min(x0, x1), min(y0, y1), max(x0, x1), max(y0, y1))
                pen.rectangle(box, outline=number, fill=number)
            case "circle":
                (x, y), edge = points
                _disk(pen, x, y, math.dist((x, y), edge), number)
            case "point" | "points":
                for x, y in points:
                    _disk(pen, x, y, POINT_RADIUS, number)
            case "line" | "linestrip":
                pen.line(points, fill=number, width=LINE_WIDTH)
            case "mask":
                with Image.open(io.BytesIO(base64.b64decode(shape["mask"])), formats=("PNG",)) as stamp:
                    image.paste(number, (int(points[0][0]), int(points[0][1])), stamp.convert("1"))
            case _:
                pen.polygon(points, outline=number, fill=number)
    return np.array(image, np.int32)


def _disk(pen: ImageDraw.ImageDraw, x: float, y: float, radius: float, number: int) -> None:
    pen.ellipse((x - radius, y - radius, x + radius, y + radius), outline=number, fill=number)
