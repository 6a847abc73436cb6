"""The demo's third panel: images generated from prompts, and the denoising steps of the first."""

import textwrap
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import UInt8
from matplotlib.figure import Figure

from triptych.plots import style


@dataclass(frozen=True, kw_only=True)
class GeneratedCard:
    """One image and its prompt."""

    image: UInt8[np.ndarray, "H W 3"]
    words: str


@dataclass(frozen=True, kw_only=True)
class GeneratePanel:
    """Images in rows, their prompts below; then the denoising steps of the first.

    Attributes:
        cards: eight fill a row.
        frames: steps of the first card, from noise to image; eight fill a row.
        labels: one for each frame, such as "step 4".
    """

    cards: Sequence[GeneratedCard]
    frames: Sequence[UInt8[np.ndarray, "H W 3"]] = ()
    labels: Sequence[str] = ()
    title: str = "Paint"  # words: quoted
    below: str = "Latent diffusion: one image per prompt, and the first one's denoising steps"

    GAP, HEAD, NOTE, LETTER, ACROSS = 0.12, 0.62, 0.5, 0.062, 8

    def height(self, width: float) -> float:
        rows = -(-len(self.cards) // self.ACROSS)
        strip = self._tile(width) + 0.2 if self.frames else 0.0
        return self.HEAD + rows * (self._tile(width) + self.NOTE) + strip

    def _tile(self, width: float) -> float:
        return (width - (self.ACROSS - 1) * self.GAP) / self.ACROSS

    def draw(self, page: Figure, left: float, top: float, width: float) -> None:
        style.text(page, left, top + 0.2, self.title, 13, weight="bold")
        style.text(page, left + 0.13 * len(self.title) + 0.25, top + 0.2, self.below, 9, style.SOFT)
        tile, y = self._tile(width), top + self.HEAD
        for start in range(0, len(self.cards), self.ACROSS):
            for i, card in enumerate(self.cards[start : start + self.ACROSS]):
                x = left + i * (tile + self.GAP)
                style.show_image(style.axes(page, x, y, tile, tile), card.image)
                lines = textwrap.wrap(card.words, int(tile / self.LETTER), max_lines=2, placeholder="…")
                for n, line in enumerate(lines):
                    style.text(page, x, y + tile + 0.17 + 0.15 * n, line, 8, style.SOFT)
            y += tile + self.NOTE
        for i, (frame, label) in enumerate(zip(self.frames, self.labels, strict=True)):
            x = left + i * (tile + self.GAP)
            style.show_image(style.axes(page, x, y, tile, tile), frame)
            style.text(page, x, y + tile + 0.16, label, 8, style.SOFT)
