"""`triptych bench vit`: speed, loading and startup of a Vision Transformer."""

import itertools
import logging
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from triptych.bench.harness.forward import (
    DTYPES,
    METHOD,
    PACKING,
    Effort,
    measure_peaks,
)
from triptych.bench.harness.report import Column, Report, Table
from triptych.bench.harness.suite import add_compiled, suite
from triptych.bench.measurements.forward_throughput import random_images, throughput_rows, throughput_table
from triptych.bench.measurements.load_time import loading
from triptych.bench.measurements.startup_time import starting
from triptych.bench.peers import build as peers
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
    """Networks that are also measured compiled, which takes half a minute for each library, precision and batch."""
    loaded: str = "vit-l16"
    """Network whose loading is measured."""
    started: tuple[str, ...] = ("vit-ti16", "swin-t")
    """Networks whose startup is measured."""


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


@suite("vit", FULL)
def run(report: Report, plan: Plan) -> None:
    """Measure everything in the plan."""
    available, report.notes = peers.present(plan.peers)
    with tempfile.TemporaryDirectory() as folder:
        # Other programs are measured first, while this process uses little memory.
        networks = {name: make(plan, name) for name in plan.started}
        started = starting(networks, Path(folder), available, plan.rounds, plan.patience)
    with tempfile.TemporaryDirectory() as folder:
        loaded = loading(
            plan.loaded,
            make(plan, plan.loaded),
            Path(folder),
            available,
            max(plan.rounds // 2, 1),
            plan.patience,
        )
    peaks, limits = measure_peaks(plan)
    speed = throughput(plan, available, peaks)
    if plan.compiled:
        add_compiled(report, speed, lambda: throughput(plan, available, peaks, compiled=True).rows)
    report.tables = [limits, speed, loaded, started]


def make(plan: Plan, name: str) -> Any:
    """Create a network of the plan with random weights, including the head, whose default of zero would hide errors."""
    torch.manual_seed(0)
    net = create(name, **dict(plan.changes))
    assert isinstance(net, ViT | Swin)
    assert isinstance(net.head, nn.Linear)
    nn.init.trunc_normal_(net.head.weight, std=0.02)
    return net.eval()


def throughput(
    plan: Plan, available: Sequence[str], peaks: dict[str, float], compiled: bool = False
) -> Table:
    """Measure images per second of each network, precision and batch size, compared with each library."""
    table = throughput_table(
        f"Forward passes with random weights and inputs. {PACKING} Compiled means `torch.compile` with frozen weights. "
        f"{METHOD}",
        Column(key="network", heading="network"),
        available,
    )
    for network, (label, dtype) in itertools.product(
        plan.compiled if compiled else plan.networks, DTYPES.items()
    ):
        net = make(plan, network)
        theirs = peers.build(net, dtype, tuple(available))
        net = net.to(dtype)
        inputs = (images(net, batch, dtype) for batch in plan.batches)
        cost, subject = macs(net.config), {"network": network}
        table.rows += throughput_rows(net, theirs, inputs, cost, subject, label, peaks, plan, compiled)
    return table


def images(net: ViT | Swin, batch: int, dtype: torch.dtype) -> torch.Tensor:
    """Return random images of the network's input size."""
    return random_images(net, net.config.image_size, batch, dtype)
