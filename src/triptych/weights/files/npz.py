"""NumPy's .npz, as JAX checkpoints come: a zip of .npy members, read without pickle."""

import math
import zipfile
from pathlib import Path
from typing import IO

import numpy as np
import torch
from torch import Tensor

from triptych.weights.files.tensor_entry import Broken, Contents, Entry
from triptych.weights.files.zip_members import Member, open_zip


def read_table(path: Path) -> Contents:
    """Names, shapes and places of the arrays in a .npz file.

    Raises:
        Broken: no zip, a damaged member, or an array of Python objects (which would be a pickle).
    """
    members = open_zip(path)
    for member in members:
        if not member.name.endswith(".npy"):
            raise Broken(f"it holds {member.name}, which is no array")
    with path.open("rb") as file, zipfile.ZipFile(file) as archive:
        return Contents({m.name[: -len(".npy")]: _entry(path, m, file, archive) for m in members}, "npz")


def _entry(path: Path, member: Member, file: IO[bytes], archive: zipfile.ZipFile) -> Entry:
    try:
        if member.compressed:
            with archive.open(member.name) as unpacked:
                (shape, fortran, dtype), start = _header(unpacked), unpacked.tell()
        else:
            file.seek(member.offset)
            (shape, fortran, dtype), start = _header(file), file.tell() - member.offset
    except Exception as problem:  # zip, zlib and NumPy's parser of literals each have errors of their own
        raise Broken(f"{member.name} has no valid header") from problem
    if dtype.hasobject:
        raise Broken(
            f"{member.name} holds Python objects, which only a pickle could bring back; save plain arrays"
        )
    shape = tuple(int(size) for size in shape)
    torch_dtype = _torch_dtype(member.name, dtype)
    if member.size - start != math.prod(shape) * dtype.itemsize:
        raise Broken(
            f"{member.name} has {member.size - start} bytes, its shape {list(shape)} needs another number"
        )
    if member.compressed:
        return Entry(path, 0, shape, torch_dtype, unpack=lambda: _unpack(path, member.name, torch_dtype))
    strides = None
    if fortran and len(shape) > 1:
        strides = tuple(math.prod(shape[:axis]) for axis in range(len(shape)))
    return Entry(path, member.offset + start, shape, torch_dtype, strides)


def _header(file: IO[bytes]) -> tuple[tuple[int, ...], bool, np.dtype]:
    """Shape, whether columns come first, and type. Leaves the file at the first number."""
    read = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}
    return read[np.lib.format.read_magic(file)](file)


def _torch_dtype(name: str, dtype: np.dtype) -> torch.dtype:
    if dtype.kind == "V" and dtype.itemsize == 2:
        return torch.bfloat16  # NumPy has no bfloat16 and stores it as two opaque bytes
    if dtype.byteorder == ">":
        raise Broken(f"{name} is big-endian; save it little-endian")
    try:
        return torch.from_numpy(np.empty(0, dtype)).dtype
    except TypeError as problem:
        raise Broken(f"{name} has type {dtype}, which PyTorch cannot hold") from problem


def _unpack(path: Path, member: str, dtype: torch.dtype) -> Tensor:
    with np.load(path, allow_pickle=False) as arrays:
        array = np.ascontiguousarray(arrays[member.removesuffix(".npy")])
    return (
        torch.from_numpy(array.view(np.uint16)).view(torch.bfloat16)
        if dtype == torch.bfloat16
        else torch.from_numpy(array)
    )
