"""`triptych bench train`: training steps compared with those of diffusers, transformers and timm, and the overhead of
the training loop."""

import itertools
import logging
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from triptych.bench.harness.forward import DTYPES, METHOD, Effort, comparison_columns, in_turn, measure_peaks
from triptych.bench.harness.report import Column, Report, Table
from triptych.bench.harness.subprocesses import FinishedProcess, run_child
from triptych.bench.harness.suite import add_compiled, suite
from triptych.bench.harness.timing import check_equal
from triptych.bench.measurements.peak_memory import row as memory_row
from triptych.bench.measurements.train_loop import LoopPlan, latents_and_images, training_loops
from triptych.bench.measurements.train_step import training_step
from triptych.bench.peers import build as peers
from triptych.bench.suites import ldm, swin, vit
from triptych.device import flush_denormals
from triptych.models.configs import autoencoder as autoencoder_config
from triptych.models.configs import swin as swin_config
from triptych.models.configs import unet as unet_config
from triptych.models.configs import vit as vit_config
from triptych.models.configs.latent_diffusion import SIZES, LatentDiffusionConfig
from triptych.models.configs.text import TextConfig
from triptych.models.swin import Swin
from triptych.network import Network
from triptych.torch_compile import compile_blocks
from triptych.weights import export, save

log = logging.getLogger(__name__)

FIRST = 3  # steps whose losses and gradients are compared
# Largest difference that rounding explains. After the first step, weights are updated by nearly the sign of a gradient.
TOLERANCES = {"fp32": 1e-3, "bf16": 5e-2}

Size = tuple[int, ...]


@dataclass(frozen=True, kw_only=True)
class Classifier:
    """A classifier whose training step is measured."""

    name: str
    batch: int
    changes: tuple[tuple[str, Any], ...] = ()
    """Fields of its config that are changed."""


# A text-to-image model for 128 px: 45 million weights in the UNet, latents of 32 x 32, prompts of 77 tokens.
MIDDLE = replace(
    SIZES["sd1"],
    network=replace(
        SIZES["sd1"].network,
        latent_size=(32, 32),
        base_channels=128,
        channel_multipliers=(1, 2, 3),
        num_res_blocks=1,
        attention_downsample_factors=(2, 4),
        context_dim=512,
    ),
    autoencoder=replace(
        SIZES["sd1"].autoencoder,
        image_size=(128, 128),
        base_channels=64,
        channel_multipliers=(1, 2, 4),
        num_res_blocks=1,
    ),
    text_encoder=replace(SIZES["sd1"].text_encoder, embed_dim=512, depth=2, num_heads=8, mlp_ratio=2.0),  # type: ignore[arg-type]
)


@dataclass(frozen=True, kw_only=True)
class Plan(Effort):
    """What is measured, and for how long."""

    config: LatentDiffusionConfig = MIDDLE
    unet_batch: int = 4
    autoencoder: tuple[int, int] = (4, 64)
    """Number of images in a step, and their side in pixels."""
    classifiers: tuple[Classifier, ...] = (
        Classifier(name="vit-ti16", batch=8),
        Classifier(name="vit-s16", batch=8),
        Classifier(name="swin-t", batch=4),
    )
    compiled: bool = False
    """Also measure compiled classifiers in bf16, which takes minutes for each library."""
    loops: LoopPlan = field(default_factory=LoopPlan)
    rounds: int = 5
    seconds: float = 5.0
    patience: float = 20.0
    sides: tuple[int, ...] = (1024, 2048)
    peers: tuple[str, ...] = ("diffusers", "transformers", "timm")


FULL = Plan()
QUICK = Plan(
    config=ldm.TINY,
    unet_batch=2,
    autoencoder=(2, 32),
    classifiers=(
        Classifier(name="vit-ti16", batch=2, changes=vit.TINY),
        Classifier(name="swin-t", batch=2, changes=(*swin.TINY, ("image_size", 56))),
    ),
    loops=LoopPlan(
        images=24,
        batch=4,
        vit=("depth=1", "embed_dim=48", "num_heads=3", "mlp_ratio=2.0"),
        unet=("base_channels=16", "channel_multipliers=[1,2]", "norm_groups=8", "head_dim=8"),
        pixels=32,
        rounds=1,
        generation_steps=2,
    ),
    rounds=1,
    seconds=0.0,
    patience=0.0,
    sides=(256,),
    copied=2**22,
)


DIFFUSION, CLASSIFIER = "A step of latent diffusion", "A step of a classifier"


@dataclass(frozen=True)
class Task:
    """A network and its loss, whose training step is measured."""

    name: str
    what: str
    """Name of the task in `training_step`."""
    folder: Path
    size: Size
    macs: int
    """Multiply-accumulate operations of the forward pass of a step."""
    available: tuple[str, ...]
    """Libraries that have the same network."""


@flush_denormals()
@suite("train", FULL)
def run(report: Report, plan: Plan) -> None:
    """Measure everything in the plan."""
    available, report.notes = peers.present(plan.peers)
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        diffusion, classifiers = (
            diffusion_tasks(plan, folder, available),
            classifier_tasks(plan, folder, available),
        )
        # Other programs are measured first, while this process uses little memory.
        held = memory([*diffusion, *classifiers])
        peaks, limits = measure_peaks(plan)
        report.tables = [
            limits,
            table_of(DIFFUSION, diffusion, ("diffusers",)),
            table_of(CLASSIFIER, classifiers, ("transformers", "timm")),
            held,
            training_loops(plan.loops, folder / "ldm" / "model.safetensors"),
            latents_and_images(plan.loops, folder / "ldm" / "model.safetensors"),
        ]
        for table, tasks in zip(report.tables[1:3], (diffusion, classifiers), strict=True):
            table.rows += steps(tasks, plan, peaks)
        # Compiled networks are measured last, since compiling increases the memory of the process.
        if plan.compiled:
            add_compiled(report, report.tables[2], lambda: steps(classifiers, plan, peaks, compiled=True))


def diffusion_tasks(plan: Plan, folder: Path, available: Sequence[str]) -> list[Task]:
    """Write the UNet and the autoencoder for each library; return their tasks."""
    folder, config, text = folder / "ldm", plan.config, plan.config.text_encoder
    assert isinstance(text, TextConfig)
    libraries = tuple(name for name in available if name == "diffusers")
    folder.mkdir()
    ldm.write(config, folder, bool(libraries))
    rows, columns = config.network.latent_size
    batch, pixels = plan.autoencoder
    unet = plan.unet_batch, text.max_length, text.embed_dim
    unet_macs = plan.unet_batch * unet_config.macs(config.network, tokens=text.max_length)  # type: ignore[arg-type]
    macs = batch * autoencoder_config.macs(config.autoencoder, (pixels, pixels))
    return [
        Task(f"UNet, {rows} x {columns}, batch {unet[0]}", "unet", folder, unet, unet_macs, libraries),
        Task(
            f"autoencoder, {pixels} px, batch {batch}",
            "autoencoder",
            folder,
            plan.autoencoder,
            macs,
            libraries,
        ),
    ]


def classifier_tasks(plan: Plan, folder: Path, available: Sequence[str]) -> list[Task]:
    """Write the classifiers for each library; return their tasks."""
    tasks = []
    for classifier in plan.classifiers:
        if classifier.name.startswith("swin"):
            net: Any = swin.make(replace(swin.FULL, network=classifier.name, changes=classifier.changes))
        else:
            net = vit.make(replace(vit.FULL, changes=classifier.changes), classifier.name)
        here = folder / classifier.name
        libraries = tuple(name for name in available if name in peers.FORMATS)
        write(net, here, libraries)
        pixels = net.config.image_size[0]
        macs = swin_config.macs(net.config) if isinstance(net, Swin) else vit_config.macs(net.config)
        name = f"{classifier.name}, {pixels} px, batch {classifier.batch}"
        tasks.append(
            Task(name, "classifier", here, (classifier.batch, pixels), classifier.batch * macs, libraries)
        )
    return tasks


def write(net: Network, folder: Path, libraries: Sequence[str]) -> None:
    """Write the same weights as our file and as a folder for each library."""
    folder.mkdir()
    save(net, folder / "model.safetensors")
    for name in libraries:
        export(net, folder / peers.FORMATS[name], peers.FORMATS[name])


def table_of(title: str, tasks: Sequence[Task], named: Sequence[str]) -> Table:
    """Create a table without rows that compares with those of the named libraries that are available."""
    method = METHOD.replace("2 x MACs x images/s", "3 x 2 x MACs of the forward pass / seconds")
    return Table(
        title=title,
        description=(
            "Seconds per step on fixed inputs: forward pass, loss, backward pass, gradient clipping, fused AdamW. The "
            "loop is the same for all libraries; weights are in fp32 and equal at the start; bf16 uses autocast. "
            "Compiled means `torch.compile`: of each of our blocks, as in `triptych train --loop.compile`, and of the "
            f"full network of other libraries. Losses and gradient norms of the first {FIRST} steps are checked equal. "
            f"{method}"
        ),
        columns=[
            Column(key="network", heading="network"),
            Column(key="mode", heading="mode"),
            Column(key="dtype", heading="precision"),
            *comparison_columns(
                tuple(name for name in named if any(name in task.available for task in tasks))
            ),
        ],
    )


def steps(
    tasks: Sequence[Task], plan: Plan, peaks: Mapping[str, float], compiled: bool = False
) -> list[dict[str, Any]]:
    """Time a step of each task in each precision, compared with each available library; compiled in bf16 only.

    Only classifiers are compared compiled. Autoencoders are not called through `forward`, and the gradients of
    diffusers' UNet have half their norm when PyTorch 2.13 compiles it under autocast (those of ours do, too).
    """
    rows = []
    for task, label in itertools.product(tasks, ["bf16"] if compiled else DTYPES):
        dtype = DTYPES[label]
        sides = {
            who: training_step(task.what, who, task.folder, task.size, dtype)
            for who in ("ours", *task.available)
        }
        if compiled:
            for who, side in sides.items():
                compile_blocks(side.net) if who == "ours" else side.net.compile()
        firsts = {who: torch.stack([step() for _ in range(FIRST)]) for who, step in sides.items()}
        apart = alike(firsts, TOLERANCES[label])
        row = in_turn(sides, plan)
        used = 6 * task.macs / row["ours"].median / peaks[label]
        row |= {"network": task.name, "mode": "compiled" if compiled else "eager", "dtype": label}
        row |= {"utilization": used, "apart": apart if len(sides) > 1 else None}
        rows.append(row)
        speeds = ", ".join(f"{name} {row[name].median:.3g}" for name in sides)
        log.info("%s, %s, %s: seconds %s", task.name, row["mode"], label, speeds)
    return rows


def alike(firsts: Mapping[str, Tensor], tolerance: float) -> float:
    """Return the largest difference of losses and of gradient norms, each relative to its largest value.

    Args:
        firsts: (steps, 2), losses and gradient norms of the first steps, by library.
        tolerance: largest difference that rounding explains.

    Raises:
        UnequalError: a difference is larger than `tolerance`.
    """
    (count,) = {values.shape[1] for values in firsts.values()}
    return max(
        check_equal({who: values[:, i] for who, values in firsts.items()}, tolerance) for i in range(count)
    )


def memory(tasks: Sequence[Task], rounds: int = 1) -> Table:
    """Measure the first two steps of each task in fresh processes in bf16, compared with the first available library.

    Raises:
        UnequalError: losses or gradients differ.
    """
    table = Table(
        title="Memory of a step",
        description=(
            "Two steps in a fresh process, bf16 by autocast: the peak of the process (VmHWM), and its growth over the "
            "memory before the first step, with the weights in memory. Both include the optimizer's moments."
        ),
        columns=[Column(key="network", heading="network"), Column(key="peer", heading="compared with")],
    )
    for what, unit in (("", "peak, GB"), ("grown ", "grown, GB")):
        for who in ("ours", "theirs"):
            table.columns.append(Column(key=what + who, heading=f"{who} {unit}", form=".3f"))
        table.columns.append(Column(key=what + "ratio", heading="ours / theirs", form=".2f"))
    for task in tasks:
        named = {"ours": "ours"} | dict(zip(("theirs",), task.available, strict=False))
        runs: dict[str, list[FinishedProcess]] = {side: [] for side in named}
        for side, who in [*named.items()] * rounds:
            classifier = (task.what, who, task.folder, "bfloat16", str(torch.get_num_threads()))
            runs[side].append(run_child("train_step", *classifier, *map(str, task.size)))
        alike(
            {side: torch.tensor(done[0].reported["losses"]) for side, done in runs.items()},
            TOLERANCES["bf16"],
        )
        peer = task.available[0] if task.available else None
        table.rows.append({"network": task.name, "peer": peer, **memory_row(runs)})
        log.info("%s: peak %s", task.name, {side: table.rows[-1][side].median for side in runs})
    return table
