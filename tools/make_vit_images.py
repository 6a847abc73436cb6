"""Make docs/images/vit_*.png, the figures of docs/papers/vit.md, with the package itself.

    python tools/make_vit_images.py                      # of the shipped network
    python tools/make_vit_images.py --model RUN          # of another one; without positions it has no such figure

The images are of the built-in test style, which no network here was trained on.
"""

import argparse
from pathlib import Path

import numpy as np
import torch
from einops import rearrange
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from PIL import Image

import triptych as tp
from triptych.data.builtin.emoji import emoji
from triptych.layers.position import resample_positions
from triptych.models.vit import ViT
from triptych.pipelines.explain.vit import Explanation
from triptych.plots import style
from triptych.plots.attention import attention_distance, attention_heads
from triptych.plots.embedding import position_similarity

LIGHT = 190_000  # bytes; a larger file is stored with fewer colors
PATCHED, LOOKED_AT = "sailboat", "owl"
ROLLED_OUT = ("fox", "strawberry", "owl", "sailboat", "rocket", "guitar")
DRAWINGS = emoji("test", background=(255, 255, 255))


def drawing(label: str) -> np.ndarray:
    """uint8 (64, 64, 3): how the test style draws a concept."""
    return DRAWINGS[int(np.flatnonzero(DRAWINGS.labels == DRAWINGS.classes.index(label))[0])].image


def patches(image: np.ndarray, patch: int = 16) -> Figure:
    """The image, the image cut into patches, and the patches in the order of their tokens."""
    pieces = rearrange(image, "(h p) (w q) c -> h w p q c", p=patch, q=patch)
    rows, columns = pieces.shape[:2]
    side, gap, top = 2.2, 0.1, 1.05
    page = style.figure(9.4, top + side + 1.5)
    H, W = image.shape[:2]
    style.heading(
        page, "Patch partition", f"{H} x {W} pixels, P = {patch}: N = HW / P² = {rows * columns} patches"
    )
    style.show_image(style.axes(page, 0.4, top, side, side), image)
    cell = (side - (columns - 1) * gap) / columns
    left = 0.4 + side + 1.0
    style.text(page, left - 0.62, top + side / 2, "→", 20, style.SOFT)
    for i in range(rows):
        for j in range(columns):
            at = style.axes(page, left + j * (cell + gap), top + i * (cell + gap), cell, cell)
            style.show_image(at, pieces[i, j])
            number = style.INK if pieces[i, j].mean() > 150 else style.PAPER
            at.text(
                0.05,
                0.93,
                str(i * columns + j + 1),
                transform=at.transAxes,
                fontsize=7,
                color=number,
                va="top",
            )
    right = left + side + 0.55
    for line, words in enumerate(
        (
            "a patch is a vector of P²C numbers:",
            f"{patch} · {patch} · 3 = {patch * patch * 3}",
            "",
            "one matrix E turns it into a token",
            "of D numbers, the same matrix",
            "for every patch (Equation 1)",
        )
    ):
        style.text(page, right, top + 0.55 + 0.24 * line, words, 9, style.SOFT)
    small = (9.4 - 0.8 - (rows * columns - 1) * 0.06) / (rows * columns)
    below = top + side + 0.5
    style.text(page, 0.4, below - 0.1, "the sequence, row by row", 9, style.SOFT)
    for n, piece in enumerate(pieces.reshape(-1, patch, patch, 3)):
        x = 0.4 + n * (small + 0.06)
        style.show_image(style.axes(page, x, below, small, small), piece)
        style.text(page, x + small / 2, below + small + 0.18, str(n + 1), 8, style.SOFT, ha="center")
    return page


def grids(net: ViT) -> Figure:
    """Cosine similarity of one position with all others, in the learned table and in resampled ones."""
    old = net.config.grid
    wide = (old[0], round(old[1] * 1.5))
    tall, double = wide[::-1], (old[0] * 2, old[1] * 2)
    named = ((old, "as trained"), (double, "twice the size"), (wide, "landscape"), (tall, "portrait"))
    unit = 2.0 / old[1]
    sizes = [(unit * w, unit * h) if grid != double else (2.0, 2.0) for grid, _ in named for h, w in [grid]]
    page = style.figure(0.8 + sum(w for w, _ in sizes) + 0.45 * 3, 1.1 + max(h for _, h in sizes) + 0.55)
    style.heading(
        page,
        "One position in four grids",
        "cosine similarity of the marked position's embedding with every other",
    )
    x = 0.4
    for (grid, words), (width, height) in zip(named, sizes, strict=True):
        table = resample_positions(net.positions.detach(), old, grid, net.placed)[0, net.placed :]
        table = torch.nn.functional.normalize(table.double(), dim=-1)
        row, column = grid[0] // 4, grid[1] // 2
        similarity = (table @ table[row * grid[1] + column]).view(grid)
        ax = style.axes(page, x, 1.05, width, height)
        ax.imshow(
            similarity.numpy(), cmap=style.SIMILARITY, vmin=-1, vmax=1, aspect="auto", interpolation="nearest"
        )
        corner = (column - 0.5, row - 0.5)
        ax.add_patch(Rectangle(corner, 1, 1, fill=False, edgecolor=style.RED, linewidth=1.4))
        ax.set(xticks=[], yticks=[])
        for spine in ax.spines.values():
            spine.set(color=style.LINE, linewidth=0.8)
        style.text(page, x, 1.05 + height + 0.22, f"{words}, {grid[0]} x {grid[1]}", 9, style.SOFT)
        x += width + 0.45
    return page


def rollouts(explanations: dict[str, Explanation]) -> Figure:
    """Draw the images, the rollout of each below, and the prediction; wrong ones in red."""
    side, gap, top = 1.35, 0.16, 1.25
    page = style.figure(0.8 + len(explanations) * (side + gap) - gap, top + 2 * side + gap + 0.75)
    style.heading(
        page,
        "Attention rollout",
        "through all blocks; the prediction is below, in red if it is wrong",
    )
    for i, (label, one) in enumerate(explanations.items()):
        x = 0.4 + i * (side + gap)
        style.text(page, x + side / 2, top - 0.1, style.short(label, 16), 9, style.SOFT, ha="center")
        style.show_image(style.axes(page, x, top, side, side), one.image)
        style.show_image(
            style.axes(page, x, top + side + gap, side, side), style.overlay(one.image, one.rollout)
        )
        best = one.classification[0]
        words, color = style.short(best.name, 16), style.INK if best.name == label else style.RED
        below = top + 2 * side + gap
        style.text(page, x + side / 2, below + 0.22, words, 9, color, ha="center")
        style.text(page, x + side / 2, below + 0.4, f"{best.probability:.0%}", 8, style.SOFT, ha="center")
    return page


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="vit-emoji", help="what triptych.load takes")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent.parent / "docs" / "images")
    args = parser.parse_args()
    net = tp.load(args.model)
    figures = {"patches": patches(drawing(PATCHED))}
    one = tp.explain(net, drawing(LOOKED_AT))
    figures["heads"] = attention_heads(one.image, one.heads, one.readout)
    figures["rollout"] = rollouts({label: tp.explain(net, drawing(label)) for label in ROLLED_OUT})
    distances = [
        tp.explain(net, DRAWINGS[i].image).distances for i in range(0, len(DRAWINGS), len(DRAWINGS) // 32)
    ]
    figures["distance"] = attention_distance(np.mean(distances, axis=0), one.image.shape[:2], net.config.grid)
    if net.config.position == "learned":
        figures["positions"] = position_similarity(one.positions)
        figures["grids"] = grids(net)
    args.out.mkdir(parents=True, exist_ok=True)
    for name, figure in figures.items():
        path = args.out / f"vit_{name}.png"
        style.save(figure, path)
        for colors in (256, 192, 128):
            if path.stat().st_size > LIGHT:
                with Image.open(path) as image:
                    fewer = image.convert("RGB").quantize(colors, Image.Quantize.MEDIANCUT, kmeans=3)
                fewer.save(path, optimize=True)
        print(f"{path}: {path.stat().st_size / 1000:.0f} kB")


if __name__ == "__main__":
    main()
