"""`triptych export`"""

from dataclasses import dataclass
from typing import Annotated, Literal

import tyro

from triptych.cli.output import print_json
from triptych.cli.parsing import flag


@dataclass(frozen=True, kw_only=True)
class Export:
    """Export a network as a graph for onnxruntime, OpenVINO or torch.export, checked against the network.

    OUT is a file .onnx, .xml or .pt2. An autoencoder or a latent diffusion model has several graphs: OUT is then a
    folder, with pipeline.json. For the weights formats of other libraries see `triptych convert`.
    """

    model: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="MODEL")]
    """A model's file, folder, hub id or name, or a RUN folder."""
    out: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="OUT")]
    """The file or folder to write."""
    format: Annotated[
        Literal["onnx", "pt2", "openvino"] | None, flag("F", "that of OUT's suffix; onnx for a folder")
    ] = None
    """onnx, pt2 (torch.export) or openvino."""
    dynamic: Literal["size", "batch", "none"] = "size"
    """What may change from call to call: batch, height and width; the batch; nothing."""
    size: Annotated[str | None, flag("WxH", "the model's own")] = None
    """Image size to export at, in pixels; the only one with --dynamic batch or none."""
    prediction: Annotated[Literal["eps", "v"] | None, flag("eps|v")] = None
    """What a latent diffusion model's UNet predicts, where the file does not store it (Stable Diffusion 2)."""
    json: bool = False
    """Print what was written and how it was checked as JSON."""

    def run(self) -> int:
        from pathlib import Path

        from triptych.cli.parsing import height_width
        from triptych.weights import load
        from triptych.weights.graphs.exporting import export_graphs, format_for, results_json

        size = None if self.size is None else height_width(self.size)
        path = Path(self.out)
        format = self.format or format_for(path) or ("onnx" if not path.suffix else None)
        results = export_graphs(
            load(self.model, prediction=self.prediction), path, format, self.dynamic, size
        )
        if self.json:
            print_json(results_json(results))
            return 0
        sizes = {"size": "batch, height and width open", "batch": "batch open", "none": "one size"}
        for result in results:
            print(
                f"{result.path}: {sizes[result.dynamic]}; largest difference from the network {result.difference:.1e} "
                f"in outputs up to {result.largest:.2g}"
            )
        return 0
