"""`triptych explain`"""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from triptych.cli.output import SHIPPED_CLASSIFIER, print_json, shortened
from triptych.cli.parsing import flag, height_width


@dataclass(frozen=True, kw_only=True)
class Explain:
    """Explain what a ViT, a Swin, or a segmenter on one of them predicts for an image.

    Writes explanation.json, the arrays as explanation.npz, and images: for a ViT rollout.png,
    heads.png, distances.png, filters.png and positions.png; for a Swin rollout.png, point.png (what a point
    attends to in each block, with the windows), pyramid.png and filters.png.
    """

    image: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="IMAGE")]
    """An image file."""
    model: str = SHIPPED_CLASSIFIER
    """A model's file, folder, hub id or name, or a RUN folder."""
    out: Path = Path("explanation")
    """Folder to write into."""
    point: Annotated[tuple[float, float] | None, flag("X Y", "what a ViT's head reads, else the center")] = (
        None
    )
    """Query pixel of the image."""
    size: Annotated[str, flag("WxH", "the model's own")] = ""
    """Width and height of the network's input in pixels."""
    json: bool = False
    """Print classes, rollout, distances and files as JSON."""

    def run(self) -> int:
        from triptych.pipelines.explain.vit import explain
        from triptych.plots import style
        from triptych.plots.explanation import explanation_figures

        size = height_width(self.size) if self.size else None
        result = explain(self.model, self.image, size, point=self.point)
        result.save(self.out)
        words = ", ".join(
            f"{shortened(guess.name)} {guess.probability:.0%}" for guess in result.classification[:3]
        )
        figures = explanation_figures(result.arrays(), words, result.readout)
        for name, figure in figures.items():
            style.save(figure, self.out / f"{name}.png")
        written = [*(f"{name}.png" for name in figures), "explanation.npz", "explanation.json"]
        if self.json:
            print_json(result.to_json() | {"files": [str(self.out / name) for name in written]})
        else:
            words = words or "no classes, as the network has no head"
            print(f"{self.image}: {words}\n{self.out}: {', '.join(written)}")
        return 0
