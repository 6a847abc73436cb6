"""What `triptych train` adds to a plain loop, what a latent cache saves, and how fast a trained model paints."""

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
from triptych.bench.measurements.train_step import Learner
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
    """What is trained for a while, and on how much."""

    pictures: int = 512
    """JPEGs of 160 pixels a side."""
    batch: int = 32
    pixels: int = 64
    """Of a side, for both networks."""
    vit: tuple[str, ...] = ()
    """Changes to ViT-Ti/16."""
    unet: tuple[str, ...] = ()
    """Changes to unet-emoji."""
    windows: int = 1
    """Times `SPEED_STEPS` steps that are measured of a run, after the first ones."""
    rounds: int = 2
    paint_steps: int = 10


def whole_loops(plan: LoopPlan, first_stage: Path) -> Table:
    """Seconds per step of `triptych train` and of a plain loop of the same network, batch and precision."""
    table = Table(
        title="The whole loop",
        description=(
            f"Seconds per step of `triptych train` on {plan.pictures} JPEGs of 160 px, by its own log: loading, "
            "augmenting, moving average, clipping, schedule and log in it, evaluation and checkpoints not; beside the "
            "same network in the plain loop on one batch that is ready. Precision is what `auto` chooses. Decoded "
            "pictures are kept in memory, but for the run that decodes them every time in another process. Waiting is "
            "the share of time without a batch to learn from."
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
        data = draw(Path(place) / "data", plan.pictures)
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
                "ours": lambda config=config, waited=waited: whole(config, waited),
                "plain": lambda plain=plain: (
                    timed(lambda: [plain() for _ in range(SPEED_STEPS // 2)])() / (SPEED_STEPS // 2)
                ),
            }
            done = interleave(sides, plan.rounds, warmup=0).found
            row: dict[str, Any] = {side: Spread.of(seconds_taken) for side, seconds_taken in done.items()}
            row |= {"what": what, "ratio": ratio(done["ours"], done["plain"]), "waiting": Spread.of(waited)}
            log.info("%s: %.3g s a step, plain %.3g", what, row["ours"].median, row["plain"].median)
            table.rows.append(row)
    return table


def latents_and_pictures(plan: LoopPlan, model: Path) -> Table:
    """Images per second: into the cache, out of it, and generated."""
    table = Table(
        title="Latents and images",
        description=(
            f"Images per second at {plan.pixels} px, by the model whose steps are measured above. Kept: each picture "
            "and its mirror image go into the latent cache of `triptych train`, loading and writing included; beside "
            "the encoder alone on batches that are ready. Trained on: a small UNet on cached latents, beside encoding "
            "each time. "
            f"Generated: {plan.paint_steps} steps with guidance and the decoder, four at a time, bf16."
        ),
        columns=[
            Column(key="what", heading="what"),
            Column(key="ours", heading="images/s", form=".3g"),
            Column(key="other", heading="compared with", form=".3g"),
            Column(key="ratio", heading="time / compared with", form=".2f"),
        ],
    )
    with tempfile.TemporaryDirectory() as place:
        data = draw(Path(place) / "data", plan.pictures)
        cached = interleave(caching(plan, data, model), plan.rounds, warmup=0)
        table.rows.append(a_second("cached as latents", plan.pictures, cached))
        learnt = {
            side: (lambda use=use: whole(second_stage(plan, data, model, use)) / plan.batch)
            for side, use in (("ours", "on"), ("other", "off"))
        }
        table.rows.append(a_second("trained on", 1, interleave(learnt, max(plan.rounds - 1, 1), warmup=0)))
    paint = DiffusionPipeline(model, dtype="bf16").text_to_image
    options: Any = {
        "num_steps": plan.paint_steps,
        "num_images": 4,
        "height": plan.pixels,
        "width": plan.pixels,
    }
    generated = timed(lambda: paint("a red apple", progress=False, **options))
    table.rows.append(a_second("generated", 4, interleave({"ours": generated}, plan.rounds)))
    for row in table.rows:
        log.info("%s: %.3g images/s", row["what"], row["ours"].median)
    return table


def a_second(what: str, count: int, done: Rounds[float]) -> dict[str, Any]:
    """A row of so many pictures over the seconds that they took."""
    row: dict[str, Any] = {
        side: Spread.of(count / seconds for seconds in seconds_taken)
        for side, seconds_taken in done.found.items()
    }
    if "other" in row:
        row["ratio"] = ratio(done.found["ours"], done.found["other"])
    return {"what": what, **row}


def caching(plan: LoopPlan, data: Path, model: Path) -> dict[str, Callable[[], float]]:
    """Seconds for all pictures: through the cache onto the disk, and through the encoder alone."""
    first_stage = stage_of(model)
    source, size = open_source(str(data)), (plan.pixels, plan.pixels)
    preprocess = replace(first_stage.card.preprocess, size=size, crop=1.0, mode="crop")
    cache = LatentCache(source, first_stage, preprocess, True, DataConfig(workers=0), batch_size=plan.batch)
    images = torch.rand(plan.batch, 3, *size) * 2 - 1

    @torch.no_grad()
    def alone() -> None:
        for _ in range(2 * (plan.pictures // plan.batch)):  # and their mirror images
            first_stage.embed(images)

    def filled() -> None:
        with tempfile.TemporaryDirectory() as place:
            cache.fill(Path(place) / "latents")

    return {"ours": timed(filled), "other": timed(alone)}


def stage_of(model: Path) -> FirstStage:
    """The first stage of a latent diffusion model, as a run holds it."""
    net: Any = load(model)
    assert isinstance(net, LatentDiffusion)
    return net.autoencoder.float().eval().requires_grad_(False)


def draw(folder: Path, count: int, side: int = 160) -> Path:
    """So many JPEGs of two classes, of clouds of color."""
    rng = np.random.default_rng(0)
    for i in range(count):
        path = folder / "ab"[i % 2] / f"{i:05d}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        small = Image.fromarray(rng.integers(0, 256, (8, 8, 3), np.uint8))
        small.resize((side, side), Image.Resampling.BICUBIC).save(path, quality=90)
    return folder


def classification(plan: LoopPlan, data: Path) -> ClassifyConfig:
    """A run of as many steps as are measured."""
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
    """The same of an unconditional denoiser."""
    return SecondStageConfig(
        data=str(data),
        first_stage=str(first_stage),
        condition="none",
        model="unet-emoji",
        model_args=plan.unet,
        image_size=(plan.pixels, plan.pixels),
        cache=LatentCacheConfig(use=use),
        samples=SamplesConfig(count=0),
        loading=loading(plan),
        loop=loop(plan),
    )


def loading(plan: LoopPlan) -> DataConfig:
    return DataConfig(batch_size=plan.batch, workers=0, eval_fraction=0.05)


def loop(plan: LoopPlan) -> LoopConfig:
    """Long enough for the windows, with one evaluation, at the end."""
    steps = SPEED_STEPS * (1 + plan.windows)
    batches = (plan.pictures - max(1, round(0.05 * plan.pictures))) // plan.batch
    return LoopConfig(epochs=steps / max(batches, 1), ema=0.999, eval_every=1e9, log_every=1e9)


def whole(config: RunConfig, waited: list[float] | None = None) -> float:
    """Seconds per step of a run, by its own account, after the first `SPEED_STEPS`; and the share it waited."""
    with tempfile.TemporaryDirectory() as place:
        if not train(config, Path(place) / "run").finished:
            raise KeyboardInterrupt  # which the run took for a wish to go on later
        lines = (Path(place) / "run" / "log.jsonl").read_text().splitlines()
    rows = [row for row in map(json.loads, lines) if "images_per_second" in row][1:]
    if waited is not None:
        waited.append(mean(row["waiting"] for row in rows))
    return mean(config.loading.batch_size / row["images_per_second"] for row in rows)


def mean(values: Iterable[float]) -> float:
    return float(np.mean(list(values)))


def plain_loop(parts: Run, batch: int) -> Learner:
    """A step of the network of a run, on a batch that is ready."""
    net: Any = parts.net
    generator = torch.Generator().manual_seed(1)
    if isinstance(parts.config, ClassifyConfig):
        images = torch.randn(batch, 3, *net.config.image_size, generator=generator)
        labels = torch.arange(batch) % net.config.num_classes
        return Learner(net, lambda: F.cross_entropy(net(images).float(), labels), parts.dtype)
    unet = net.network.config
    x, noise = (
        torch.randn(batch, unet.in_channels, *unet.latent_size, generator=generator) for _ in range(2)
    )
    t = torch.randint(1000, (batch,), generator=generator)

    def loss() -> Tensor:
        return F.mse_loss(net.network(x, t).float(), noise)

    return Learner(net, loss, parts.dtype)
