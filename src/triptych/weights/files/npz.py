"""NumPy's .npz files, which hold JAX checkpoints: a zip of .npy members, read without pickle."""

import math
import zipfile
from pathlib import Path
from typing import IO

import numpy as np
import torch
from torch import Tensor

from triptych.weights.files.tensor_entry import DamagedFileError, FileContents, TensorEntry
from triptych.weights.files.zip_members import Member, list_members


def read_table(path: Path) -> FileContents:
    """Return names, shapes and locations of the arrays in a .npz file.

    Raises:
        DamagedFileError: no zip, a damaged member, or an array of Python objects (which would need a pickle).
    """
    members = list_members(path)
    for member in members:
        if not member.name.endswith(".npy"):
            raise DamagedFileError(f"it contains {member.name}, which is not an array")
    with path.open("rb") as file, zipfile.ZipFile(file) as archive:
        return FileContents({m.name[: -len(".npy")]: _entry(path, m, file, archive) for m in members}, "npz")


def _entry(path: Path, member: Member, file: IO[bytes], archive: zipfile.ZipFile) -> TensorEntry:
    try:
        if member.compressed:
            with archive.open(member.name) as unpacked:
                (shape, fortran, dtype), start = _header(unpacked), unpacked.tell()
        else:
            file.seek(member.offset)
            (shape, fortran, dtype), start = _header(file), file.tell() - member.offset
    except Exception as problem:  # zipfile, zlib and NumPy's header parser raise unrelated exceptions
        raise DamagedFileError(f"{member.name} has no valid header") from problem
    if dtype.hasobject:
        raise DamagedFileError(
            f"{member.name} contains Python objects, which only a pickle could restore; save plain arrays"
        )
    shape = tuple(int(size) for size in shape)
    torch_dtype = _torch_dtype(member.name, dtype)
    if member.size - start != math.prod(shape) * dtype.itemsize:
        raise DamagedFileError(
            f"{member.name} has {member.size - start} bytes, its shape {list(shape)} needs another number"
        )
    if member.compressed:
        return TensorEntry(
            path, 0, shape, torch_dtype, unpack=lambda: _unpack(path, member.name, torch_dtype)
        )
    strides = None
    if fortran and len(shape) > 1:
        strides = tuple(math.prod(shape[:axis]) for axis in range(len(shape)))
    return TensorEntry(path, member.offset + start, shape, torch_dtype, strides)


def _header(file: IO[bytes]) -> tuple[tuple[int, ...], bool, np.dtype]:
    """Return shape, whether the order is Fortran's, and dtype; leave the file at the first element."""
    readers = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}
    return readers[np.lib.format.read_magic(file)](file)


def _torch_dtype(name: str, dtype: np.dtype) -> torch.dtype:
    if dtype.kind == "V" and dtype.itemsize == 2:
        return torch.bfloat16  # NumPy has no bfloat16 and stores it as two opaque bytes
    if dtype.byteorder == ">":
        raise DamagedFileError(f"{name} is big-endian; save it little-endian")
    try:
        return torch.from_numpy(np.empty(0, dtype)).dtype
    except TypeError as problem:
        raise DamagedFileError(f"{name} has type {dtype}, which PyTorch cannot hold") from problem


def _unpack(path: Path, member: str, dtype: torch.dtype) -> Tensor:
    with np.load(path, allow_pickle=False) as arrays:
        array = np.ascontiguousarray(arrays[member.removesuffix(".npy")])
    return (
        torch.from_numpy(array.view(np.uint16)).view(torch.bfloat16)
        if dtype == torch.bfloat16
        else torch.from_numpy(array)
    )
