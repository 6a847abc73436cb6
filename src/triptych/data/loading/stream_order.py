"""The order of a stream: nearly sequential where the data lies, well mixed in every batch, and held nowhere.

    runs       what lies together, a row group or a piece of a shard; their order is drawn each epoch
    lanes      all rows in that order, cut into equal parts that are read side by side
    windows    of a lane: the rows in each are shuffled, which is what a shuffle buffer does, but by its place alone

The k-th example of an epoch is of lane k modulo their number. It is a function of (seed, epoch, k) alone, of no process
and no worker, and so where a run is gone on from needs no more than k. In a batch the lanes stand one behind the other:
processes that divide it into runs, and their workers, each read lanes of their own.
"""

import functools
from collections.abc import Callable, Sequence
from typing import overload

import numpy as np

from triptych.errors import UserError


class LazyBatches(Sequence[np.ndarray]):
    """The batches of an epoch, each made when it is asked for; slices are of the same kind."""

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
    """Which examples are in which batch of a stream: a function of (seed, epoch) alone.

    Args:
        bounds: int64 (runs + 1,), where each run begins, and the number of rows.
        batch_size: of all processes together. Batches are full; what is left at the end of an epoch, another part of
            the data each time, is left out.
        buffer: rows in the windows of all lanes together.
        lanes: of this many places, or as many as there are runs, are the examples of a batch. Where they divide the
            batch, and processes times workers divide them, each row group of a parquet file is read by one of these.

    Raises:
        UserError: fewer rows than a batch.
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
            raise UserError(
                f"a stream of {self.count} examples fills no batch of {batch_size}; "
                "lower --loading.batch-size, or leave --loading.stream out"
            )
        self.lanes = min(lanes, int(np.count_nonzero(np.diff(bounds))))  # no run need be read by two
        self.window = max(1, buffer // self.lanes)
        # Twice as many as are in use at a time: the batches that are asked for run ahead of those given out.
        self._shuffled = functools.lru_cache(4 * self.lanes)(self._draw_window)
        self._runs = functools.lru_cache(2)(self._draw_runs)

    def __len__(self) -> int:
        """Batches in an epoch."""
        return self.count // self.batch_size

    def batches(self, epoch: int, /) -> LazyBatches:
        """The indices in each batch, lane by lane."""
        return LazyBatches(functools.partial(self._batch, epoch), range(len(self)))

    def buffered_rows(self, workers: int) -> int:
        """Rows in the windows of as many lanes as each of so many workers reads, twice."""
        return 2 * self.window * (-(-self.lanes // max(1, workers)) + 1)

    def _batch(self, epoch: int, number: int) -> np.ndarray:
        places = number * self.batch_size + np.arange(self.batch_size)
        return self.rows(epoch, places[np.argsort(places % self.lanes, kind="stable")])

    def rows(self, epoch: int, places: np.ndarray) -> np.ndarray:
        """The examples at some places of an epoch's order."""
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
        """The order of the runs, and where each ends in it."""
        order = np.random.default_rng([self.seed % 2**64, epoch]).permutation(len(self.bounds) - 1)
        return order, np.cumsum(np.diff(self.bounds)[order])

    def _draw_window(self, epoch: int, lane: int, window: int) -> np.ndarray:
        least, more = divmod(self.count, self.lanes)
        rows = min(self.window, least + (lane < more) - window * self.window)
        return np.random.default_rng([self.seed % 2**64, epoch, lane, window]).permutation(rows)
