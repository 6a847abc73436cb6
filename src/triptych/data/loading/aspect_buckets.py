"""Aspect-ratio buckets: images of different shapes are grouped into batches of one shape each, to crop little."""

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from torch.utils.data import Dataset

from triptych.data.example import Batch
from triptych.data.images import read_image_size
from triptych.data.source import Source
from triptych.errors import ConfigError, TriptychError

ImageShape = tuple[int, int]
"""Height and width in pixels."""
MAX_BUCKET_ASPECT = 2.0  # largest ratio of the longer side to the shorter


def bucket_shapes(size: ImageShape, count: int, unit: int) -> tuple[ImageShape, ...]:
    """Return at most `count` shapes with about the area of `size`, whose sides are multiples of `unit` and whose aspect
    ratios are spaced evenly on a logarithmic scale from 1 / 2 to 2. If there are more, the squarest are returned.

    Args:
        size: height and width in pixels; always one of the shapes before the number is limited.
        count: largest number of shapes.
        unit: pixels of which each side is a multiple.

    Raises:
        ConfigError: a side of `size` is not a multiple of `unit`.
    """
    if any(side % unit for side in size):
        raise ConfigError(
            f"the size {size[0]} x {size[1]} cannot have buckets; make both sides multiples of {unit}"
        )
    area = size[0] * size[1]
    shapes = {size: None}
    for part in np.linspace(-1, 1, count):
        aspect = MAX_BUCKET_ASPECT ** float(part)  # width over height
        height = max(unit, round(math.sqrt(area / aspect) / unit) * unit)
        width = max(unit, round(math.sqrt(area * aspect) / unit) * unit)
        shapes[(height, width)] = None
    ordered = sorted(shapes, key=lambda shape: abs(math.log(shape[1] / shape[0])))
    return tuple(sorted(ordered[:count], key=lambda shape: shape[1] / shape[0]))


def assign_buckets(source: Source, shapes: Sequence[ImageShape]) -> np.ndarray:
    """Return int64 (n,): for each image the index of the shape with the nearest aspect ratio.

    Only the headers of images are read; an image without a readable header goes into the first bucket.
    """
    aspects = np.log([width / height for height, width in shapes])
    assigned = np.zeros(len(source), np.int64)
    for row in range(len(source)):
        try:
            size = read_image_size(source[row].image)
        except TriptychError:
            continue
        if size is not None and min(size) > 0:
            assigned[row] = np.abs(aspects - math.log(size[1] / size[0])).argmin()
    return assigned


class BucketOrder:
    """Assignment of examples to batches, each from a single bucket, as a function of (seed, epoch) alone.

    With shuffling, batches are full, and the remainder of a bucket is left out of the epoch; only a bucket with fewer
    examples than a batch yields a smaller one. Without shuffling, each example occurs once.

    Args:
        buckets: int64 (n,), bucket of each example, as returned by `assign_buckets`.
    """

    def __init__(self, buckets: np.ndarray, batch_size: int, seed: int, *, shuffle: bool):
        self.buckets, self.batch_size, self.seed, self.shuffle = buckets, batch_size, seed, shuffle
        self.rows = [np.flatnonzero(buckets == number) for number in np.unique(buckets)]

    def __len__(self) -> int:
        """Batches in an epoch."""
        round_ = (lambda n: max(1, math.floor(n))) if self.shuffle else math.ceil
        return sum(round_(len(rows) / self.batch_size) for rows in self.rows)

    def batches(self, epoch: int, /) -> list[np.ndarray]:
        """Return the indices of the examples in each batch of an epoch."""
        rng = np.random.default_rng([self.seed % 2**64, epoch])
        all_batches = []
        for rows in self.rows:
            if self.shuffle:
                rows = rng.permutation(rows)
                rows = rows[: max(self.batch_size, len(rows) // self.batch_size * self.batch_size)]
            all_batches += [rows[i : i + self.batch_size] for i in range(0, len(rows), self.batch_size)]
        return [all_batches[i] for i in rng.permutation(len(all_batches))] if self.shuffle else all_batches


class BucketedDataset(Dataset[Any]):
    """A dataset for each bucket, joined into one.

    Args:
        buckets: int64 (n,), bucket of each example, as returned by `assign_buckets`.
        make: called with the index of a bucket and its rows; returns the dataset of these rows.
    """

    def __init__(self, buckets: np.ndarray, make: Callable[[int, np.ndarray], Any]):
        self.buckets = buckets
        self.place = np.zeros(len(buckets), np.int64)
        self.rows: dict[int, np.ndarray] = {}
        self.parts: dict[int, Any] = {}
        for number in np.unique(buckets).tolist():
            rows = np.flatnonzero(buckets == number)
            self.rows[number], self.place[rows] = rows, np.arange(len(rows))
            self.parts[number] = make(number, rows)

    @property
    def source(self) -> Source:
        """The source of one of the datasets."""
        return next(iter(self.parts.values())).source

    def __len__(self) -> int:
        return len(self.buckets)

    def __getitems__(self, indices: Sequence[int]) -> Batch:
        """Return a batch of examples of one bucket; its "row" refers to the full source."""
        at = np.asarray(indices, np.int64)
        number = int(self.buckets[at[0]])
        batch: Batch = self.parts[number].__getitems__(self.place[at].tolist())
        batch["row"] = self.rows[number][batch["row"]].tolist()
        return batch
