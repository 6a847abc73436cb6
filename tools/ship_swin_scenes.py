"""Make the shipped Swin of a run, measure it and a plain U-Net, and write its card and docs/shipped-networks.md.

    python tools/make_emoji.py --styles all --out EMOJI
    triptych train swin_emoji --data emoji:EMOJI --out runs/swin_emoji
    triptych train swin_emoji64 --data emoji:EMOJI --init runs/swin_emoji --out runs/swin_emoji64
    triptych train swin_scenes --data scenes:EMOJI --init runs/swin_emoji64 --out runs/swin_scenes
    triptych train unet_scenes --data scenes:EMOJI --out runs/unet_scenes
    python tools/ship_swin_scenes.py runs/swin_scenes runs/unet_scenes

Weights are stored in fp16, and the stored weights are measured, on scenes of a style that is not among the training
styles.
"""

import json
import platform
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

import triptych as tp
from page_tables import write_table
from triptych.atomic_write import write_text_atomically
from triptych.metrics.cost import count_macs, count_parameters
from triptych.training import evaluate
from triptych.weights.mapping.families import to_json

ROOT = Path(__file__).parents[1]
ASSET = ROOT / "src/triptych/assets/swin_scenes.safetensors"
LICENSE = "Apache-2.0; drawings it was trained on: MIT, Apache-2.0 and CC BY 4.0, see NOTICE"


def main(run: str, baseline: str) -> None:
    net = tp.load(run)
    card = replace(
        net.card,
        source="trained on drawings and scenes: recipes swin_emoji, swin_emoji64, swin_scenes",
        license=LICENSE,
    )
    net.card = card
    tp.save(net, ASSET, dtype=torch.float16)
    ours, theirs = (measure(model) for model in (str(ASSET), baseline))
    facts = f"{ours['count']:,} pixels of 500 scenes; torch {torch.__version__}, Python {platform.python_version()}"
    figures = {name: round(float(ours[name]), 4) for name in ("miou", "pixel_accuracy", "mean_accuracy")}
    figures |= {f"unet_{name}": round(float(theirs[name]), 4) for name in ("miou", "pixel_accuracy")}
    net.card = replace(card, figures=figures, notes=facts)
    tp.save(net, ASSET, dtype=torch.float16)
    text = json.dumps({"config": to_json(net.config), "card": to_json(net.card)}, indent=1) + "\n"
    write_text_atomically(ASSET.with_suffix(".json"), text)
    names = ours["classes"]
    lines = [
        "| intersection over union on the held-out style | swin-scenes | plain U-Net |",
        "|---|---|---|",
    ]
    for i, name in enumerate(names):
        lines.append(f"| {name} | {ours['per_class_iou'][i]:.3f} | {theirs['per_class_iou'][i]:.3f} |")
    for name, words in (("miou", "mean of the seven"), ("pixel_accuracy", "pixel accuracy")):
        lines.append(f"| {words} | {ours[name]:.3f} | {theirs[name]:.3f} |")
    for name, words in (
        ("parameters", "million parameters"),
        ("macs", "billion multiply-accumulates at 96 px"),
    ):
        lines.append(f"| {words} | {ours[name]:.2f} | {theirs[name]:.2f} |")
    (seen, _), (others, _) = history(run)[-1], history(baseline)[-1]
    on_the_way = ", ".join(f"{miou:.3f} after {images:,}" for images, miou in history(run)[:-1])
    facts += f". The Swin was trained on {seen:,} scenes (mean IoU {on_the_way}), the U-Net on {others:,}"
    lines += ["", f"{ASSET.stat().st_size / 1e6:.1f} MB in fp16. {facts}."]
    write_table("ship_swin_scenes.py", lines)


def history(run: str) -> list[tuple[int, float]]:
    """Return the number of scenes and mean IoU at each evaluation of a run."""
    rows = map(json.loads, (Path(run) / "log.jsonl").read_text(encoding="utf-8").splitlines())
    return [(row["images"], row["eval"]["miou"]) for row in rows if "eval" in row]


def measure(model: str) -> dict[str, Any]:
    """Figures on the held-out scenes, and the cost."""
    net = tp.load(model)
    cost = {"parameters": count_parameters(net) / 1e6, "macs": count_macs(net, (1, 3, 96, 96)) / 1e9}
    return {**vars(evaluate(model, "scenes", workers=0, dtype="fp32")), **cost}


if __name__ == "__main__":
    if len(sys.argv) != 3:
        raise SystemExit("usage: python tools/ship_swin_scenes.py RUN BASELINE")
    main(sys.argv[1], sys.argv[2])
