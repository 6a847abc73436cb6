"""The sheet `triptych demo` makes: a page of panels, each drawn by its own small class.

A panel knows its height for a given width and draws itself at a place; the sheet stacks them under one title.
See (ViT) is here; the panels of parse (Swin) and paint (diffusion) are further classes of the same two
methods.
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

WIDTH, MARGIN = 12.4, 0.5  # inches


class Panel(Protocol):
    """A stripe of the sheet. All measures are inches from the upper left corner of the page."""

    def height(self, width: float) -> float: ...

    def draw(self, page: Figure, left: float, top: float, width: float) -> None: ...


@dataclass(frozen=True, kw_only=True)
class Seen:
    """One image through a classifier.

    Attributes:
        image: what the network saw.
        rollout: where it looked, one number a patch.
        guesses: (name, probability), most probable first.
        truth: the right name, if it is known; its bar is blue.
    """

    image: UInt8[np.ndarray, "H W 3"]
    rollout: Float[np.ndarray, "h w"]
    guesses: Sequence[tuple[str, float]]
    truth: str | None = None


@dataclass(frozen=True, kw_only=True)
class SeePanel:
    """Each image, its attention rollout and its first guesses, two to a row."""

    cards: Sequence[Seen]
    title: str = "See"
    below: str = "Vision Transformer: five guesses, and where its attention went"

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

    def _card(self, page: Figure, card: Seen, x: float, y: float, width: float) -> None:
        side = self.SIDE
        style.picture(style.axes(page, x, y, side, side), _square(card.image))
        light = style.overlay(card.image, card.rollout)
        style.picture(style.axes(page, x + side + self.GAP, y, side, side), _square(light))
        bars = x + 2 * (side + self.GAP) + 0.08
        ax = style.axes(page, bars, y, x + width - bars, side)
        ax.set(xlim=(0, x + width - bars), ylim=(side, 0))
        ax.axis("off")
        self._bars(ax, card, x + width - bars)

    def _bars(self, ax: Axes, card: Seen, width: float) -> None:
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
