"""`triptych classify`"""

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import tyro

from triptych.cli.output import SHIPPED_CLASSIFIER, Workers, print_json, shortened, with_progress
from triptych.cli.parsing import flag
from triptych.errors import ConfigError

if TYPE_CHECKING:
    from triptych.pipelines.classification_result import Classification


@dataclass(frozen=True, kw_only=True)
class Classify:
    """Classify images: print the most probable classes of each image, best first."""

    images: Annotated[tuple[str, ...], tyro.conf.Positional, flag("IMAGE...")] = ()
    """Image files, or folders of them."""
    model: str = SHIPPED_CLASSIFIER
    """A model's file, folder, hub id or name, or a RUN folder."""
    top: int = 5
    """Number of classes to print for each image."""
    dtype: Literal["auto", "fp32", "bf16"] = "auto"
    """Precision; auto is bf16 if the hardware multiplies it natively, else fp32."""
    compile: bool = False
    """Compile the network's blocks: slow to start, faster for many images of one size."""
    batch_size: int = 64
    """Images per forward pass."""
    workers: Workers = None
    """Worker processes that read ahead; 0 reads in the main process."""
    on_bad_image: Literal["fail", "skip"] = "fail"
    """Stop at an image that cannot be read, or skip and report it."""
    max_pixels: int | None = None
    """Largest number of pixels of an image; none is 178 million."""
    json: bool = False
    """Print one JSON object per image, one per line."""

    def run(self) -> int:
        from triptych import ClassificationPipeline
        from triptych.data.loading.workers import default_workers

        files = image_files(self.images)
        dtype = None if self.dtype == "auto" else self.dtype
        workers = default_workers() if self.workers is None else self.workers
        pipe = ClassificationPipeline(
            self.model,
            None,
            dtype,
            self.batch_size,
            workers,
            self.on_bad_image,
            compile=self.compile,
            max_pixels=self.max_pixels,
        )
        results = pipe.stream(files, self.top)
        if len(files) > self.batch_size and not sys.stdout.isatty():  # else the results are the progress
            results = with_progress(results, len(files), "classifying")
        for result in results:
            print_json(result.to_json()) if self.json else show(result)
        if len(pipe.skipped) == len(files):
            raise ConfigError(f"none of the {len(files)} images could be read; see the lines above")
        if pipe.skipped:
            print(f"{len(pipe.skipped)} of {len(files)} images could not be read", file=sys.stderr)
        return 0


def image_files(named: tuple[str, ...]) -> list[Path]:
    """Return the named files, and all images below the named folders."""
    from triptych.pipelines.image_input import images_below

    if not named:
        raise ConfigError("no image is given; name image files or folders: triptych classify IMAGE...")
    files: list[Path] = []
    for path in map(Path, named):
        below = list(images_below(path)) if path.is_dir() else [path]
        if not below:
            raise ConfigError(f"{path} contains no images; give a folder of images")
        files += below
    return files


def show(one: "Classification") -> None:
    """A file's name, and a line with a bar for each class."""
    from rich.console import Console
    from rich.text import Text

    lines = [Text(one.source, style="bold")]
    names = [shortened(guess.name) for guess in one]
    wide = max(map(len, names))
    for i, guess in enumerate(one):
        line = Text(f"  {guess.probability:6.1%}  ", style="bold" if i == 0 else "")
        line.append(f"{names[i]:<{wide}}  ")
        line.append("━" * max(1, round(24 * guess.probability)), style="blue" if i == 0 else "bright_black")
        lines.append(line)
    Console(highlight=False).print(Text("\n").join(lines), soft_wrap=True)
