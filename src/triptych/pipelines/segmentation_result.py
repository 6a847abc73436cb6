"""The result of segmenting an image: a class for each pixel, areas, and images of them."""

import io
import json
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float, Integer, UInt8
from PIL import Image

from triptych.atomic_write import write_atomically, write_text_atomically
from triptych.data.geotiff import GeoTags, geotiff
from triptych.errors import ConfigError
from triptych.pipelines.palette import is_ground

PART_ENDINGS = {"overlay": ".overlay.png", "labels": ".labels.png", "json": ".json"}
PARTS = tuple(PART_ENDINGS)


@dataclass(frozen=True)
class Area:
    """A class that occurs in an image, and where."""

    name: str
    index: int
    pixels: int
    share: float
    """Share of the image's pixels, from 0 to 1."""
    box: tuple[int, int, int, int]
    """Bounding box: left and top inclusive, right and bottom exclusive."""


@dataclass(frozen=True, kw_only=True, repr=False)
class Segmentation:
    """The segmentation of one image, at the image's own size."""

    labels: Integer[np.ndarray, "H W"]
    """Index of each pixel's class: uint8, or uint16 with more than 256 classes."""
    classes: tuple[str, ...]
    """Name of each class, by index."""
    colors: UInt8[np.ndarray, "classes 3"]
    """Red, green and blue of each class."""
    image: UInt8[np.ndarray, "H W 3"]
    """The image, upright."""
    confidence: Float[np.ndarray, "H W"] | None = None
    """Probability of each pixel's class; None unless requested."""
    source: str = ""
    """The image's file, else its type."""
    geo_tags: GeoTags = field(default_factory=dict)
    """Tags of a GeoTIFF that place the image on Earth; empty for other images."""

    @cached_property
    def areas(self) -> tuple[Area, ...]:
        """The classes that occur, largest first."""
        H, W = self.labels.shape
        counts = np.bincount(self.labels.ravel(), minlength=len(self.classes))
        left, top, right, bottom = _boxes(self.labels, len(self.classes))
        areas = [
            Area(
                self.classes[i],
                int(i),
                int(counts[i]),
                int(counts[i]) / (H * W),
                (int(left[i]), int(top[i]), int(right[i]), int(bottom[i])),
            )
            for i in np.flatnonzero(counts)
        ]
        return tuple(sorted(areas, key=lambda area: -area.pixels))

    @property
    def shares(self) -> dict[str, float]:
        """Name of each class that occurs -> share of the pixels, largest first."""
        return {area.name: area.share for area in self.areas}

    def mask(self, name: str | int) -> np.ndarray:
        """Return an array that is True where a class is, by name or index.

        Raises:
            ConfigError: there is no such class.
        """
        index = self.classes.index(name) if name in self.classes else name
        if not isinstance(index, int) or not 0 <= index < len(self.classes):
            known = ", ".join(self.classes[:8]) + (", ..." if len(self.classes) > 8 else "")
            raise ConfigError(f"no class is called {name!r}; there are {known}")
        return self.labels == index

    def overlay(self, strength: float = 0.6) -> Image.Image:
        """Return the image in gray, tinted and outlined in each class's color; background classes are only paler.

        Args:
            strength: opacity of the colors, 0 to 1.

        Raises:
            ConfigError: `strength` is out of range.
        """
        if not 0 <= strength <= 1:
            raise ConfigError(f"strength is {strength}, which must be from 0 to 1")
        gray = Image.fromarray(self.image).convert("L").convert("RGB")
        tint = Image.fromarray(self.colors[self.labels])
        thing = np.array([not is_ground(name) for name in self.classes])[self.labels]
        shown = np.array(Image.blend(gray, tint, strength))
        if not thing.all():
            faded = Image.blend(gray, Image.new("RGB", gray.size, "white"), 0.6 * strength)
            shown[~thing] = np.asarray(faded)[~thing]
        rim = _rim(self.labels, max(1, round(max(self.labels.shape) / 700))) & thing
        shown[rim] = self.colors[self.labels[rim]]
        return Image.fromarray(shown)

    def label_image(self) -> Image.Image:
        """Return the labels as an image whose pixel values are class indices.

        It has a palette of the classes' colors (mode P), or is 16-bit gray (mode I;16) for more than 256 classes.
        """
        if len(self.classes) > 256:
            return Image.fromarray(self.labels.astype(np.uint16))
        image = Image.fromarray(self.labels.astype(np.uint8)).convert("P")
        image.putpalette(self.colors.ravel().tolist())
        return image

    def to_json(self) -> dict[str, Any]:
        """Return the size and the areas as plain values."""
        height, width = self.labels.shape
        return {
            "image": self.source,
            "height": height,
            "width": width,
            "classes": len(self.classes),
            "areas": [
                {**asdict(area), "box": list(area.box), "color": self.colors[area.index].tolist()}
                for area in self.areas
            ],
        }

    def save(
        self,
        where: str | os.PathLike[str],
        name: str | None = None,
        parts: Sequence[str] = PARTS,
        durable: bool = True,
    ) -> list[Path]:
        """Write the labels into a .png file, the areas into a .json file, or all parts into a folder:
        NAME.overlay.png, NAME.labels.png and NAME.json, in this order. With the labels of a GeoTIFF, NAME.labels.tif is
        written as well, with the tags that place it on Earth; a file that ends in .tif is written alone.

        Args:
            where: a file that ends in .png or .json, or a folder, which is created.
            name: NAME; by default the stem of the image's file.
            parts: which of "overlay", "labels" and "json" a folder gets.
            durable: as in `triptych.atomic_write.write_atomically`.

        Returns:
            The files.

        Raises:
            StorageError: the place cannot be written.
        """
        where = Path(where)
        if where.suffix.lower() in (".tif", ".tiff"):
            self._write_geotiff(where, durable)
            return [where]
        if where.suffix.lower() in (".png", ".json"):
            name, parts = where.name, ("labels" if where.suffix.lower() == ".png" else "json",)
            places = {parts[0]: where}
        else:
            name = name or Path(self.source).stem or "image"
            places = {part: where / f"{name}{PART_ENDINGS[part]}" for part in PARTS}
        for part in (part for part in PARTS if part in parts):
            if part == "json":
                write_text_atomically(places[part], self._json_text(), durable)
            else:
                image = self.label_image() if part == "labels" else self.overlay()
                _write_png(image, places[part], durable)
        written = [places[part] for part in PARTS if part in parts]
        if self.geo_tags and "labels" in parts:
            written.append(places["labels"].with_suffix(".tif"))
            self._write_geotiff(written[-1], durable)
        return written

    def _write_geotiff(self, path: Path, durable: bool) -> None:
        content = geotiff(self.labels, self.geo_tags)
        write_atomically(path, lambda file: file.write(content), durable)

    def _json_text(self) -> str:
        return json.dumps(self.to_json(), indent=1, ensure_ascii=False) + "\n"

    def __repr__(self) -> str:
        text = ", ".join(f"{area.name} {area.share:.1%}" for area in self.areas[:5])
        more = f", {len(self.areas) - 5} more" if len(self.areas) > 5 else ""
        return f"<{self.source + ': ' if self.source else ''}{text}{more}>"


def _write_png(image: Image.Image, path: Path, durable: bool) -> None:
    buffer = io.BytesIO()
    image.save(buffer, format="PNG")
    write_atomically(path, lambda file: file.write(buffer.getvalue()), durable)


def _boxes(labels: Integer[np.ndarray, "H W"], count: int) -> tuple[np.ndarray, ...]:
    """Return the first column and row of each class, and those after its last."""
    (left, right), (top, bottom) = _ends(np.ascontiguousarray(labels.T), count), _ends(labels, count)
    return left, top, right, bottom


def _ends(labels: Integer[np.ndarray, "H W"], count: int) -> tuple[np.ndarray, np.ndarray]:
    """Return the first row of each class, and the one after its last."""
    H, W = labels.shape
    first, last = np.full(count, H), np.zeros(count, int)
    step = max(1, 2**18 // W)  # rows at a time, few enough for the CPU's cache
    for y in range(0, H, step):
        band = labels[y : y + step]
        places = band + (np.arange(len(band)) * count)[:, None]
        occurs = np.bincount(places.ravel(), minlength=len(band) * count).reshape(len(band), count) > 0
        here = occurs.any(0)
        first[here] = np.minimum(first[here], y + occurs[:, here].argmax(0))
        last[here] = y + len(band) - occurs[::-1, here].argmax(0)
    return first, last


def _rim(labels: Integer[np.ndarray, "H W"], wide: int) -> np.ndarray:
    """Return an array that is True within `wide` pixels of another class."""
    rim = np.zeros(labels.shape, bool)
    for axis in (0, 1):
        n = labels.shape[axis]
        for step in range(1, min(wide, n - 1) + 1):
            before = labels.take(range(n - step), axis) != labels.take(range(step, n), axis)
            low = [slice(None), slice(None)]
            high = [slice(None), slice(None)]
            low[axis], high[axis] = slice(0, n - step), slice(step, n)
            rim[tuple(low)] |= before
            rim[tuple(high)] |= before
    return rim
