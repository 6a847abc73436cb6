"""Time and memory against the number of pixels, and the exponents of their growth."""

import logging
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from triptych.bench.harness.report import Column, Table
from triptych.bench.harness.subprocesses import run_child
from triptych.bench.harness.timing import Spread, interleave

log = logging.getLogger(__name__)


def scaling(
    networks: dict[str, dict[str, Any]],
    sides: Sequence[int],
    rounds: int,
    seconds: float,
    patience: float = 0.0,
) -> tuple[Table, Table]:
    """Measure seconds and memory of square images of several sizes in each network, and fit the exponents.

    Args:
        networks: changed config fields by name of the network.
        sides: sides of the images in pixels.
        rounds: number of processes per measurement.
        seconds: least time that a process spends on forward passes.
        patience: as in `interleave`.
    """
    rows: list[dict[str, Any]] = []
    threads = torch.get_num_threads()
    for side in sides:
        arguments = {
            name: tuple(map(str, (name, repr(changes), side, seconds, threads)))
            for name, changes in networks.items()
        }
        calls = {
            name: (lambda options=options: run_child("scaling", *options).reported)
            for name, options in arguments.items()
        }
        done = interleave(calls, rounds, warmup=0, patience=patience)
        row: dict[str, Any] = {"side": side, "pixels": side * side, "others": done.others}
        for name, reports in done.measurements.items():
            row[f"{name} seconds"] = Spread.of(item["seconds"] for item in reports)
            row[f"{name} memory"] = Spread.of(item["grown"] / 1e9 for item in reports)
        rows.append(row)
        log.info(
            "%d px: %s", side, ", ".join(f"{name} {row[f'{name} seconds'].median:.3g} s" for name in networks)
        )
    columns = [
        Column(key="side", heading="side, px", form="d"),
        Column(key="pixels", heading="pixels", form="d"),
    ]
    for what, unit, form in (("seconds", "s", ".3g"), ("memory", "GB", ".3g")):
        columns += [Column(key=f"{name} {what}", heading=f"{name}, {unit}", form=form) for name in networks]
    columns.append(Column(key="others", heading="used by others", form=".0%"))
    description = (
        "One square image in fp32 through our networks, eager. Each value comes from processes of its own: the median "
        "time of the passes after the first, and the growth of the process's peak memory (VmHWM) by the first pass."
    )
    grown = Table(
        title="Growth with the number of pixels", description=description, columns=columns, rows=rows
    )
    return grown, exponents(rows, tuple(networks))


def exponents(rows: Sequence[dict[str, Any]], networks: Sequence[str]) -> Table:
    """Fit cost = c pixels^p for each network, over all sizes and between the two largest; return a table of p."""
    fitted = []
    for name in networks:
        row: dict[str, Any] = {"network": name}
        for what in ("seconds", "memory"):
            pixels = np.array([item["pixels"] for item in rows], dtype=float)
            costs = np.array([item[f"{name} {what}"].median for item in rows])
            row[what] = exponent(pixels, costs)
            row[f"last {what}"] = exponent(pixels[-2:], costs[-2:])
        fitted.append(row)
    columns = [
        Column(key="network", heading="network"),
        Column(key="seconds", heading="time, all sizes", form=".2f"),
        Column(key="last seconds", heading="time, two largest", form=".2f"),
        Column(key="memory", heading="memory, all sizes", form=".2f"),
        Column(key="last memory", heading="memory, two largest", form=".2f"),
    ]
    description = (
        "The exponent p of cost = c pixels^p, fitted by least squares of the logarithms. Windows make Swin's attention "
        "linear in the number of pixels (Equation 2 of its paper), while ViT's is quadratic (Equation 1). ViT's other "
        "products are linear, so its exponent approaches 2 only for large images. Its memory is linear, because the "
        "fused kernel never stores all attention weights."
    )
    return Table(
        title="Exponents",
        description=description,
        columns=columns,
        rows=fitted,
        image="images/swin_scaling.png",
    )


def exponent(x: np.ndarray, y: np.ndarray) -> float | None:
    """Return the slope of the line through the logarithms; None if fewer than two points are positive."""
    good = (x > 0) & (y > 0)
    if len(set(x[good])) < 2:
        return None
    return float(np.polyfit(np.log(x[good]), np.log(y[good]), 1)[0])
