"""Make the shipped ViT out of a training run, measure it, and write its card and the table of docs/shipped-networks.md.

    python tools/make_emoji.py --styles all --out EMOJI
    triptych train vit_emoji --data emoji:EMOJI --out runs/emoji32
    triptych train vit_emoji64 --data emoji:EMOJI --init runs/emoji32 --out runs/emoji64
    python tools/ship_vit_emoji.py runs/emoji64 EMOJI

Weights are stored in fp16, and the stored weights are measured, on Twemoji, a style that is not among the
training styles. The baseline is the nearest neighbor among all training images at 16x16 raw pixels.
"""

import json
import platform
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

import triptych as tp
from page_tables import write_table
from triptych.atomic_write import write_text_atomically
from triptych.config import to_json
from triptych.data.builtin.emoji import EmojiSource, emoji
from triptych.data.resizing import resize_crop
from triptych.training import evaluate

ROOT = Path(__file__).parents[1]
ASSET = ROOT / "src/triptych/assets/vit_emoji.safetensors"
LICENSE = "Apache-2.0; drawings it was trained on: MIT, Apache-2.0 and CC BY 4.0, see NOTICE"
NAMES = ("top1", "top5", "subgroup", "group")


def main(run: str, styles: str) -> None:
    net = tp.load(run)
    train, test = emoji("train", root=styles), emoji("test")
    card = replace(
        net.card, source="trained on drawings: recipes vit_emoji, then vit_emoji64", license=LICENSE
    )
    net.card = card
    tp.save(net, ASSET, dtype=torch.float16)
    result = evaluate(str(ASSET), "emoji", workers=0, dtype="fp32").metrics()
    figures = {name: round(float(result[name]), 4) for name in NAMES}
    figures |= {f"floor_{name}": value for name, value in floor(train, test).items()}
    facts = (
        f"{len(train):,} training images of {len(train.styles)} styles, {len(test):,} test images of another; "
        f"torch {torch.__version__}, Python {platform.python_version()}"
    )
    net.card = replace(card, figures=figures, notes=facts)
    tp.save(net, ASSET, dtype=torch.float16)
    shown = {**to_json(net.card), "classes": len(card.classes), "groupings": sorted(card.groupings)}
    text = json.dumps({"config": to_json(net.config), "card": shown}, indent=1) + "\n"
    write_text_atomically(ASSET.with_suffix(".json"), text)
    write_figures(figures, facts, ASSET.stat().st_size)


def floor(train: EmojiSource, test: EmojiSource) -> dict[str, float]:
    """Accuracy of the nearest neighbor at 16x16 raw pixels on white."""
    known, queries = small(train), small(test)
    distance = (known**2).sum(1) - 2 * queries @ known.T
    guessed = np.asarray(train.labels)[distance.argmin(1)]
    truth = np.asarray(test.labels)
    shares = {"top1": float((guessed == truth).mean())}
    for name, coarser in test.groupings.items():
        names = np.asarray(coarser)
        shares[name] = float((names[guessed] == names[truth]).mean())
    return {name: round(share, 4) for name, share in shares.items()}


def small(source: EmojiSource) -> np.ndarray:
    """Return each image on white at 16x16, one per row."""
    rows = []
    for i in range(len(source)):
        pixels = source[i].image.astype(np.float32)
        alpha = pixels[..., 3:] / 255
        white = (pixels[..., :3] * alpha + 255 * (1 - alpha)).round().astype(np.uint8)
        rows.append(resize_crop(white, (16, 16), 1.0, "squash", "box", (255, 255, 255)).reshape(-1) / 255)
    return np.stack(rows).astype(np.float32)


def write_figures(figures: dict[str, float], facts: str, size: int) -> None:
    """Write the table of the page."""
    words = {"top1": "concept, of 1,032", "subgroup": "subgroup, of 65", "group": "group, of 6"}
    lines = ["| accuracy on the held-out style | vit-emoji | nearest neighbor |", "|---|---|---|"]
    lines += [
        f"| {word} | {figures[name]:.3f} | {figures['floor_' + name]:.3f} |" for name, word in words.items()
    ]
    lines += ["", f"Top-5 {figures['top5']:.3f}. {size / 1e6:.1f} MB in fp16. {facts}."]
    write_table("ship_vit_emoji.py", lines)


if __name__ == "__main__":
    if len(sys.argv) != 3:
        raise SystemExit("usage: python tools/ship_vit_emoji.py RUN EMOJI")
    main(sys.argv[1], sys.argv[2])
