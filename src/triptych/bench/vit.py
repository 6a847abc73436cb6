"""`triptych bench vit`: how fast it runs, loads and starts."""

import itertools
import logging
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from triptych.bench import machine, peers
from triptych.bench.loading import loading
from triptych.bench.others import Others
from triptych.bench.report import Column, Report, Table
from triptych.bench.starting import starting
from triptych.bench.timing import CALM, Spread, check_equal, interleave, ratio, timed
from triptych.models.registry import create
from triptych.models.vit import ViT
from triptych.models.vit_config import macs

log = logging.getLogger(__name__)

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
# How far rounding takes logits of equal networks apart, in units of the largest logit.
TOLERANCES = {"fp32": 1e-5, "bf16": 5e-2}


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What is measured, and for how long."""

    networks: tuple[str, ...] = ("vit-ti16", "vit-b16")
    batches: tuple[int, ...] = (1, 8)
    changes: tuple[tuple[str, Any], ...] = ()
    """Fields of the networks' configs that are changed: (("depth", 2), ...)."""
    loaded: str = "vit-l16"
    started: str = "vit-ti16"
    rounds: int = 7
    seconds: float = 8.0
    """Least time spent on a comparison of two networks."""
    patience: float = 45.0
    """Most time spent on a comparison that other programs disturb."""
    sides: tuple[int, ...] = machine.SIDES
    copied: int = machine.COPIED
    peers: tuple[str, ...] = ("transformers", "timm")


TINY = (
    ("depth", 2),
    ("embed_dim", 48),
    ("num_heads", 3),
    ("mlp_dim", 96),
    ("image_size", 32),
    ("num_classes", 10),
)
FULL = Plan()
QUICK = Plan(
    networks=("vit-ti16",),
    batches=(2,),
    changes=TINY,
    loaded="vit-ti16",
    rounds=1,
    seconds=0.0,
    patience=0.0,
    sides=(256,),
    copied=2**22,
)


def run(plan: Plan = FULL, command: str = "triptych bench vit --out docs") -> Report:
    """Measure everything in the plan. Nothing else should run meanwhile."""
    others = Others()
    facts = machine.describe()
    report = Report(suite="vit", command=command, machine=facts)
    known = peers.available(plan.peers)
    there = tuple(name for name, missing in known.items() if missing is None)
    report.notes += [f"{name} is not measured: {missing}." for name, missing in known.items() if missing]
    with tempfile.TemporaryDirectory() as folder:
        # The programs come first: they are best measured while this one is small.
        started = starting(make(plan, plan.started), Path(folder), there, plan.rounds, plan.patience)
    with tempfile.TemporaryDirectory() as folder:
        loaded = loading(
            plan.loaded, make(plan, plan.loaded), Path(folder), there, max(plan.rounds // 2, 1), plan.patience
        )
    peaks, limits = measure_peaks(plan)
    report.tables = [limits, throughput(plan, there, peaks), loaded, started]
    share = others.share()
    facts["taken by others"] = (
        "unknown" if share is None else f"{share:.0%} of the processors, over the whole run"
    )
    return report


def make(plan: Plan, name: str) -> ViT:
    """A network of the plan, with random weights; its head's too, which else start at zero and hide all errors."""
    torch.manual_seed(0)
    net = create(name, **dict(plan.changes))
    assert isinstance(net, ViT)
    assert isinstance(net.head, nn.Linear)
    nn.init.trunc_normal_(net.head.weight, std=0.02)
    return net.eval()


def measure_peaks(plan: Plan) -> tuple[dict[str, float], Table]:
    """FLOP/s of the best product in each precision, and the table of the machine's limits."""
    found = {
        name: machine.product_peak(dtype, plan.sides, plan.rounds, plan.patience)
        for name, dtype in DTYPES.items()
    }
    rows = [
        {"what": f"matrix product, {name}", "peak": f"{peak / 1e9:.0f} GFLOP/s"}
        for name, peak in found.items()
    ]
    copied = machine.copy_peak(plan.copied, plan.rounds, plan.patience)
    rows.append({"what": f"copy of {plan.copied >> 20} MiB", "peak": f"{copied / 1e9:.1f} GB/s"})
    for row in rows:
        log.info("%s: %s", row["what"], row["peak"])
    columns = [Column(key="what", heading="limit"), Column(key="peak", heading="measured")]
    says = (
        f"The fastest square product of sides {', '.join(map(str, plan.sides))}, by torch.mm; the fastest copy, "
        "bytes read and written."
    )
    return found, Table(title="What the machine can do", says=says, columns=columns, rows=rows)


def throughput(plan: Plan, there: Sequence[str], peaks: dict[str, float]) -> Table:
    """Images a second of each network, precision and batch, beside each peer that is there."""
    table = Table(
        title="Images a second",
        says=(
            "Eager forward passes, weights and inputs random. Utilisation is 2 x MACs x images/s over the measured "
            "peak of the precision. Ratios are of time. Rounds in which other programs took more than "
            f"{CALM:.0%} of the processors were repeated for a while; what was taken in the worst one kept is said."
        ),
        columns=[
            Column(key="network", heading="network"),
            Column(key="dtype", heading="precision"),
            Column(key="batch", heading="batch", form="d"),
            Column(key="ours", heading="ours", form=".3g"),
            Column(key="utilisation", heading="utilisation", form=".0%"),
        ],
    )
    for name in there:
        table.columns.append(Column(key=name, heading=name, form=".3g"))
        table.columns.append(Column(key=f"ratio to {name}", heading=f"ours / {name}", form=".2f"))
    table.columns.append(Column(key="apart", heading="outputs apart", form=".0e"))
    table.columns.append(Column(key="others", heading="others took", form=".0%"))
    for network, (label, dtype) in itertools.product(plan.networks, DTYPES.items()):
        net = make(plan, network)
        theirs = peers.build(net, dtype, tuple(there))
        net = net.to(dtype)
        for batch in plan.batches:
            sides = {"ours": net, **theirs}
            row = compare(sides, images(net, batch, dtype), TOLERANCES[label], plan)
            best = 2 * macs(net.config) * row["ours"].median
            row |= {"network": network, "dtype": label, "batch": batch, "utilisation": best / peaks[label]}
            table.rows.append(row)
            said = ", ".join(f"{name} {row[name].median:.3g}" for name in sides)
            log.info("%s, %s, batch %d: images/s %s", network, label, batch, said)
    return table


@torch.inference_mode()
def compare(sides: dict[str, peers.Forward], x: torch.Tensor, tolerance: float, plan: Plan) -> dict[str, Any]:
    """Images a second of every side on `x`, and ours over each other's time.

    Raises:
        UnequalError: the sides do not compute the same.
    """
    apart = check_equal({name: forward(x) for name, forward in sides.items()}, tolerance)
    work = {name: timed(lambda forward=forward: forward(x)) for name, forward in sides.items()}
    done = interleave(work, plan.rounds, plan.seconds, patience=plan.patience)
    times = done.found
    row: dict[str, Any] = {name: Spread.of(len(x) / t for t in taken) for name, taken in times.items()}
    row |= {f"ratio to {name}": ratio(times["ours"], t) for name, t in times.items() if name != "ours"}
    return row | {"others": done.others, "apart": apart if len(sides) > 1 else None}


def images(net: ViT, batch: int, dtype: torch.dtype) -> torch.Tensor:
    """Random images of the network's own size."""
    shape = (batch, net.config.in_channels, *net.config.image_size)
    return torch.randn(shape, generator=torch.Generator().manual_seed(1)).to(dtype)
