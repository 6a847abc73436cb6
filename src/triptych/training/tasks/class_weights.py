"""Weights of classes in a loss: balanced by how often they occur in the training data, or read from a file."""

import csv
import json
import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from triptych.data.source import Source
from triptych.errors import DataError, TriptychError

MAX_MASKS = 1000  # that are counted for balanced weights of a segmenter's classes


def read_class_weights(
    spec: str, classes: tuple[str, ...], count: Callable[[], Int[np.ndarray, " k"]]
) -> Float[Tensor, " k"] | None:
    """Return the weight of each class; None if all are 1.

    Args:
        spec: "none"; "balanced", the mean number of examples of a class over that of this class (King and Zeng 2001, as
            in scikit-learn's class_weight), and 0 for a class without examples; or a file: JSON with an object of names
            and weights or a list of weights in the order of the classes, or CSV with a name and a weight in each row.
        classes: name of each class.
        count: returns the number of examples of each class.

    Raises:
        DataError: the file does not exist, cannot be read, or does not give each class a weight.
    """
    if spec == "none":
        return None
    if spec == "balanced":
        counts = count()
        present = counts > 0
        balanced = counts.sum() / (present.sum() * np.maximum(counts, 1)) * present
        return torch.from_numpy(balanced).float()
    weights = _read_file(Path(spec).expanduser(), classes)
    unknown, missing = sorted(set(weights) - set(classes)), [name for name in classes if name not in weights]
    if unknown or missing:
        what = f"lacks a weight for {missing[0]!r}" if missing else f"names {unknown[0]!r}, which is no class"
        raise DataError(f"{spec} {what}; give each of the {len(classes)} classes one weight")
    invalid = next((name for name in classes if not 0 <= weights[name] < math.inf), None)
    if invalid is not None or not any(weights.values()):
        name = classes[0] if invalid is None else invalid
        raise DataError(f"{spec} gives {name!r} the weight {weights[name]}; give a positive number")
    return torch.tensor([weights[name] for name in classes], dtype=torch.float32)


def _read_file(path: Path, classes: tuple[str, ...]) -> dict[str, float]:
    if not path.is_file():
        raise DataError(f"class weights are {str(path)!r}, which is no file; give balanced, none or a file")
    try:
        text = path.read_text(encoding="utf-8-sig")
        if path.suffix.lower() == ".json":
            values = json.loads(text)
            if isinstance(values, list):
                values = dict(zip(classes, values, strict=True))
            return {str(name): float(weight) for name, weight in values.items()}
        rows = [row for row in csv.reader(text.splitlines()) if row]
        if rows and not _is_number(rows[0][-1]):  # the heading
            rows = rows[1:]
        return {name.strip(): float(weight) for name, weight in rows}
    except (OSError, ValueError, TypeError, AttributeError) as problem:
        raise DataError(
            f"{path} cannot be read as class weights ({problem}); write the name and weight of a class in each row"
        ) from problem


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def count_labels(source: Source) -> Int[np.ndarray, " k"]:
    """Return the number of examples of each class."""
    assert source.labels is not None
    return np.bincount(source.labels, minlength=len(source.classes or ()))


def count_pixels(source: Source) -> Int[np.ndarray, " k"]:
    """Return the number of pixels of each class in the masks of up to `MAX_MASKS` examples, evenly spaced.

    Examples that cannot be read are left out.
    """
    num_classes = len(source.mask_classes or ())
    counts = np.zeros(num_classes, np.int64)
    for row in np.linspace(0, len(source) - 1, min(len(source), MAX_MASKS)).astype(int).tolist():
        try:
            mask = source[row].mask
        except TriptychError:
            continue
        if mask is not None:
            counts += np.bincount(mask[mask < num_classes], minlength=num_classes)
    return counts
