"""The sheet `triptych demo` makes: a page of panels, each drawn by its own small class.

A panel knows its height for a given width and draws itself at a place; the sheet stacks them under one title.
The panels of the ViT and the Swin are here; that of diffusion is in `demo_samples`.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from jaxtyping import Float, UInt8
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import FancyBboxPatch

from triptych.plots import style
from triptych.plots.segmentation import LINE_HEIGHT, chip
from triptych.plots.swin_attention import mark_point, mark_windows, on_pixels

WIDTH, MARGIN = 12.4, 0.5  # inches


class Panel(Protocol):
    """A stripe of the sheet. All measures are inches from the upper left corner of the page."""

    def height(self, width: float) -> float: ...

    def draw(self, page: Figure, left: float, top: float, width: float) -> None: ...


@dataclass(frozen=True, kw_only=True)
class ClassifiedCard:
    """One image through a classifier.

    Attributes:
        image: the network's input.
        rollout: attention rollout, one number per patch.
        guesses: (name, probability), most probable first.
        truth: the right name, if it is known; its bar is blue.
    """

    image: UInt8[np.ndarray, "H W 3"]
    rollout: Float[np.ndarray, "h w"]
    guesses: Sequence[tuple[str, float]]
    truth: str | None = None


@dataclass(frozen=True, kw_only=True)
class ClassifyPanel:
    """Each image, its attention rollout and its first guesses, two to a row."""

    cards: Sequence[ClassifiedCard]
    title: str = "See"
    below: str = "Vision Transformer: five most probable classes, and attention rollout"

    SIDE, GAP, ROW, HEAD = 1.34, 0.12, 1.62, 0.72

    def height(self, width: float) -> float:
        return self.HEAD + -(-len(self.cards) // 2) * self.ROW - (self.ROW - self.SIDE)

    def draw(self, page: Figure, left: float, top: float, width: float) -> None:
        style.text(page, left, top + 0.2, self.title, 13, weight="bold")
        style.text(page, left + 0.13 * len(self.title) + 0.25, top + 0.2, self.below, 9, style.SOFT)
        gutter = 0.45
        column = (width - gutter) / 2
        for i, card in enumerate(self.cards):
            x = left + i % 2 * (column + gutter)
            self._card(page, card, x, top + self.HEAD + i // 2 * self.ROW, column)

    def _card(self, page: Figure, card: ClassifiedCard, x: float, y: float, width: float) -> None:
        side = self.SIDE
        style.show_image(style.axes(page, x, y, side, side), _square(card.image))
        light = style.overlay(card.image, card.rollout)
        style.show_image(style.axes(page, x + side + self.GAP, y, side, side), _square(light))
        bars = x + 2 * (side + self.GAP) + 0.08
        ax = style.axes(page, bars, y, x + width - bars, side)
        ax.set(xlim=(0, x + width - bars), ylim=(side, 0))
        ax.axis("off")
        self._bars(ax, card, x + width - bars)

    def _bars(self, ax: Axes, card: ClassifiedCard, width: float) -> None:
        """A line a guess: name and percentage above a thin bar, the best in bold."""
        step = self.SIDE / 5
        for i, (name, probability) in enumerate(card.guesses[:5]):
            y = i * step
            color = (
                style.BLUE
                if name == card.truth
                else style.INK
                if card.truth is None and i == 0
                else style.FAINT
            )
            words = style.INK if i == 0 else style.SOFT
            weight = "bold" if i == 0 else "normal"
            plain = style.shorts([name], int((width - 0.45) / 0.072))[0]
            ax.text(0, y + 0.13, plain, fontsize=8.5, color=words, weight=weight)
            ax.text(
                width, y + 0.13, _percent(probability), fontsize=8.5, color=words, weight=weight, ha="right"
            )
            for extent, shade in ((width, style.LINE), (max(width * probability, 0.045), color)):
                ax.add_patch(
                    FancyBboxPatch(
                        (0, y + 0.18),
                        extent,
                        0.045,
                        boxstyle="round,pad=0,rounding_size=0.0225",
                        lw=0,
                        color=shade,
                    )
                )


@dataclass(frozen=True, kw_only=True)
class SegmentedCard:
    """One image through a segmenter.

    Attributes:
        image: the network's input.
        overlay: the segmentation over it.
        words: the scores, for the line below.
    """

    image: UInt8[np.ndarray, "H W 3"]
    overlay: UInt8[np.ndarray, "H2 W2 3"]
    words: str = ""


@dataclass(frozen=True, kw_only=True)
class AttentionCard:
    """What a point of an image attended to in one block of a Swin.

    Attributes:
        words: which block; what comes after the first comma stands on a line of its own.
        heat: attention on the block's map.
        stride: pixels of a cell.
        window, shift: height and width of the windows, and how far they are shifted, in pixels.
    """

    words: str
    heat: Float[np.ndarray, "h w"]
    stride: int
    window: Float[np.ndarray, " 2"]
    shift: Float[np.ndarray, " 2"]


@dataclass(frozen=True, kw_only=True)
class SegmentPanel:
    """Images and their segmentations, a legend; below, what a point of the first image attends to, block by block.

    Attributes:
        cards: two images.
        legend: name, color (red, green, blue from 0 to 255) and a number in words of each class.
        attention_cards: attention of a point of the first image; eight blocks fill the line.
        image: that image as the network's input, which `attention_cards` and `point` are in pixels of.
        point: x and y.
    """

    cards: Sequence[SegmentedCard]
    legend: Sequence[tuple[str, Sequence[int], str]]
    heading: str = "IoU, both scenes"
    attention_cards: Sequence[AttentionCard] = ()
    image: UInt8[np.ndarray, "h w 3"] | None = None
    point: tuple[float, float] = (0.0, 0.0)
    title: str = "Parse"
    below: str = (
        "Swin Transformer: a class for every pixel, and what one point attends to through its windows"
    )

    SIDE, GAP, HEAD, NOTE, LABEL, ACROSS = 2.0, 0.12, 0.62, 0.3, 0.5, 8

    def height(self, width: float) -> float:
        rows = -(-len(self.attention_cards) // self.ACROSS)
        return self.HEAD + self.SIDE + self.NOTE + rows * (self.LABEL + self._tile(width))

    def _tile(self, width: float) -> float:
        return (width - (self.ACROSS - 1) * self.GAP) / self.ACROSS

    def draw(self, page: Figure, left: float, top: float, width: float) -> None:
        style.text(page, left, top + 0.2, self.title, 13, weight="bold")
        style.text(page, left + 0.13 * len(self.title) + 0.25, top + 0.2, self.below, 9, style.SOFT)
        x, y, side = left, top + self.HEAD, self.SIDE
        for i, card in enumerate(self.cards):
            ax = style.axes(page, x, y, side, side)
            style.show_image(ax, _square(card.image))
            if i == 0 and self.image is not None:
                mark_point(ax, self.image.shape[:2], np.array(self.point, np.float32))
            style.show_image(style.axes(page, x + side + self.GAP, y, side, side), _square(card.overlay))
            style.text(page, x + side + self.GAP, y + side + 0.2, card.words, 8.5, style.SOFT)
            x += 2 * (side + self.GAP) + 0.24
        self._legend(page, x, y, left + width - x)
        self._attention(page, left, y + side + self.NOTE, width)

    def _legend(self, page: Figure, left: float, top: float, width: float) -> None:
        ax = style.axes(page, left, top, width, self.SIDE)
        ax.set(xlim=(0, width), ylim=(self.SIDE, 0))
        ax.axis("off")
        ax.text(width, 0.1, self.heading, fontsize=8, color=style.FAINT, ha="right")
        for i, (name, color, number) in enumerate(self.legend[: int((self.SIDE - 0.2) / LINE_HEIGHT)]):
            y = 0.2 + i * LINE_HEIGHT
            ax.add_patch(chip(0, y + 0.05, 0.15, 0.13, color))
            ax.text(
                0.24,
                y + 0.16,
                style.shorts([name], int((width - 1.0) / 0.066))[0],
                fontsize=8.5,
                color=style.INK,
            )
            ax.text(width, y + 0.16, number, fontsize=8.5, color=style.SOFT, ha="right")

    def _attention(self, page: Figure, left: float, top: float, width: float) -> None:
        if self.image is None:
            return
        tile, point, size = self._tile(width), np.array(self.point, np.float32), self.image.shape[:2]
        for i, look in enumerate(self.attention_cards):
            x = left + i % self.ACROSS * (tile + self.GAP)
            y = top + i // self.ACROSS * (self.LABEL + tile) + self.LABEL
            first, _, rest = look.words.partition(", ")
            style.text(page, x, y - 0.23, first, 8.5, style.INK)
            style.text(page, x, y - 0.08, rest, 7.5, style.SOFT)
            ax = style.axes(page, x, y, tile, tile * size[0] / size[1])
            style.show_image(ax, style.overlay(self.image, on_pixels(look.heat, size, look.stride), high=1.0))
            mark_windows(ax, size, look.window, look.shift, point)


def demo_sheet(panels: Sequence[Panel], title: str = "Triptych", below: str = "") -> Figure:
    """One page: the title, a line below it, and the panels one under another."""
    width = WIDTH - 2 * MARGIN
    heights = [panel.height(width) for panel in panels]
    top, between = 1.35, 0.5
    page = style.figure(WIDTH, top + sum(heights) + between * (len(panels) - 1) + MARGIN)
    style.text(page, MARGIN, 0.72, title, size=24, weight="bold")
    style.text(page, MARGIN, 1.0, below, size=10, color=style.SOFT)
    y = top
    for panel, height in zip(panels, heights, strict=True):
        panel.draw(page, MARGIN, y, width)
        y += height + between
    return page


def _square(image: np.ndarray) -> np.ndarray:
    """White bands around an image that is not square."""
    H, W, _ = image.shape
    side = max(H, W)
    canvas = np.full((side, side, 3), 255, dtype=image.dtype)
    y, x = (side - H) // 2, (side - W) // 2
    canvas[y : y + H, x : x + W] = image
    return canvas


def _percent(probability: float) -> str:
    return f"{probability:.0%}" if probability >= 0.005 else "<1%"
