"""Rows and bytes on disk, read where they lie: nothing of them stays in memory, and processes share nothing."""

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
from triptych.errors import UserError

INDEX_VERSION = 1
MAX_OPEN_FILES = 32  # files at a time


class FileStamp(NamedTuple):
    """A file as it was when it was indexed."""

    path: str
    size: int
    mtime_ns: int

    @classmethod
    def of(cls, path: Path) -> "FileStamp":
        try:
            stat = path.stat()
        except OSError as problem:
            raise UserError(f"{path} cannot be read ({problem.strerror}); check the path") from problem
        return cls(str(path), stat.st_size, stat.st_mtime_ns)

    def check(self, stat: os.stat_result) -> None:
        if (stat.st_size, stat.st_mtime_ns) != (self.size, self.mtime_ns):
            raise SourceChangedError(f"{self.path} has changed since it was opened; start again")


class FileReader:
    """Files that are read at places, a few open at a time.

    Raises (while reading):
        SourceChangedError: a file that is missing, or is not what it was.
    """

    def __init__(self, files: Sequence[FileStamp]):
        self.files = files
        self._open: OrderedDict[int, int] = OrderedDict()

    def read(self, number: int, offset: int, size: int) -> bytes:
        known = self.files[number]
        try:
            handle = self._open.pop(number, None)
            if handle is None:
                handle = os.open(known.path, os.O_RDONLY)
            self._open[number] = handle
            known.check(os.fstat(handle))
            content = os.pread(handle, size, offset)  # has no position that processes could fight over
        except OSError as problem:
            why = problem.strerror
            raise SourceChangedError(f"{known.path} cannot be read ({why}); it was there before") from problem
        if len(content) < size:
            raise SourceChangedError(f"{known.path} has become shorter since it was opened; start again")
        if len(self._open) > MAX_OPEN_FILES:
            os.close(self._open.popitem(last=False)[1])
        return content

    def __getstate__(self) -> dict[str, Any]:
        return {"files": self.files, "_open": OrderedDict()}

    def __del__(self) -> None:
        for handle in self._open.values():
            os.close(handle)


class RecordFile:
    """Rows of a fixed size in a file."""

    def __init__(self, path: Path, dtype: np.dtype):
        self.dtype, known = dtype, FileStamp.of(path)
        self._files, self._count = FileReader([known]), known.size // dtype.itemsize

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, row: int) -> Any:
        size = self.dtype.itemsize
        return np.frombuffer(self._files.read(0, row * size, size), self.dtype)[0]


class DiskIndex:
    """A folder of what was found out about some files: `about`, as JSON, and parts that are read where they lie.

    It lies in the cache of `datasets`, under a name that is a function of what it was made of: changed files have
    another. `about` is written last: an index that was broken off is made again.
    """

    def __init__(self, asked: Any):
        from datasets import config as settings

        digest = hashlib.sha256(json.dumps([INDEX_VERSION, asked]).encode()).hexdigest()[:32]
        self.folder = Path(settings.HF_DATASETS_CACHE) / "triptych" / digest

    def path(self, name: str) -> Path:
        return self.folder / f"{name}.bin"

    @property
    def about(self) -> dict[str, Any] | None:
        try:
            return json.loads((self.folder / "about.json").read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return None

    def made(self, names: Sequence[str], make: Callable[..., dict[str, Any]]) -> dict[str, Any]:
        """`about`; where it is not known yet, of `make`, called with a file to write for each name. Other processes
        wait meanwhile, and find it made."""
        import filelock

        if (about := self.about) is not None:
            return about
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as problem:
            raise UserError(
                f"cannot write {self.folder}: {problem.strerror}; set HF_DATASETS_CACHE to a folder that can be written"
            ) from problem
        with filelock.FileLock(self.folder / "lock"):
            if (about := self.about) is None:
                about = self.renewed(names, make)
        return about

    def renewed(self, names: Sequence[str], make: Callable[..., dict[str, Any]]) -> dict[str, Any]:
        """Made anew, whether it is known or not."""
        about: dict[str, Any] = {}

        def write(opened: list[BinaryIO]) -> None:
            if len(opened) == len(names):
                about.update(make(*opened))
            else:
                write_atomically(self.path(names[len(opened)]), lambda file: write([*opened, file]))

        write([])
        write_text_atomically(self.folder / "about.json", json.dumps(about))
        return about


class TextWriter:
    """Texts one behind the other in a file, and where each lies: to be written, row by row, with what else is known."""

    def __init__(self, file: BinaryIO):
        self.file, self.at = file, 0

    def append(self, text: str) -> tuple[int, int]:
        content = text.encode()
        place = (self.at, len(content))
        self.file.write(content)
        self.at += len(content)
        return place


class LabelWriter:
    """Labels as numbers, int32 in a file, in the order in which the values turned up.

    Raises (while adding):
        UserError: values of a wrong kind, or none; says where.
    """

    def __init__(self, file: BinaryIO, column: str):
        self.file, self.column = file, column
        self.known: dict[str, int] = {}
        self.highest, self.lowest, self.count, self.missing = -1, 0, 0, 0
        self.first_missing = ""
        self.digest = hashlib.sha256()

    def add(self, values: Sequence[Any] | np.ndarray, name: Callable[[int], str]) -> None:
        """The next rows' values; `name` says what the i-th of them is called."""
        numbers = np.full(len(values), -1, np.int64)
        if isinstance(values, np.ndarray):
            numbers = values.astype(np.int64)
        else:
            for i, value in enumerate(values):
                if value is None or value == "":
                    self.first_missing = self.first_missing or name(i)
                    self.missing += 1
                elif isinstance(value, str):
                    numbers[i] = self.known.setdefault(value, len(self.known))
                else:
                    numbers[i] = int(value)
        if len(numbers):
            self.highest, self.lowest = (
                max(self.highest, int(numbers.max())),
                min(self.lowest, int(numbers.min())),
            )
        if self.highest >= 2**31:
            raise UserError(
                f"column {self.column} goes up to {self.highest}; number the classes from 0, or use their names"
            )
        self.count += len(numbers)
        content = numbers.astype(np.int32).tobytes()
        self.file.write(content)
        self.digest.update(content)

    @property
    def about(self) -> dict[str, Any]:
        return {
            "names": list(self.known),
            "highest": self.highest,
            "lowest": self.lowest,
            "missing": self.missing,
            "first missing": self.first_missing,
        }
