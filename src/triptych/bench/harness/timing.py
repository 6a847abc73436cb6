"""Compare implementations: check that their outputs are equal, then time the same work in alternation."""

import statistics
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Generic, TypeVar

import torch
from torch import Tensor

from triptych.bench.harness.cpu_contention import CpuContention

T = TypeVar("T")


class UnequalError(RuntimeError):
    """Two implementations returned different results for the same work, so that their times cannot be compared."""


@dataclass(frozen=True)
class Spread:
    """Median, minimum and maximum of several measurements."""

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, values: Iterable[float]) -> "Spread":
        values = sorted(values)
        return cls(statistics.median(values), values[0], values[-1])

    def scaled(self, by: float) -> "Spread":
        """Return the values multiplied by a positive number, for another unit."""
        return Spread(by * self.median, by * self.low, by * self.high)

    def inverted(self) -> "Spread":
        """Return the reciprocals, for the inverse of a ratio."""
        return Spread(1 / self.median, 1 / self.high, 1 / self.low)


def timed(work: Callable[[], object], clock: Callable[[], float] = time.perf_counter) -> Callable[[], float]:
    """Return a function that calls `work` and returns the seconds that this took."""

    def seconds() -> float:
        start = clock()
        work()
        return clock() - start

    return seconds


@dataclass(frozen=True)
class Rounds(Generic[T]):
    """Results of a comparison."""

    measurements: dict[str, list[T]]
    """Measurements by implementation; the i-th ones of all are from the same round."""
    others: float
    """Largest fraction of the CPU that other programs used in one of the rounds; 0 if unknown."""


CALM = 0.05  # largest fraction of the CPU that other programs may use in a round that counts


def interleave(
    sides: Mapping[str, Callable[[], T]],
    rounds: int = 5,
    seconds: float = 0.0,
    warmup: int = 1,
    patience: float = 0.0,
) -> Rounds[T]:
    """Measure implementations in alternation, A B A B, so that a slow phase of the machine affects all of them.

    Args:
        sides: functions that make one measurement, by name.
        rounds: smallest number of measurements per implementation.
        seconds: more rounds are run until this time has passed.
        warmup: rounds that are run first and discarded.
        patience: seconds for which rounds are repeated if other programs used more than `CALM` of the CPU. After that
            the `rounds` with the least use by others count, whatever they measured.
    """
    for _ in range(warmup):
        for measure in sides.values():
            measure()
    start = time.perf_counter()
    measured_rounds: list[tuple[float, dict[str, T]]] = []
    while True:
        contention = CpuContention()
        row = {name: measure() for name, measure in sides.items()}
        measured_rounds.append((contention.share() or 0.0, row))
        calm = [item for item in measured_rounds if item[0] <= CALM]
        passed = time.perf_counter() - start
        if len(calm) >= rounds and passed >= seconds:
            break
        if len(measured_rounds) >= rounds and passed >= max(seconds, patience):
            calm = sorted(measured_rounds, key=lambda item: item[0])[:rounds]
            break
    return Rounds({name: [row[name] for _, row in calm] for name in sides}, max(share for share, _ in calm))


def ratio(ours: Iterable[float], theirs: Iterable[float]) -> Spread:
    """Return the ratio of ours to theirs in each round, so that slow phases of the machine cancel out."""
    return Spread.of(a / b for a, b in zip(ours, theirs, strict=True))


def distance(ours: Tensor, theirs: Tensor) -> float:
    """Return the largest absolute difference, relative to the largest absolute value of theirs."""
    scale = theirs.double().abs().max().clamp(min=1e-30)
    return float((ours.double() - theirs.double()).abs().max() / scale)


def check_equal(outputs: Mapping[str, Tensor], tolerance: float) -> float:
    """Return the largest `distance` of an output from the first one.

    Args:
        outputs: output of each implementation for the same input, by name.
        tolerance: largest distance that rounding explains.

    Raises:
        UnequalError: shapes differ, a value is not finite, or a distance is larger than `tolerance`.
    """
    (first, mine), *others = outputs.items()
    greatest = 0.0
    if not torch.isfinite(mine).all():
        raise UnequalError(f"{first} returns values that are not finite")
    for name, other in others:
        if other.shape != mine.shape:
            raise UnequalError(
                f"{first} returns shape {tuple(mine.shape)}, but {name} returns {tuple(other.shape)}"
            )
        apart = distance(mine, other)
        if not apart <= tolerance:  # also true for NaN
            raise UnequalError(f"{first} and {name} are {apart:.2g} apart, more than {tolerance:.2g}")
        greatest = max(greatest, apart)
    return greatest
