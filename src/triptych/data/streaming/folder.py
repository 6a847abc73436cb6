"""Stream a folder of images. It is scanned each time it is opened, to notice changes, but the list is kept on disk."""

import hashlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np

from triptych.data.disk_index import DiskIndex, FileReader, FileStamp, LabelWriter, RecordFile, TextWriter
from triptych.data.image_formats import is_image_name
from triptych.data.sources.columns import Columns
from triptych.data.sources.folders import ID_COLUMN, read_lines
from triptych.data.streaming.source import RowCells
from triptych.errors import DataError

_RUN = 256  # images in a run, which are adjacent in a folder
_ROW = np.dtype([("name", "<i8"), ("name_size", "<i4"), ("caption", "<i4")])
TEXTS = ("", ".txt", ".caption")  # suffixes of caption files by number, 0 for none; .txt overrides .caption


class ImageFile(NamedTuple):
    """An image file: the parts of its path relative to the folder, the index in TEXTS of its captions' suffix, and the
    size of both files in bytes."""

    parts: tuple[str, ...]
    text: int
    size: int


def walk_images(folder: Path) -> Iterator[ImageFile]:
    """Yield all images below a folder in sorted order, with the names of one folder at a time in memory.

    Raises:
        DataError: a folder cannot be read.
    """

    def refuse(problem: OSError) -> None:
        raise DataError(f"{folder} cannot be read ({problem.strerror}); check its permissions") from problem

    for root, folders, names in os.walk(folder, followlinks=True, onerror=refuse):
        folders[:] = sorted(name for name in folders if not name.startswith((".", "__MACOSX")))
        below = Path(root).relative_to(folder).parts
        texts = {name for name in names if name.lower().endswith(TEXTS[1:])}
        for name in sorted(names):
            if not is_image_name(name):
                continue
            stem = os.path.splitext(name)[0]
            text = next((i for i, end in enumerate(TEXTS) if i and stem + end in texts), 0)
            files = [name, stem + TEXTS[text]] if text else [name]
            size = sum(os.stat(os.path.join(root, file)).st_size for file in files)
            yield ImageFile((*below, name), text, size)


class FolderRows:
    """The images below a folder. The class of an image is the first folder on the way to it.

    Args:
        folder: the folder.
        prefix: prepended to the names of examples.

    Raises:
        DataError: there are no images, or some next to class folders, or file names that are not UTF-8.
    """

    names: tuple[str, ...] | None = None

    def __init__(self, folder: Path, prefix: str):
        self.folder, self.prefix = folder, prefix
        index = DiskIndex(["folder", str(folder)])
        summary = index.build(("rows", "names", "labels"), self._make)
        if not summary["count"]:
            raise DataError(
                f"{folder} holds no images (.jpg, .png, .webp ...); give class folders, .tar or .parquet files"
            )
        self._records = RecordFile(index.path("rows"), _ROW)
        self._names = FileReader([FileStamp.of(index.path("names"))])
        self.labels_file = index.path("labels")
        self.numbering: dict[str, Any] | None = summary["numbering"]
        self.fingerprint: str = summary["fingerprint"]
        label_column = None if self.numbering is None else "label"
        self.columns = Columns("image", label_column, "caption" if summary["captions"] else None)
        count = len(self._records)
        self.bounds = np.array([*range(0, count, _RUN), count], np.int64)

    def __len__(self) -> int:
        return len(self._records)

    def hold(self, rows: int, window: int) -> None:
        """Do nothing, since each image is a file of its own."""

    def cells(self, row: int) -> RowCells:
        """Read a row."""
        record = self._records[row]
        name = self._names.read(0, int(record["name"]), int(record["name_size"])).decode()
        path = os.path.join(self.folder, name)
        text = TEXTS[record["caption"]]
        caption = read_lines(Path(os.path.splitext(path)[0] + text)) if text else None
        return RowCells(path, self.prefix + name, caption)

    def _make(self, rows: BinaryIO, names: BinaryIO, labels: BinaryIO) -> dict[str, Any]:
        lines, numbering, digest = TextWriter(names), LabelWriter(labels, ID_COLUMN), hashlib.sha256()
        count = captions = 0
        stray = ""
        for image in walk_images(self.folder):
            name = "/".join(image.parts)
            try:
                place = lines.append(name)
            except UnicodeEncodeError as problem:
                raise DataError(f"{name!r} has a name that is not UTF-8; rename it") from problem
            rows.write(np.array([(*place, image.text)], _ROW).tobytes())
            digest.update(f"{name}\n{image.text} {image.size}\n".encode())
            count, captions = count + 1, captions + (image.text > 0)
            if len(image.parts) > 1:
                numbering.add([image.parts[0]], str)
            elif not stray:
                stray = name
            if stray and numbering.count:
                raise DataError(
                    f"{self.folder / stray} is next to class folders; move it into one of them or out of the folder"
                )
        return {
            "count": count,
            "captions": captions,
            "numbering": numbering.summary if numbering.count else None,
            "fingerprint": digest.hexdigest()[:32],
        }
