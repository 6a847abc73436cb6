"""The base class of explanations, and points in preprocessed images."""

import io
import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
from jaxtyping import UInt8
from torch import Tensor

from triptych.atomic_write import write_atomically, write_text_atomically
from triptych.data.images import decode
from triptych.errors import ConfigError
from triptych.model_card import Preprocess
from triptych.pipelines.classification_result import Classification, Guess
from triptych.pipelines.image_input import ImageInput, name_of

Point: TypeAlias = tuple[float | int, float | int]  # x, y in pixels from the upper left corner


@dataclass(frozen=True, kw_only=True)
class ExplanationBase:
    """The explanation of one image. Arrays are fp32; maps have their rows from the top."""

    source: str
    """The image's file, else its type."""
    classification: Classification
    """Classes of the image, or of the pixel at `point` from a segmenter; empty for a network without a head."""
    image: UInt8[np.ndarray, "H W 3"]
    """The network's input, as pixels."""
    readout: str
    """The output that the rollout explains: "class token", "mean of the last map", ..."""
    point: Point | None
    """x and y in pixels of `image`."""

    def arrays(self) -> dict[str, np.ndarray]:
        """Return all arrays by name."""
        raise NotImplementedError

    def to_json(self) -> dict[str, Any]:
        """Return the small values as JSON; the large arrays are in `arrays()`."""
        values = self.classification.to_json() | {"size": list(self.image.shape[:2]), "readout": self.readout}
        return values if self.point is None else values | {"point": [round(side, 2) for side in self.point]}

    def save(self, folder: str | Path) -> None:
        """Write `explanation.json` and `explanation.npz` into `folder`. `triptych.plots` draws the images."""
        buffer = io.BytesIO()
        np.savez_compressed(buffer, **self.arrays())  # pyright: ignore[reportArgumentType]
        write_atomically(Path(folder) / "explanation.npz", lambda file: file.write(buffer.getvalue()))
        write_text_atomically(Path(folder) / "explanation.json", json.dumps(self.to_json(), indent=1) + "\n")


def best(
    logits: Tensor | None, at: Point | None, classes: tuple[str, ...], top: int, source: str
) -> Classification:
    """Return the `top` most probable classes for `logits` of shape (classes,), or (classes, h, w) at the point; none if
    there are no classes."""
    if logits is None or not classes:
        return Classification((), source)
    if logits.ndim == 3 and at is not None:
        logits = logits[:, int(at[1]), int(at[0])]
    probabilities, indices = logits.softmax(0).topk(min(top, len(logits)))
    pairs = zip(indices.tolist(), probabilities.tolist(), strict=True)
    return Classification(tuple(Guess(classes[i], i, p) for i, p in pairs), source)


def size_of(image: ImageInput) -> tuple[int, int]:
    """Return height and width of an image, upright."""
    height, width = decode(image, name=name_of(image)).shape[:2]
    return height, width


def check_point(point: Point, image_size: tuple[int, int]) -> None:
    """Raise a `ConfigError` if a point is outside an image of this height and width."""
    if not (0 <= point[0] < image_size[1] and 0 <= point[1] < image_size[0]):
        raise ConfigError(
            f"the point x = {point[0]:g}, y = {point[1]:g} is outside the image of "
            f"{image_size[1]} x {image_size[0]} pixels (width x height)"
        )


def map_point(point: Point, image_size: tuple[int, int], preprocess: Preprocess) -> Point:
    """Return where a point of an image of height and width `image_size` lies in the result of `fitted`.

    Raises:
        ConfigError: the point is outside the image, or cropped away.
    """
    check_point(point, image_size)
    size = preprocess.size
    by = [to / preprocess.crop / have for to, have in zip(size, image_size, strict=True)]
    if preprocess.mode != "squash":
        by = [max(by) if preprocess.mode == "crop" else min(by)] * 2
    # The center stays the center. All pairs are y, x.
    at = [
        to / 2 + s * (v - have / 2) for to, s, v, have in zip(size, by, point[::-1], image_size, strict=True)
    ]
    if not all(0 <= v < side for v, side in zip(at, size, strict=True)):
        y, x = (
            f"from {max(0, math.ceil(have / 2 - to / 2 / s))} to {min(have, math.floor(have / 2 + to / 2 / s))}"
            for to, s, have in zip(size, by, image_size, strict=True)
        )
        raise ConfigError(
            f"the point x = {point[0]:g}, y = {point[1]:g} is cropped away: the network's input has x {x} and y {y}"
        )
    return at[1], at[0]
