"""The overhead of `triptych train` over a plain loop, the gain of a latent cache, and the speed of generation."""

import json
import logging
import tempfile
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from triptych.bench.harness.report import Column, Table
from triptych.bench.harness.timing import Rounds, Spread, interleave, ratio, timed
from triptych.bench.measurements.train_step import TrainingStep
from triptych.data.config import AugmentConfig, DataConfig
from triptych.data.open import open_source
from triptych.models.autoencoder import FirstStage
from triptych.models.latent_diffusion import LatentDiffusion
from triptych.pipelines.diffusion.pipeline import DiffusionPipeline
from triptych.training.configs.base import ClassifyConfig, LoopConfig
from triptych.training.configs.second_stage import LatentCacheConfig, SamplesConfig, SecondStageConfig
from triptych.training.monitoring.step_reporter import SPEED_STEPS
from triptych.training.runner import Run, RunConfig, prepare
from triptych.training.runner import run as train
from triptych.training.second_stage.latent_cache import LatentCache
from triptych.weights import load

log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class LoopPlan:
    """Sizes of the runs that are measured."""

    images: int = 512
    """Number of images, JPEGs of 160 x 160 pixels."""
    batch: int = 32
    """Batch size."""
    pixels: int = 64
    """Side of both networks' inputs."""
    vit: tuple[str, ...] = ()
    """Changes of ViT-Ti/16's config."""
    unet: tuple[str, ...] = ()
    """Changes of unet-emoji's config."""
    windows: int = 1
    """Measured steps of a run, after its first `SPEED_STEPS`, in units of `SPEED_STEPS`."""
    rounds: int = 2
    generation_steps: int = 10
    """Sampling steps of the generated images."""


def training_loops(plan: LoopPlan, first_stage: Path) -> Table:
    """Measure seconds per step of `triptych train` and of a plain loop with the same network, batch and precision."""
    table = Table(
        title="The whole loop",
        description=(
            f"Seconds per step of `triptych train` on {plan.images} JPEGs of 160 px, as its log reports: with "
            "loading, augmentation, EMA, clipping, schedule and logging, without evaluation and checkpoints; compared "
            "with the same network in a plain loop on one prepared batch. Precision is what `auto` chooses. Decoded "
            "images are cached in memory, except in the run that decodes them in a worker process each time. Waiting "
            "is the fraction of the time without a batch to train on."
        ),
        columns=[
            Column(key="what", heading="run"),
            Column(key="ours", heading="triptych train", form=".3g"),
            Column(key="plain", heading="plain loop", form=".3g"),
            Column(key="ratio", heading="whole / plain", form=".2f"),
            Column(key="waiting", heading="waiting", form=".1%"),
        ],
    )
    with tempfile.TemporaryDirectory() as place:
        data = draw(Path(place) / "data", plan.images)
        classify = classification(plan, data)
        decoding = replace(classify, loading=replace(classify.loading, cache="off", workers=1))
        for what, config in (
            (f"ViT, {plan.pixels} px, batch {plan.batch}", classify),
            ("the same, decoding", decoding),
            (f"UNet on cached latents, batch {plan.batch}", second_stage(plan, data, first_stage, "on")),
        ):
            waited: list[float] = []
            plain = plain_loop(prepare(config), plan.batch)
            sides: dict[str, Callable[[], float]] = {
                "ours": lambda config=config, waited=waited: seconds_per_step(config, waited),
                "plain": lambda plain=plain: (
                    timed(lambda: [plain() for _ in range(SPEED_STEPS // 2)])() / (SPEED_STEPS // 2)
                ),
            }
            done = interleave(sides, plan.rounds, warmup=0).measurements
            row: dict[str, Any] = {side: Spread.of(seconds_taken) for side, seconds_taken in done.items()}
            row |= {"what": what, "ratio": ratio(done["ours"], done["plain"]), "waiting": Spread.of(waited)}
            log.info("%s: %.3g s a step, plain %.3g", what, row["ours"].median, row["plain"].median)
            table.rows.append(row)
    return table


def latents_and_images(plan: LoopPlan, model: Path) -> Table:
    """Measure images per second: encoded into the latent cache, trained on from it, and generated."""
    table = Table(
        title="Latents and images",
        description=(
            f"Images per second at {plan.pixels} px of the model whose steps are measured above. Cached: each image "
            "and its mirror image are written to the latent cache of `triptych train`, including loading; compared "
            "with the encoder alone on prepared batches. Trained on: a small UNet on cached latents, compared with "
            "encoding the images each time. "
            f"Generated: {plan.generation_steps} steps with guidance and the decoder, four at a time, bf16."
        ),
        columns=[
            Column(key="what", heading="what"),
            Column(key="ours", heading="images/s", form=".3g"),
            Column(key="other", heading="compared with", form=".3g"),
            Column(key="ratio", heading="time / compared with", form=".2f"),
        ],
    )
    with tempfile.TemporaryDirectory() as place:
        data = draw(Path(place) / "data", plan.images)
        cached = interleave(caching(plan, data, model), plan.rounds, warmup=0)
        table.rows.append(a_second("cached as latents", plan.images, cached))
        trained = {
            side: (lambda use=use: seconds_per_step(second_stage(plan, data, model, use)) / plan.batch)
            for side, use in (("ours", "on"), ("other", "off"))
        }
        table.rows.append(a_second("trained on", 1, interleave(trained, max(plan.rounds - 1, 1), warmup=0)))
    generate = DiffusionPipeline(model, dtype="bf16").text_to_image
    options: Any = {
        "num_steps": plan.generation_steps,
        "num_images": 4,
        "height": plan.pixels,
        "width": plan.pixels,
    }
    generated = timed(lambda: generate("a red apple", progress=False, **options))
    table.rows.append(a_second("generated", 4, interleave({"ours": generated}, plan.rounds)))
    for row in table.rows:
        log.info("%s: %.3g images/s", row["what"], row["ours"].median)
    return table


def a_second(what: str, count: int, done: Rounds[float]) -> dict[str, Any]:
    """Return a row of images per second: `count` images divided by the measured seconds."""
    row: dict[str, Any] = {
        side: Spread.of(count / seconds for seconds in seconds_taken)
        for side, seconds_taken in done.measurements.items()
    }
    if "other" in row:
        row["ratio"] = ratio(done.measurements["ours"], done.measurements["other"])
    return {"what": what, **row}


def caching(plan: LoopPlan, data: Path, model: Path) -> dict[str, Callable[[], float]]:
    """Return functions that measure the seconds to write all images to the latent cache, and to encode them only."""
    first_stage = stage_of(model)
    source, size = open_source(str(data)), (plan.pixels, plan.pixels)
    preprocess = replace(first_stage.card.preprocess, size=size, crop=1.0, mode="crop")
    cache = LatentCache(source, first_stage, preprocess, True, DataConfig(workers=0), batch_size=plan.batch)
    images = torch.rand(plan.batch, 3, *size) * 2 - 1

    @torch.no_grad()
    def alone() -> None:
        for _ in range(2 * (plan.images // plan.batch)):  # and their mirror images
            first_stage.embed(images)

    def filled() -> None:
        with tempfile.TemporaryDirectory() as place:
            cache.fill(Path(place) / "latents")

    return {"ours": timed(filled), "other": timed(alone)}


def stage_of(model: Path) -> FirstStage:
    """Load the first stage of a latent diffusion model, as a run does."""
    net: Any = load(model)
    assert isinstance(net, LatentDiffusion)
    return net.autoencoder.float().eval().requires_grad_(False)


def draw(folder: Path, count: int, side: int = 160) -> Path:
    """Write `count` JPEGs of two classes, with smooth random colors; return the folder."""
    rng = np.random.default_rng(0)
    for i in range(count):
        path = folder / "ab"[i % 2] / f"{i:05d}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        small = Image.fromarray(rng.integers(0, 256, (8, 8, 3), np.uint8))
        small.resize((side, side), Image.Resampling.BICUBIC).save(path, quality=90)
    return folder


def classification(plan: LoopPlan, data: Path) -> ClassifyConfig:
    """Return the config of a classification run, as long as is measured."""
    size = (plan.pixels, plan.pixels)
    return ClassifyConfig(
        data=str(data),
        model="vit-ti16",
        model_args=plan.vit,
        image_size=size,
        loading=loading(plan),
        augment=AugmentConfig(image_size=size),
        loop=loop(plan),
    )


def second_stage(plan: LoopPlan, data: Path, first_stage: Path, use: Any) -> SecondStageConfig:
    """Return the config of a run of an unconditional denoiser, as long as is measured."""
    return SecondStageConfig(
        data=str(data),
        first_stage=str(first_stage),
        condition="none",
        model="unet-emoji",
        model_args=plan.unet,
        image_size=(plan.pixels, plan.pixels),
        cache=LatentCacheConfig(use=use),
        samples=SamplesConfig(num_images=0),
        loading=loading(plan),
        loop=loop(plan),
    )


def loading(plan: LoopPlan) -> DataConfig:
    return DataConfig(batch_size=plan.batch, workers=0, eval_fraction=0.05)


def loop(plan: LoopPlan) -> LoopConfig:
    """Return a loop that is long enough for the measurement, with one evaluation at the end."""
    steps = SPEED_STEPS * (1 + plan.windows)
    batches = (plan.images - max(1, round(0.05 * plan.images))) // plan.batch
    return LoopConfig(epochs=steps / max(batches, 1), ema=0.999, eval_every=1e9, log_every=1e9)


def seconds_per_step(config: RunConfig, waited: list[float] | None = None) -> float:
    """Run a config; return the seconds per step that its log reports, without the first `SPEED_STEPS`, and append the
    fraction of time that it waited to `waited`."""
    with tempfile.TemporaryDirectory() as place:
        if not train(config, Path(place) / "run").finished:
            raise KeyboardInterrupt  # which the run handled by saving a checkpoint
        lines = (Path(place) / "run" / "log.jsonl").read_text().splitlines()
    rows = [row for row in map(json.loads, lines) if "images_per_second" in row][1:]
    if waited is not None:
        waited.append(mean(row["waiting"] for row in rows))
    return mean(config.loading.batch_size / row["images_per_second"] for row in rows)


def mean(values: Iterable[float]) -> float:
    return float(np.mean(list(values)))


def plain_loop(parts: Run, batch: int) -> TrainingStep:
    """Create a training step of a run's network on a prepared batch."""
    net: Any = parts.net
    generator = torch.Generator().manual_seed(1)
    if isinstance(parts.config, ClassifyConfig):
        images = torch.randn(batch, 3, *net.config.image_size, generator=generator)
        labels = torch.arange(batch) % net.config.num_classes
        return TrainingStep(net, lambda: F.cross_entropy(net(images).float(), labels), parts.dtype)
    unet = net.network.config
    x, noise = (
        torch.randn(batch, unet.in_channels, *unet.latent_size, generator=generator) for _ in range(2)
    )
    t = torch.randint(1000, (batch,), generator=generator)

    def loss() -> Tensor:
        return F.mse_loss(net.network(x, t).float(), noise)

    return TrainingStep(net, loss, parts.dtype)
