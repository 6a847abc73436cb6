"""Stream tar shards by an index on disk, which has 52 bytes and a name per example and is not kept in memory."""

import hashlib
import itertools
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np

from triptych.data.disk_index import DiskIndex, FileReader, FileStamp, LabelWriter, RecordFile, TextWriter
from triptych.data.image_formats import KNOWN_SUFFIXES
from triptych.data.sources.columns import Columns, find_columns
from triptych.data.sources.folders import ID_COLUMN, make_table
from triptych.data.sources.tar import (
    LABEL_SUFFIXES,
    MAX_VALUE_BYTES,
    TEXT_SUFFIXES,
    TarMember,
    iter_members,
    parse_values,
)
from triptych.data.streaming.source import RowCells
from triptych.errors import DataError, TriptychError

_RUN = 256  # examples in a run, which are read in succession
FIRST_EXAMPLES = 1000  # number of first examples that define the columns
_ROW = np.dtype(
    [
        *(("shard", "<i4"), ("name", "<i8"), ("name_size", "<i4")),
        *((what + end, dtype) for what in ("image", "text", "mask") for end, dtype in (("", "<i8"), ("_size", "<u4"))),
    ]
)  # fmt: skip


class ExampleFiles(NamedTuple):
    """The files of an example, by the part of their names after the first dot."""

    key: str
    files: dict[str, TarMember]


def iter_examples(shard: Path) -> Iterator[ExampleFiles]:
    """Yield the examples of a shard in the webdataset layout: successive files with the same name up to the first
    dot."""
    result: ExampleFiles | None = None
    for member in iter_members(shard):
        folder, _, name = member.name.rpartition("/")
        stem, _, field = name.partition(".")
        if not stem or not field:
            continue
        key = f"{folder}/{stem}" if folder else stem
        if result is None or result.key != key:
            if result is not None:
                yield result
            result = ExampleFiles(key, {})
        result.files[field] = member
    if result is not None:
        yield result


class _Fields(NamedTuple):
    """The columns, and the files of an example that hold label and caption (see `ExampleFiles`)."""

    columns: Columns
    label: str | None
    caption: str | None


class TarRows:
    """The examples of tar shards.

    Args:
        shards: uncompressed tar files in the webdataset layout, in which the files of an example are in succession.
        requested: names of the image, label, caption and mask columns; None where the user has given none.

    Raises:
        DataError: a shard is damaged, there are no images, columns are unknown or ambiguous, or labels cannot be read.
    """

    def __init__(self, shards: Sequence[Path], requested: tuple[str | None, ...]):
        self.files = [FileStamp.of(shard) for shard in shards]
        self.shards, self.requested = list(shards), requested
        self._handles = FileReader(self.files)
        index = DiskIndex(["tar", self.files, requested])
        summary = index.load_or_build(("rows", "names", "labels"), self._make)
        self._records = RecordFile(index.path("rows"), _ROW)
        self._names = FileReader([FileStamp.of(index.path("names"))])
        self.labels_file = index.path("labels")
        self.columns = Columns(**summary["columns"])
        self._label, self._caption = summary["label"], summary["caption"]
        self.numbering: dict[str, Any] | None = summary["numbering"]
        self.names: tuple[str, ...] | None = None
        self.fingerprint: str = summary["fingerprint"]
        starts = [
            start + piece
            for start, count in zip(np.cumsum([0, *summary["counts"]]), summary["counts"], strict=False)
            for piece in range(0, count, _RUN)
        ]
        self.bounds = np.array([*starts, len(self._records)], np.int64)

    def __len__(self) -> int:
        return len(self._records)

    def cells(self, row: int) -> RowCells:
        """Read a row."""
        record = self._records[row]
        shard = int(record["shard"])
        key = self._names.read(0, int(record["name"]), int(record["name_size"])).decode()
        name = f"{self.shards[shard].name}/{key}"
        image = self._handles.read(shard, int(record["image"]), int(record["image_size"]))
        caption = None
        if self._caption is not None and record["text_size"]:
            caption = self._value(shard, TarMember(name, int(record["text"]), int(record["text_size"])))
        mask = None
        if record["mask_size"]:
            mask = self._handles.read(shard, int(record["mask"]), int(record["mask_size"]))
        return RowCells(image, name, caption, mask)

    def hold(self, rows: int, window: int) -> None:
        """Do nothing, since each example can be read independently."""

    def _value(self, shard: int, member: TarMember) -> Any:
        return self._read(self._handles.read, shard, self._caption, member).get(self.columns.caption or "")

    def _read(self, read: Callable[..., bytes], shard: int, field: str, member: TarMember) -> dict[str, Any]:
        suffix = field.rpartition(".")[2].lower()
        if member.size > MAX_VALUE_BYTES or suffix not in (*TEXT_SUFFIXES, *LABEL_SUFFIXES, "json"):
            return {}
        try:
            return parse_values(field, suffix, read(shard, member.offset, member.size).decode())
        except TriptychError:
            raise
        except ValueError as problem:
            where = f"{member.name} in {self.shards[shard]}"
            raise DataError(f"{where} cannot be read ({problem}); repair it") from problem

    def _make(self, rows: BinaryIO, names: BinaryIO, labels: BinaryIO) -> dict[str, Any]:
        fields = self._fields()
        lines, digest, counts = TextWriter(names), hashlib.sha256(), []
        numbering = LabelWriter(labels, fields.columns.label or "")
        for number, shard in enumerate(self.shards):
            count = 0
            examples = (group for group in iter_examples(shard) if self._image(group, fields.columns.image))
            while part := list(itertools.islice(examples, 4096)):
                packed = np.zeros(len(part), _ROW)
                for i, group in enumerate(part):
                    packed[i] = self._row(number, group, fields, lines)
                if fields.label is not None:
                    values = [self._label_of(number, group, fields) for group in part]
                    numbering.add(values, lambda i, part=part, shard=shard: f"{shard.name}/{part[i].key}")
                rows.write(content := packed.tobytes())
                digest.update(content)
                digest.update("\n".join(group.key for group in part).encode())
                count += len(part)
            counts.append(count)
        digest.update(repr((fields.columns, list(numbering.numbers))).encode())
        digest.update(numbering.digest.digest())
        columns = {name: getattr(fields.columns, name) for name in ("image", "label", "caption", "mask")}
        return {
            "counts": counts,
            "columns": columns,
            "label": fields.label,
            "caption": fields.caption,
            "numbering": numbering.summary if fields.label is not None else None,
            "fingerprint": digest.hexdigest()[:32],
        }

    def _row(self, shard: int, group: ExampleFiles, fields: _Fields, lines: TextWriter) -> tuple[int, ...]:
        image = self._image(group, fields.columns.image)
        assert image is not None
        text = group.files.get(fields.caption or "")
        mask = group.files.get(fields.columns.mask or "")
        result = [shard, *lines.append(group.key)]
        for member in (image, text, mask):
            result += [0, 0] if member is None else [member.offset, member.size]
        return tuple(result)

    def _image(self, group: ExampleFiles, column: str) -> TarMember | None:
        if column != "image":
            return group.files.get(column)
        mask = self.requested[3]
        result = [
            field
            for field in group.files
            if field != mask and f".{field.rpartition('.')[2].lower()}" in KNOWN_SUFFIXES
        ]
        if len(result) > 1:
            raise DataError(
                f"{group.key} has several images; choose one, for example image_column={result[1]}"
            )
        return group.files[result[0]] if result else None

    def _label_of(self, shard: int, group: ExampleFiles, fields: _Fields) -> Any:
        member = group.files.get(fields.label or "")
        if member is None:
            return None
        return self._read(self._handles.read, shard, fields.label or "", member).get(
            fields.columns.label or ""
        )

    def _fields(self) -> _Fields:
        """Find the columns from the first examples. The other examples must have them, too."""
        image, label, caption, mask = self.requested
        examples: list[dict[str, Any]] = []
        file_of_column: dict[str, str] = {}
        for number, shard in enumerate(self.shards):
            for group in itertools.islice(iter_examples(shard), FIRST_EXAMPLES - len(examples)):
                if self._image(group, image or "image") is None:
                    continue
                example: dict[str, Any] = {ID_COLUMN: group.key, "image": "an image"}
                for field, member in group.files.items():
                    if field == mask:
                        example[field] = "a mask"
                    for name, value in self._read(self._handles.read, number, field, member).items():
                        example[name] = value
                        file_of_column.setdefault(name, field)
                examples.append(example)
            if len(examples) >= FIRST_EXAMPLES:
                break
        if not examples:
            raise DataError(
                f"{self.shards[0]} holds no images; a shard needs files such as key.jpg with key.cls, key.txt or "
                "key.json"
            )
        names = dict.fromkeys(name for example in examples for name in example)
        masks = mask if mask in names else None
        features = make_table(
            {name: [example.get(name) for example in examples] for name in names}, masks=masks
        ).features
        columns = find_columns(features, "image", label, caption, masks)
        return _Fields(
            Columns(image or "image", columns.label, columns.caption, columns.mask),
            file_of_column.get(columns.label or ""),
            file_of_column.get(columns.caption or ""),
        )
