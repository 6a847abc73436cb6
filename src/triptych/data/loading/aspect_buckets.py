"""Aspect-ratio buckets: pictures of differing shapes in batches of one shape each, so that little is cut away."""

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from torch.utils.data import Dataset

from triptych.data.example import Batch
from triptych.data.images import read_image_size
from triptych.data.source import Source
from triptych.errors import UserError

ImageShape = tuple[int, int]
"""Height and width in pixels."""
MAX_BUCKET_ASPECT = 2.0  # the longer side over the shorter of the outermost bucket


def bucket_shapes(size: ImageShape, count: int, unit: int) -> tuple[ImageShape, ...]:
    """At most `count` shapes of about the area of `size`, the squarest and its kin: sides multiples of `unit`, aspects
    spread evenly in their logarithm from 1 / 2 to 2.

    Raises:
        UserError: sides of `size` that are no multiples of `unit`.
    """
    if any(side % unit for side in size):
        raise UserError(f"buckets of {size[0]} x {size[1]} are of multiples of {unit}; change the size")
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
    """int64 (n,): the bucket whose aspect each picture's is nearest to. Headers alone are read; a picture without a
    readable one goes into the first."""
    aspects = np.log([width / height for height, width in shapes])
    assigned = np.zeros(len(source), np.int64)
    for row in range(len(source)):
        try:
            size = read_image_size(source[row].image)
        except UserError:
            continue
        if size is not None and min(size) > 0:
            assigned[row] = np.abs(aspects - math.log(size[1] / size[0])).argmin()
    return assigned


class BucketOrder:
    """Which examples are in which batch: each batch of one bucket, in an order that is a function of (seed, epoch).

    Shuffled, batches are full and what is left of a bucket waits for the next epoch; only a bucket of fewer than a
    batch gives a smaller one. Not shuffled, every example comes once.
    """

    def __init__(self, buckets: np.ndarray, batch_size: int, seed: int, *, shuffle: bool):
        self.buckets, self.batch_size, self.seed, self.shuffle = buckets, batch_size, seed, shuffle
        self.rows = [np.flatnonzero(buckets == number) for number in np.unique(buckets)]

    def __len__(self) -> int:
        """Batches in an epoch."""
        round_ = (lambda n: max(1, math.floor(n))) if self.shuffle else math.ceil
        return sum(round_(len(rows) / self.batch_size) for rows in self.rows)

    def batches(self, epoch: int, /) -> list[np.ndarray]:
        rng = np.random.default_rng([self.seed % 2**64, epoch])
        all_batches = []
        for rows in self.rows:
            if self.shuffle:
                rows = rng.permutation(rows)
                rows = rows[: max(self.batch_size, len(rows) // self.batch_size * self.batch_size)]
            all_batches += [rows[i : i + self.batch_size] for i in range(0, len(rows), self.batch_size)]
        return [all_batches[i] for i in rng.permutation(len(all_batches))] if self.shuffle else all_batches


class BucketedDataset(Dataset[Any]):
    """A source in parts, each asked for its own shape.

    Args:
        buckets: of each example, as `sort_into` gives it.
        make: called with a bucket's number and its rows; gives what batches of these rows are asked of.
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
        """The source of one of the parts."""
        return next(iter(self.parts.values())).source

    def __len__(self) -> int:
        return len(self.buckets)

    def __getitems__(self, indices: Sequence[int]) -> Batch:
        """A batch of one bucket; "row" counts in the whole source."""
        at = np.asarray(indices, np.int64)
        number = int(self.buckets[at[0]])
        batch: Batch = self.parts[number].__getitems__(self.place[at].tolist())
        batch["row"] = self.rows[number][batch["row"]].tolist()
        return batch
