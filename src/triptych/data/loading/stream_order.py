"""Shuffled order of a stream: files are read nearly sequentially, batches are well mixed, and nothing is stored.

    runs       rows that are stored contiguously, such as a row group or a part of a shard; shuffled each epoch
    lanes      equal parts of the sequence of all rows in that order, which are read in parallel
    windows    parts of a lane, within which rows are shuffled as by a shuffle buffer

Example k of an epoch is from lane k modulo the number of lanes. It depends only on (seed, epoch, k), and not on the
number of processes or workers, so k is all the state that resuming needs. A batch is sorted by lane: the processes and
workers that divide it each read lanes of their own.
"""

import functools
from collections.abc import Callable, Sequence
from typing import overload

import numpy as np

from triptych.errors import ConfigError


class LazyBatches(Sequence[np.ndarray]):
    """The batches of an epoch, each computed when it is accessed. Slices are lazy, too."""

    def __init__(self, make: Callable[[int], np.ndarray], numbers: range):
        self.make, self.numbers = make, numbers

    def __len__(self) -> int:
        return len(self.numbers)

    @overload
    def __getitem__(self, index: int) -> np.ndarray: ...
    @overload
    def __getitem__(self, index: slice) -> "LazyBatches": ...
    def __getitem__(self, index: int | slice) -> "np.ndarray | LazyBatches":
        if isinstance(index, slice):
            return LazyBatches(self.make, self.numbers[index])
        return self.make(self.numbers[index])


class StreamOrder:
    """Assignment of the examples of a stream to batches, as a function of (seed, epoch) alone.

    Args:
        bounds: int64 (runs + 1,), first row of each run, and the number of rows.
        batch_size: number of examples in a batch of all processes together. All batches are full; the remainder is
            left out of the epoch, and differs from epoch to epoch.
        seed: seed of the order.
        buffer: number of rows in the windows of all lanes together.
        lanes: number of lanes, at most one per run. If the batch size is a multiple of it, and it is a multiple of
            processes times workers, each row group of a parquet file is read by a single worker.

    Raises:
        ConfigError: fewer rows than a batch.
    """

    def __init__(
        self,
        bounds: np.ndarray,
        batch_size: int,
        seed: int,
        *,
        buffer: int = 8192,
        lanes: int = 32,
    ):
        self.bounds, self.count = bounds, int(bounds[-1])
        self.batch_size, self.seed = batch_size, seed
        if self.count < batch_size:
            raise ConfigError(
                f"the stream has {self.count} examples, fewer than a batch of {batch_size}; "
                "lower --loading.batch-size, or omit --loading.stream"
            )
        self.lanes = min(
            lanes, int(np.count_nonzero(np.diff(bounds)))
        )  # at most one per run that is not empty
        self.window = max(1, buffer // self.lanes)
        # Twice the number in use at a time, since batches are requested ahead of those that are yielded.
        self._shuffled = functools.lru_cache(4 * self.lanes)(self._draw_window)
        self._runs = functools.lru_cache(2)(self._draw_runs)

    def __len__(self) -> int:
        """Number of batches in an epoch."""
        return self.count // self.batch_size

    def batches(self, epoch: int, /) -> LazyBatches:
        """Return the indices of the examples in each batch, sorted by lane."""
        return LazyBatches(functools.partial(self._batch, epoch), range(len(self)))

    def buffered_rows(self, workers: int) -> int:
        """Return how many rows each worker should keep in memory: twice the windows of the lanes that it reads."""
        return 2 * self.window * (-(-self.lanes // max(1, workers)) + 1)

    def _batch(self, epoch: int, number: int) -> np.ndarray:
        places = number * self.batch_size + np.arange(self.batch_size)
        return self.rows(epoch, places[np.argsort(places % self.lanes, kind="stable")])

    def rows(self, epoch: int, places: np.ndarray) -> np.ndarray:
        """Return the indices of the examples at some positions of an epoch."""
        lane, at = places % self.lanes, places // self.lanes
        window, inner = at // self.window, at % self.window
        least, more = divmod(self.count, self.lanes)
        start = lane * least + np.minimum(lane, more) + window * self.window
        for i, (number, window_number) in enumerate(zip(lane.tolist(), window.tolist(), strict=True)):
            start[i] += self._shuffled(epoch, number, window_number)[inner[i]]
        order, ends = self._runs(epoch)
        run = np.searchsorted(ends, start, side="right")
        return self.bounds[order[run] + 1] - (ends[run] - start)

    def _draw_runs(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """Return the order of the runs, and where each ends in the sequence of rows."""
        order = np.random.default_rng([self.seed % 2**64, epoch]).permutation(len(self.bounds) - 1)
        return order, np.cumsum(np.diff(self.bounds)[order])

    def _draw_window(self, epoch: int, lane: int, window: int) -> np.ndarray:
        least, more = divmod(self.count, self.lanes)
        rows = min(self.window, least + (lane < more) - window * self.window)
        return np.random.default_rng([self.seed % 2**64, epoch, lane, window]).permutation(rows)
