"""`triptych bench data`: memory and time of streaming against the number of examples."""

import io
import logging
import shutil
import tarfile
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from triptych.bench.harness.report import Column, Report, Table
from triptych.bench.harness.subprocesses import run_child
from triptych.bench.harness.suite import suite

log = logging.getLogger(__name__)

DIFFERENT = 256  # distinct images, of one pixel
GROUP = 5_000  # rows per row group
SHARD = 10_000  # examples per tar file
CLASSES = 100


@dataclass(frozen=True, kw_only=True)
class Plan:
    """Numbers of examples by format."""

    parquet: tuple[int, ...] = (10_000, 100_000, 1_000_000, 10_000_000)
    tar: tuple[int, ...] = (10_000, 100_000, 1_000_000)
    """Fewer, since a tar file takes at least 1 KiB per file."""
    folder: tuple[int, ...] = (10_000, 100_000)
    held: int = 1_000_000
    """Largest number that is also opened without streaming."""


FULL = Plan()
QUICK = Plan(parquet=(300, 600), tar=(300,), folder=(300,), held=500)


@suite("data", FULL)
def run(report: Report, plan: Plan) -> None:
    """Create a synthetic data set of each size, and open and read it in fresh processes."""
    makers = {"parquet": make_parquet, "tar": make_tar, "folder": make_folder}
    rows: list[dict[str, Any]] = []
    for layout, make in makers.items():
        for count in getattr(plan, layout):
            with tempfile.TemporaryDirectory(prefix="triptych-bench-") as folder:
                rows.append(measured(layout, count, make, Path(folder), plan))
                log.info("%s of %s: %s", layout, f"{count:,}", rows[-1])
    report.tables = [table(rows)]


def measured(
    layout: str, count: int, make: Callable[[Path, int], None], folder: Path, plan: Plan
) -> dict[str, Any]:
    """Measure a row of the table."""
    make(folder / "set", count)
    cache = folder / "cache"
    first = run_child("read_data", cache, folder / "set", "stream", "0").reported
    again = run_child("read_data", cache, folder / "set", "stream", "2").reported
    row = {
        "format": layout,
        "count": first["count"],
        "index": first["opened"],
        "open": again["opened"],
        "disk": first["disk"] / 2**20,
        "making": first["indexed"] / 2**20,
        "reading": again["peak"] / 2**20,
        "grown": (max(first["peak"], again["peak"]) - first["before"]) / 2**20,
        "worker": again["private"] / 2**20,
        "table": None,
    }
    if count <= plan.held:
        table_run = run_child("read_data", folder / "other", folder / "set", "table", "0").reported
        row["table"] = (table_run["peak"] - table_run["before"]) / 2**20
    shutil.rmtree(folder / "set")
    return row


def table(rows: list[dict[str, Any]]) -> Table:
    columns = [
        Column(key="format", heading="in"),
        Column(key="count", heading="examples", form=",d"),
        Column(key="index", heading="index, s", form=".1f"),
        Column(key="open", heading="open again, s", form=".2f"),
        Column(key="disk", heading="index on disk, MiB", form=".1f"),
        Column(key="making", heading="peak, indexing, MiB", form=".0f"),
        Column(key="reading", heading="peak, reading, MiB", form=".0f"),
        Column(key="grown", heading="of it above imports, MiB", form=".0f"),
        Column(key="worker", heading="a worker's own, MiB", form=".0f"),
        Column(key="table", heading="not streamed, above imports, MiB", form=".0f"),
    ]
    description = (
        "Labeled images of one pixel are opened with `stream=True`, a tenth is held out, and 20 shuffled batches of "
        f"256 are read, in fresh processes. Row groups have {GROUP:,} rows, shards {SHARD:,} examples. Peaks are "
        "reported by the operating system (VmHWM): of a process that builds the index and reads without workers, and "
        "of one that uses the existing index and reads with two workers; their own memory is not shared with other "
        "processes. The last column is the growth without streaming, which for parquet includes the memory-mapped "
        "copy in the cache of `datasets`."
    )
    return Table(
        title="Memory against the number of examples", description=description, columns=columns, rows=rows
    )


def encoded_images() -> list[bytes]:
    files = []
    for value in range(DIFFERENT):
        file = io.BytesIO()
        Image.new("L", (1, 1), value).save(file, "PNG")
        files.append(file.getvalue())
    return files


def make_parquet(folder: Path, count: int) -> None:
    """Write one file with several row groups."""
    import pyarrow
    import pyarrow.parquet

    folder.mkdir()
    known = pyarrow.array(encoded_images(), pyarrow.binary())
    schema = pyarrow.schema({"image": pyarrow.binary(), "label": pyarrow.int32()})
    with pyarrow.parquet.ParquetWriter(folder / "all.parquet", schema, use_dictionary=False) as writer:
        for start in range(0, count, GROUP):
            rows = np.arange(start, min(start + GROUP, count))
            columns = [known.take(pyarrow.array(rows % DIFFERENT)), pyarrow.array(rows % CLASSES, "int32")]
            writer.write_table(pyarrow.table(columns, schema=schema), row_group_size=GROUP)


def make_tar(folder: Path, count: int) -> None:
    """Write shards of key.png and key.cls."""
    folder.mkdir()
    known = encoded_images()
    for number, start in enumerate(range(0, count, SHARD)):
        with open(folder / f"{number:05d}.tar", "wb") as file:
            for row in range(start, min(start + SHARD, count)):
                for end, content in (("png", known[row % DIFFERENT]), ("cls", b"%d" % (row % CLASSES))):
                    member = tarfile.TarInfo(f"{row:08d}.{end}")
                    member.size = len(content)
                    file.write(member.tobuf(tarfile.USTAR_FORMAT) + content.ljust(512, b"\0"))
            file.write(b"\0" * 1024)


def make_folder(folder: Path, count: int) -> None:
    """Write class folders with subfolders of at most 1,000 files."""
    known = encoded_images()
    for row in range(count):
        place = folder / f"{row % CLASSES:03d}" / f"{row // CLASSES // 1000:03d}"
        if row // CLASSES % 1000 == 0:
            place.mkdir(parents=True, exist_ok=True)
        (place / f"{row:08d}.png").write_bytes(known[row % DIFFERENT])
