"""Read rows and bytes from disk on demand, in constant memory and without state that processes share."""

import hashlib
import json
import os
from collections import OrderedDict
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np

from triptych.atomic_write import write_atomically, write_text_atomically
from triptych.data.example import SourceChangedError
from triptych.errors import DataError, StorageError

INDEX_VERSION = 1
MAX_OPEN_FILES = 32  # per reader


class FileStamp(NamedTuple):
    """Path, size and modification time of a file when it was indexed."""

    path: str
    size: int
    mtime_ns: int

    @classmethod
    def of(cls, path: Path) -> "FileStamp":
        try:
            stat = path.stat()
        except OSError as problem:
            raise DataError(f"{path} cannot be read ({problem.strerror}); check the path") from problem
        return cls(str(path), stat.st_size, stat.st_mtime_ns)

    def check(self, stat: os.stat_result) -> None:
        """Raise a `SourceChangedError` if the size or modification time of the file has changed."""
        if (stat.st_size, stat.st_mtime_ns) != (self.size, self.mtime_ns):
            raise SourceChangedError(f"{self.path} has changed since it was opened; start again")


class FileReader:
    """Random access to the bytes of several files, of which a few are open at a time.

    Raises (while reading):
        SourceChangedError: a file is missing or has changed.
    """

    def __init__(self, files: Sequence[FileStamp]):
        self.files = files
        self._open: OrderedDict[int, int] = OrderedDict()

    def read(self, number: int, offset: int, size: int) -> bytes:
        """Return `size` bytes of file `number`, starting at `offset`."""
        stamp = self.files[number]
        try:
            handle = self._open.pop(number, None)
            if handle is None:
                handle = os.open(stamp.path, os.O_RDONLY)
            self._open[number] = handle
            stamp.check(os.fstat(handle))
            content = os.pread(handle, size, offset)  # no file position that forked processes would share
        except OSError as problem:
            reason = problem.strerror
            raise SourceChangedError(
                f"{stamp.path} cannot be read ({reason}); it could be read before"
            ) from problem
        if len(content) < size:
            raise SourceChangedError(f"{stamp.path} has become shorter since it was opened; start again")
        if len(self._open) > MAX_OPEN_FILES:
            os.close(self._open.popitem(last=False)[1])
        return content

    def __getstate__(self) -> dict[str, Any]:
        return {"files": self.files, "_open": OrderedDict()}

    def __del__(self) -> None:
        for handle in self._open.values():
            os.close(handle)


class RecordFile:
    """Records of a fixed size in a file, by index."""

    def __init__(self, path: Path, dtype: np.dtype):
        self.dtype, stamp = dtype, FileStamp.of(path)
        self._files, self._count = FileReader([stamp]), stamp.size // dtype.itemsize

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, row: int) -> Any:
        size = self.dtype.itemsize
        return np.frombuffer(self._files.read(0, row * size, size), self.dtype)[0]


class DiskIndex:
    """An index of data files, cached on disk: `summary`, a dict, and binary parts, which are read on demand.

    It is a folder in the cache of `datasets`, whose name is a hash of `key`: changed files have another index. The
    summary is written last, so that an unfinished index is built again.

    Args:
        key: what the index depends on, as JSON: the stamps of the files and the options.
    """

    def __init__(self, key: Any):
        from datasets import config as settings

        digest = hashlib.sha256(json.dumps([INDEX_VERSION, key]).encode()).hexdigest()[:32]
        self.folder = Path(settings.HF_DATASETS_CACHE) / "triptych" / digest

    def path(self, name: str) -> Path:
        """The file of a binary part."""
        return self.folder / f"{name}.bin"

    @property
    def summary(self) -> dict[str, Any] | None:
        """The summary; None if the index has not been built."""
        try:
            return json.loads((self.folder / "about.json").read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return None

    def load_or_build(self, parts: Sequence[str], build: Callable[..., dict[str, Any]]) -> dict[str, Any]:
        """Return the summary; build the index first if it does not exist. Other processes wait meanwhile.

        Args:
            parts: names of the binary parts.
            build: called with a file to write for each part; returns the summary.
        """
        import filelock

        if (summary := self.summary) is not None:
            return summary
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as problem:
            raise StorageError(
                f"cannot write {self.folder}: {problem.strerror}; set HF_DATASETS_CACHE to a folder that can be written"
            ) from problem
        with filelock.FileLock(self.folder / "lock"):
            if (summary := self.summary) is None:
                summary = self.build(parts, build)
        return summary

    def build(self, parts: Sequence[str], build: Callable[..., dict[str, Any]]) -> dict[str, Any]:
        """As `load_or_build`, but build the index even if it exists."""
        summary: dict[str, Any] = {}

        def write(opened: list[BinaryIO]) -> None:
            if len(opened) == len(parts):
                summary.update(build(*opened))
            else:
                write_atomically(self.path(parts[len(opened)]), lambda file: write([*opened, file]))

        write([])
        write_text_atomically(self.folder / "about.json", json.dumps(summary))
        return summary


class TextWriter:
    """Append strings to a file. `append` returns where each one is stored, for the row that refers to it."""

    def __init__(self, file: BinaryIO):
        self.file, self.offset = file, 0

    def append(self, text: str) -> tuple[int, int]:
        """Write a string; return its offset and size in bytes."""
        content = text.encode()
        location = (self.offset, len(content))
        self.file.write(content)
        self.offset += len(content)
        return location


class LabelWriter:
    """Append labels to a file as int32: numbers as they are, strings numbered in the order of their first occurrence.

    Raises (while adding):
        DataError: a number that is too large.
    """

    def __init__(self, file: BinaryIO, column: str):
        self.file, self.column = file, column
        self.numbers: dict[str, int] = {}
        self.highest, self.lowest, self.count, self.missing = -1, 0, 0, 0
        self.first_missing = ""
        self.digest = hashlib.sha256()

    def add(self, values: Sequence[Any] | np.ndarray, name: Callable[[int], str]) -> None:
        """Append the labels of the next rows.

        Args:
            values: numbers or strings; None or "" if a row has no label.
            name: returns the name of the i-th of these rows, for errors.
        """
        numbers = np.full(len(values), -1, np.int64)
        if isinstance(values, np.ndarray):
            numbers = values.astype(np.int64)
        else:
            for i, value in enumerate(values):
                if value is None or value == "":
                    self.first_missing = self.first_missing or name(i)
                    self.missing += 1
                elif isinstance(value, str):
                    numbers[i] = self.numbers.setdefault(value, len(self.numbers))
                else:
                    numbers[i] = int(value)
        if len(numbers):
            self.highest, self.lowest = (
                max(self.highest, int(numbers.max())),
                min(self.lowest, int(numbers.min())),
            )
        if self.highest >= 2**31:
            raise DataError(
                f"column {self.column} goes up to {self.highest}; number the classes from 0, or use their names"
            )
        self.count += len(numbers)
        content = numbers.astype(np.int32).tobytes()
        self.file.write(content)
        self.digest.update(content)

    @property
    def summary(self) -> dict[str, Any]:
        """Names of strings by number, the range of the numbers, and how many labels are missing."""
        return {
            "names": list(self.numbers),
            "highest": self.highest,
            "lowest": self.lowest,
            "missing": self.missing,
            "first missing": self.first_missing,
        }
