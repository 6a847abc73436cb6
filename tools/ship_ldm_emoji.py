"""Make the shipped latent diffusion model of a training run, measure it, write its card and the README's table.

    python tools/make_emoji.py --styles all --out EMOJI
    triptych train autoencoder_emoji --data emoji:EMOJI --out runs/autoencoder_emoji
    triptych train latent_diffusion_emoji --data emoji:EMOJI --first-stage runs/autoencoder_emoji --out runs/ldm_emoji
    triptych train latent_diffusion_emoji --data emoji:EMOJI --first-stage runs/autoencoder_emoji \\
        --init runs/ldm_emoji --optim.lr 5e-4 --loop.epochs 140 --loop.seed 1 --out runs/ldm_emoji_longer
    python tools/ship_ldm_emoji.py runs/ldm_emoji_longer

Weights are kept as fp16 in two files; the figures are of what is kept. Reconstructions are of Twemoji, a drawing style
that is not among the training styles. Samples are painted from the captions of the shipped training drawings and
compared with these; and from those of drawings that were held back, concepts in styles that they were not seen in.
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
from triptych.atomic_write import write_text_atomically
from triptych.cli.evaluate_generation import generated
from triptych.config import from_json
from triptych.data.config import DataConfig
from triptych.data.open import open_source
from triptych.data.source import Source
from triptych.evaluation.feature_extractor import open_extractor
from triptych.evaluation.generation import Faithfulness, ask, evaluate_generation
from triptych.models.latent_diffusion import LatentDiffusion
from triptych.train import evaluate
from triptych.train.configs.second_stage import SecondStageConfig
from triptych.train.second_stage.build import open_data
from triptych.weights.mapping.families import to_json

ROOT = Path(__file__).parents[1]
ASSET = ROOT / "src/triptych/assets/ldm_emoji"
LICENSE = "Apache-2.0; drawings it was trained on: MIT, Apache-2.0 and CC BY 4.0, see NOTICE"
SEER = "vit-emoji"
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
    figures = first_stage(pipe) | samples(pipe, open_source("emoji", "train")) | held_back(pipe, run)
    figures["seconds_an_image"] = seconds(pipe)
    facts = (
        f"{SAMPLES:,} pictures painted from captions of the shipped training drawings, at the default settings, beside "
        f"all of these; torch {torch.__version__}, Python {platform.python_version()}, "
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
    """How well its autoencoder gives back drawings by a hand that it has never seen."""
    assert isinstance(pipe.net, LatentDiffusion)
    found = evaluate(pipe.net.autoencoder, "emoji", workers=0, dtype="fp32", extractor=SEER)
    return {f"first_stage_{name}": float(found[name]) for name in ("psnr", "ssim", "frechet")}


def samples(pipe: tp.DiffusionPipeline, source: Source) -> dict[str, float]:
    """Figures of pictures beside the real ones whose captions they were painted from."""
    asked = ask(pipe.config, pipe.card, source, SAMPLES)
    found = evaluate_generation(
        generated(pipe, asked, BATCH, {}),
        open_extractor(SEER, picture=(64, 64)),
        source,
        asked=asked,
        classifier=tp.load(SEER),
        loading=DataConfig(eval_batch_size=BATCH, workers=0),
    )
    names = ("frechet", "frechet_floor", "kernel", "precision", "recall", "density", "coverage")
    return {name: float(found[name]) for name in names} | faith(found["faithfulness"], "")


def held_back(pipe: tp.DiffusionPipeline, run: str) -> dict[str, float]:
    """How often the concept is found in pictures of concepts in styles that they were not learnt in."""
    said = json.loads((Path(run) / "config.json").read_text(encoding="utf-8"))
    said.pop("fingerprint", None)
    source = open_data(from_json(SecondStageConfig, said))[1]
    asked = ask(pipe.config, pipe.card, source, len(source))
    measured = Faithfulness(tp.load(SEER), source, asked, torch.device("cpu"))
    for at, picture in enumerate(generated(pipe, asked, BATCH, {})):
        measured.update([picture], at)
    found = measured.compute(DataConfig(eval_batch_size=BATCH, workers=0))
    return faith(found, "held_back_") | {"held_back_count": float(len(source))}


def faith(found: dict[str, dict[str, float]], prefix: str) -> dict[str, float]:
    named = {"top1": "concept", "subgroup": "subgroup", "group": "group"}
    return {
        f"{prefix}{word}{side}": found[kind][name]
        for name, word in named.items()
        for kind, side in (("generated", ""), ("real", "_real"))
    }


def seconds(pipe: tp.DiffusionPipeline) -> float:
    """Median time of one picture at the default settings, after one that is not counted."""
    took = []
    for seed in range(TIMED + 1):
        start = time.perf_counter()
        pipe.text_to_image("a red apple, noto style", seed=seed)
        took.append(time.perf_counter() - start)
    return statistics.median(islice(took, 1, None))


def table(net: Any, figures: dict[str, float], facts: str, run: str) -> None:
    size = sum(path.stat().st_size for path in ASSET.iterdir())
    lines = [
        "| found by vit-emoji in the picture | painted | real | held back, painted | real |",
        "|---|---|---|---|---|",
    ]
    for name, words in (
        ("concept", "the concept of the prompt, of 1,032"),
        ("subgroup", "its subgroup, of 65"),
        ("group", "its group, of 6"),
    ):
        columns = (name, f"{name}_real", f"held_back_{name}", f"held_back_{name}_real")
        lines.append(f"| {words} | " + " | ".join(f"{figures[column]:.3f}" for column in columns) + " |")
    lines += ["", "| in vit-emoji's features | |", "|---|---|"]
    for name, words in (
        ("frechet", "Fréchet distance of the samples"),
        ("frechet_floor", "that of as many perfect ones"),
        ("precision", "precision"),
        ("recall", "recall"),
        ("coverage", "coverage"),
        ("first_stage_frechet", "Fréchet distance of the first stage's reconstructions, Twemoji"),
        ("first_stage_psnr", "their PSNR, dB"),
        ("seconds_an_image", "seconds a picture"),
    ):
        lines.append(f"| {words} | {figures[name]:.3g} |")
    millions = sum(p.numel() for p in net.parameters()) / 1e6
    latents = seen(Path(run))
    lines += [
        "",
        f"{millions:.2f} million parameters, {size / 1e6:.1f} MB as fp16; the second stage saw {latents:,} latents. "
        f"{int(figures['held_back_count'])} drawings were held back. {facts}.",
    ]
    write_table("ship_ldm_emoji.py", lines)


def seen(run: Path) -> int:
    """Latents that the weights were learnt from, in this run and in the one that it started from."""
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
