"""How two sides are compared: in turn on the same work, after their outputs were found equal."""

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
    """Two sides gave different results for the same work, so that their times mean nothing."""


@dataclass(frozen=True)
class Spread:
    """Several measurements of one thing: their median, and the least and the greatest."""

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, values: Iterable[float]) -> "Spread":
        values = sorted(values)
        return cls(statistics.median(values), values[0], values[-1])

    def scaled(self, by: float) -> "Spread":
        """In another unit; `by` is positive."""
        return Spread(by * self.median, by * self.low, by * self.high)

    def inverted(self) -> "Spread":
        """Of a ratio, that of the other way round."""
        return Spread(1 / self.median, 1 / self.high, 1 / self.low)


def timed(work: Callable[[], object], clock: Callable[[], float] = time.perf_counter) -> Callable[[], float]:
    """`work` as a measurement: the seconds that a call of it takes."""

    def seconds() -> float:
        start = clock()
        work()
        return clock() - start

    return seconds


@dataclass(frozen=True)
class Rounds(Generic[T]):
    """What a comparison measured."""

    found: dict[str, list[T]]
    """Side -> its measurements; the i-th of one was made next to the i-th of another."""
    others: float
    """The share of the CPU that other programs took in the worst of these rounds; 0 if unknown."""


CALM = 0.05  # share of the CPU that others may take in a round that counts


def interleave(
    sides: Mapping[str, Callable[[], T]],
    rounds: int = 5,
    seconds: float = 0.0,
    warmup: int = 1,
    patience: float = 0.0,
) -> Rounds[T]:
    """Measure each side in turn, A B A B: what slows the machine for a while slows all of them.

    Args:
        sides: name -> a call that makes one measurement.
        rounds: smallest number of measurements per side.
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
    """Ours over theirs, round by round, so that a slow moment of the machine cancels."""
    return Spread.of(a / b for a, b in zip(ours, theirs, strict=True))


def distance(ours: Tensor, theirs: Tensor) -> float:
    """The largest difference, in units of the largest value of theirs."""
    scale = theirs.double().abs().max().clamp(min=1e-30)
    return float((ours.double() - theirs.double()).abs().max() / scale)


def check_equal(outputs: Mapping[str, Tensor], tolerance: float) -> float:
    """The greatest `distance` of any side's output from the first side's.

    Args:
        outputs: name -> what a side made of the common input.
        tolerance: how far rounding alone may take them.

    Raises:
        UnequalError: shapes differ, something is not finite, or they are further apart than `tolerance`.
    """
    (first, mine), *others = outputs.items()
    greatest = 0.0
    if not torch.isfinite(mine).all():
        raise UnequalError(f"{first} gives numbers that are not finite")
    for name, other in others:
        if other.shape != mine.shape:
            raise UnequalError(f"{first} gives {tuple(mine.shape)} where {name} gives {tuple(other.shape)}")
        apart = distance(mine, other)
        if not apart <= tolerance:  # also where it is NaN
            raise UnequalError(f"{first} and {name} are {apart:.2g} apart, more than {tolerance:.2g}")
        greatest = max(greatest, apart)
    return greatest
