"""`triptych bench sweep`: cost of batch size, number of tokens and sampling steps. Image sizes are swept by `swin`."""

import logging
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from triptych.bench.harness.forward import (
    PACKING,
    TOLERANCES,
    Effort,
    Forward,
    compare,
    compare_seconds,
    in_turn,
    measure_peaks,
)
from triptych.bench.harness.report import Column, Report, Table
from triptych.bench.harness.suite import suite
from triptych.bench.harness.timing import Spread
from triptych.bench.measurements.scaling import exponent
from triptych.bench.peers import build as peers
from triptych.bench.suites.swin import Plan as SwinPlan
from triptych.bench.suites.swin import make as make_swin
from triptych.bench.suites.vit import Plan as ViTPlan
from triptych.bench.suites.vit import images
from triptych.bench.suites.vit import make as make_vit
from triptych.layers.attention import attention
from triptych.layers.resnet import packed
from triptych.models.configs import swin as swin_config
from triptych.models.configs import vit as vit_config
from triptych.models.swin import Swin
from triptych.pipelines.diffusion.pipeline import DiffusionPipeline
from triptych.plots.scaling import Curve, scaling

log = logging.getLogger(__name__)

BF16 = torch.bfloat16
MODEL = "ldm-emoji"  # ships with the package


@dataclass(frozen=True, kw_only=True)
class Plan(Effort):
    """What is measured, and for how long."""

    vit: ViTPlan = field(default_factory=lambda: ViTPlan(networks=("vit-b16",)))
    swin: SwinPlan = field(default_factory=SwinPlan)
    batches: tuple[int, ...] = (1, 2, 4, 8, 16)
    heads: tuple[int, int] = (12, 64)
    """Number of heads and head dimension of the attention, as in ViT-B."""
    tokens: tuple[int, ...] = (64, 256, 1024, 4096)
    steps: tuple[int, ...] = (5, 10, 20, 40)
    num_images: int = 2
    rounds: int = 5
    seconds: float = 4.0
    patience: float = 20.0
    sides: tuple[int, ...] = (1024, 2048)
    peers: tuple[str, ...] = ("transformers",)


FULL = Plan()
QUICK = Plan(
    vit=ViTPlan(networks=("vit-ti16",), changes=(("depth", 2), ("image_size", 32), ("num_classes", 10))),
    swin=SwinPlan(
        changes=(
            *(("embed_dim", 16), ("depths", (2, 2)), ("num_heads", (1, 2)), ("window_size", 7)),
            *(("num_classes", 10), ("image_size", 56)),
        )
    ),
    batches=(1, 2),
    heads=(2, 16),
    tokens=(16, 32),
    steps=(1, 2),
    num_images=1,
    rounds=1,
    seconds=0.0,
    patience=0.0,
    sides=(256,),
    copied=2**22,
)


@suite("sweep", FULL)
def run(report: Report, plan: Plan) -> None:
    """Measure everything in the plan."""
    available, report.notes = peers.present(plan.peers)
    peaks, limits = measure_peaks(plan)
    report.tables = [limits, batch(plan, available, peaks["bf16"]), tokens(plan), steps(plan)]
    for table, counted in zip(report.tables[1:], ("images in a batch", "tokens", "steps"), strict=True):
        table.image = f"images/sweep_{table.title.lower()}.png"
        report.figures[table.image] = drawn(table, counted)


def batch(plan: Plan, available: Sequence[str], peak: float) -> Table:
    """Measure images per second against the batch size."""
    table = Table(
        title="Batch",
        description=(
            f"Images per second in bf16, eager, with random weights and inputs; outputs are checked equal. {PACKING} "
            "Utilization is 2 x MACs x images/s, divided by the measured peak of bf16."
        ),
        columns=[
            Column(key="network", heading="network"),
            Column(key="n", heading="batch", form="d"),
            Column(key="ours", heading="ours", form=".3g"),
            Column(key="utilization", heading="utilization", form=".0%"),
        ],
    )
    for name in available:
        table.columns.append(Column(key=name, heading=name, form=".3g"))
        table.columns.append(Column(key=f"ratio to {name}", heading=f"ours / {name}", form=".2f"))
    table.columns.append(Column(key="others", heading="used by others", form=".0%"))
    for name, net in {
        plan.vit.networks[0]: make_vit(plan.vit, plan.vit.networks[0]),
        plan.swin.network: make_swin(plan.swin),
    }.items():
        theirs = peers.build(net, BF16, tuple(available))
        macs = swin_config.macs(net.config) if isinstance(net, Swin) else vit_config.macs(net.config)
        sides: dict[str, Forward] = {"ours": net.to(BF16), **theirs}
        for n in plan.batches:
            with packed(net):
                row = compare(sides, images(net, n, BF16), TOLERANCES["bf16"], plan)
            used = 2 * macs * row["ours"].median / peak
            table.rows.append(row | {"network": name, "n": n, "utilization": used})
            log.info("%s, batch %d: %.3g images/s", name, n, row["ours"].median)
    return table


def tokens(plan: Plan) -> Table:
    """Time self-attention against the number of tokens: ours, product, softmax and product, and PyTorch's fused
    kernel."""
    heads, width = plan.heads
    table = Table(
        title="Tokens",
        description=(
            f"Seconds of self-attention with {heads} heads of dimension {width} in bf16, without gradients: ours "
            "(`layers.attention`), the formula written out, and `scaled_dot_product_attention` called directly. "
            "Outputs are checked equal."
        ),
        columns=[
            Column(key="n", heading="tokens", form="d"),
            *(Column(key=key, heading=key, form=".3g") for key in ("ours", "written out", "fused kernel")),
            Column(key="ratio to written out", heading="ours / written out", form=".2f"),
            Column(key="ratio to fused kernel", heading="ours / fused kernel", form=".2f"),
            Column(key="others", heading="used by others", form=".0%"),
        ],
    )
    for n in plan.tokens:
        generator = torch.Generator().manual_seed(n)
        q, k, v = torch.randn(3, 1, heads, n, width, generator=generator).to(BF16)
        calls = {
            "ours": lambda q=q, k=k, v=v: attention(q, k, v),
            "written out": lambda q=q, k=k, v=v: written_out(q, k, v),
            "fused kernel": lambda q=q, k=k, v=v: F.scaled_dot_product_attention(q, k, v),
        }
        row = compare_seconds(calls, TOLERANCES["bf16"], plan)
        table.rows.append(row | {"n": n})
        log.info("%d tokens: %.3g s", n, row["ours"].median)
    return table


def written_out(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Compute Vaswani et al. 2017, Equation 1, literally."""
    return torch.softmax(q @ k.transpose(-2, -1) * q.shape[-1] ** -0.5, dim=-1) @ v


def steps(plan: Plan) -> Table:
    """Measure seconds per image against the number of sampling steps."""
    pipe = DiffusionPipeline(MODEL, dtype="bf16")
    table = Table(
        title="Steps",
        description=(
            f"Seconds per image of `{MODEL}` in bf16, {plan.num_images} at once, against the number of dpm++2m "
            "steps, with guidance. The costs of the prompt and the decoder do not depend on it."
        ),
        columns=[
            Column(key="n", heading="steps", form="d"),
            Column(key="ours", heading="s per image", form=".3g"),
            Column(key="each", heading="s per further step", form=".3g"),
            Column(key="others", heading="used by others", form=".0%"),
        ],
    )
    before: tuple[int, float] | None = None
    for n in plan.steps:

        def generate(n: int = n) -> object:
            return pipe.text_to_image(
                "a red apple",
                num_steps=n,
                num_images=plan.num_images,
                batch_size=plan.num_images,
                progress=False,
            )

        row: dict[str, Any] = in_turn({"ours": generate}, plan)
        seconds = Spread(
            *(t / plan.num_images for t in (row["ours"].median, row["ours"].low, row["ours"].high))
        )
        each = None if before is None else (seconds.median - before[1]) / (n - before[0])
        before = (n, seconds.median)
        table.rows.append(row | {"n": n, "ours": seconds, "each": each})
        log.info("%d steps: %.3g s per image", n, seconds.median)
    return table


def drawn(table: Table, counted: str) -> Any:
    """Plot a table: a curve for each network or implementation."""
    curves: dict[str, Curve] = {}
    for network in dict.fromkeys(row.get("network") for row in table.rows):
        rows = [row for row in table.rows if row.get("network") == network]
        sides = ("ours", "written out", "fused kernel") if counted == "tokens" else ("ours",)
        for side in sides:
            values = [row[side].median for row in rows]
            power = exponent(np.array([row["n"] for row in rows], dtype=float), np.array(values))
            curves[network or side] = Curve(values=values, exponent=power)
    xs = sorted({row["n"] for row in table.rows})
    unit = "images per second" if counted.startswith("images") else "seconds"
    return scaling(xs, {unit: curves}, table.title, "bf16, on a CPU; exponents over all sizes", counted)
