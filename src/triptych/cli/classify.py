"""`triptych classify`"""

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import tyro

from triptych.cli.output import SHIPPED_CLASSIFIER, Workers, print_json, shortened, with_progress
from triptych.errors import UserError

if TYPE_CHECKING:
    from triptych.pipelines.classification_result import Classification


@dataclass(frozen=True, kw_only=True)
class Classify:
    """Name what is in pictures: the most probable classes of each, best first."""

    images: Annotated[tuple[str, ...], tyro.conf.Positional, tyro.conf.arg(metavar="IMAGE...")] = ()
    """Image files, or folders of them."""
    model: str = SHIPPED_CLASSIFIER
    """A model's file, folder, hub id or name, or a RUN folder."""
    top: int = 5
    """How many classes to name."""
    dtype: Literal["auto", "fp32", "bf16"] = "auto"
    """Precision; auto takes bf16 where the hardware multiplies it natively."""
    compile: bool = False
    """Compile the network's blocks: a wait at the start, which pays for many pictures of one size."""
    batch_size: int = 64
    """Images a forward pass."""
    workers: Workers = None
    """Processes that read ahead; 0 reads in between."""
    on_bad_image: Literal["fail", "skip"] = "fail"
    """Stop at an image that cannot be read, or leave it out and say so."""
    json: bool = False
    """Print one JSON object an image, a line each."""

    def run(self) -> int:
        from triptych import ClassificationPipeline
        from triptych.data.loading.workers import default_workers

        files = image_files(self.images)
        dtype = None if self.dtype == "auto" else self.dtype
        workers = default_workers() if self.workers is None else self.workers
        pipe = ClassificationPipeline(
            self.model, None, dtype, self.batch_size, workers, self.on_bad_image, compile=self.compile
        )
        found = pipe.stream(files, self.top)
        if len(files) > self.batch_size and not sys.stdout.isatty():  # else the results are the progress
            found = with_progress(found, len(files), "classifying")
        for one in found:
            print_json(one.to_json()) if self.json else show(one)
        if len(pipe.skipped) == len(files):
            raise UserError(f"none of the {len(files)} images could be read; see the lines above")
        if pipe.skipped:
            print(f"{len(pipe.skipped)} of {len(files)} images could not be read", file=sys.stderr)
        return 0


def image_files(named: tuple[str, ...]) -> list[Path]:
    """The named files, and all images below the named folders."""
    from triptych.pipelines.image_input import images_below

    if not named:
        raise UserError("no image was named; give image files or folders: triptych classify IMAGE...")
    files: list[Path] = []
    for path in map(Path, named):
        below = list(images_below(path)) if path.is_dir() else [path]
        if not below:
            raise UserError(f"{path} has no images below it; give a folder of images")
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
