"""`triptych bench bulk`: classify and segment folders of images, compared with the network alone; generate many."""

import io
import logging
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from triptych.bench.harness.report import Column, Report, Table
from triptych.bench.harness.subprocesses import FinishedProcess, run_child
from triptych.bench.harness.suite import suite
from triptych.bench.harness.timing import Spread, check_equal
from triptych.bench.peers import build as peers
from triptych.data.builtin.scenes import scenes
from triptych.data.images import decode
from triptych.model_card import Preprocess
from triptych.models.registry import create
from triptych.models.vit import ViT
from triptych.weights import export, save

log = logging.getLogger(__name__)

DIFFERENT = 256  # distinct images, which are repeated
SIDE = 64  # of the images, in pixels
FOLDER = 1_000  # files per subfolder
APART = {
    "fp32": 1e-4,
    "bf16": 5e-2,
}  # largest difference of probabilities by rounding, relative to the largest


@dataclass(frozen=True, kw_only=True)
class Plan:
    """Numbers of images, and of the worker processes that read them."""

    classify: tuple[tuple[int, tuple[int, ...]], ...] = (
        (1_000, (0, 1, 2)),
        (10_000, (0, 1, 2)),
        (100_000, (1,)),
    )
    """Numbers of images, each with the numbers of workers that read them."""
    segment: tuple[tuple[int, tuple[int, ...]], ...] = ((1_000, (0, 1, 2)), (5_000, (1,)))
    """The same for segmentation."""
    batches: tuple[int, int] = (64, 16)
    """Batch sizes of the classifier and the segmenter."""
    compared: int = 1_000
    """Number of images for the comparison with another library."""
    generate: tuple[tuple[int, int], ...] = ((8, 1), (40, 1), (8, 8), (40, 8))
    """Numbers of images to generate, each with the batch size."""
    steps: int = 30
    dtype: str = "bf16"
    peers: tuple[str, ...] = ("transformers",)


FULL = Plan()
QUICK = Plan(
    classify=((40, (0, 1)),),
    segment=((8, (1,)),),
    batches=(8, 4),
    compared=8,
    generate=((2, 2),),
    steps=2,
    dtype="fp32",
)


@suite("bulk", FULL)
def run(report: Report, plan: Plan) -> None:
    """Create the folders, and process each in fresh processes."""
    available, report.notes = peers.present(plan.peers)
    classified, segmented = [], []
    with tempfile.TemporaryDirectory(prefix="triptych-bench-") as place:
        for count in sorted({count for count, _ in (*plan.classify, *plan.segment)}):
            folder = Path(place) / "images"
            make(folder, count)  # adds images to the folder
            for task, model, rows in (
                ("classify", "vit-emoji", classified),
                ("segment", "swin-scenes", segmented),
            ):
                for workers in dict(getattr(plan, task)).get(count, ()):
                    batch = plan.batches[task == "segment"]
                    with tempfile.TemporaryDirectory(dir=place) as out:
                        process = folders(task, model, folder, Path(out) / "out", batch, workers, count, plan)
                    rows.append(row(count, workers, process))
                    log.info("%s, %d images, %d workers: %s", task, count, workers, rows[-1])
        report.tables = [
            table(
                "Classifying", "vit-emoji", plan.batches[0], "a line of JSON for each image is", classified
            ),
            table(
                "Segmenting", "swin-scenes", plan.batches[1], "labels and JSON of each image are", segmented
            ),
        ]
        if "transformers" in available:
            report.tables.append(compare_folder(Path(place), plan))
        report.tables.append(generating_many(Path(place), plan))


def folders(
    task: str, model: str | Path, folder: Path, out: Path, batch: int, workers: int, count: int, plan: Plan
) -> FinishedProcess:
    """Process a folder with one of our pipelines."""
    process = run_child(
        "folder_ours", task, model, folder, out, *map(str, (batch, workers, count)), plan.dtype
    )
    if process.reported["count"] != count:
        raise RuntimeError(f"{task} gave {process.reported['count']} results for {count} images")
    return process


def row(count: int, workers: int, process: FinishedProcess) -> dict[str, Any]:
    """Return a row with the images/s of a run and of the network alone before and after it, and memory."""
    reported = process.reported
    network = Spread.of(1 / seconds for seconds in reported["network"])
    return {
        "count": count,
        "workers": workers,
        "network": network,
        "folder": 1 / reported["seconds"],
        "ratio": Spread.of(seconds / reported["seconds"] for seconds in reported["network"]),
        "peak": reported["peak"] / 2**20,
        "grown": (reported["peak"] - reported["before"]) / 2**20,
        "private": reported["private"] / 2**20 if workers else None,
    }


def table(title: str, model: str, batch: int, written: str, rows: list[dict[str, Any]]) -> Table:
    columns = [
        Column(key="count", heading="images", form=",d"),
        Column(key="workers", heading="workers", form="d"),
        Column(key="network", heading="network alone, images/s", form=".0f"),
        Column(key="folder", heading="folder, images/s", form=".0f"),
        Column(key="ratio", heading="folder / network", form=".2f"),
        Column(key="peak", heading="peak, MiB", form=".0f"),
        Column(key="grown", heading="of it for the folder, MiB", form=".0f"),
        Column(key="private", heading="a worker's own, MiB", form=".0f"),
    ]
    description = (
        f"A folder of PNGs and JPEGs of {SIDE} pixels is processed by {model} in batches of {batch}, each run in a "
        f"fresh process; {written} written. The network alone processes one batch of tensors repeatedly, before and "
        "after the run; the ratio is of speeds, higher is better. Peaks are reported by the operating system (VmHWM); "
        "a worker's own memory is not shared with other processes."
    )
    return Table(title=f"{title} a folder", description=description, columns=columns, rows=rows)


def compare_folder(place: Path, plan: Plan) -> Table:
    """Classify a folder with our pipeline and with that of transformers, with the same random weights.

    Raises:
        UnequalError: their classes or probabilities differ.
    """
    torch.manual_seed(0)
    net = create("vit-ti16", num_classes=10, image_size=SIDE, patch_size=8)
    assert isinstance(net, ViT)
    torch.nn.init.normal_(net.head.weight, std=0.2)  # type: ignore[arg-type]
    preprocess = Preprocess(size=(SIDE, SIDE), mode="squash", crop=1.0)
    net.card = replace(net.card, classes=tuple(f"class {i}" for i in range(10)), preprocess=preprocess)
    save(net, place / "compared.safetensors")
    export(net, place / "hf", "hf")
    folder, count, batch = place / "few", plan.compared, plan.batches[0]
    make(folder, count)
    rows = []
    for workers in (0, 1):
        ours = folders(
            "classify", place / "compared.safetensors", folder, place / "out", batch, workers, count, plan
        ).reported
        arguments = (place / "hf", folder, str(batch), str(workers), plan.dtype)
        theirs = run_child("folder_transformers", *arguments).reported
        check_first(ours["first"], theirs["first"], APART[plan.dtype])
        rows.append(
            {
                "workers": workers,
                "network": Spread.of(1 / seconds for seconds in ours["network"]),
                "ours": 1 / ours["seconds"],
                "transformers": 1 / theirs["seconds"],
                "ratio": ours["seconds"] / theirs["seconds"],
            }
        )
        log.info("compared with transformers, %d workers: %s", workers, rows[-1])
    columns = [
        Column(key="workers", heading="workers", form="d"),
        Column(key="network", heading="our network alone, images/s", form=".0f"),
        Column(key="ours", heading="ours, images/s", form=".0f"),
        Column(key="transformers", heading="transformers, images/s", form=".0f"),
        Column(key="ratio", heading="time, ours / transformers", form=".2f"),
    ]
    description = (
        f"{count:,} of the same images, classified by ViT-Ti/8 with random weights of {SIDE} pixels in {plan.dtype}, "
        f"in batches of {batch}: `ClassificationPipeline` compared with transformers' image-classification `pipeline` "
        "on a list of the files, with the same number of workers. The probabilities of the first images' best classes "
        "are checked equal."
    )
    return Table(
        title="A folder, compared with transformers", description=description, columns=columns, rows=rows
    )


def check_first(
    ours: Sequence[dict[str, float]], theirs: Sequence[dict[str, float]], tolerance: float
) -> None:
    """Check that the best class of each of our results has the same probability in theirs.

    Raises:
        UnequalError: a probability differs by more than `tolerance`.
    """
    best = [max(probabilities, key=probabilities.__getitem__) for probabilities in ours]
    sides = {
        who: torch.tensor(
            [probabilities.get(name, 0.0) for probabilities, name in zip(rows_of, best, strict=True)]
        )
        for who, rows_of in (("ours", ours), ("transformers", theirs))
    }
    check_equal(sides, tolerance)


def generating_many(place: Path, plan: Plan) -> Table:
    """Generate images with the shipped model."""
    rows = []
    for count, batch in plan.generate:
        with tempfile.TemporaryDirectory(dir=place) as out:
            reported = run_child(
                "generate_many", "ldm-emoji", out, *map(str, (count, batch, plan.steps))
            ).reported
        rows.append(
            {
                "count": count,
                "batch": batch,
                "seconds": reported["seconds"],
                "peak": reported["peak"] / 2**20,
                "grown": (reported["peak"] - reported["before"]) / 2**20,
            }
        )
        log.info("%d images in batches of %d: %s", count, batch, rows[-1])
    columns = [
        Column(key="count", heading="images", form=",d"),
        Column(key="batch", heading="batch", form="d"),
        Column(key="seconds", heading="seconds per image", form=".2f"),
        Column(key="peak", heading="peak, MiB", form=".0f"),
        Column(key="grown", heading="of it for the images, MiB", form=".0f"),
    ]
    description = (
        f"Images of one prompt by ldm-emoji, {plan.steps} steps, each written when it is finished, after a warm-up "
        "batch; in fresh processes."
    )
    return Table(title="Generating many images", description=description, columns=columns, rows=rows)


def make(folder: Path, count: int) -> None:
    """Write images 0 to `count` - 1, except those that exist."""
    source = scenes("test", DIFFERENT, (SIDE, SIDE))
    formats = (("JPEG", "jpg"), ("PNG", "png"))
    known: list[tuple[bytes, str]] = []
    for i in range(min(count, DIFFERENT)):
        file, (format, ending) = io.BytesIO(), formats[i % 2]
        Image.fromarray(decode(source[i].image)).save(file, format)
        known.append((file.getvalue(), ending))
    for number in range(count):
        content, ending = known[number % len(known)]
        path = folder / f"{number // FOLDER:04d}" / f"{number:07d}.{ending}"
        if number % FOLDER == 0:
            path.parent.mkdir(parents=True, exist_ok=True)
        if not path.exists():
            path.write_bytes(content)
