"""Files appear whole or not at all: written beside, synced, renamed."""

import errno
import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO

from triptych.errors import UserError


def write_atomically(
    path: str | os.PathLike[str], write: Callable[[BinaryIO], object], durable: bool = True
) -> None:
    """Make `path` with what `write(file)` writes; a reader sees the old file or the new one, never a part.

    Args:
        path: the file to make or replace; its folder is made if it is missing.
        write: called once with a binary file open for writing and seeking.
        durable: on the disk when this returns. Otherwise the system writes it when it sees fit, which is forty times as
            fast for small files; it is whole even so, unless the machine itself stops in the next seconds.

    Raises:
        UserError: the folder cannot be written or the disk is full; nothing is left behind.
    """
    path = Path(path)
    beside = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, beside = tempfile.mkstemp(prefix=f".{path.name}.", suffix=".part", dir=path.parent)
        with os.fdopen(handle, "wb") as file:
            write(file)
            if durable:
                file.flush()
                os.fsync(file.fileno())
        os.chmod(beside, 0o666 & ~_umask())  # mkstemp makes a private file; a result is an ordinary one
        os.replace(beside, path)
        beside = None
        if durable:
            sync_folder(path.parent)
    except OSError as problem:
        raise unwritable(path, problem) from problem
    finally:
        if beside is not None and os.path.exists(beside):
            os.unlink(beside)


def write_text_atomically(path: str | os.PathLike[str], text: str, durable: bool = True) -> None:
    """`write_atomically` for UTF-8 text."""
    write_atomically(path, lambda file: file.write(text.encode()), durable)


def unwritable(path: str | os.PathLike[str], problem: OSError) -> UserError:
    """What to say where the disk refused to write `path`."""
    full = problem.errno in (errno.ENOSPC, errno.EDQUOT)
    remedy = "free space or choose another place" if full else "choose another place"
    return UserError(f"cannot write {path}: {problem.strerror or problem}; {remedy}")


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def sync_folder(folder: Path) -> None:
    """Make the rename itself durable; a file system that cannot sync a folder is left to its own care."""
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
