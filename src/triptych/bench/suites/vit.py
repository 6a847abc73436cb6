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

from triptych.bench.harness import machine
from triptych.bench.harness.cpu_contention import Others
from triptych.bench.harness.forward import (
    DTYPES,
    HOW,
    LAID,
    TOLERANCES,
    Effort,
    Forward,
    beside,
    compare,
    frozen,
    measure_peaks,
)
from triptych.bench.harness.report import Column, Report, Table
from triptych.bench.measurements.load_time import loading
from triptych.bench.measurements.startup_time import starting
from triptych.bench.peers import build as peers
from triptych.kernels.inductor import backend_error
from triptych.layers.resnet import packed
from triptych.models.configs.vit import macs
from triptych.models.registry import create
from triptych.models.swin import Swin
from triptych.models.vit import ViT

log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Plan(Effort):
    """What is measured, and for how long."""

    networks: tuple[str, ...] = ("vit-ti16", "vit-b16")
    batches: tuple[int, ...] = (1, 8)
    changes: tuple[tuple[str, Any], ...] = ()
    """Fields of the networks' configs that are changed: (("depth", 2), ...)."""
    compiled: tuple[str, ...] = ("vit-b16",)
    """Those that are compiled too, which takes half a minute for each side, precision and batch."""
    loaded: str = "vit-l16"
    started: tuple[str, ...] = ("vit-ti16", "swin-t")


TINY = (
    ("depth", 2),
    ("embed_dim", 48),
    ("num_heads", 3),
    ("mlp_ratio", 2.0),
    ("image_size", 32),
    ("num_classes", 10),
)
FULL = Plan()
QUICK = Plan(
    networks=("vit-ti16",),
    batches=(2,),
    changes=TINY,
    compiled=(),
    loaded="vit-ti16",
    started=("vit-ti16",),
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
    there, report.notes = peers.present(plan.peers)
    with tempfile.TemporaryDirectory() as folder:
        # The programs come first: they are best measured while this one is small.
        networks = {name: make(plan, name) for name in plan.started}
        started = starting(networks, Path(folder), there, plan.rounds, plan.patience)
    with tempfile.TemporaryDirectory() as folder:
        loaded = loading(
            plan.loaded, make(plan, plan.loaded), Path(folder), there, max(plan.rounds // 2, 1), plan.patience
        )
    peaks, limits = measure_peaks(plan)
    speed = throughput(plan, there, peaks)
    if plan.compiled:
        try:
            speed.rows += throughput(plan, there, peaks, compiled=True).rows
        except backend_error() as problem:
            report.notes.append(f"Not all compiled is measured: {str(problem).splitlines()[0]}")
    report.tables = [limits, speed, loaded, started]
    facts["taken by others"] = others.said()
    return report


def make(plan: Plan, name: str) -> Any:
    """A network of the plan, with random weights; its head's too, which else start at zero and hide all errors."""
    torch.manual_seed(0)
    net = create(name, **dict(plan.changes))
    assert isinstance(net, ViT | Swin)
    assert isinstance(net.head, nn.Linear)
    nn.init.trunc_normal_(net.head.weight, std=0.02)
    return net.eval()


def throughput(plan: Plan, there: Sequence[str], peaks: dict[str, float], compiled: bool = False) -> Table:
    """Images a second of each network, precision and batch, beside each peer that is there."""
    table = Table(
        title="Images a second",
        says=(
            f"Forward passes, weights and inputs random. {LAID} Compiled is `torch.compile` with weights frozen. "
            f"{HOW}"
        ),
        columns=[
            Column(key="mode", heading="mode"),
            Column(key="network", heading="network"),
            Column(key="dtype", heading="precision"),
            Column(key="batch", heading="batch", form="d"),
            *beside(tuple(there)),
        ],
    )
    mode, networks = ("compiled", plan.compiled) if compiled else ("eager", plan.networks)
    for network, (label, dtype) in itertools.product(networks, DTYPES.items()):
        net = make(plan, network)
        theirs = peers.build(net, dtype, tuple(there))
        net = net.to(dtype)
        for batch in plan.batches:
            sides: dict[str, Forward] = {"ours": net, **theirs}
            with frozen() if compiled else packed(net):
                called = {who: torch.compile(side) for who, side in sides.items()} if compiled else sides
                row = compare(called, images(net, batch, dtype), TOLERANCES[label], plan)
            used = 2 * macs(net.config) * row["ours"].median / peaks[label]
            row |= {
                "mode": mode,
                "network": network,
                "dtype": label,
                "batch": batch,
                "utilisation": used,
            }
            table.rows.append(row)
            said = ", ".join(f"{name} {row[name].median:.3g}" for name in sides)
            log.info("%s, %s, %s, batch %d: images/s %s", mode, network, label, batch, said)
    return table


def images(net: ViT | Swin, batch: int, dtype: torch.dtype) -> torch.Tensor:
    """Random images of the network's own size."""
    shape = (batch, net.config.in_channels, *net.config.image_size)
    return torch.randn(shape, generator=torch.Generator().manual_seed(1)).to(dtype)
