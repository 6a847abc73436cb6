"""`triptych evaluate`: of what classifies, parses or reconstructs; `measure` has what paints."""

import json
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from triptych.cli.generate import said
from triptych.cli.output import percent, plain, print_json, table, waiting
from triptych.cli.parsing import height_width
from triptych.errors import UserError

WORST = 10  # lines in each of the two lists on the screen
PAIRS = 100  # pairs of confused classes in metrics.json


@dataclass(frozen=True, kw_only=True)
class Evaluate:
    """Measure a classifier: top-1, top-5, every coarser naming and every class; a segmenter: mIoU, pixel accuracy,
    every class; or an autoencoder: PSNR, SSIM, perceptual distance, and the reconstructions' Frechet and kernel
    distance as a set in the features of --extractor. Exact on any number of images.

    Writes metrics.json and, of classes, confusion.png into --out, or into the folder of the run.

    Of a latent diffusion model: --samples pictures are painted from the data's captions or classes, and compared with
    the data in the features of --extractor: Frechet and kernel distance, precision, recall, density, coverage, and
    whether a classifier finds in them what they were to show.
    """

    model: Annotated[str, tyro.conf.Positional, said("[MODEL-or-RUN]")] = ""
    """A model's file, folder, hub id or name, or a RUN folder. None with a folder of --samples."""
    data: str = ""
    """emoji, a folder, tar shards, a parquet file or a hub id; a run brings its own."""
    split: str = ""
    """One of the data's splits; its evaluation split if left out."""
    batch_size: int | None = None
    """Images a forward pass; a run brings its own, others take 64, segmenters 4, painters fewer of large pictures."""
    workers: int = 2
    """Processes that read and decode."""
    dtype: Literal["auto", "fp32", "bf16"] = "auto"
    """Precision of products; auto takes bf16 where the hardware multiplies it natively."""
    compile: bool = False
    """Compile the network's blocks: a wait at the start, which pays for many pictures of one size."""
    on_bad_image: Literal["fail", "skip"] = "skip"
    """Stop at an image that cannot be read, or leave it out and say so."""
    image_column: str | None = None
    """Column that holds the images, where there are several."""
    label_column: str | None = None
    """Column that holds the labels, where there are several."""
    mask_column: str | None = None
    """Column that holds the masks, where there are several."""
    ignore_index: int | None = None
    """Number in masks that is no class and is left out; a run brings its own, and 255 never is one."""
    reduce_zero_label: bool = False
    """In masks 0 is no class and is left out, and 1 is the first."""
    size: Annotated[str, said("PIXELS-or-WxH", "the model's own")] = ""
    """Of a segmenter: resize pictures to this shorter side, their aspect kept, instead of as its card says. Else width
    and height at which pictures are painted and compared."""
    window: Annotated[str, tyro.conf.arg(metavar="WxH")] = ""
    """Of a segmenter: slide a window of this width and height in pixels over each picture."""
    overlap: float = 0.5
    """Of neighbouring windows, as a share of the window."""
    scales: tuple[float, ...] = (1.0,)
    """Of a segmenter: look at each of these relative sizes and average, for example 0.75 1 1.5."""
    flip: bool = False
    """Of a segmenter: average with the mirrored picture."""
    caption_column: str | None = None
    """Column that holds the captions, where there are several."""
    samples: Annotated[str, said("N-or-DIR", "1000")] = ""
    """How many pictures to paint; or a folder of pictures that are there already, whoever made them."""
    extractor: Annotated[str, said("MODEL", "the autoencoder's run's own, else vit-emoji")] = ""
    """Whose features distances are of, in fp32: a ViT (DINOv2 too), a Swin, or inception."""
    reference: Annotated[Path | None, said("FILE", "in the cache")] = None
    """The real pictures' statistics: made once, and with it --data may be left out."""
    classifier: Annotated[str, said("MODEL", "vit-emoji, of its classes")] = ""
    """Which looks in painted pictures for the class that they were to show; "none" for none."""
    steps: int = 30
    """Of the sampler."""
    guidance: Annotated[float | None, said("FLOAT", "the model's own, mostly 7.5, of classes 1.5")] = None
    """How closely to follow the caption or the class."""
    sampler: str = "dpm++2m"
    """As in generate."""
    seed: int = 0
    """Of the first painted picture; each further one has one more. And of which captions are taken."""
    out: Annotated[Path | None, tyro.conf.arg(metavar="FOLDER")] = None
    """Folder to write into."""
    json: bool = False
    """Print what metrics.json holds."""

    def run(self) -> int:
        from triptych.cli import evaluate_generation

        family = evaluate_generation.family(self)
        if family in evaluate_generation.FAMILIES:
            return evaluate_generation.run(self, family)
        if self.samples:
            raise UserError(
                f"{self.model} makes no pictures; leave --samples out, or name a latent diffusion model"
            )
        from triptych.data.loading.test_time_views import ViewOptions
        from triptych.train import evaluate

        window = height_width(self.window, "window") if self.window else None
        passes = ViewOptions(
            size=self.shorter_side(), window=window, overlap=self.overlap, scales=self.scales, flip=self.flip
        )
        found = evaluate(
            self.model,
            self.data or None,
            split=self.split or None,
            batch_size=self.batch_size,
            workers=self.workers,
            on_bad_image=self.on_bad_image,
            image_column=self.image_column,
            label_column=self.label_column,
            mask_column=self.mask_column,
            ignore_index=self.ignore_index,
            reduce_zero_label=self.reduce_zero_label or None,
            passes=None if passes == ViewOptions() else passes,
            dtype=None if self.dtype == "auto" else self.dtype,
            compile=self.compile,
            extractor=self.extractor or None,
            progress=lambda batches, total: waiting(batches, total, "evaluating"),
        )
        summarise, shown = {
            "classification": (summary, show),
            "segmentation": (parse_summary, show_parse),
            "reconstruction": (plain_summary, show_plain),
        }[found["task"]]
        figures = summarise(found) | {
            "model": self.model,
            "data": self.data,
            "split": self.split,
        }
        a_run = (Path(self.model) / "log.jsonl").is_file()
        out = self.out or (Path(self.model) if a_run else None)
        if out is not None:
            write(figures, found, out)
        if self.json:
            print_json(figures, indent=1)
        else:
            shown(figures)
            made = "metrics.json, confusion.png" if "confusion" in found else "metrics.json"
            print(f"{out}: {made}" if out else "--out FOLDER writes all of it, and a picture of the classes")
        return 0

    def shorter_side(self) -> int | None:
        """What --size is of a segmenter.

        Raises:
            UserError: no number of pixels.
        """
        if self.size and not self.size.isdecimal():
            raise UserError(f"size is {self.size!r}, which must be a number of pixels for {self.model}")
        return int(self.size) if self.size else None


def summary(found: dict[str, Any]) -> dict[str, Any]:
    """What `triptych.train.evaluate` returns, with names for numbers and the matrix as its most confused
    pairs."""
    from triptych.metrics.classification import most_confused

    names, matrix = found["classes"], found["confusion"]
    arrays = ("per_class", "per_class_count", "confusion", "classes", "bad", "groupings")
    pairs = [] if matrix is None else most_confused(matrix, PAIRS)
    return {
        **{name: value for name, value in found.items() if name not in arrays},
        "per_class": {
            name: {"right": share, "count": count}
            for name, share, count in zip(names, found["per_class"], found["per_class_count"], strict=True)
        },
        "per_group": {
            grouping: by_group(coarser, found["per_class"], found["per_class_count"])
            for grouping, coarser in found["groupings"].items()
        },
        "most_confused": [{"truth": names[t], "prediction": names[p], "count": n} for t, p, n in pairs],
        "left_out": found["bad"],
    }


def parse_summary(found: dict[str, Any]) -> dict[str, Any]:
    """The same of a segmenter, which is counted in pixels."""
    from triptych.metrics.classification import most_confused

    names = found["classes"]
    each = zip(
        names,
        found["per_class_iou"],
        found["per_class_accuracy"],
        found["per_class_count"],
        strict=True,
    )
    pairs = most_confused(found["confusion"], PAIRS)
    return {
        **{name: found[name] for name in ("task", "count", "miou", "pixel_accuracy", "mean_accuracy")},
        "per_class": {
            name: {"iou": iou, "accuracy": accuracy, "count": count} for name, iou, accuracy, count in each
        },
        "most_confused": [{"truth": names[t], "prediction": names[p], "count": n} for t, p, n in pairs],
        "left_out": found["bad"],
    }


def plain_summary(found: dict[str, Any]) -> dict[str, Any]:
    """The same of what has no classes."""
    return {**{name: value for name, value in found.items() if name != "bad"}, "left_out": found["bad"]}


def by_group(
    coarser: Sequence[str], shares: Sequence[float], counts: Sequence[int]
) -> dict[str, dict[str, Any]]:
    """Of each coarser name the share of its images whose class was named, not just the group."""
    made: dict[str, dict[str, Any]] = {}
    for name, share, count in zip(coarser, shares, counts, strict=True):
        if count:
            group = made.setdefault(name, {"right": 0.0, "count": 0})
            group["right"] += float(share) * int(count)
            group["count"] += int(count)
    for group in made.values():
        group["right"] /= group["count"]
    return made


def write(figures: dict[str, Any], found: dict[str, Any], out: Path) -> None:
    from triptych.atomic_write import write_text_atomically
    from triptych.plots import style
    from triptych.plots.confusion import confusion

    write_text_atomically(
        out / "metrics.json", json.dumps(plain(figures), indent=1, ensure_ascii=False) + "\n"
    )
    if found.get("confusion") is not None:
        # The coarsest naming orders many classes best.
        coarser = min(found["groupings"].values(), key=lambda names: len(set(names)), default=None)
        counted = "pixels" if found["task"] == "segmentation" else "images"
        figure = confusion(found["confusion"], found["classes"], coarser, counted=counted)
        style.save(figure, out / "confusion.png")


def show(figures: dict[str, Any]) -> None:
    """The figures, the classes recognised worst, and the pairs confused most."""
    words = {"top1": "top-1", "top5": "top-5", "mean_per_class": "mean of classes"}
    scores = {k: v for k, v in figures.items() if isinstance(v, float) and k != "loss"}
    rows = [(words.get(name, name), f"{share:.2%}") for name, share in scores.items()]
    rows += [("loss", f"{figures['loss']:.4f}"), ("images", f"{figures['count']:,}")]
    table("", {"figure": "left", "": "right"}, rows)
    columns = {"class": "left", "right": "right", "of": "right"}
    if figures["per_group"]:
        grouping, groups = min(figures["per_group"].items(), key=lambda item: len(item[1]))
        table(f"by {grouping}", {grouping: "left", "classes right": "right", "of": "right"}, _rows(groups))
    seen = {name: each for name, each in figures["per_class"].items() if each["count"]}
    if max(each["count"] for each in seen.values()) > 1:  # of one image a class there is no worst
        worst = sorted(seen, key=lambda name: (seen[name]["right"], -seen[name]["count"]))[:WORST]
        table("recognised worst", columns, _rows({name: seen[name] for name in worst}))
    pairs = figures["most_confused"][:WORST]
    if pairs:
        sides = {"truth": "left", "taken for": "left", "times": "right"}
        table("confused most", sides, ((p["truth"], p["prediction"], str(p["count"])) for p in pairs))
    for name, why in figures["left_out"].items():
        print(f"left out: {name}: {why}", file=sys.stderr)


def show_parse(figures: dict[str, Any]) -> None:
    """The figures, the classes from the worst, and the pairs confused most."""
    words = {
        "miou": "mIoU",
        "pixel_accuracy": "pixel accuracy",
        "mean_accuracy": "mean of classes' accuracies",
    }
    rows = [(word, f"{figures[name]:.2%}") for name, word in words.items()]
    table("", {"figure": "left", "": "right"}, [*rows, ("pixels", f"{figures['count']:,}")])
    seen = {name: each for name, each in figures["per_class"].items() if each["iou"] == each["iou"]}
    order = sorted(seen, key=lambda name: seen[name]["iou"])
    few = len(seen) <= 2 * WORST
    columns = {"class": "left", "IoU": "right", "accuracy": "right", "share of pixels": "right"}
    table(
        "" if few else f"the {WORST} worst of {len(seen)} classes",
        columns,
        (
            (
                name,
                f"{each['iou']:.1%}",
                f"{each['accuracy']:.1%}" if each["count"] else "-",
                percent(each["count"] / figures["count"]),
            )
            for name, each in ((name, seen[name]) for name in (seen if few else order[:WORST]))
        ),
    )
    pairs = figures["most_confused"][:WORST]
    if pairs:
        sides = {"truth": "left", "taken for": "left", "of all pixels": "right"}
        shares = ((p["truth"], p["prediction"], f"{p['count'] / figures['count']:.2%}") for p in pairs)
        table("confused most", sides, shares)
    for name, why in figures["left_out"].items():
        print(f"left out: {name}: {why}", file=sys.stderr)


def show_plain(figures: dict[str, Any]) -> None:
    """Figures one below the other."""
    words = {
        "psnr": "PSNR (dB)",
        "ssim": "SSIM",
        "l1": "mean error of [-1, 1]",
        "perceptual": "perceptual distance",
        "frechet": "Fréchet distance",
        "kernel": "kernel distance",
    }
    rows = [
        (words.get(k, k.replace("_", " ")), f"{v:.4f}") for k, v in figures.items() if isinstance(v, float)
    ]
    table("", {"figure": "left", "": "right"}, [*rows, ("images", f"{figures['count']:,}")])
    if "frechet" in figures:
        layer = figures["identity"]["extractor"]["layer"]
        print(f"distances of sets in features of {figures['extractor']} ({layer})")
    for name, why in figures["left_out"].items():
        print(f"left out: {name}: {why}", file=sys.stderr)


def _rows(named: dict[str, dict[str, Any]]) -> Iterator[tuple[str, str, str]]:
    return ((name, f"{each['right']:.0%}", f"{each['count']:,}") for name, each in named.items())
