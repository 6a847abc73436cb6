"""Which examples are in which batch: functions of the seed and the epoch alone, so that a state is two integers."""

import math
from collections.abc import Sequence
from typing import Protocol

import numpy as np

from triptych.data.loading.permutation import permute
from triptych.data.loading.stream_order import LazyBatches

MAX_STORED_ROWS = 1 << 20  # rows whose order is held in memory; of more it is computed, batch by batch


class BatchOrder(Protocol):
    """Which examples are in which batch of an epoch: a function of the epoch alone."""

    def __len__(self) -> int: ...
    def batches(self, epoch: int, /) -> Sequence[np.ndarray]: ...


class EpochOrder:
    """Which examples are in which batch: a function of (seed, epoch) alone."""

    def __init__(self, count: int, batch_size: int, seed: int, *, shuffle: bool):
        self.count, self.batch_size, self.seed, self.shuffle = count, batch_size, seed, shuffle

    def __len__(self) -> int:
        """Batches in an epoch."""
        batches = self.count / self.batch_size
        return max(1, math.floor(batches)) if self.shuffle else math.ceil(batches)

    def batches(self, epoch: int, /) -> Sequence[np.ndarray]:
        """The indices in each batch; all full when shuffling, else every index once."""
        size = self.batch_size
        rows: np.ndarray | None = None
        if self.shuffle and self.count <= MAX_STORED_ROWS:
            rng = np.random.default_rng([self.seed % 2**64, epoch])
            rows = rng.permutation(self.count)
            while len(rows) < size:  # fewer examples than one batch: they come again
                rows = np.concatenate([rows, rng.permutation(self.count)])

        def batch(number: int) -> np.ndarray:
            if rows is not None:
                return rows[number * size : (number + 1) * size]
            places = np.arange(number * size, min((number + 1) * size, self.count))
            return permute(places, self.count, self.seed, epoch) if self.shuffle else places

        return LazyBatches(batch, range(len(self)))


class DividedOrder:
    """One process's part of an order that `world` processes share: of each batch the `rank`-th of as many runs of rows,
    or whole batches in turn."""

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
