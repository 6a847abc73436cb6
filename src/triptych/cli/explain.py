"""`triptych explain`"""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from triptych.cli.output import SHIPPED_CLASSIFIER, print_json, shortened
from triptych.cli.parsing import height_width


@dataclass(frozen=True, kw_only=True)
class Explain:
    """Show why a Vision Transformer, a Swin, or a segmenter on one of them says what it says of a picture.

    Writes explanation.json, the arrays as explanation.npz, and pictures. Of a ViT these are rollout.png,
    heads.png, distances.png, filters.png and positions.png; of a Swin rollout.png, point.png (what a point
    attends to in each block, with the windows), pyramid.png and filters.png.
    """

    image: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="IMAGE")]
    """An image file."""
    model: str = SHIPPED_CLASSIFIER
    """A model's file, folder, hub id or name, or a RUN folder."""
    out: Path = Path("explanation")
    """Folder to write into."""
    point: Annotated[tuple[float, float] | None, tyro.conf.arg(metavar="X Y")] = None
    """A pixel of the picture to look from. Without one: what a ViT's head reads, else the middle."""
    size: Annotated[str, tyro.conf.arg(metavar="WxH")] = ""
    """Feed this width and height in pixels instead of the model's own."""
    json: bool = False
    """Print guesses, rollout, distances and the files as JSON."""

    def run(self) -> int:
        from triptych.pipelines.explain.vit import explain
        from triptych.plots import style
        from triptych.plots.explanation import explanation_figures

        size = height_width(self.size) if self.size else None
        found = explain(self.model, self.image, size, point=self.point)
        found.save(self.out)
        words = ", ".join(
            f"{shortened(guess.name)} {guess.probability:.0%}" for guess in found.classification[:3]
        )
        figures = explanation_figures(found.arrays(), words, found.readout)
        for name, figure in figures.items():
            style.save(figure, self.out / f"{name}.png")
        written = [*(f"{name}.png" for name in figures), "explanation.npz", "explanation.json"]
        if self.json:
            print_json(found.to_json() | {"files": [str(self.out / name) for name in written]})
        else:
            words = words or "no guesses, as the network has no head"
            print(f"{self.image}: {words}\n{self.out}: {', '.join(written)}")
        return 0
