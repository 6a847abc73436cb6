"""Stream parquet files: they are read in place, a block of rows at a time, without copying them to a cache.

`datasets` can stream parquet files, too, but it loses the contents of its shuffle buffer on resuming, and its order
depends on the number of workers.
"""

import hashlib
import os
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

import numpy as np

from triptych.data.disk_index import MAX_OPEN_FILES, DiskIndex, FileStamp, LabelWriter
from triptych.data.example import SourceChangedError
from triptych.data.sources.columns import Columns, check_label_column, find_columns
from triptych.data.streaming.source import RowCells
from triptych.errors import DataError

if TYPE_CHECKING:
    import pyarrow
    import pyarrow.parquet

_BLOCK = 64  # rows that are decoded together
READ_AHEAD_BYTES = 1 << 20  # of a column


class ParquetRows:
    """The rows of parquet files. Recently read rows are kept in memory, so that rows that are shuffled within a window
    are decoded once.

    Args:
        files: parquet files with the same columns.
        requested: names of the image, label, caption and mask columns; None where the user has given none.
        name: prefix of the names of rows.

    Raises:
        DataError: a file is not a parquet file or has other columns, the columns are unknown or ambiguous (see
            `find_columns`), or labels have a wrong type.
    """

    def __init__(self, files: Sequence[Path], requested: tuple[str | None, ...], name: str):
        import datasets

        self.files, self.name = [FileStamp.of(file) for file in files], name
        self.hold(4096, 256)
        self._forget()
        schema = self._file(0).schema_arrow
        features = datasets.Features.from_arrow_schema(schema)
        image, label, caption, mask = requested
        self.columns: Columns = find_columns(features, image, label, caption, mask)
        self.names: tuple[str, ...] | None = None
        if self.columns.label is not None:
            check_label_column(self.columns.label, features)
            feature = features[self.columns.label]
            self.names = tuple(feature.names) if isinstance(feature, datasets.ClassLabel) else None
        index = DiskIndex(["parquet", self.files, self.columns.label])
        summary = index.load_or_build(("labels",), lambda labels: self._make(labels, schema))
        self.labels_file = index.path("labels")
        self.numbering: dict[str, Any] | None = summary["numbering"]
        self.fingerprint: str = summary["fingerprint"]
        self._groups = [
            (file, group) for file, count in enumerate(summary["groups"]) for group in range(len(count))
        ]
        counts = [count for counts in summary["groups"] for count in counts]
        self.bounds = np.cumsum([0, *counts], dtype=np.int64)
        used = (self.columns.image, self.columns.caption, self.columns.mask)
        self._used = [column for column in dict.fromkeys(used) if column is not None]

    def __len__(self) -> int:
        return int(self.bounds[-1])

    def hold(self, rows: int, window: int) -> None:
        """Set how many decoded rows to keep in memory, and the size of the windows in which they are read in random
        order."""
        self._limit, self._window, self._places = rows, window // _BLOCK + 2, rows // window + 2

    def cells(self, row: int) -> RowCells:
        """Read a row."""
        group = int(np.searchsorted(self.bounds, row, side="right")) - 1
        block, at = divmod(row - int(self.bounds[group]), _BLOCK)
        table = self._block(group, block)
        image, caption, mask = (
            None if column is None else table.column(column)[at].as_py()
            for column in (self.columns.image, self.columns.caption, self.columns.mask)
        )
        path = image.get("path") if isinstance(image, dict) else image if isinstance(image, str) else None
        return RowCells(image, f"{self.name}/{row}" + (f" ({path})" if path else ""), caption, mask)

    def _block(self, group: int, number: int) -> "pyarrow.Table":
        if self._process != os.getpid():
            self._forget()  # in a forked worker: the open files and positions belong to its parent
        if (group, number) in self._blocks:
            self._blocks.move_to_end((group, number))
            return self._blocks[group, number]
        for passed, table in self._advance(group, number):
            self._blocks[group, passed] = table
        result = self._blocks[group, number]
        while len(self._blocks) > max(self._limit // _BLOCK, self._window):
            self._blocks.popitem(last=False)
        return result

    def _advance(self, group: int, number: int) -> "list[tuple[int, pyarrow.Table]]":
        """Read up to a block, from the nearest preceding position that was read to before; return the last blocks, of
        one window."""
        import pyarrow

        at = max((reached for of, reached in self._cursors if of == group and reached <= number), default=0)
        blocks = self._cursors.pop((group, at), None) or self._read(group)
        stamp = self.files[self._groups[group][0]]
        result: list[tuple[int, Any]] = []
        try:
            stamp.check(os.stat(stamp.path))
            for passed in range(at, number + 1):
                table = next(blocks)
                if number - passed < self._window:
                    result.append((passed, table))
        except StopIteration:
            raise SourceChangedError(f"{stamp.path} has fewer rows than it had; start again") from None
        except (OSError, pyarrow.ArrowException) as problem:
            why = getattr(problem, "strerror", None) or str(problem).split("\n")[0]
            raise SourceChangedError(
                f"{stamp.path} cannot be read ({why}); it is damaged or was removed"
            ) from problem
        self._cursors[group, number + 1] = blocks
        if len(self._cursors) > self._places:
            self._cursors.popitem(last=False)
        return result

    def _read(self, group: int) -> "Iterator[pyarrow.Table]":
        """Yield the blocks of a row group."""
        import pyarrow

        file, number = self._groups[group]
        batches = self._file(file).iter_batches(
            batch_size=_BLOCK, row_groups=[number], columns=self._used, use_threads=False
        )
        rest: list[Any] = []
        for batch in batches:  # with fewer rows at the end of the file's own chunks
            rest.append(batch)
            while sum(map(len, rest)) >= _BLOCK:
                table = pyarrow.Table.from_batches(rest)
                yield table.slice(0, _BLOCK)
                rest = table.slice(_BLOCK).to_batches()
        if rest:
            yield pyarrow.Table.from_batches(rest)

    def _file(self, number: int) -> "pyarrow.parquet.ParquetFile":
        import pyarrow.parquet

        opened = self._open.pop(number, None)
        if opened is None:
            path = self.files[number].path
            try:
                opened = pyarrow.parquet.ParquetFile(path, pre_buffer=False, buffer_size=READ_AHEAD_BYTES)
            except FileNotFoundError as problem:
                reason = problem.strerror
                raise SourceChangedError(
                    f"{path} cannot be read ({reason}); it could be read before"
                ) from problem
            except (OSError, pyarrow.ArrowException) as problem:
                why = str(problem).split("\n")[0]
                raise DataError(
                    f"{path} cannot be read as parquet ({why}); copy or convert it again"
                ) from problem
        self._open[number] = opened
        if len(self._open) > MAX_OPEN_FILES:
            self._open.popitem(last=False)
        return opened

    def _forget(self) -> None:
        self._process = os.getpid()
        self._open: OrderedDict[int, Any] = OrderedDict()
        self._cursors: OrderedDict[tuple[int, int], Any] = OrderedDict()  # by row group and next block
        self._blocks: OrderedDict[tuple[int, int], Any] = OrderedDict()

    def __getstate__(self) -> dict[str, Any]:
        blank = {"_process": 0, "_open": None, "_cursors": None, "_blocks": None}
        return {**self.__dict__, **blank}

    def _make(self, labels: BinaryIO, schema: "pyarrow.Schema") -> dict[str, Any]:
        column = self.columns.label
        digest, groups = hashlib.sha256(), []
        numbering = LabelWriter(labels, column or "")
        for number, stamp in enumerate(self.files):
            file = self._file(number)
            if file.schema_arrow.names != schema.names:
                raise DataError(
                    f"{stamp.path} has the columns {', '.join(file.schema_arrow.names)}, but {self.files[0].path} has "
                    f"{', '.join(schema.names)}; give files with the same columns"
                )
            counts = [file.metadata.row_group(i).num_rows for i in range(file.metadata.num_row_groups)]
            sizes = [file.metadata.row_group(i).total_byte_size for i in range(len(counts))]
            digest.update(repr((Path(stamp.path).name, stamp.size, counts, sizes)).encode())
            groups.append(counts)
            if column is not None:
                self._number(file, column, numbering)
        digest.update(repr((schema.names, list(numbering.numbers))).encode() + numbering.digest.digest())
        return {
            "groups": groups,
            "numbering": numbering.summary if column is not None else None,
            "fingerprint": digest.hexdigest()[:32],
        }

    def _number(self, file: Any, column: str, numbering: LabelWriter) -> None:
        import pyarrow

        for batch in file.iter_batches(batch_size=1 << 16, columns=[column], use_threads=False):
            cells, first = batch.column(0), numbering.count

            def name(i: int, first: int = first) -> str:
                return f"row {first + i}"

            integral = pyarrow.types.is_integer(cells.type) and not cells.null_count
            values = cells.to_numpy() if integral else cells.to_pylist()
            numbering.add(values, name)
