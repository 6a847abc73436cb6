"""`triptych segment`"""

import sys
from collections import Counter
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import tyro

from triptych.cli.output import SHIPPED_SEGMENTER, Workers, percent, print_json, shortened, with_progress
from triptych.cli.parsing import height_width
from triptych.errors import UserError

if TYPE_CHECKING:
    from triptych.pipelines.segmentation_result import Segmentation

Part = Literal["overlay", "labels", "legend", "json"]
ENDS = {"overlay": ".overlay.png", "labels": ".labels.png", "legend": ".legend.png", "json": ".json"}
SEVERAL = 32  # pictures of which all is written
ALL = f"(default: all; of more than {SEVERAL} pictures labels json)"


@dataclass(frozen=True, kw_only=True)
class Segment:
    """Parse pictures: the class of every pixel.

    Writes of each image NAME.overlay.png, NAME.labels.png (a pixel's value is the index of its class), NAME.legend.png
    and NAME.json with the area, share and box of each class. Pictures below a folder keep their place below --out. Of
    more than 32 pictures only labels and json are written, unless --write says what: a legend takes a second.
    """

    images: Annotated[tuple[str, ...], tyro.conf.Positional, tyro.conf.arg(metavar="IMAGE...")] = ()
    """Image files, or folders of them."""
    model: str = SHIPPED_SEGMENTER
    """A segmenter's file, folder, hub id or name, or a RUN folder."""
    out: Annotated[Path, tyro.conf.arg(metavar="DIR")] = Path("parsed")
    """Folder to write into."""
    write: Annotated[tuple[Part, ...], tyro.conf.arg(metavar="PART...", help_behavior_hint=ALL)] = ()
    """What to write of each picture, of overlay, labels, legend and json."""
    skip_existing: bool = False
    """Leave out pictures of which all that is there: so a run goes on where it was stopped."""
    size: Annotated[int | None, tyro.conf.arg(metavar="PIXELS")] = None
    """Resize pictures to this shorter side, their aspect kept, instead of as the model's card says."""
    window: Annotated[str, tyro.conf.arg(metavar="WxH")] = ""
    """Slide a window of this width and height in pixels over each picture, at its own size or at --size."""
    overlap: float = 0.5
    """Of neighbouring windows, as a share of the window."""
    scales: tuple[float, ...] = (1.0,)
    """Look at each of these relative sizes and average, for example 0.75 1 1.5."""
    flip: bool = False
    """Average with the mirrored picture."""
    dtype: Literal["auto", "fp32", "bf16"] = "auto"
    """Precision; auto takes bf16 where the hardware multiplies it natively."""
    compile: bool = False
    """Compile the network's blocks: a wait at the start, which pays for many pictures of one size."""
    batch_size: int = 4
    """Pictures or windows a forward pass."""
    workers: Workers = None
    """Processes that read ahead; 0 reads in between."""
    on_bad_image: Literal["fail", "skip"] = "fail"
    """Stop at an image that cannot be read, or leave it out and say so."""
    json: bool = False
    """Print one JSON object an image, a line each."""

    def run(self) -> int:
        from triptych import SegmentationPipeline
        from triptych.data.loading.test_time_views import ViewOptions
        from triptych.data.loading.workers import default_workers

        files = destinations(self.images)
        parts = self.write or (ENDS if len(files) <= SEVERAL else ("labels", "json"))
        if self.skip_existing:
            every = len(files)
            files = {file: place for file, place in files.items() if not there(self.out / place, parts)}
            print(f"{every - len(files)} of {every} are there already", file=sys.stderr)
            if not files:
                return 0
        window = height_width(self.window, "window") if self.window else None
        passes = ViewOptions(
            size=self.size, window=window, overlap=self.overlap, scales=self.scales, flip=self.flip
        )
        dtype = None if self.dtype == "auto" else self.dtype
        workers = default_workers() if self.workers is None else self.workers
        pipe = SegmentationPipeline(
            self.model, None, dtype, self.batch_size, workers, self.on_bad_image, compile=self.compile
        )
        found = pipe.stream(files, passes)
        if len(files) > 1 and not (
            sys.stdout.isatty() and not self.json
        ):  # else the results are the progress
            found = with_progress(found, len(files), "parsing")
        for one in found:
            place = self.out / files[Path(one.source)]
            written = [str(path) for path in written_parts(one, place, parts)]
            if self.json:
                print_json(one.to_json() | {"files": written})
            else:
                areas = [f"{shortened(area.name)} {percent(area.share)}" for area in one.areas[:6]]
                more = [f"{len(one.areas) - 6} more"] if len(one.areas) > 6 else []
                print(f"{one.source}: {', '.join(areas + more)}\n", end="", flush=True)  # whole lines
        if len(pipe.skipped) == len(files):
            raise UserError(f"none of the {len(files)} images could be read; see the lines above")
        if pipe.skipped:
            print(f"{len(pipe.skipped)} of {len(files)} images could not be read", file=sys.stderr)
        if not self.json:
            name = files[next(iter(files))].name if len(files) == 1 else "NAME"
            print(f"{self.out}: {', '.join(name + ENDS[part] for part in ENDS if part in parts)}")
        return 0


def there(place: Path, parts: Collection[str]) -> bool:
    """Whether all that is written of a picture is there."""
    return all(place.with_name(place.name + ENDS[part]).exists() for part in parts)


def destinations(named: tuple[str, ...]) -> dict[Path, Path]:
    """Every image file that was named, or lies below a named folder -> its place below --out, without an ending. Two of
    one name in one place are told apart by their own endings, else by a number.
    """
    from triptych.pipelines.image_input import images_below

    if not named:
        raise UserError(
            "no image was named; give image files or folders: triptych segment IMAGE... --out DIR"
        )
    places: dict[Path, Path] = {}
    for path in map(Path, named):
        below = list(images_below(path)) if path.is_dir() else [path]
        if not below:
            raise UserError(f"{path} has no images below it; give a folder of images")
        for file in below:
            places.setdefault(file, file.relative_to(path) if path.is_dir() else Path(file.name))
    often = Counter(place.with_suffix("") for place in places.values())
    made: dict[Path, Path] = {}
    taken: set[Path] = set()
    for file, place in places.items():
        wanted = place if often[place.with_suffix("")] > 1 else place.with_suffix("")
        number, made[file] = 1, wanted
        while made[file] in taken:
            number += 1
            made[file] = wanted.with_name(f"{wanted.name}-{number}")
        taken.add(made[file])
    return made


def written_parts(one: "Segmentation", place: Path, parts: Collection[str]) -> list[Path]:
    """Writes of one picture its `parts`; `place` is their folder and the beginning of their names."""
    legend = []
    if "legend" in parts:
        import numpy as np

        from triptych.plots import style
        from triptych.plots.segmentation import Entry, parse_figure

        entries = [
            Entry(shortened(area.name), one.colors[area.index].tolist(), area.share) for area in one.areas
        ]
        legend = [place.with_name(place.name + ENDS["legend"])]
        page = parse_figure(one.image, np.asarray(one.overlay()), entries, Path(one.source).name)
        style.save(page, legend[0])
    # What can be made again need not be on the disk before the next one is begun.
    saved = one.save(place.parent, place.name, [part for part in parts if part != "legend"], durable=False)
    return sorted(
        [*saved, *legend], key=lambda path: list(ENDS.values()).index(path.name.removeprefix(place.name))
    )
