"""Atomic writes: to a temporary file in the same folder, which is synced and renamed."""

import errno
import os
import secrets
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO

from triptych.errors import StorageError


def write_atomically(
    path: str | os.PathLike[str], write: Callable[[BinaryIO], object], durable: bool = True
) -> None:
    """Write a file atomically: readers see the old file or the complete new one.

    Args:
        path: the file to create or replace; its folder is created if missing.
        write: called once with a binary file that is open for writing and seeking.
        durable: sync to disk before returning. Without it small files are written forty times as fast, and are lost or
            incomplete only if the machine itself stops within seconds.

    Raises:
        StorageError: the folder cannot be written or the disk is full. No temporary file is left behind.
    """
    path = Path(path)
    temporary = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        name = path.parent / f".{path.name}.{secrets.token_hex(4)}.part"
        with open(name, "xb") as file:  # with the permissions that the process's umask leaves
            temporary = name
            write(file)
            if durable:
                file.flush()
                os.fsync(file.fileno())
        os.replace(temporary, path)
        temporary = None
        if durable:
            fsync_folder(path.parent)
    except OSError as problem:
        raise storage_error(path, problem) from problem
    finally:
        if temporary is not None and os.path.exists(temporary):
            os.unlink(temporary)


def require_place(path: str | os.PathLike[str]) -> None:
    """Check a path that a user gave for a new file or folder: of missing folders only the one that it is in is created,
    since more are usually a typing error.

    Raises:
        StorageError: names the missing folder.
    """
    above = Path(path).absolute().parent.parent
    if not above.exists():
        raise StorageError(f"cannot write {path}: the folder {above} does not exist; make it first")


def write_text_atomically(path: str | os.PathLike[str], text: str, durable: bool = True) -> None:
    """Write UTF-8 text atomically, as `write_atomically` does."""
    write_atomically(path, lambda file: file.write(text.encode()), durable)


def storage_error(path: str | os.PathLike[str], problem: OSError) -> StorageError:
    """Return the error for a failed write of `path`."""
    full = problem.errno in (errno.ENOSPC, errno.EDQUOT)
    remedy = "free space or choose another place" if full else "choose another place"
    return StorageError(f"cannot write {path}: {problem.strerror or problem}; {remedy}")


def fsync_folder(folder: Path) -> None:
    """Make a rename in `folder` durable. Does nothing on file systems that cannot sync folders."""
    try:
        handle = os.open(folder, os.O_RDONLY)
    except OSError:
        return
    try:
        os.fsync(handle)
    except OSError:
        pass
    finally:
        os.close(handle)
