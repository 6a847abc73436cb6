"""The checkpoints of a run: a folder for each, in the format of torch.distributed.checkpoint (DCP).

    RUN/checkpoints/step-000000450/
        __0_0.distcp    the tensors; each process of a run writes its own shards, `__RANK_0.distcp`
        .metadata       DCP's index: of which sizes the tensors are, and which piece of which lies where
        facts.json      {"facts": {...}, "files": {NAME: {"bytes": n, "crc32": n}}, "crc32": n}

"facts" is what is not a tensor (`triptych.train.loop`: step, data position, best figures, the run's identity);
"files" has every other file, and the last sum is of both. The names of the tensors are those of
`triptych.train.state.gather`, so that DCP reads them into another number of processes as well.

Written into `.step-000000450.part`: every process writes and syncs and sums its shards; the first one then writes
`.metadata` and facts.json, syncs the folder, renames it, and removes what need not be kept. So a folder with a step's
name is whole, unless the disk has damaged it since, which the sums tell; and whatever begins with `.step-` is rest.
"""

import contextlib
import json
import pickle
import re
import shutil
import warnings
import zlib
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.metadata import Metadata, StorageMeta, TensorStorageMetadata
from torch.distributed.checkpoint.staging import DefaultStager, StagingOptions
from torch.distributed.checkpoint.storage import WriteResult

from triptych import distributed
from triptych.atomic_write import fsync_folder, storage_error, write_text_atomically
from triptych.errors import UserError

Facts = dict[str, Any]  # what is not a tensor, as JSON
Sums = dict[str, dict[str, int]]  # of each file

FACTS = "facts.json"
PLAIN = {
    ("torch", "Size"),
    ("torch.serialization", "_get_layout"),
    *(("pathlib", f"{kind}Path") for kind in ("Posix", "Windows", "")),
    *(("pathlib._local", f"{kind}Path") for kind in ("Posix", "Windows", "")),
}
ALONE = "torch.distributed is disabled"  # the start of a warning of DCP


@dataclass(frozen=True)
class RunCheckpoint:
    """One that is whole."""

    path: Path
    step: int
    facts: Facts

    def shapes(self) -> dict[str, TensorStorageMetadata]:
        """Size and dtype of every tensor in it, as `.size` and `.properties.dtype`."""
        found = _Reader(self.path).read_metadata().state_dict_metadata
        return {name: kind for name, kind in found.items() if isinstance(kind, TensorStorageMetadata)}

    def read_into(self, tensors: dict[str, Tensor]) -> None:
        """Fill `tensors`, which are of the sizes in it and may be sharded; every process of a run calls it."""
        with _quietly():
            dcp.load(tensors, storage_reader=_Reader(self.path), no_dist=_alone())

    def read(self) -> dict[str, Tensor]:
        """All its tensors, on the processor."""
        tensors = {
            name: torch.empty(kind.size, dtype=kind.properties.dtype) for name, kind in self.shapes().items()
        }
        self.read_into(tensors)
        return tensors


class Checkpoints:
    """Those of one run: saved while training goes on, the last `keep` of them kept.

    Args:
        folder: RUN/checkpoints; made by the first save.
    """

    def __init__(self, folder: Path, keep: int):
        self.folder, self.keep = folder, keep
        cuda = torch.cuda.is_available()
        self._stager = DefaultStager(
            StagingOptions(cuda, False, False, cuda)
        )  # keeps its buffers for the next
        self._saving: Future[Any] | None = None
        self._part: Path | None = None

    def paths(self) -> list[Path]:
        """The newest first, whole or damaged."""
        found = [p for p in self.folder.glob("step-*") if re.fullmatch(r"step-\d+", p.name)]
        return sorted(found, reverse=True)

    def tidy(self) -> None:
        """Remove what a killed run left half written. The first process alone calls it."""
        for rest in self.folder.glob(".step-*"):
            shutil.rmtree(rest, ignore_errors=True)

    def newest(self) -> tuple[RunCheckpoint, list[str]] | None:
        """The newest checkpoint whose sums agree, and a line for each that was passed over; None if there is none.

        Raises:
            UserError: there are checkpoints, and every one is damaged; or they are of an earlier format.
        """
        damaged = []
        for path in self.paths():
            try:
                return RunCheckpoint(path, int(path.name.removeprefix("step-")), verify(path)), damaged
            except (ValueError, KeyError, TypeError, OSError) as problem:
                damaged.append(f"{path} is damaged ({problem}); going on from the one before")
        if damaged:
            raise UserError(
                f"every checkpoint in {self.folder} is damaged; remove that folder to begin again"
            )
        if any(self.folder.glob("step-*.safetensors")):
            raise UserError(
                f"the checkpoints in {self.folder} are of an earlier version of triptych; finish that run with it, or "
                "give another --out (its model.safetensors can be the start of one, with --init)"
            )
        return None

    def save(self, step: int, tensors: dict[str, Tensor], facts: Facts) -> None:
        """Copy `tensors` and go on; they are written meanwhile. Every process of a run calls it, with its shards.

        A checkpoint of that step that is already there is of the same tensors: it is given the new facts alone.

        Raises:
            UserError: the save before could not be written.
        """
        self.wait()
        path = self.folder / f"step-{step:09d}"
        with contextlib.suppress(ValueError, KeyError, TypeError, OSError):
            verify(path)
            files = json.loads((path / FACTS).read_text(encoding="utf-8"))["files"]
            return write_text_atomically(path / FACTS, _facts_text(facts, files))
        if not self.folder.parent.is_dir():
            raise UserError(
                f"the run's folder {self.folder.parent} is no longer there, and what it has learnt is lost"
            )
        self._part = self.folder / f".{path.name}.part"
        writer = _Writer(self._part, lambda sums: self._commit(path, facts, sums))
        # For good: the warning comes from DCP's thread, which `catch_warnings` around this call may not outlive.
        warnings.filterwarnings("ignore", message=ALONE)
        with _refusing(path):
            started = dcp.async_save(
                dict(tensors),
                storage_writer=writer,
                async_stager=self._stager,
                process_group=distributed.world.checkpoint_group,  # its own: it talks while the loop does
                no_dist=_alone(),
            )
        assert isinstance(started, Future)  # staged by now: the stager is not asynchronous
        self._saving = started

    @property
    def busy(self) -> bool:
        """Whether one is being written.

        Raises:
            UserError: it could not be written.
        """
        if self._saving is not None and self._saving.done():
            self.wait()
        return self._saving is not None

    def wait(self) -> None:
        """Until the last save is on the disk.

        Raises:
            UserError: it could not be written; those before it are as they were.
        """
        saving, self._saving = self._saving, None
        if saving is None or self._part is None:
            return
        try:
            with _refusing(self.folder / self._part.name[1:].removesuffix(".part")):
                saving.result()
        except BaseException:
            shutil.rmtree(self._part, ignore_errors=True)
            raise

    def close(self) -> None:
        """Let go of the buffers; what is being written is finished first, and its failure is not told."""
        with contextlib.suppress(UserError):
            self.wait()
        self._stager.close()

    def _commit(self, path: Path, facts: Facts, sums: Sums) -> None:
        """Make a checkpoint of what all have written; in the first process."""
        part = path.with_name(f".{path.name}.part")
        write_text_atomically(part / FACTS, _facts_text(facts, sums))
        fsync_folder(part)
        # One of a later step is of work that was lost with it (it was damaged, so an older one was gone on from).
        for lost in self.paths():
            if lost.name >= path.name:
                _remove(lost)
        part.rename(path)
        fsync_folder(self.folder)
        for old in self.paths()[self.keep :]:
            _remove(old)


def verify(path: Path) -> Facts:
    """The facts of a checkpoint whose sums agree.

    Raises:
        ValueError, KeyError, TypeError, OSError: it is damaged.
    """
    said = json.loads((path / FACTS).read_text(encoding="utf-8"))
    if zlib.crc32(_plain(said["facts"], said["files"])) != said["crc32"]:
        raise ValueError(f"the checksum of {FACTS} differs")
    for name, sums in said["files"].items():
        if file_checksum(path / name) != sums:
            raise ValueError(f"the checksum of {name} differs")
    return said["facts"]


def file_checksum(path: Path) -> dict[str, int]:
    """Length and checksum of a file."""
    length = crc = 0
    with open(path, "rb") as file:
        while piece := file.read(1 << 22):
            length, crc = length + len(piece), zlib.crc32(piece, crc)
    return {"bytes": length, "crc32": crc}


@dataclass(frozen=True)
class _Summed(WriteResult):
    """What DCP tells the first process of each tensor that was written, and the sums of the file it is in."""

    sums: dict[str, int]


class _Writer(dcp.FileSystemWriter):
    """DCP's own, which also sums what it wrote, and calls `commit` once all processes have written."""

    def __init__(self, part: Path, commit: Callable[[Sums], None]):
        super().__init__(part)
        self.commit = commit

    def write_data(self, plan: Any, planner: Any) -> torch.futures.Future[list[WriteResult]]:
        results = super().write_data(plan, planner).wait()
        names = {result.storage_data.relative_path for result in results}
        sums = {name: file_checksum(Path(self.path) / name) for name in names}
        told: torch.futures.Future[list[WriteResult]] = torch.futures.Future()
        told.set_result(
            [
                _Summed(r.index, r.size_in_bytes, r.storage_data, sums[r.storage_data.relative_path])
                for r in results
            ]
        )
        return told

    def finish(self, metadata: Metadata, results: list[list[WriteResult]]) -> None:
        super().finish(metadata, results)
        sums: Sums = {".metadata": file_checksum(Path(self.path) / ".metadata")}
        for result in (one for of_process in results for one in of_process):
            assert isinstance(result, _Summed)
            sums[result.storage_data.relative_path] = result.sums
        self.commit(sums)


class _Reader(dcp.FileSystemReader):
    """DCP's own, but the index, which is a pickle, runs nothing."""

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        with open(Path(self.path) / ".metadata", "rb") as file:
            metadata = _Index(file).load()
        metadata.storage_meta = StorageMeta(load_id=self.load_id)
        return metadata


class _Index(pickle.Unpickler):
    """Makes what an index is made of: DCP's own dataclasses, sizes, dtypes, paths."""

    def find_class(self, module: str, name: str, /) -> Any:
        plain = (module, name) in PLAIN or (
            module == "torch" and isinstance(getattr(torch, name, None), torch.dtype)
        )
        if plain or (module.startswith("torch.distributed.checkpoint.") and "." not in name):
            found = super().find_class(module, name)
            if plain or isinstance(found, type):
                return found
        raise pickle.UnpicklingError(f"its index names {module}.{name}, which no index does")


def _facts_text(facts: Facts, files: Sums) -> str:
    whole = {"facts": facts, "files": files, "crc32": zlib.crc32(_plain(facts, files))}
    return json.dumps(whole, indent=1) + "\n"


def _plain(*values: Any) -> bytes:
    return json.dumps(values, sort_keys=True).encode()


def _remove(path: Path) -> None:
    """At once for whoever looks for checkpoints, whatever happens meanwhile."""
    rest = path.with_name(f".{path.name}.gone")
    shutil.rmtree(rest, ignore_errors=True)
    with contextlib.suppress(OSError):
        path.rename(rest)
    shutil.rmtree(rest, ignore_errors=True)


def _alone() -> bool:
    return not (torch.distributed.is_available() and torch.distributed.is_initialized())


@contextlib.contextmanager
def _quietly() -> Iterator[None]:
    """Without DCP's warning that a run of one process is one."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=ALONE)
        yield


@contextlib.contextmanager
def _refusing(path: Path) -> Iterator[None]:
    """What the disk refuses, through whatever DCP and torch made of it, as one line."""
    try:
        yield
    except (CheckpointException, OSError) as problem:
        for cause in _causes(problem):
            if isinstance(cause, UserError):
                raise cause from problem
            if isinstance(cause, OSError):
                raise storage_error(path, cause) from problem
        raise


def _causes(problem: BaseException) -> Iterator[BaseException]:
    if isinstance(problem, CheckpointException):
        for failure, _ in problem.failures.values():
            yield from _causes(failure)
        return
    yield problem
    if (
        problem.__context__ is not None
    ):  # torch's zip writer fails of its own once the file under it has failed
        yield from _causes(problem.__context__)
