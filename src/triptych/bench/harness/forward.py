"""A forward pass of ours beside a peer's: images per second in turn, outputs checked equal, and the machine's peaks."""

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
# How far rounding takes logits of equal networks apart, in units of the largest logit.
TOLERANCES = {"fp32": 1e-5, "bf16": 5e-2}


@dataclass(frozen=True, kw_only=True)
class Effort:
    """How long a suite measures."""

    rounds: int = 7
    seconds: float = 8.0
    """Least time spent on a comparison of two networks."""
    patience: float = 45.0
    """Most time spent on a comparison that other programs disturb."""
    sides: tuple[int, ...] = machine.SIDES
    copied: int = machine.COPIED
    peers: tuple[str, ...] = ("transformers", "timm")


HOW = (
    "Utilization is 2 x MACs x images/s over the measured peak of the precision. Ratios are of time. Rounds in which "
    f"other programs used more than {CALM:.0%} of the CPU were repeated for a while; what was taken in the "
    "worst one kept is said."
)

LAID = "Ours runs as in its pipelines: its weights were packed for the CPU before."


def measure_peaks(effort: Effort) -> tuple[dict[str, float], Table]:
    """FLOP/s of the best product in each precision, and the table of the machine's limits."""
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
        f"The fastest product of square matrices of sides {', '.join(map(str, effort.sides))}, by torch.mm; "
        "the fastest copy, bytes read and written."
    )
    return peaks, Table(title="Limits of the machine", description=description, columns=columns, rows=rows)


def compare(sides: Mapping[str, Forward], x: Tensor, tolerance: float, effort: Effort) -> dict[str, Any]:
    """Images per second of every side on `x`, and ours over each other's time.

    Raises:
        UnequalError: the sides do not compute the same.
    """
    work = {name: (lambda forward=forward: forward(x)) for name, forward in sides.items()}
    row = compare_seconds(work, tolerance, effort)
    for name in sides:  # the most images per second are those of the least seconds
        row[name] = Spread(*(len(x) / t for t in (row[name].median, row[name].high, row[name].low)))
    return row


@torch.inference_mode()
def compare_seconds(
    sides: Mapping[str, Callable[[], Tensor]], tolerance: float, effort: Effort
) -> dict[str, Any]:
    """Seconds of every side, and ours over each other's.

    Raises:
        UnequalError: the sides do not compute the same.
    """
    apart = check_equal({name: work() for name, work in sides.items()}, tolerance)
    return in_turn(sides, effort) | {"apart": apart if len(sides) > 1 else None}


def in_turn(sides: Mapping[str, Callable[[], object]], effort: Effort) -> dict[str, Any]:
    """Seconds of every side, ours over each other's, and what other programs took meanwhile."""
    times = {name: timed(work) for name, work in sides.items()}
    done = interleave(times, effort.rounds, effort.seconds, patience=effort.patience)
    row: dict[str, Any] = {name: Spread.of(seconds) for name, seconds in done.found.items()}
    row |= {
        f"ratio to {name}": ratio(done.found["ours"], t) for name, t in done.found.items() if name != "ours"
    }
    return row | {"others": done.others}


@contextlib.contextmanager
def frozen() -> Iterator[None]:
    """What is compiled inside takes weights as constants, and packs them for the CPU once."""
    with freezing():
        yield
    torch.compiler.reset()


def beside(peers: tuple[str, ...]) -> list[Column]:
    """The columns of what `compare` gives."""
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
