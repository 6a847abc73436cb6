"""`triptych bench resume`: whether killed runs end exactly like uninterrupted ones, and the cost of checkpoints."""

import json
import logging
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from triptych import weights
from triptych.bench.harness.report import Column, Report, Table
from triptych.bench.harness.suite import suite
from triptych.bench.harness.timing import Spread, UnequalError, interleave, ratio
from triptych.bench.measurements.kill_and_resume import RunningProcess, apart, kill_often, step_of
from triptych.data.config import AugmentConfig, DataConfig
from triptych.evaluation.config import PerceptualConfig
from triptych.heads.config import HeadConfig
from triptych.models.registry import create
from triptych.training.checkpoints import Checkpoints
from triptych.training.configs.base import ClassifyConfig, LoopConfig, OptimConfig, SegmentConfig
from triptych.training.configs.first_stage import CompressConfig, DiscriminatorConfig
from triptych.training.configs.registry import RunConfig, run_to_json
from triptych.training.configs.second_stage import (
    CaptionConfig,
    LatentCacheConfig,
    SamplesConfig,
    SecondStageConfig,
)
from triptych.training.ema import Ema
from triptych.training.optim import make_optimizer
from triptych.training.state import collect_tensors

log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Plan:
    """Number of kills, and sizes of the runs."""

    kills: int = 10
    """Number of kills of each run."""
    images: int = 40
    """Number of images in each of four classes."""
    epochs: float = 12.0
    save_every: float = 0.2
    """Seconds between checkpoints."""
    runs: tuple[str, ...] = ()
    """Names of the runs; empty means all."""
    saved: str = "vit-s16"
    """Network whose checkpoints are timed."""
    changes: tuple[tuple[str, Any], ...] = (("num_classes", 1000),)
    batch: int = 16
    steps: int = 12
    """Number of steps in which one checkpoint is saved."""
    rounds: int = 5
    patience: float = 120.0


FULL = Plan()
QUICK = Plan(
    kills=2,
    images=16,
    epochs=2.0,
    save_every=0.0,
    runs=("ViT, classification",),
    saved="vit-ti16",
    changes=(
        ("depth", 2),
        ("embed_dim", 48),
        ("num_heads", 3),
        ("mlp_ratio", 2.0),
        ("image_size", 32),
        ("num_classes", 4),
    ),
    batch=2,
    steps=2,
    rounds=1,
    patience=0.0,
)

COLORS = {"blue": (30, 40, 200), "green": (40, 190, 40), "red": (200, 30, 30), "yellow": (220, 200, 40)}
SMALL_STAGE = {
    "base_channels": 8,
    "channel_multipliers": (1, 2),
    "num_res_blocks": 1,
    "norm_groups": 4,
    "middle_attention": False,
}


@suite("resume", FULL)
def run(report: Report, plan: Plan) -> None:
    """Measure everything in the plan.

    Raises:
        UnequalError: a killed run ended differently from the uninterrupted one.
    """
    with tempfile.TemporaryDirectory() as folder:
        report.tables.append(resumed(plan, Path(folder)))
    with tempfile.TemporaryDirectory() as folder:
        report.tables.append(saving(plan, Path(folder)))


def resumed(plan: Plan, folder: Path) -> Table:
    """Compare killed and uninterrupted runs of each type bit for bit."""
    rows = []
    rng = np.random.default_rng(0)
    for name, config in configs(plan, folder).items():
        if plan.runs and name not in plan.runs:
            continue
        here = folder / str(len(rows))
        here.mkdir()
        rows.append({"run": name, **survived(config, here, plan.kills, rng)})
        log.info("%s: %s", name, rows[-1])
    columns = [
        Column(key="run", heading="run"),
        Column(key="steps", heading="steps", form="d"),
        Column(key="kills", heading="kills survived", form="d"),
        Column(key="in a checkpoint", heading="of them while writing a checkpoint", form="d"),
        Column(key="at the start", heading="while starting", form="d"),
        Column(key="lost", heading="steps run twice", form="d"),
        Column(key="tensors", heading="tensors compared", form="d"),
        Column(key="difference", heading="greatest difference", form="g"),
        Column(key="rows", heading="log rows compared", form="d"),
        Column(key="rows apart", heading="that differ", form="d"),
    ]
    description = (
        "Each run is executed once without interruption, and once killed with SIGKILL at random moments and resumed by "
        "the same command: within steps, while a checkpoint is written, and during startup. Compared at the end: all "
        "tensors of the last checkpoint (weights, their EMA, both moments of each optimizer), all logged values that "
        "do not measure time, data position, best metrics, and the bytes of model.safetensors. fp32 on the CPU, two "
        f"worker processes, a checkpoint every {plan.save_every} s, the same number of threads."
    )
    return Table(title="Killed and resumed", description=description, columns=columns, rows=rows)


def survived(
    config: RunConfig,
    folder: Path,
    kills: int,
    rng: np.random.Generator,
    start: Callable[[Path, Path], RunningProcess] | None = None,
) -> dict[str, Any]:
    """Execute a run without interruption and killed, in `folder`; return a row of the table.

    Args:
        start: starts the run of a config file in a folder; by default in a fresh interpreter.

    Raises:
        UnequalError: the two runs end differently.
    """
    begin, config_file = start or _interpreter, folder / "config.json"
    config_file.write_text(json.dumps(run_to_json(config)))
    uninterrupted, killed = folder / "uninterrupted", folder / "killed"
    if begin(config_file, uninterrupted).wait() != 0:
        raise RuntimeError(f"the uninterrupted run failed; see {folder}/run.log")
    steps = step_of(uninterrupted)
    counts = kill_often(lambda: begin(config_file, killed), killed, steps, kills, rng)
    differences = apart(uninterrupted, killed)
    if (
        differences["difference"]
        or differences["rows apart"]
        or not (differences["facts"] and differences["kept"])
    ):
        raise UnequalError(
            f"a run that was killed {kills} times differs from an uninterrupted one: {differences}"
        )
    return {"steps": steps, "kills": kills, **counts.kills, "lost": counts.lost, **differences}


def _interpreter(config: Path, out: Path) -> RunningProcess:
    with open(config.parent / "run.log", "ab") as log_file:
        return subprocess.Popen(
            [sys.executable, "-m", "triptych.bench.measurements.kill_and_resume", str(config), str(out)],
            stdout=log_file,
            stderr=log_file,
        )


def configs(plan: Plan, folder: Path) -> dict[str, RunConfig]:
    """Return the config of each type of run, by its name in the table. The images are drawn into `folder`."""
    images, masked = draw(folder, plan.images)
    shared: dict[str, Any] = {
        "loading": DataConfig(batch_size=8, workers=2, cache="off", eval_fraction=0.2),
        "loop": LoopConfig(
            epochs=plan.epochs,
            ema=0.9,
            precision="fp32",
            device="cpu",
            save_every=plan.save_every,
            eval_every=0.7,
        ),
    }
    latent = _latent_diffusion(images, folder, shared)
    return {
        "ViT, classification": _classifier(images, shared),
        "Swin, segmentation": _segmenter(masked, shared),
        "autoencoder, with a GAN": _autoencoder(images, folder, shared),
        "latent diffusion, on a cache": replace(latent, cache=LatentCacheConfig(use="on")),
        "latent diffusion, on images": replace(latent, cache=LatentCacheConfig(use="off")),
    }  # fmt: skip


def _classifier(images: Path, shared: dict[str, Any]) -> ClassifyConfig:
    return ClassifyConfig(
        data=str(images),
        model="vit-ti16",
        model_args=("depth=2", "embed_dim=24", "mlp_ratio=2.0", "patch_size=8", "dropout=0.1"),
        image_size=(16, 16),
        drop_path_rate=0.2,
        augment=AugmentConfig(brightness=0.1, mixup=0.2, erasing=0.2),
        optim=OptimConfig(lr=3e-3),
        **shared,
    )


def _segmenter(masked: Path, shared: dict[str, Any]) -> SegmentConfig:
    network = (
        "embed_dim=16",
        "depths=[1,2]",
        "num_heads=[1,2]",
        "window_size=4",
        "stem_widths=[8]",
        "patch_size=2",
    )
    return SegmentConfig(
        data=str(masked),
        model="swin-emoji",
        model_args=network,
        image_size=(32, 32),
        head=HeadConfig(type="unet", channels=16, image_branch_channels=8, aux_channels=8),
        augment=AugmentConfig(crop_scale=(0.7, 1.0), brightness=0.1),
        optim=OptimConfig(lr=5e-3),
        **shared,
    )


def _autoencoder(images: Path, folder: Path, shared: dict[str, Any]) -> CompressConfig:
    features = create(
        "vit-ti16",
        patch_size=8,
        image_size=16,
        depth=2,
        embed_dim=24,
        num_heads=2,
        mlp_ratio=2.0,
        num_classes=0,
    )
    weights.save(features, folder / "features.safetensors")
    return CompressConfig(
        data=str(images),
        model_args=tuple(f"{k}={json.dumps(v)}" for k, v in SMALL_STAGE.items()),
        image_size=(16, 16),
        perceptual=PerceptualConfig(model=str(folder / "features.safetensors"), weight=0.3),
        discriminator=DiscriminatorConfig(channels=4, layers=1, start=0.3),
        features=None,
        optim=OptimConfig(lr=3e-3, betas=(0.5, 0.9)),
        **shared,
    )


def _latent_diffusion(images: Path, folder: Path, shared: dict[str, Any]) -> SecondStageConfig:
    stage = create("kl-f8", image_size=16, latent_channels=2, scale=2.0, **SMALL_STAGE)
    weights.save(stage, folder / "stage.safetensors")
    network = (
        "base_channels=8",
        "norm_groups=4",
        "channel_multipliers=[1,2]",
        "num_res_blocks=1",
        "head_dim=8",
    )
    return SecondStageConfig(
        data=str(images),
        first_stage=str(folder / "stage.safetensors"),
        condition="text",
        model="unet-emoji",
        model_args=network,
        text=CaptionConfig(vocabulary=300, embed_dim=16, depth=1, head_dim=8, max_length=12),
        samples=SamplesConfig(num_images=0),
        optim=OptimConfig(lr=2e-3),
        **shared,
    )


def draw(folder: Path, count: int) -> tuple[Path, Path]:
    """Draw `count` noisy squares of each class: class folders with captions, and a folder of images and masks."""
    images, masked = folder / "labeled", folder / "masked"
    rng = np.random.default_rng(0)
    for name in ("images", "masks"):
        (masked / name).mkdir(parents=True)
    (masked / "classes.txt").write_text("ground\nsquare\n")
    for name, color in COLORS.items():
        (images / name).mkdir(parents=True)
        for i in range(count):
            mask = np.zeros((32, 32), np.uint8)
            y, x = rng.integers(2, 16, 2)
            mask[y : y + 12, x : x + 12] = 1
            noisy = np.where(mask[..., None] > 0, color, (60, 60, 60)) + rng.normal(0, 20, (32, 32, 3))
            image = Image.fromarray(noisy.clip(0, 255).astype(np.uint8))
            image.save(images / name / f"{i}.png")
            (images / name / f"{i}.txt").write_text(f"a {name} square\n")
            image.save(masked / "images" / f"{name}-{i}.png")
            Image.fromarray(mask).save(masked / "masks" / f"{name}-{i}.png")
    return images, masked


def saving(plan: Plan, folder: Path) -> Table:
    """Time training steps with and without a checkpoint among them."""
    net = create(plan.saved, **dict(plan.changes)).train()
    ema = Ema(net, 0.999)
    optimizer = make_optimizer(net, OptimConfig())
    size = net.config.image_size
    images = torch.randn(plan.batch, 3, *size, generator=torch.Generator().manual_seed(0))
    checkpoints, written, number = Checkpoints(folder / "checkpoints", 1), [], 0

    def step() -> None:
        net(images).logsumexp(1).mean().backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        ema.update(net, 1000, torch.zeros(()))

    def steps(mode: str) -> float:
        """Return the milliseconds per step, without the wait for a write that is unfinished afterwards."""
        nonlocal number
        start = time.perf_counter()
        for i in range(plan.steps):
            step()
            if i == 0 and mode != "none":
                number += 1
                began = time.perf_counter()
                checkpoints.save(number, collect_tensors(net, ema, optimizer), {"step": number})
                if mode == "waited for":
                    checkpoints.wait()
                    written.append(time.perf_counter() - began)
        seconds = (time.perf_counter() - start) / plan.steps
        checkpoints.wait()
        return 1e3 * seconds

    modes = ("none", "asynchronous", "waited for")
    times = interleave(
        {mode: lambda mode=mode: steps(mode) for mode in modes}, plan.rounds, patience=plan.patience
    ).measurements
    megabytes = _bytes(collect_tensors(net, ema, optimizer)) / 1e6
    checkpoints.close()
    rows = [
        {
            "network": f"{plan.saved}, batch {plan.batch}",
            "megabytes": megabytes,
            "written": Spread.of(written[-plan.rounds :]),
            **{mode: Spread.of(times[mode]) for mode in modes},
            "asynchronous ratio": ratio(times["asynchronous"], times["none"]),
            "waited ratio": ratio(times["waited for"], times["none"]),
        }
    ]
    columns = [
        Column(key="network", heading="network"),
        Column(key="megabytes", heading="checkpoint, MB", form=".0f"),
        Column(key="written", heading="seconds to write it", form=".2f"),
        Column(key="none", heading="ms per step without", form=".1f"),
        Column(key="asynchronous", heading="written meanwhile", form=".1f"),
        Column(key="waited for", heading="waited for", form=".1f"),
        Column(key="asynchronous ratio", heading="meanwhile / without", form=".3f"),
        Column(key="waited ratio", heading="waited for / without", form=".3f"),
    ]
    description = (
        f"The mean time of {plan.steps} training steps. After the first of them, no checkpoint is saved; or it is "
        "copied and written while the next steps run, as in a run; or it is written before the next step. It holds "
        "weights, EMA and both moments, with checksums, and is synced to disk. On a CPU, writing slows the steps. "
        f"A checkpoint every {plan.steps} steps is frequent: a run saves one every five minutes."
    )
    return Table(title="What a checkpoint costs", description=description, columns=columns, rows=rows)


def _bytes(tensors: dict[str, Tensor]) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
