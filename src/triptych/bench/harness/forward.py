"""Compare forward passes with those of reference implementations, and measure the peak throughput of the machine."""

import contextlib
import logging
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from triptych.bench.harness import machine
from triptych.bench.harness.report import Column, Table
from triptych.bench.harness.timing import CALM, Spread, check_equal, interleave, ratio, timed
from triptych.kernels.inductor import freezing

log = logging.getLogger(__name__)

Forward = Callable[[Tensor], Tensor]

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
# Largest difference between logits of equal networks that rounding explains, relative to the largest logit.
TOLERANCES = {"fp32": 1e-5, "bf16": 5e-2}


@dataclass(frozen=True, kw_only=True)
class Effort:
    """How long a suite measures, and what it compares with."""

    rounds: int = 7
    """Smallest number of measurements per comparison."""
    seconds: float = 8.0
    """Least time spent on a comparison."""
    patience: float = 45.0
    """Most time spent on a comparison that other programs disturb."""
    sides: tuple[int, ...] = machine.SIDES
    """Sides of the matrices whose product is timed."""
    copied: int = machine.COPIED
    """Bytes of the copy that is timed."""
    peers: tuple[str, ...] = ("transformers", "timm")
    """Libraries to compare with."""


METHOD = (
    "Utilization is 2 x MACs x images/s, divided by the measured peak of the precision. Ratios are of times. Rounds in "
    f"which other programs used more than {CALM:.0%} of the CPU were repeated, up to a time limit; the last column is "
    "their share of the CPU in the worst round that counts."
)

PACKING = "Our network runs as in our pipelines, with weights packed for the CPU beforehand."


def measure_peaks(effort: Effort) -> tuple[dict[str, float], Table]:
    """Measure the peak FLOP/s of each precision; return them, and a table of the machine's limits."""
    peaks = {
        name: machine.product_peak(dtype, effort.sides, effort.rounds, effort.patience)
        for name, dtype in DTYPES.items()
    }
    rows = [
        {"what": f"matrix product, {name}", "peak": f"{peak / 1e9:.0f} GFLOP/s"}
        for name, peak in peaks.items()
    ]
    copied = machine.copy_peak(effort.copied, effort.rounds, effort.patience)
    rows.append({"what": f"copy of {effort.copied >> 20} MiB", "peak": f"{copied / 1e9:.1f} GB/s"})
    for row in rows:
        log.info("%s: %s", row["what"], row["peak"])
    columns = [Column(key="what", heading="limit"), Column(key="peak", heading="measured")]
    description = (
        f"The fastest product of square matrices with sides of {', '.join(map(str, effort.sides))}, by torch.mm, and "
        "the fastest copy, counting bytes read and written."
    )
    return peaks, Table(title="Limits of the machine", description=description, columns=columns, rows=rows)


def compare(sides: Mapping[str, Forward], x: Tensor, tolerance: float, effort: Effort) -> dict[str, Any]:
    """Measure the images per second of each implementation on `x`, and the ratio of our time to that of each other one.

    Raises:
        UnequalError: the outputs differ by more than `tolerance`.
    """
    work = {name: (lambda forward=forward: forward(x)) for name, forward in sides.items()}
    row = compare_seconds(work, tolerance, effort)
    for name in sides:  # the highest speed is that of the lowest time
        row[name] = Spread(*(len(x) / t for t in (row[name].median, row[name].high, row[name].low)))
    return row


@torch.inference_mode()
def compare_seconds(
    sides: Mapping[str, Callable[[], Tensor]], tolerance: float, effort: Effort
) -> dict[str, Any]:
    """Measure the seconds of each implementation, and the ratio of ours to each other one.

    Raises:
        UnequalError: the outputs differ by more than `tolerance`.
    """
    apart = check_equal({name: work() for name, work in sides.items()}, tolerance)
    return in_turn(sides, effort) | {"apart": apart if len(sides) > 1 else None}


def in_turn(sides: Mapping[str, Callable[[], object]], effort: Effort) -> dict[str, Any]:
    """Measure the seconds of each implementation in alternation, the ratio of ours to each other one, and the share of
    the CPU that other programs used."""
    times = {name: timed(work) for name, work in sides.items()}
    done = interleave(times, effort.rounds, effort.seconds, patience=effort.patience)
    row: dict[str, Any] = {name: Spread.of(seconds) for name, seconds in done.measurements.items()}
    row |= {
        f"ratio to {name}": ratio(done.measurements["ours"], t)
        for name, t in done.measurements.items()
        if name != "ours"
    }
    return row | {"others": done.others}


@contextlib.contextmanager
def frozen() -> Iterator[None]:
    """Let `torch.compile` treat weights as constants within the block, so that it packs them for the CPU once."""
    with freezing():
        yield
    torch.compiler.reset()


def comparison_columns(peers: tuple[str, ...]) -> list[Column]:
    """Return the columns for the results of `compare`."""
    columns = [
        Column(key="ours", heading="ours", form=".3g"),
        Column(key="utilization", heading="utilization", form=".0%"),
    ]
    for name in peers:
        columns.append(Column(key=name, heading=name, form=".3g"))
        columns.append(Column(key=f"ratio to {name}", heading=f"ours / {name}", form=".2f"))
    columns.append(Column(key="apart", heading="outputs apart", form=".0e"))
    columns.append(Column(key="others", heading="used by others", form=".0%"))
    return columns
