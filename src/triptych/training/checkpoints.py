"""The checkpoints of a run: one folder each, in the format of torch.distributed.checkpoint (DCP).

    RUN/checkpoints/step-000000450/
        __0_0.distcp    the tensors; each process of a run writes its own shards, `__RANK_0.distcp`
        .metadata       DCP's index: sizes of the tensors, and which piece of them is in which file
        facts.json      {"facts": {...}, "files": {NAME: {"bytes": n, "crc32": n}}, "crc32": n}

"facts" is what is not a tensor (`TrainState.state_dict` and the run's identity); "files" has the checksum of every
other file, and the last checksum is of both. The names of the tensors are those of `state.collect_tensors`, so that DCP
can read them into another number of processes.

A checkpoint is written into `.step-000000450.part`: every process writes, syncs and sums its shards; the main process
then writes `.metadata` and facts.json, syncs the folder, renames it, and removes old checkpoints. So a folder with the
name of a step is complete, unless the disk has damaged it since, which the checksums detect; and whatever begins with
`.step-` is left over from a run that was killed.
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

from triptych.atomic_write import fsync_folder, storage_error, write_text_atomically
from triptych.distributed import SINGLE_PROCESS, ProcessGroup
from triptych.errors import CheckpointError, StorageError, TriptychError

Facts = dict[str, Any]  # what is not a tensor, as JSON values
Checksums = dict[str, dict[str, int]]  # of each file

FACTS = "facts.json"
SAFE_NAMES = {  # what the pickle of an index may contain besides DCP's own classes and dtypes
    ("torch", "Size"),
    ("torch.serialization", "_get_layout"),
    *(("pathlib", f"{system}Path") for system in ("Posix", "Windows", "")),
    *(("pathlib._local", f"{system}Path") for system in ("Posix", "Windows", "")),
}
NOT_DISTRIBUTED = "torch.distributed is disabled"  # the start of a warning of DCP


@dataclass(frozen=True)
class RunCheckpoint:
    """A complete checkpoint."""

    path: Path
    step: int
    facts: Facts

    def shapes(self) -> dict[str, TensorStorageMetadata]:
        """Return size and dtype of every tensor in it, as `.size` and `.properties.dtype`."""
        entries = _Reader(self.path).read_metadata().state_dict_metadata
        return {name: entry for name, entry in entries.items() if isinstance(entry, TensorStorageMetadata)}

    def read_into(self, tensors: dict[str, Tensor]) -> None:
        """Fill `tensors`, which have the sizes in it and may be sharded. Every process of a run calls this."""
        with _no_warning():
            dcp.load(tensors, storage_reader=_Reader(self.path), no_dist=not _is_distributed())

    def read(self) -> dict[str, Tensor]:
        """Return all its tensors, on the CPU."""
        tensors = {
            name: torch.empty(entry.size, dtype=entry.properties.dtype)
            for name, entry in self.shapes().items()
        }
        self.read_into(tensors)
        return tensors


class Checkpoints:
    """The checkpoints of a run: saved in the background, and only the last `keep` are kept.

    Args:
        folder: RUN/checkpoints; created by the first save.
        keep: number of checkpoints to keep.
        group: the processes of the run.
    """

    def __init__(self, folder: Path, keep: int, group: ProcessGroup = SINGLE_PROCESS):
        self.folder, self.keep, self.group = folder, keep, group
        cuda = torch.cuda.is_available()
        # The stager keeps its buffers for the next save. It is not asynchronous.
        self._stager = DefaultStager(StagingOptions(cuda, False, False, cuda))
        self._saving: Future[Any] | None = None
        self._part: Path | None = None
        self._while_saving = contextlib.ExitStack()

    def paths(self) -> list[Path]:
        """Return the folders of all checkpoints, the newest first, complete or damaged."""
        paths = [p for p in self.folder.glob("step-*") if re.fullmatch(r"step-\d+", p.name)]
        return sorted(paths, reverse=True)

    def remove_partial(self) -> None:
        """Remove what a killed run did not finish. Only the main process calls this."""
        for part in self.folder.glob(".step-*"):
            shutil.rmtree(part, ignore_errors=True)

    def newest(self) -> tuple[RunCheckpoint, list[str]] | None:
        """Return the newest checkpoint whose checksums agree, and a message for each damaged one that is newer; None if
        there is no checkpoint.

        Raises:
            CheckpointError: all checkpoints are damaged, or they have an earlier format.
        """
        damaged = []
        for path in self.paths():
            try:
                return RunCheckpoint(path, int(path.name.removeprefix("step-")), verify(path)), damaged
            except (ValueError, KeyError, TypeError, OSError) as error:
                damaged.append(f"{path} is damaged ({error}); resuming from the previous one")
        if damaged:
            raise CheckpointError(
                f"every checkpoint in {self.folder} is damaged; remove that folder to start again"
            )
        if any(self.folder.glob("step-*.safetensors")):
            raise CheckpointError(
                f"the checkpoints in {self.folder} are of an earlier version of triptych; finish that run with it, or "
                "give another --out (its model.safetensors can be the start of one, with --init)"
            )
        return None

    def save(self, step: int, tensors: dict[str, Tensor], facts: Facts) -> None:
        """Copy `tensors` and return; they are written in the background. Every process of a run calls this, with its
        shards.

        If there is a checkpoint of that step already, it has the same tensors, and only its facts are replaced.

        Raises:
            StorageError: the previous save could not be written.
        """
        self.wait()
        path = self.folder / f"step-{step:09d}"
        with contextlib.suppress(ValueError, KeyError, TypeError, OSError):
            verify(path)
            files = json.loads((path / FACTS).read_text(encoding="utf-8"))["files"]
            return write_text_atomically(path / FACTS, _facts_text(facts, files))
        if not self.folder.parent.is_dir():
            raise StorageError(
                f"the run's folder {self.folder.parent} no longer exists, and the training since its last checkpoint "
                "is lost"
            )
        self._part = self.folder / f".{path.name}.part"
        writer = _Writer(self._part, lambda sums: self._commit(path, facts, sums))
        self._while_saving.enter_context(_no_warning())  # until `wait`: the warning comes from DCP's thread
        with _storage_errors(path):
            future = dcp.async_save(
                dict(tensors),
                storage_writer=writer,
                async_stager=self._stager,
                process_group=self.group.checkpoint_group,  # its own: it is in use while the loop communicates
                no_dist=not _is_distributed(),
            )
        assert isinstance(future, Future)
        self._saving = future

    @property
    def busy(self) -> bool:
        """Whether a checkpoint is being written.

        Raises:
            StorageError: it could not be written.
        """
        if self._saving is not None and self._saving.done():
            self.wait()
        return self._saving is not None

    def wait(self) -> None:
        """Wait until the last save is on the disk.

        Raises:
            StorageError: it could not be written; earlier checkpoints are as they were.
        """
        saving, self._saving = self._saving, None
        if saving is None or self._part is None:
            return
        try:
            with self._while_saving, _storage_errors(self.folder / self._part.name[1:].removesuffix(".part")):
                saving.result()
        except BaseException:
            shutil.rmtree(self._part, ignore_errors=True)
            raise

    def close(self) -> None:
        """Free the buffers. A save in progress is finished first; its failure is ignored."""
        with contextlib.suppress(TriptychError):
            self.wait()
        self._while_saving.close()
        self._stager.close()

    def _commit(self, path: Path, facts: Facts, sums: Checksums) -> None:
        """Make a checkpoint of what all processes have written; in the main process."""
        part = path.with_name(f".{path.name}.part")
        write_text_atomically(part / FACTS, _facts_text(facts, sums))
        fsync_folder(part)
        # A checkpoint of a later step was damaged, so that the run was resumed from an earlier one.
        for later in self.paths():
            if later.name >= path.name:
                _remove(later)
        part.rename(path)
        fsync_folder(self.folder)
        for old in self.paths()[self.keep :]:
            _remove(old)


def verify(path: Path) -> Facts:
    """Return the facts of a checkpoint whose checksums agree.

    Raises:
        ValueError, KeyError, TypeError, OSError: it is damaged.
    """
    content = json.loads((path / FACTS).read_text(encoding="utf-8"))
    if zlib.crc32(_canonical(content["facts"], content["files"])) != content["crc32"]:
        raise ValueError(f"the checksum of {FACTS} differs")
    for name, sums in content["files"].items():
        if file_checksum(path / name) != sums:
            raise ValueError(f"the checksum of {name} differs")
    return content["facts"]


def file_checksum(path: Path) -> dict[str, int]:
    """Return length and CRC of a file."""
    length = crc = 0
    with open(path, "rb") as file:
        while piece := file.read(1 << 22):
            length, crc = length + len(piece), zlib.crc32(piece, crc)
    return {"bytes": length, "crc32": crc}


@dataclass(frozen=True)
class _CheckedResult(WriteResult):
    """DCP's message to the main process about a tensor, with the checksum of the file that it is in."""

    sums: dict[str, int]


class _Writer(dcp.FileSystemWriter):
    """DCP's writer, which also sums the files that it wrote, and calls `commit` once all processes have written."""

    def __init__(self, part: Path, commit: Callable[[Checksums], None]):
        super().__init__(part)
        self.commit = commit

    def write_data(self, plan: Any, planner: Any) -> torch.futures.Future[list[WriteResult]]:
        results = super().write_data(plan, planner).wait()
        names = {result.storage_data.relative_path for result in results}
        sums = {name: file_checksum(Path(self.path) / name) for name in names}
        future: torch.futures.Future[list[WriteResult]] = torch.futures.Future()
        future.set_result(
            [
                _CheckedResult(r.index, r.size_in_bytes, r.storage_data, sums[r.storage_data.relative_path])
                for r in results
            ]
        )
        return future

    def finish(self, metadata: Metadata, results: list[list[WriteResult]]) -> None:
        super().finish(metadata, results)
        sums: Checksums = {".metadata": file_checksum(Path(self.path) / ".metadata")}
        for result in (result for of_process in results for result in of_process):
            assert isinstance(result, _CheckedResult)
            sums[result.storage_data.relative_path] = result.sums
        self.commit(sums)


class _Reader(dcp.FileSystemReader):
    """DCP's reader, but the index, which is a pickle, cannot run code."""

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        with open(Path(self.path) / ".metadata", "rb") as file:
            metadata = _IndexUnpickler(file).load()
        metadata.storage_meta = StorageMeta(load_id=self.load_id)
        return metadata


class _IndexUnpickler(pickle.Unpickler):
    """Creates only what an index contains: DCP's own dataclasses, sizes, dtypes, paths."""

    def find_class(self, module: str, name: str, /) -> Any:
        safe = (module, name) in SAFE_NAMES or (
            module == "torch" and isinstance(getattr(torch, name, None), torch.dtype)
        )
        if safe or (module.startswith("torch.distributed.checkpoint.") and "." not in name):
            value = super().find_class(module, name)
            if safe or isinstance(value, type):
                return value
        raise pickle.UnpicklingError(f"its index names {module}.{name}, which no index needs")


def _facts_text(facts: Facts, files: Checksums) -> str:
    content = {"facts": facts, "files": files, "crc32": zlib.crc32(_canonical(facts, files))}
    return json.dumps(content, indent=1) + "\n"


def _canonical(*values: Any) -> bytes:
    return json.dumps(values, sort_keys=True).encode()


def _remove(path: Path) -> None:
    """Remove a checkpoint; whoever looks for checkpoints no longer sees it from the first moment on."""
    removed = path.with_name(f".{path.name}.gone")
    shutil.rmtree(removed, ignore_errors=True)
    with contextlib.suppress(OSError):
        path.rename(removed)
    shutil.rmtree(removed, ignore_errors=True)


def _is_distributed() -> bool:
    return torch.distributed.is_available() and torch.distributed.is_initialized()


@contextlib.contextmanager
def _no_warning() -> Iterator[None]:
    """Suppress DCP's warning that a run of one process has one process."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=NOT_DISTRIBUTED)
        yield


@contextlib.contextmanager
def _storage_errors(path: Path) -> Iterator[None]:
    """Turn a failure to write, whatever DCP and torch made of it, into a `StorageError`."""
    try:
        yield
    except (CheckpointException, OSError) as error:
        for cause in _causes(error):
            if isinstance(cause, TriptychError):
                raise cause from error
            if isinstance(cause, OSError):
                raise storage_error(path, cause) from error
        raise


def _causes(error: BaseException) -> Iterator[BaseException]:
    if isinstance(error, CheckpointException):
        for failure, _ in error.failures.values():
            yield from _causes(failure)
        return
    yield error
    if error.__context__ is not None:  # torch's zip writer raises its own error after that of the file
        yield from _causes(error.__context__)
