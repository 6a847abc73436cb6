"""`triptych bench approximate`: the time that each approximation of generation saves, and the error of its images."""

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
    """Model whose step and decoder are timed, with random weights."""
    tiny: str = "taesd"
    """Small decoder for its latents."""
    dtype: str = "bf16"
    merges: tuple[float, ...] = (0.25, 0.5, 0.75)
    """Fractions of tokens that are merged."""
    caches: tuple[int, ...] = (2, 3, 5)
    """Intervals of deep cache."""
    model: str = "ldm-emoji"
    """Model that generates images."""
    images_per_prompt: int = 2
    prompts: tuple[str, ...] = PROMPTS
    steps: int = 30
    rounds: int = 2


FULL = Plan()
QUICK = Plan(
    config=TINY, merges=(0.5,), caches=(2,), images_per_prompt=1, prompts=PROMPTS[:1], steps=3, rounds=1
)


@suite("approximate", FULL)
def run(report: Report, plan: Plan) -> None:
    """Measure everything in the plan."""
    report.tables = [steps(plan), decoding(plan), image_differences(plan)]
    report.notes = [
        "Each approximation is opt-in and changes the image: token merging (Bolya and Hoffman 2023) in the "
        "self-attention of the highest resolution, deep cache (Ma et al. 2023), guidance in an interval (Kynkäänniemi "
        "et al. 2024), TAESD in place of the decoder. At zero strength each is bit-exact."
    ]


def compare(
    sides: Mapping[str, Callable[[], object]], rounds: int, passes: Mapping[str, int]
) -> list[dict[str, Any]]:
    """Measure the seconds per pass of each variant in alternation, and the ratio to the first one."""
    times_of = interleave({name: timed(work) for name, work in sides.items()}, rounds, warmup=0).measurements
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
    """Time a pass of the UNet over two latents, as with guidance."""
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
        f"Seconds per pass of the UNet over two latents of {rows} x {columns} in {plan.dtype}, with random weights. "
        "For deep cache it is the mean over n passes, of which one is complete.",
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
        passes()  # packs the weights
        result.rows = compare(sides, plan.rounds, {f"deep cache, {n}": n for n in plan.caches})
    return result


@torch.inference_mode()
def decoding(plan: Plan) -> Table:
    """Time a pass of the decoder and of the small decoder."""
    dtype, config = DTYPES[plan.dtype], plan.config
    exact: Any = make(config).autoencoder.to(dtype)
    tiny: Any = build(STAGES[plan.tiny]).to(dtype).eval()
    shape = (1, config.autoencoder.latent_channels, *config.network.latent_size)
    z = torch.randn(shape, generator=torch.Generator().manual_seed(1)).to(dtype)
    result = table(
        "Decoding",
        f"Seconds from latents to one image in {plan.dtype}, with random weights, so that errors cannot be measured.",
    )
    sides: dict[str, Callable[[], object]] = {
        "exact": lambda: exact.decode(z),
        f"tiny decoder, {plan.tiny}": lambda: tiny.decode(z),
    }
    result.rows = compare(sides, plan.rounds, {})
    return result


def image_differences(plan: Plan) -> Table:
    """Generate images of the same seeds exactly and with each approximation."""
    pipe = DiffusionPipeline(plan.model, dtype=plan.dtype)

    def generate(**options: Any) -> Any:
        return [
            np.asarray(image, dtype=np.float64)
            for prompt in plan.prompts
            for image in pipe.text_to_image(
                prompt, num_steps=plan.steps, num_images=plan.images_per_prompt, progress=False, **options
            )
        ]

    variants: dict[str, dict[str, Any]] = {"exact": {}}
    variants |= {f"merged tokens, {r:g}": {"merge_tokens": r} for r in plan.merges}
    variants |= {f"deep cache, {n}": {"deep_cache": n} for n in plan.caches}
    variants["guidance interval, {:g} to {:g}".format(*INTERVAL)] = {"guidance_interval": INTERVAL}
    generated = {name: generate(**options) for name, options in variants.items()}
    count = plan.images_per_prompt * len(plan.prompts)
    rows, columns = pipe.config.network.latent_size
    result = table(
        f"Images of {plan.model}",
        f"Seconds per image, from prompt to pixels, and the difference to the exact images: {count} images of the same "
        f"prompts and seeds, {plan.steps} steps in {plan.dtype}. The UNet has "
        f"{len(pipe.config.network.channel_multipliers)} levels on latents of {rows} x {columns}, where "
        "little can be saved.",
        Column(key="psnr", heading="PSNR, dB", form=".1f"),
        Column(key="apart", heading="mean difference, of 255", form=".2f"),
    )
    result.rows = compare(
        {name: lambda options=options: generate(**options) for name, options in variants.items()},
        plan.rounds,
        dict.fromkeys(variants, count),
    )
    for row in result.rows:
        pairs = list(zip(generated[row["what"]], generated["exact"], strict=True))
        if row["what"] != "exact":
            row["psnr"] = Spread.of(psnr(a, b) for a, b in pairs)
        row["apart"] = Spread.of(float(np.abs(a - b).mean()) for a, b in pairs)
    return result


def psnr(a: np.ndarray, b: np.ndarray) -> float:
    """Return the peak signal-to-noise ratio in dB of pixels from 0 to 255; 99 for equal images."""
    error = float(((a - b) ** 2).mean())
    return min(99.0, 10 * math.log10(255**2 / error)) if error else 99.0
