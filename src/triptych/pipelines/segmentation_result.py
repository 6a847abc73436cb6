"""What a segmenter says of a picture: a class for each pixel, and what can be made of that."""

import io
import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float, Integer, UInt8
from PIL import Image

from triptych.atomic_write import write_atomically, write_text_atomically
from triptych.errors import UserError
from triptych.pipelines.palette import is_ground

ENDINGS = {"overlay": ".overlay.png", "labels": ".labels.png", "json": ".json"}
PARTS = tuple(ENDINGS)


class Area(NamedTuple):
    """One class that occurs in a picture, and where."""

    name: str
    index: int
    pixels: int
    share: float
    """Of the picture's pixels, from 0 to 1."""
    box: tuple[int, int, int, int]
    """The least box that holds all of them: left, top, and right, bottom, which are not in it."""


@dataclass(frozen=True, kw_only=True, repr=False)
class Segmentation:
    """The parse of one picture, at the picture's own size."""

    labels: Integer[np.ndarray, "H W"]
    """Index of each pixel's class: uint8, or uint16 with more than 256 classes."""
    classes: tuple[str, ...]
    """Name of each class, by index."""
    colors: UInt8[np.ndarray, "classes 3"]
    """Its red, green and blue."""
    image: UInt8[np.ndarray, "H W 3"]
    """The picture, upright."""
    confidence: Float[np.ndarray, "H W"] | None = None
    """Probability of each pixel's class, where it was asked for."""
    source: str = ""
    """The file, or what else the picture came from."""

    @cached_property
    def areas(self) -> tuple[Area, ...]:
        """The classes that occur, the largest first."""
        H, W = self.labels.shape
        counts = np.bincount(self.labels.ravel(), minlength=len(self.classes))
        left, top, right, bottom = _boxes(self.labels, len(self.classes))
        found = [
            Area(
                self.classes[i],
                int(i),
                int(counts[i]),
                int(counts[i]) / (H * W),
                (int(left[i]), int(top[i]), int(right[i]), int(bottom[i])),
            )
            for i in np.flatnonzero(counts)
        ]
        return tuple(sorted(found, key=lambda area: -area.pixels))

    @property
    def shares(self) -> dict[str, float]:
        """Name of each class that occurs -> its share of the pixels, the largest first."""
        return {area.name: area.share for area in self.areas}

    def mask(self, name: str | int) -> np.ndarray:
        """True where a class is, by its name or index.

        Raises:
            UserError: there is no such class.
        """
        index = self.classes.index(name) if name in self.classes else name
        if not isinstance(index, int) or not 0 <= index < len(self.classes):
            known = ", ".join(self.classes[:8]) + (", ..." if len(self.classes) > 8 else "")
            raise UserError(f"no class is called {name!r}; there are {known}")
        return self.labels == index

    def overlay(self, strength: float = 0.6) -> Image.Image:
        """The picture in grey with each class in its color over it and a line around it; "background" is only paler.

        Args:
            strength: how much of the color, from 0 to 1.

        Raises:
            UserError: `strength` is outside of that.
        """
        if not 0 <= strength <= 1:
            raise UserError(f"strength is {strength}, which must be from 0 to 1")
        grey = Image.fromarray(self.image).convert("L").convert("RGB")
        tint = Image.fromarray(self.colors[self.labels])
        thing = np.array([not is_ground(name) for name in self.classes])[self.labels]
        shown = np.array(Image.blend(grey, tint, strength))
        if not thing.all():
            faded = Image.blend(grey, Image.new("RGB", grey.size, "white"), 0.6 * strength)
            shown[~thing] = np.asarray(faded)[~thing]
        rim = _rim(self.labels, max(1, round(max(self.labels.shape) / 700))) & thing
        shown[rim] = self.colors[self.labels[rim]]
        return Image.fromarray(shown)

    def label_image(self) -> Image.Image:
        """The labels as a picture whose pixel values are the class indices: with a palette of the classes' colors
        (mode P), or 16-bit grey (mode I;16) for more than 256 classes."""
        if len(self.classes) > 256:
            return Image.fromarray(self.labels.astype(np.uint16))
        made = Image.fromarray(self.labels.astype(np.uint8)).convert("P")
        made.putpalette(self.colors.ravel().tolist())
        return made

    def to_json(self) -> dict[str, Any]:
        """Size and areas as plain values."""
        height, width = self.labels.shape
        return {
            "image": self.source,
            "height": height,
            "width": width,
            "classes": len(self.classes),
            "areas": [
                {**area._asdict(), "box": list(area.box), "color": self.colors[area.index].tolist()}
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
        """Write the labels into a .png file, the areas into a .json file, or into a folder all there is:
        NAME.overlay.png, NAME.labels.png and NAME.json, in this order.

        Args:
            where: ends in .png or .json, or is a folder, which is made.
            name: NAME; that of the picture's file if left out.
            parts: which of "overlay", "labels" and "json" a folder gets.
            durable: as in `triptych.atomic_write.write_atomically`.

        Returns:
            the files.

        Raises:
            UserError: the place cannot be written.
        """
        where = Path(where)
        if where.suffix.lower() in (".png", ".json"):
            name, parts = where.name, ("labels" if where.suffix.lower() == ".png" else "json",)
            places = {parts[0]: where}
        else:
            name = name or Path(self.source).stem or "image"
            places = {part: where / f"{name}{ENDINGS[part]}" for part in PARTS}
        for part in (part for part in PARTS if part in parts):
            if part == "json":
                write_text_atomically(places[part], self._json_text(), durable)
            else:
                image = self.label_image() if part == "labels" else self.overlay()
                _write_png(image, places[part], durable)
        return [places[part] for part in PARTS if part in parts]

    def _json_text(self) -> str:
        return json.dumps(self.to_json(), indent=1, ensure_ascii=False) + "\n"

    def __repr__(self) -> str:
        words = ", ".join(f"{area.name} {area.share:.1%}" for area in self.areas[:5])
        more = f", {len(self.areas) - 5} more" if len(self.areas) > 5 else ""
        return f"<{self.source + ': ' if self.source else ''}{words}{more}>"


def _write_png(image: Image.Image, path: Path, durable: bool) -> None:
    buffer = io.BytesIO()
    image.save(buffer, format="PNG")
    write_atomically(path, lambda file: file.write(buffer.getvalue()), durable)


def _boxes(labels: Integer[np.ndarray, "H W"], count: int) -> tuple[np.ndarray, ...]:
    """First column and row of each class, and the ones after its last."""
    (left, right), (top, bottom) = _ends(np.ascontiguousarray(labels.T), count), _ends(labels, count)
    return left, top, right, bottom


def _ends(labels: Integer[np.ndarray, "H W"], count: int) -> tuple[np.ndarray, np.ndarray]:
    """The first row of each class, and the one after its last."""
    H, W = labels.shape
    first, last = np.full(count, H), np.zeros(count, int)
    step = max(1, 2**18 // W)  # rows counted at once: the numbers made of them stay in the cache
    for y in range(0, H, step):
        band = labels[y : y + step]
        places = band + (np.arange(len(band)) * count)[:, None]
        there = np.bincount(places.ravel(), minlength=len(band) * count).reshape(len(band), count) > 0
        here = there.any(0)
        first[here] = np.minimum(first[here], y + there[:, here].argmax(0))
        last[here] = y + len(band) - there[::-1, here].argmax(0)
    return first, last


def _rim(labels: Integer[np.ndarray, "H W"], wide: int) -> np.ndarray:
    """True within `wide` pixels of another class."""
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
