"""`triptych bench approximate`: what each approximation of a painter saves, and how far from exact its pictures are."""

import logging
import math
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from triptych.bench.harness.forward import DTYPES, Effort
from triptych.bench.harness.report import Column, Report, Table
from triptych.bench.harness.suite import suite
from triptych.bench.harness.timing import Spread, interleave, ratio, timed
from triptych.bench.suites.ldm import TINY, make
from triptych.layers.resnet import packed
from triptych.models.configs.autoencoder import SIZES as STAGES
from triptych.models.configs.latent_diffusion import SIZES, LatentDiffusionConfig
from triptych.models.configs.text import TextConfig
from triptych.models.registry import build
from triptych.models.unet_acceleration import deep_cached, merged_tokens
from triptych.pipelines.diffusion.pipeline import DiffusionPipeline

log = logging.getLogger(__name__)

INTERVAL = (0.3, 5.5)
PROMPTS = ("a red apple", "a black cat", "a sailing boat", "a smiling face")


@dataclass(frozen=True, kw_only=True)
class Plan(Effort):
    """What is measured, and for how long."""

    config: LatentDiffusionConfig = SIZES["sd1"]
    """Of a step and of the decoder, with random weights."""
    tiny: str = "taesd"
    """The small decoder on its latents."""
    dtype: str = "bf16"
    merges: tuple[float, ...] = (0.25, 0.5, 0.75)
    caches: tuple[int, ...] = (2, 3, 5)
    model: str = "ldm-emoji"
    """That paints the pictures."""
    pictures: int = 2
    """Of each prompt."""
    prompts: tuple[str, ...] = PROMPTS
    steps: int = 30
    rounds: int = 2


FULL = Plan()
QUICK = Plan(config=TINY, merges=(0.5,), caches=(2,), pictures=1, prompts=PROMPTS[:1], steps=3, rounds=1)


@suite("approximate", FULL)
def run(report: Report, plan: Plan) -> None:
    """Measure everything in the plan."""
    report.tables = [steps(plan), decoding(plan), pictures(plan)]
    report.notes = [
        "Each is opt-in, and gives another image than the exact computation: token merging (Bolya and Hoffman 2023) in "
        "the finest self-attentions, deep cache (Ma et al. 2023), guidance in an interval (Kynkäänniemi et al. 2024), "
        "TAESD in place of the decoder. At zero strength each is exact to the bit."
    ]


def compare(
    sides: Mapping[str, Callable[[], object]], rounds: int, passes: Mapping[str, int]
) -> list[dict[str, Any]]:
    """Seconds of a pass of each side, in turn, and over those of the first."""
    times_of = interleave({name: timed(work) for name, work in sides.items()}, rounds, warmup=0).found
    times_of = {name: [t / passes.get(name, 1) for t in times] for name, times in times_of.items()}
    first, rows = next(iter(times_of)), []
    for name, times in times_of.items():
        row = {"what": name, "seconds": Spread.of(times), "ratio": ratio(times, times_of[first])}
        log.info("%s: %.3g s, %.2f of %s", name, row["seconds"].median, row["ratio"].median, first)
        rows.append(row)
    return rows


def table(title: str, description: str, *more: Column) -> Table:
    return Table(
        title=title,
        description=description,
        columns=[
            Column(key="what", heading="what"),
            Column(key="seconds", heading="seconds", form=".3g"),
            Column(key="ratio", heading="time / exact", form=".2f"),
            *more,
        ],
    )


@torch.inference_mode()
def steps(plan: Plan) -> Table:
    """A pass of the UNet over two latents, as guidance takes it."""
    dtype, config = DTYPES[plan.dtype], plan.config
    net = make(config).network.to(dtype)
    draw = torch.Generator().manual_seed(1)
    x = torch.randn(2, config.network.in_channels, *config.network.latent_size, generator=draw).to(dtype)
    text = config.text_encoder
    assert isinstance(text, TextConfig)  # the plans are of Stable Diffusion
    context = torch.randn(2, text.max_length, config.network.context_dim, generator=draw).to(dtype)  # type: ignore[union-attr]
    t = torch.tensor([501, 501])
    rows, columns = config.network.latent_size
    result = table(
        "A step of the denoiser",
        f"Seconds of one pass of the UNet over two latents of {rows} x {columns} in {plan.dtype}, weights random. Of "
        "deep cache at every n-th the mean over n passes, of which one is whole.",
    )
    with ExitStack() as stack:
        stack.enter_context(packed(net))
        once = net.project_context(context)

        def passes(ratio: float = 0.0, interval: int = 1) -> None:
            with merged_tokens(net, ratio), deep_cached(net, interval):
                for _ in range(interval):
                    net(x, t, once)

        sides: dict[str, Callable[[], object]] = {"exact": passes}
        sides |= {f"merged tokens, {r:g}": lambda r=r: passes(r) for r in plan.merges}
        sides |= {f"deep cache, {n}": lambda n=n: passes(interval=n) for n in plan.caches}
        passes()  # lays the weights out
        result.rows = compare(sides, plan.rounds, {f"deep cache, {n}": n for n in plan.caches})
    return result


@torch.inference_mode()
def decoding(plan: Plan) -> Table:
    """A pass of the decoder, and of the small one."""
    dtype, config = DTYPES[plan.dtype], plan.config
    exact: Any = make(config).autoencoder.to(dtype)
    tiny: Any = build(STAGES[plan.tiny]).to(dtype).eval()
    shape = (1, config.autoencoder.latent_channels, *config.network.latent_size)
    z = torch.randn(shape, generator=torch.Generator().manual_seed(1)).to(dtype)
    result = table(
        "Decoding",
        f"Seconds from latents to one image in {plan.dtype}, weights random, so that no distance can be measured.",
    )
    sides: dict[str, Callable[[], object]] = {
        "exact": lambda: exact.decode(z),
        f"tiny decoder, {plan.tiny}": lambda: tiny.decode(z),
    }
    result.rows = compare(sides, plan.rounds, {})
    return result


def pictures(plan: Plan) -> Table:
    """The same seeds generated exactly and otherwise."""
    pipe = DiffusionPipeline(plan.model, dtype=plan.dtype)

    def paint(**options: Any) -> Any:
        return [
            np.asarray(image, dtype=np.float64)
            for prompt in plan.prompts
            for image in pipe.text_to_image(
                prompt, num_steps=plan.steps, num_images=plan.pictures, progress=False, **options
            )
        ]

    ways: dict[str, dict[str, Any]] = {"exact": {}}
    ways |= {f"merged tokens, {r:g}": {"merge_tokens": r} for r in plan.merges}
    ways |= {f"deep cache, {n}": {"deep_cache": n} for n in plan.caches}
    ways["guidance interval, {:g} to {:g}".format(*INTERVAL)] = {"guidance_interval": INTERVAL}
    generated = {name: paint(**options) for name, options in ways.items()}
    count = plan.pictures * len(plan.prompts)
    rows, columns = pipe.config.network.latent_size
    result = table(
        f"Images of {plan.model}",
        f"Seconds per image, from prompt to pixels, and how far the images are from the exact ones: {count} of the "
        f"same prompts and seeds, {plan.steps} steps in {plan.dtype}. Its UNet has "
        f"{len(pipe.config.network.channel_multipliers)} levels on latents of {rows} x {columns}, where "
        "little is to be saved.",
        Column(key="psnr", heading="PSNR, dB", form=".1f"),
        Column(key="apart", heading="mean difference, of 255", form=".2f"),
    )
    result.rows = compare(
        {name: lambda options=options: paint(**options) for name, options in ways.items()},
        plan.rounds,
        dict.fromkeys(ways, count),
    )
    for row in result.rows:
        pairs = list(zip(generated[row["what"]], generated["exact"], strict=True))
        if row["what"] != "exact":
            row["psnr"] = Spread.of(psnr(a, b) for a, b in pairs)
        row["apart"] = Spread.of(float(np.abs(a - b).mean()) for a, b in pairs)
    return result


def psnr(a: np.ndarray, b: np.ndarray) -> float:
    """Decibels, of pixels from 0 to 255; 99 for equal pictures."""
    error = float(((a - b) ** 2).mean())
    return min(99.0, 10 * math.log10(255**2 / error)) if error else 99.0
