"""Make docs/images/swin_*.png, the figures of docs/papers/swin.md, with the package itself.

    python tools/make_swin_images.py                      # of the shipped segmenter
    python tools/make_swin_images.py --model RUN          # of another segmenter on a Swin

The scenes are of the built-in test style, which no network here was trained on.
"""

import argparse
from pathlib import Path

import numpy as np
import torch
from matplotlib.figure import Figure
from PIL import Image

import triptych as tp
from triptych.data.builtin.scenes import scenes
from triptych.layers.window import shift_along, shift_mask, window_sources, windows_along
from triptych.models.swin import Swin
from triptych.pipelines.explain.swin_windows import backbone_of
from triptych.pipelines.segmentation import SegmentationPipeline
from triptych.plots import style
from triptych.plots.explanation import explanation_figures
from triptych.plots.segmentation import Entry, parse_figure
from triptych.plots.swin_partition import cyclic_shift, hierarchy, position_bias

LIGHT = 190_000  # bytes; a larger file is stored with fewer colors, then fewer dots
SCENE = 15


def shifted(size: tuple[int, int], side: int, title: str) -> Figure:
    """Draw the windows, regions, roll and mask of a map."""
    rows, columns = (windows_along(cells, side) for cells in size)
    shift = (shift_along(size[0], side), shift_along(size[1], side))
    order = window_sources(*size, rows, columns, (side, side), shift)
    mask = shift_mask(rows, columns, (side, side), shift, torch.device("cpu"), torch.float32)
    return cyclic_shift(size, (side, side), shift, order.numpy(), mask[:, 0].numpy(), title)


def bias(net: Swin) -> Figure:
    """Draw the learned table of each block as a map of offsets."""
    tables, names = [], []
    for s, stage in enumerate(net.stages):
        for b, block in enumerate(stage.blocks):  # type: ignore[arg-type]
            h, w = block.attn.window
            table = block.attn.bias_table.detach().T.unflatten(1, (2 * h - 1, 2 * w - 1))
            # The table is indexed by query minus key; the map shows key minus query.
            tables.append(table.flip(1, 2).numpy())
            names.append(f"stage {s + 1}, block {b + 1}")
    return position_bias(tables, names)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="swin-scenes", help="what triptych.load takes")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent.parent / "docs" / "images")
    args = parser.parse_args()
    net = tp.load(args.model).float()
    _, swin = backbone_of(net)
    size = net.card.preprocess.size
    scene = scenes("test", size=size)[SCENE]
    largest = max(scene.boxes, key=lambda box: (box.x1 - box.x0) * (box.y1 - box.y0))
    point = ((largest.x0 + largest.x1) / 2, (largest.y0 + largest.y1) / 2)
    explanation = tp.explain(net, scene.image, point=point)
    parsed = SegmentationPipeline(net, device="cpu", dtype="fp32")(scene.image)
    config = swin.config
    best = explanation.classification[0]
    words = f"prediction at the point: {best.name}, with a probability of {best.probability:.0%}"
    entries = [
        Entry(area.name, tuple(parsed.colors[area.index].tolist()), area.share) for area in parsed.areas
    ]

    def figures() -> dict[str, Figure]:
        explained = explanation_figures(explanation.arrays(), words, explanation.readout)
        return {
            "hierarchy": hierarchy(scene.image, config.strides, config.widths, config.window_size),
            "shift": shifted((8, 8), 4, "Shifted windows"),
            "pad": shifted((7, 5), 4, "Pad, roll, mask"),
            "parse": parse_figure(parsed.image, np.asarray(parsed.overlay()), entries, "Parse"),
            **({"bias": bias(swin)} if config.version == 1 else {}),
            **{name: explained[name] for name in ("point", "rollout", "pyramid")},
        }

    args.out.mkdir(parents=True, exist_ok=True)
    heavy = set(figures())
    for dots in (160, 128, 112, 96):
        style.DPI = dots
        for name, figure in figures().items():
            path = args.out / f"swin_{name}.png"
            if name in heavy:
                style.save(figure, path)
                if path.stat().st_size > LIGHT:
                    with Image.open(path) as image:
                        fewer = image.convert("RGB").quantize(256, Image.Quantize.MEDIANCUT, kmeans=3)
                    fewer.save(path, optimize=True)
                print(f"{path}: {path.stat().st_size / 1000:.0f} kB at {dots} dots an inch")
        heavy = {name for name in heavy if (args.out / f"swin_{name}.png").stat().st_size > LIGHT}


if __name__ == "__main__":
    main()
