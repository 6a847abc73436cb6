"""What `generate` prints and draws while it samples."""

import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from triptych.cli.output import json_text

if TYPE_CHECKING:
    from triptych.pipelines.diffusion.latent_codec import Preview

FRAMES = 8  # of a strip


class GenerationReporter:
    """Prints where each image was written: a line, or an element of a JSON array.

    Args:
        json: print JSON.
        keep_first: hold the first image in `first`; no other is held.
    """

    def __init__(self, json: bool, keep_first: bool):
        self.json, self.keep_first = json, keep_first
        self.first: Any = None
        self.count, self.stopped_at = 0, None

    def add(self, file: Path, image: Any) -> None:
        if self.json:
            before = ",\n" if self.count else "[\n"
            print(before + json_text({"file": str(file), **image.info}, indent=1), end="", flush=True)
        else:
            print(f"{file}: {image.width}x{image.height}, seed {image.info['seed']}\n", end="", flush=True)
        self.count, self.stopped_at = self.count + 1, image.info["stopped_at"]
        if self.keep_first and self.first is None:
            self.first = image

    def end(self) -> None:
        if self.json:
            print("\n]" if self.count else "[]", flush=True)


class StepRecorder:
    """A `preview` callback that records the first image's steps.

    Args:
        strip: file for `draw`, which shows the steps side by side.
        preview: file to update while sampling.
    """

    def __init__(self, strip: Path | None, preview: Path | None):
        self.strip, self.preview = strip, preview
        self.seed: int | None = None
        self.frames: list[Any] = []
        self.labels: list[str] = []
        self.written = 0.0

    def __call__(self, step: "Preview") -> None:
        import numpy as np

        if self.seed is None:
            self.seed = step.seeds[0]
        drawn = {round(1 + i * (step.num_steps - 1) / (FRAMES - 1)) for i in range(FRAMES - 1)}
        if self.strip is not None and step.seeds[0] == self.seed and step.step in drawn:
            self.frames.append(np.asarray(step.images(None)[0].convert("RGB")))
            alpha, sigma = step.level
            self.labels.append(f"step {step.step}, noise {sigma / alpha if alpha else float('inf'):.3g}")
        if self.preview is not None and time.monotonic() - self.written > 1:
            from triptych.atomic_write import write_atomically
            from triptych.pipelines.diffusion.image_metadata import encoded

            content = encoded(step.images()[0])
            write_atomically(self.preview, lambda file: file.write(content))
            self.written = time.monotonic()

    def draw(self, image: Any) -> None:
        """Write the strip, which ends with the finished image."""
        import numpy as np

        from triptych.plots import style
        from triptych.plots.denoising_strip import denoising_strip

        size = self.frames[0].shape[1::-1] if self.frames else image.size
        last = np.asarray(image.convert("RGB").resize(size))
        text = image.info["prompt"] or image.info["class_name"] or ""
        page = denoising_strip(
            [*self.frames, last],
            [*self.labels, "result"],
            "Denoising, step by step",
            f"{text}, seed {image.info['seed']}, {image.info['sampler']}".removeprefix(", "),
        )
        assert self.strip is not None
        style.save(page, self.strip)
        print(self.strip, file=sys.stderr)
