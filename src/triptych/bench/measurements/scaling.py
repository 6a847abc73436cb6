"""Time and memory against the number of pixels, and the exponents that they grow with."""

import logging
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from triptych.bench.harness.report import Column, Table
from triptych.bench.harness.subprocesses import python
from triptych.bench.harness.timing import Spread, interleave

log = logging.getLogger(__name__)

MEASURE = """
import ast
import torch
from triptych.models.registry import create
name, changes, side, seconds, threads = sys.argv[1:]
torch.set_num_threads(int(threads))
net = create(name, **ast.literal_eval(changes)).eval()
image = torch.randn(1, 3, int(side), int(side))
with torch.inference_mode():
    sum(float(p.sum()) for p in net.parameters())
    forget_peak()
    before, taken = memory()[0], []
    net(image)
    grown = memory()[1] - before
    while not taken or sum(taken) < float(seconds):
        start = time.perf_counter()
        net(image)
        taken.append(time.perf_counter() - start)
say(seconds=sorted(taken)[len(taken) // 2], grown=grown)
"""


def scaling(
    networks: dict[str, dict[str, Any]],
    sides: Sequence[int],
    rounds: int,
    seconds: float,
    patience: float = 0.0,
) -> tuple[Table, Table]:
    """Seconds and memory of a square image in each network, by its side in pixels, and what they grow like.

    Args:
        networks: names, with the fields of their configs that are changed.
        seconds: least time spent on the passes of one process; every figure is made in processes of its own.
    """
    rows: list[dict[str, Any]] = []
    threads = torch.get_num_threads()
    for side in sides:
        asked = {name: (name, repr(changes), side, seconds, threads) for name, changes in networks.items()}
        calls = {name: (lambda one=one: python(MEASURE, *map(str, one)).said) for name, one in asked.items()}
        done = interleave(calls, rounds, warmup=0, patience=patience)
        row: dict[str, Any] = {"side": side, "pixels": side * side, "others": done.others}
        for name, said in done.found.items():
            row[f"{name} seconds"] = Spread.of(one["seconds"] for one in said)
            row[f"{name} memory"] = Spread.of(one["grown"] / 1e9 for one in said)
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
    columns.append(Column(key="others", heading="others took", form=".0%"))
    says = (
        "One square image in fp32, ours, eager. Every figure is from processes of its own: the median pass after the "
        "first, and how far the first raised the process's memory (VmHWM) above what was resident before."
    )
    grown = Table(title="Growth with the number of pixels", says=says, columns=columns, rows=rows)
    return grown, exponents(rows, tuple(networks))


def exponents(rows: Sequence[dict[str, Any]], networks: Sequence[str]) -> Table:
    """p of cost = c pixels^p for each network: fitted over all sizes, and between the two largest."""
    found = []
    for name in networks:
        row: dict[str, Any] = {"network": name}
        for what in ("seconds", "memory"):
            pixels = np.array([one["pixels"] for one in rows], dtype=float)
            costs = np.array([one[f"{name} {what}"].median for one in rows])
            row[what] = exponent(pixels, costs)
            row[f"last {what}"] = exponent(pixels[-2:], costs[-2:])
        found.append(row)
    columns = [
        Column(key="network", heading="network"),
        Column(key="seconds", heading="time, all sizes", form=".2f"),
        Column(key="last seconds", heading="time, two largest", form=".2f"),
        Column(key="memory", heading="memory, all sizes", form=".2f"),
        Column(key="last memory", heading="memory, two largest", form=".2f"),
    ]
    says = (
        "p of cost = c pixels^p, by least squares of the logarithms. Windows make Swin's attention linear in the "
        "pixels (Equation 2 of its paper) where ViT's is quadratic (Equation 1); ViT's other products are linear, so "
        "that its exponent rises towards 2 with the size. Its memory stays linear: the fused kernel never holds all of "
        "its weights."
    )
    return Table(title="Exponents", says=says, columns=columns, rows=found, picture="images/swin_scaling.png")


def exponent(x: np.ndarray, y: np.ndarray) -> float | None:
    """Slope of the line through the logarithms; None where fewer than two points are positive."""
    good = (x > 0) & (y > 0)
    if len(set(x[good])) < 2:
        return None
    return float(np.polyfit(np.log(x[good]), np.log(y[good]), 1)[0])
