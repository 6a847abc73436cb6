"""What `generate` says and draws of pictures while they are painted."""

import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from triptych.cli.output import json_text

if TYPE_CHECKING:
    from triptych.pipelines.diffusion.latent_codec import Preview

FRAMES = 8  # of a strip


class Shown:
    """Says of each picture, once it is written, where it is: a line, or an element of a JSON array. Holds none but the
    first, if that is asked for."""

    def __init__(self, json: bool, first: bool):
        self.json, self.wanted = json, first
        self.first: Any = None
        self.count, self.stopped_at = 0, None

    def add(self, file: Path, one: Any) -> None:
        if self.json:
            before = ",\n" if self.count else "[\n"
            print(before + json_text({"file": str(file), **one.info}, indent=1), end="", flush=True)
        else:
            print(f"{file}: {one.width}x{one.height}, seed {one.info['seed']}\n", end="", flush=True)
        self.count, self.stopped_at = self.count + 1, one.info["stopped_at"]
        if self.wanted and self.first is None:
            self.first = one

    def end(self) -> None:
        if self.json:
            print("\n]" if self.count else "[]", flush=True)


class Watch:
    """Looks at the first picture between steps: for a file to look at meanwhile, and for a strip at the end."""

    def __init__(self, strip: Path | None, preview: Path | None):
        self.strip, self.preview = strip, preview
        self.seed: int | None = None
        self.frames: list[Any] = []
        self.labels: list[str] = []
        self.written = 0.0

    def __call__(self, now: "Preview") -> None:
        import numpy as np

        if self.seed is None:
            self.seed = now.seeds[0]
        kept = {round(1 + i * (now.steps - 1) / (FRAMES - 1)) for i in range(FRAMES - 1)}
        if self.strip is not None and now.seeds[0] == self.seed and now.step in kept:
            self.frames.append(np.asarray(now.images(None)[0].convert("RGB")))
            alpha, sigma = now.level
            self.labels.append(f"step {now.step}, noise {sigma / alpha if alpha else float('inf'):.3g}")
        if self.preview is not None and time.monotonic() - self.written > 1:
            from triptych.atomic_write import write_atomically
            from triptych.pipelines.diffusion.image_metadata import encoded

            content = encoded(now.images()[0])
            write_atomically(self.preview, lambda file: file.write(content))
            self.written = time.monotonic()

    def draw(self, finished: Any) -> None:
        import numpy as np

        from triptych.plots import style
        from triptych.plots.denoising_strip import denoising_strip

        size = self.frames[0].shape[1::-1] if self.frames else finished.size
        last = np.asarray(finished.convert("RGB").resize(size))
        said = finished.info["prompt"] or finished.info["class_name"] or ""
        page = denoising_strip(
            [*self.frames, last],
            [*self.labels, "the picture"],
            "What the network sees in the noise",
            f"{said}, seed {finished.info['seed']}, {finished.info['sampler']}".removeprefix(", "),
        )
        assert self.strip is not None
        style.save(page, self.strip)
        print(self.strip, file=sys.stderr)
