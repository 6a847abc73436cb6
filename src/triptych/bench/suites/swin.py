"""`triptych bench swin`: speed and memory of a Swin Transformer, and their growth with the number of pixels."""

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
    TOLERANCES,
    Effort,
    measure_peaks,
)
from triptych.bench.harness.report import Column, Report, Table
from triptych.bench.harness.suite import add_compiled, suite
from triptych.bench.measurements.forward_throughput import random_images, throughput_rows, throughput_table
from triptych.bench.measurements.peak_memory import memory
from triptych.bench.measurements.scaling import scaling
from triptych.bench.peers import build as peers
from triptych.models.configs.swin import macs, maps_at
from triptych.models.registry import create
from triptych.models.swin import Swin
from triptych.plots.scaling import Curve
from triptych.plots.scaling import scaling as drawn

log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Plan(Effort):
    """What is measured, and for how long."""

    network: str = "swin-t"
    changes: tuple[tuple[str, Any], ...] = ()
    """Fields of the network's config that are changed."""
    sizes: tuple[tuple[int, int], ...] = ((224, 224), (256, 256))
    """A size whose feature maps consist of complete windows, and one whose maps are padded."""
    batches: tuple[int, ...] = (1, 8)
    compiled: tuple[tuple[int, int], ...] = ((224, 224),)
    """Sizes that are also measured compiled, which takes about a minute for each library, precision and batch."""
    scaled: tuple[tuple[str, tuple[tuple[str, Any], ...]], ...] = (("swin-t", ()), ("vit-s16", ()))
    """Networks whose growth is measured, with changed config fields."""
    sides_px: tuple[int, ...] = (224, 448, 672, 896, 1120, 1344)
    """Sides of the images for the growth."""
    rounds: int = 5
    seconds: float = 5.0
    patience: float = 30.0
    sides: tuple[int, ...] = (1024, 2048)


TINY = (("embed_dim", 16), ("depths", (2, 2)), ("num_heads", (1, 2)), ("window_size", 7), ("num_classes", 10))
FULL = Plan()
QUICK = Plan(
    changes=(*TINY, ("image_size", 56)),
    sizes=((56, 56), (64, 72)),
    batches=(2,),
    compiled=(),
    scaled=(("swin-t", TINY), ("vit-s16", (("depth", 1), ("embed_dim", 48), ("num_heads", 3)))),
    sides_px=(32, 64),
    rounds=1,
    seconds=0.0,
    patience=0.0,
    sides=(256,),
    copied=2**22,
)


@suite("swin", FULL)
def run(report: Report, plan: Plan) -> None:
    """Measure everything in the plan."""
    available, report.notes = peers.present(plan.peers)
    # Other programs are measured first, while this process uses little memory.
    networks = {name: dict(changes) for name, changes in plan.scaled}
    grown, exponents = scaling(networks, plan.sides_px, min(plan.rounds, 2), plan.seconds / 2, plan.patience)
    report.figures[exponents.image] = growth_figure(grown, exponents, tuple(networks))
    with tempfile.TemporaryDirectory() as folder:
        batch = max(plan.batches)
        held = memory(
            plan.network,
            make(plan),
            Path(folder),
            available,
            plan.sizes,
            batch,
            DTYPES,
            TOLERANCES,
            min(plan.rounds, 2),
        )
    peaks, limits = measure_peaks(plan)
    speed = throughput(plan, available, peaks)
    if plan.compiled:
        add_compiled(report, speed, lambda: throughput(plan, available, peaks, compiled=True).rows)
    report.tables = [limits, speed, held, grown, exponents]


def make(plan: Plan) -> Swin:
    """Create the network of the plan with random weights. Those of attention and head are larger than the default
    initialization, under which logits would be zero and errors in branches would not show."""
    torch.manual_seed(0)
    net = create(plan.network, **dict(plan.changes))
    assert isinstance(net, Swin)
    for name, parameter in net.named_parameters():
        if name.endswith("bias_table"):
            nn.init.normal_(parameter)
        elif name.endswith(("attn.qkv.weight", "attn.proj.weight", "head.weight")):
            nn.init.normal_(parameter, std=parameter.shape[1] ** -0.5)
    return net.eval()


def throughput(
    plan: Plan, available: Sequence[str], peaks: dict[str, float], compiled: bool = False
) -> Table:
    """Measure images per second at each size, precision and batch size, compared with each library."""
    table = throughput_table(
        f"Forward passes of {plan.network} with random weights and inputs. {PACKING} Compiled means `torch.compile` "
        f"with frozen weights, separately for each library, shape and precision. {METHOD} timm shifts feature maps "
        "before it pads them, so that its outputs differ where maps are padded; it is left out there.",
        Column(key="size", heading="size"),
        available,
    )
    for (label, dtype), size in itertools.product(DTYPES.items(), plan.compiled if compiled else plan.sizes):
        net = make(plan)
        maps = zip(maps_at(net.config, size), net.config.window_size, strict=True)
        padded = any(map[axis] % window[axis] for map, window in maps for axis in (0, 1))
        # Networks are built for each size, since transformers' Swin changes its windows in place for some sizes.
        theirs = peers.build(net, dtype, tuple(name for name in available if name != "timm" or not padded))
        net = net.to(dtype)
        inputs = (random_images(net, size, batch, dtype) for batch in plan.batches)
        cost, subject = macs(net.config, size), {"size": f"{size[0]} x {size[1]}"}
        table.rows += throughput_rows(net, theirs, inputs, cost, subject, label, peaks, plan, compiled)
    return table


def growth_figure(grown: Table, exponents: Table, networks: Sequence[str]) -> Any:
    """Plot the growth of time and memory."""
    known = {row["network"]: row for row in exponents.rows}
    panels = {
        title: {
            name: Curve(
                values=[row[f"{name} {what}"].median for row in grown.rows], exponent=known[name][what]
            )
            for name in networks
        }
        for title, what in (("seconds per image", "seconds"), ("memory of a forward pass, GB", "memory"))
    }
    sides = [row["side"] for row in grown.rows]
    below = "one image in fp32, on a CPU; exponents are fitted over all sizes"
    return drawn(sides, panels, "Time and memory against pixels", below)
