"""`triptych segment`"""

import sys
from collections import Counter
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import tyro

from triptych.cli.output import SHIPPED_SEGMENTER, Workers, percent, print_json, shortened, with_progress
from triptych.cli.parsing import flag, height_width
from triptych.errors import ConfigError

if TYPE_CHECKING:
    from triptych.pipelines.segmentation_result import Segmentation

Part = Literal["overlay", "labels", "legend", "json"]
ENDS = {"overlay": ".overlay.png", "labels": ".labels.png", "legend": ".legend.png", "json": ".json"}
SEVERAL = 32  # images of which all is written
ALL = f"(default: all; for more than {SEVERAL} images only labels and json)"


@dataclass(frozen=True, kw_only=True)
class Segment:
    """Segment images: predict the class of every pixel.

    Writes for each image NAME.overlay.png, NAME.labels.png (a pixel's value is the index of its class), NAME.legend.png
    and NAME.json with the area, share and box of each class; of a GeoTIFF also NAME.labels.tif with its position on
    Earth. Images from a folder keep their relative paths in --out.
    For more than 32 images, only labels and json are written by default, because a legend takes a second to draw.
    """

    images: Annotated[tuple[str, ...], tyro.conf.Positional, flag("IMAGE...")] = ()
    """Image files, or folders of them."""
    model: str = SHIPPED_SEGMENTER
    """A segmenter's file, folder, hub id or name, or a RUN folder."""
    out: Annotated[Path, tyro.conf.arg(metavar="DIR")] = Path("segmented")
    """Folder to write into."""
    write: Annotated[tuple[Part, ...], tyro.conf.arg(metavar="PART...", help_behavior_hint=ALL)] = ()
    """What to write for each image: overlay, labels, legend, json."""
    skip_existing: bool = False
    """Skip images whose parts all exist, to resume a run that was stopped."""
    size: Annotated[int | None, flag("PIXELS")] = None
    """Resize images to this shorter side instead of the model's own size."""
    window: Annotated[str, flag("WxH")] = ""
    """Slide a window of this width and height in pixels over each image, at its own size or at --size."""
    overlap: float = 0.5
    """Overlap of adjacent windows, as a fraction of the window."""
    scales: tuple[float, ...] = (1.0,)
    """Average over these relative sizes, for example 0.75 1 1.5."""
    flip: bool = False
    """Average with the horizontally flipped image."""
    dtype: Literal["auto", "fp32", "bf16"] = "auto"
    """Precision; auto is bf16 if the hardware multiplies it natively, else fp32."""
    compile: bool = False
    """Compile the network's blocks: slow to start, faster for many images of one size."""
    batch_size: int = 4
    """Images or windows per forward pass."""
    workers: Workers = None
    """Worker processes that read ahead; 0 reads in the main process."""
    on_bad_image: Literal["fail", "skip"] = "fail"
    """Stop at an image that cannot be read, or skip and report it."""
    max_pixels: int | None = None
    """Largest number of pixels of an image; none is 178 million."""
    json: bool = False
    """Print one JSON object per image, one per line."""

    def run(self) -> int:
        from triptych import SegmentationPipeline
        from triptych.data.loading.test_time_views import ViewOptions
        from triptych.data.loading.workers import default_workers

        files = destinations(self.images)
        parts = self.write or (ENDS if len(files) <= SEVERAL else ("labels", "json"))
        if self.skip_existing:
            total = len(files)
            files = {file: place for file, place in files.items() if not exists(self.out / place, parts)}
            print(f"{total - len(files)} of {total} already exist", file=sys.stderr)
            if not files:
                return 0
        window = height_width(self.window, "window") if self.window else None
        passes = ViewOptions(
            size=self.size, window=window, overlap=self.overlap, scales=self.scales, flip=self.flip
        )
        dtype = None if self.dtype == "auto" else self.dtype
        workers = default_workers() if self.workers is None else self.workers
        pipe = SegmentationPipeline(
            self.model,
            None,
            dtype,
            self.batch_size,
            workers,
            self.on_bad_image,
            compile=self.compile,
            max_pixels=self.max_pixels,
        )
        results = pipe.stream(files, passes)
        if len(files) > 1 and not (
            sys.stdout.isatty() and not self.json
        ):  # else the results are the progress
            results = with_progress(results, len(files), "segmenting")
        for result in results:
            place = self.out / files[Path(result.source)]
            written = [str(path) for path in written_parts(result, place, parts)]
            if self.json:
                print_json(result.to_json() | {"files": written})
            else:
                areas = [f"{shortened(area.name)} {percent(area.share)}" for area in result.areas[:6]]
                more = [f"{len(result.areas) - 6} more"] if len(result.areas) > 6 else []
                print(f"{result.source}: {', '.join(areas + more)}\n", end="", flush=True)  # whole lines
        if len(pipe.skipped) == len(files):
            raise ConfigError(f"none of the {len(files)} images could be read; see the lines above")
        if pipe.skipped:
            print(f"{len(pipe.skipped)} of {len(files)} images could not be read", file=sys.stderr)
        if not self.json:
            name = files[next(iter(files))].name if len(files) == 1 else "NAME"
            print(f"{self.out}: {', '.join(name + ENDS[part] for part in ENDS if part in parts)}")
        return 0


def exists(place: Path, parts: Collection[str]) -> bool:
    """Whether all parts of an image have been written."""
    return all(place.with_name(place.name + ENDS[part]).exists() for part in parts)


def destinations(named: tuple[str, ...]) -> dict[Path, Path]:
    """Every image file that was named, or lies below a named folder -> its place below --out, without an ending. Two of
    one name in one place are distinguished by their suffixes, else by a number.
    """
    from triptych.pipelines.image_input import images_below

    if not named:
        raise ConfigError(
            "no image is given; pass image files or folders: triptych segment IMAGE... --out DIR"
        )
    places: dict[Path, Path] = {}
    for path in map(Path, named):
        below = list(images_below(path)) if path.is_dir() else [path]
        if not below:
            raise ConfigError(f"{path} contains no images; give a folder of images")
        for file in below:
            places.setdefault(file, file.relative_to(path) if path.is_dir() else Path(file.name))
    often = Counter(place.with_suffix("") for place in places.values())
    unique: dict[Path, Path] = {}
    used: set[Path] = set()
    for file, place in places.items():
        wanted = place if often[place.with_suffix("")] > 1 else place.with_suffix("")
        number, unique[file] = 1, wanted
        while unique[file] in used:
            number += 1
            unique[file] = wanted.with_name(f"{wanted.name}-{number}")
        used.add(unique[file])
    return unique


def written_parts(result: "Segmentation", place: Path, parts: Collection[str]) -> list[Path]:
    """Write the parts of one image; `place` is their folder and the start of their names."""
    legend = []
    if "legend" in parts:
        import numpy as np

        from triptych.plots import style
        from triptych.plots.segmentation import Entry, parse_figure

        entries = [
            Entry(shortened(area.name), result.colors[area.index].tolist(), area.share)
            for area in result.areas
        ]
        legend = [place.with_name(place.name + ENDS["legend"])]
        page = parse_figure(result.image, np.asarray(result.overlay()), entries, Path(result.source).name)
        style.save(page, legend[0])
    # These files can be computed again, so they need not reach the disk before the next image starts.
    saved = result.save(place.parent, place.name, [part for part in parts if part != "legend"], durable=False)
    return sorted(
        [*saved, *legend],
        key=lambda path: list(ENDS.values()).index(
            path.name.removeprefix(place.name).replace(".tif", ".png")
        ),
    )
