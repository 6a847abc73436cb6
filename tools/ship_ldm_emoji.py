"""Make the shipped latent diffusion model of a run, measure it, and write its card and docs/shipped-networks.md.

    python tools/make_emoji.py --styles all --out EMOJI
    triptych train autoencoder_emoji --data emoji:EMOJI --out runs/autoencoder_emoji
    triptych train latent_diffusion_emoji --data emoji:EMOJI --first-stage runs/autoencoder_emoji --out runs/ldm_emoji
    triptych train latent_diffusion_emoji --data emoji:EMOJI --first-stage runs/autoencoder_emoji \\
        --init runs/ldm_emoji --optim.lr 5e-4 --loop.epochs 140 --loop.seed 1 --out runs/ldm_emoji_longer
    python tools/ship_ldm_emoji.py runs/ldm_emoji_longer

Weights are stored in fp16 in two files, and the stored weights are measured. Reconstructions are of Twemoji, a style
that is not among the training styles. Samples are generated from the captions of the shipped training images and
compared with these images. (The second run draws other validation images than the first, so no image was held out
from both.)
"""

import json
import platform
import statistics
import sys
import time
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

import torch

import triptych as tp
from page_tables import write_table
from triptych.api.generation import generate_requested
from triptych.atomic_write import write_text_atomically
from triptych.data.config import DataConfig
from triptych.data.open import open_source
from triptych.data.source import Source
from triptych.evaluation.feature_extractor import open_extractor
from triptych.evaluation.generation import evaluate_generation, make_requests
from triptych.models.latent_diffusion import LatentDiffusion
from triptych.training import evaluate
from triptych.weights.mapping.families import to_json

ROOT = Path(__file__).parents[1]
ASSET = ROOT / "src/triptych/assets/ldm_emoji"
LICENSE = "Apache-2.0; drawings it was trained on: MIT, Apache-2.0 and CC BY 4.0, see NOTICE"
CLASSIFIER = "vit-emoji"
SAMPLES, BATCH, TIMED = 1000, 64, 7


def main(run: str) -> None:
    net = tp.load(run)
    net.card = replace(
        net.card,
        source="trained on drawings: recipes autoencoder_emoji, latent_diffusion_emoji",
        license=LICENSE,
    )
    keep(net)
    pipe = tp.DiffusionPipeline(str(ASSET), dtype="fp32")
    figures = first_stage(pipe) | samples(pipe, open_source("emoji", "train"))
    figures["seconds_an_image"] = seconds(pipe)
    facts = (
        f"{SAMPLES:,} images generated from captions of the shipped training images, at the default settings, and "
        f"compared with all of these; torch {torch.__version__}, Python {platform.python_version()}, "
        f"threads: {torch.get_num_threads()}"
    )
    net.card = replace(net.card, figures={k: float(f"{v:.4g}") for k, v in figures.items()}, notes=facts)
    keep(net)
    shown = {"config": to_json(net.config), "card": to_json(net.card)}
    write_text_atomically(ASSET / "card.json", json.dumps(shown, indent=1) + "\n")
    table(net, figures, facts, run)


def keep(net: Any) -> None:
    tp.save(net, ASSET / "model.safetensors", dtype=torch.float16, max_shard_size=11_500_000)


def first_stage(pipe: tp.DiffusionPipeline) -> dict[str, float]:
    """Measure its autoencoder's reconstructions of the held-out style."""
    assert isinstance(pipe.net, LatentDiffusion)
    result = evaluate(pipe.net.autoencoder, "emoji", workers=0, dtype="fp32", extractor=CLASSIFIER).metrics()
    return {f"first_stage_{name}": float(result[name]) for name in ("psnr", "ssim", "frechet")}


def samples(pipe: tp.DiffusionPipeline, source: Source) -> dict[str, float]:
    """Compare samples with the real images whose captions they were generated from."""
    requests = make_requests(pipe.config, pipe.card, source, SAMPLES)
    result = evaluate_generation(
        generate_requested(pipe, requests, BATCH, {}),
        open_extractor(CLASSIFIER, image_size=(64, 64)),
        source,
        requests=requests,
        classifier=tp.load(CLASSIFIER),
        loading=DataConfig(eval_batch_size=BATCH, workers=0),
    )
    names = ("frechet", "frechet_floor", "kernel", "precision", "recall", "density", "coverage")
    return {name: float(getattr(result, name)) for name in names} | faithfulness(result.faithfulness or {})


def faithfulness(shares: dict[str, dict[str, float]]) -> dict[str, float]:
    """Name the fractions of generated and real images in which the classifier finds what was asked for."""
    named = {"top1": "concept", "subgroup": "subgroup", "group": "group"}
    return {
        f"{word}{side}": shares[source][name]
        for name, word in named.items()
        for source, side in (("generated", ""), ("real", "_real"))
    }


def seconds(pipe: tp.DiffusionPipeline) -> float:
    """Return the median time per image at the default settings, after one that is not counted."""
    took = []
    for seed in range(TIMED + 1):
        start = time.perf_counter()
        pipe.text_to_image("a red apple, noto style", seed=seed)
        took.append(time.perf_counter() - start)
    return statistics.median(islice(took, 1, None))


def table(net: Any, figures: dict[str, float], facts: str, run: str) -> None:
    size = sum(path.stat().st_size for path in ASSET.iterdir())
    lines = [
        "| found by vit-emoji in the image | generated | real |",
        "|---|---|---|",
    ]
    for name, words in (
        ("concept", "the concept of the prompt, of 1,032"),
        ("subgroup", "its subgroup, of 65"),
        ("group", "its group, of 6"),
    ):
        columns = (name, f"{name}_real")
        lines.append(f"| {words} | " + " | ".join(f"{figures[column]:.3f}" for column in columns) + " |")
    lines += ["", "| in vit-emoji's features | |", "|---|---|"]
    for name, words in (
        ("frechet", "Fréchet distance of the samples"),
        ("frechet_floor", "that of as many perfect samples"),
        ("precision", "precision"),
        ("recall", "recall"),
        ("coverage", "coverage"),
        ("first_stage_frechet", "Fréchet distance of the first stage's reconstructions, Twemoji"),
        ("first_stage_psnr", "their PSNR, dB"),
        ("seconds_an_image", "seconds per image"),
    ):
        lines.append(f"| {words} | {figures[name]:.3g} |")
    millions = sum(p.numel() for p in net.parameters()) / 1e6
    latents = seen(Path(run))
    lines += [
        "",
        f"{millions:.2f} million parameters, {size / 1e6:.1f} MB in fp16; the second stage was trained on {latents:,} "
        f"latents. {facts}.",
    ]
    write_table("ship_ldm_emoji.py", lines)


def seen(run: Path) -> int:
    """Count the latents that the weights were trained on, in this run and in the one it started from."""
    steps = (run / "log.jsonl").read_text(encoding="utf-8").splitlines()
    start = json.loads((run / "config.json").read_text(encoding="utf-8"))["init"]
    before = 0
    if start:
        first = Path(start)
        before = seen(first if first.is_dir() else first.parent)
    return before + max(row.get("images", 0) for row in map(json.loads, steps))


if __name__ == "__main__":
    if len(sys.argv) != 2:
        raise SystemExit("usage: python tools/ship_ldm_emoji.py RUN")
    main(sys.argv[1])
