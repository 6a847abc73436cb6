"""`triptych convert`"""

from dataclasses import dataclass
from typing import Annotated, Literal

import tyro

from triptych.cli.output import print_json
from triptych.cli.parsing import flag


@dataclass(frozen=True, kw_only=True)
class Convert:
    """Convert a checkpoint to another library's format, bit for bit."""

    source: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="SRC")]
    """A model's file, folder, hub id or name, or a RUN folder."""
    target: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="DST")]
    """The file or folder to write."""
    format: Annotated[str, tyro.conf.arg(metavar="F")]
    """triptych, timm, hf, torchvision, google, ..."""
    prediction: Annotated[Literal["eps", "v"] | None, flag("eps|v")] = None
    """What a latent diffusion model's UNet predicts, if the file does not store it (Stable Diffusion 2)."""
    json: bool = False
    """Print what was written as JSON."""

    def run(self) -> int:
        from triptych.weights import export, load

        net = load(self.source, prediction=self.prediction)
        export(net, self.target, self.format)
        if self.json:
            print_json({"source": self.source, "target": self.target, "format": self.format})
        else:
            print(f"{self.target}: written from {self.source} in the format of {self.format}")
        return 0
