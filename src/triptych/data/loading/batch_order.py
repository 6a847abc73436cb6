"""Order of batches as a function of the seed and the epoch alone, so that the state of a loader is two integers."""

import math
from collections.abc import Sequence
from typing import Protocol

import numpy as np

from triptych.data.loading.permutation import permute
from triptych.data.loading.stream_order import LazyBatches

MAX_STORED_ROWS = 1 << 20  # rows; the order of more rows is computed per batch instead of being stored


class BatchOrder(Protocol):
    """Assignment of examples to the batches of an epoch, as a function of the epoch alone."""

    def __len__(self) -> int:
        """Number of batches in an epoch."""
        ...

    def batches(self, epoch: int, /) -> Sequence[np.ndarray]:
        """Return the indices of the examples in each batch."""
        ...


class EpochOrder:
    """Assignment of examples to batches as a function of (seed, epoch) alone.

    With shuffling all batches are full, and the remainder of the examples is left out of the epoch. Without shuffling
    each example occurs once, in the order of the source.
    """

    def __init__(self, count: int, batch_size: int, seed: int, *, shuffle: bool):
        self.count, self.batch_size, self.seed, self.shuffle = count, batch_size, seed, shuffle

    def __len__(self) -> int:
        """Number of batches in an epoch."""
        batches = self.count / self.batch_size
        return max(1, math.floor(batches)) if self.shuffle else math.ceil(batches)

    def batches(self, epoch: int, /) -> Sequence[np.ndarray]:
        """Return the indices of the examples in each batch of an epoch."""
        size = self.batch_size
        rows: np.ndarray | None = None
        if self.shuffle and self.count <= MAX_STORED_ROWS:
            rng = np.random.default_rng([self.seed % 2**64, epoch])
            rows = rng.permutation(self.count)
            while len(rows) < size:  # fewer examples than a batch: they are repeated
                rows = np.concatenate([rows, rng.permutation(self.count)])

        def batch(number: int) -> np.ndarray:
            if rows is not None:
                return rows[number * size : (number + 1) * size]
            places = np.arange(number * size, min((number + 1) * size, self.count))
            return permute(places, self.count, self.seed, epoch) if self.shuffle else places

        return LazyBatches(batch, range(len(self)))


class BalancedOrder:
    """As `EpochOrder` with shuffling, with as many examples of each class in an epoch.

    Of n examples in k classes an epoch has n examples, n / k of each class, rounded up or down. All examples of a class
    occur before one is repeated.

    Args:
        labels: class of each example.
        batch_size: number of examples in a batch.
        seed: seed of the order.
    """

    def __init__(self, labels: np.ndarray, batch_size: int, seed: int):
        self.groups = [np.flatnonzero(labels == label) for label in np.unique(labels)]
        self.count, self.batch_size, self.seed = len(labels), batch_size, seed

    def __len__(self) -> int:
        """Number of batches in an epoch."""
        return max(1, self.count // self.batch_size)

    def batches(self, epoch: int, /) -> Sequence[np.ndarray]:
        """Return the indices of the examples in each batch of an epoch."""
        rng = np.random.default_rng([self.seed % 2**64, epoch])
        total = max(self.count, self.batch_size)
        sizes = [len(part) for part in np.array_split(np.arange(total), len(self.groups))]
        rows: list[np.ndarray] = []
        for number, size in zip(rng.permutation(len(self.groups)), sizes, strict=True):
            group = self.groups[number]
            repeats = [rng.permutation(group) for _ in range(math.ceil(size / len(group)))]
            rows.append(np.concatenate(repeats)[:size])
        shuffled = rng.permutation(np.concatenate(rows))
        size = self.batch_size
        return LazyBatches(lambda number: shuffled[number * size : (number + 1) * size], range(len(self)))


class DividedOrder:
    """The part of one process in an order that is divided among processes.

    Args:
        order: the order of all processes.
        rank: number of the process.
        world: number of processes.
        within: divide each batch, of which the process gets the `rank`-th of `world` runs of rows; otherwise the
            process gets every `world`-th batch, starting at `rank`.
    """

    def __init__(self, order: BatchOrder, rank: int, world: int, within: bool):
        self.order, self.rank, self.world, self.within = order, rank, world, within

    def __len__(self) -> int:
        count = len(self.order)
        return count if self.within else len(range(self.rank, count, self.world))

    def batches(self, epoch: int, /) -> Sequence[np.ndarray]:
        all_batches = self.order.batches(epoch)
        if self.within:
            return LazyBatches(
                lambda number: np.array_split(all_batches[number], self.world)[self.rank],
                range(len(all_batches)),
            )
        return all_batches[self.rank :: self.world]
