"""Tensors to files, each whole or not at all, one tensor in memory at a time."""

import json
import os
from collections.abc import Mapping
from typing import BinaryIO

import numpy as np
import torch
from torch import Tensor

from triptych.weights.safetensors_file import DTYPES
from triptych.writing import write_atomically

Path = str | os.PathLike[str]


def write_safetensors(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """A .safetensors file: eight bytes of length, a JSON header, the tensors' bytes.

    Widest types come first, as the format's own library lays them out, so that every tensor is aligned.
    """
    kinds = {dtype: name for name, dtype in DTYPES.items()}
    order = sorted(tensors, key=lambda name: (-tensors[name].dtype.itemsize, name))
    header: dict[str, object] = {"__metadata__": dict(metadata)} if metadata else {}
    end = 0
    for name in order:
        start, end = end, end + tensors[name].nbytes
        header[name] = {
            "dtype": kinds[tensors[name].dtype],
            "shape": list(tensors[name].shape),
            "data_offsets": [start, end],
        }
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)

    def write(file: BinaryIO) -> None:
        file.write(len(text).to_bytes(8, "little"))
        file.write(text)
        for name in order:
            file.write(as_bytes(tensors[name]).numpy().data)

    write_atomically(path, write)


def as_bytes(tensor: Tensor) -> Tensor:
    """A tensor's bytes in order."""
    return tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)


def write_npz(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """A .npz file, uncompressed; bfloat16 as two opaque bytes, as JAX's checkpoints have it."""
    arrays = {name: _array(tensor) for name, tensor in tensors.items()}
    write_atomically(path, lambda file: np.savez(file, allow_pickle=False, **arrays))  # type: ignore[arg-type]


def _array(tensor: Tensor) -> np.ndarray:
    tensor = tensor.detach().cpu().contiguous()
    if tensor.dtype == torch.bfloat16:
        return tensor.view(torch.uint16).numpy().view("V2")
    return tensor.numpy()


def write_torch(
    path: Path,
    tensors: Mapping[str, Tensor],
    nest: str | None = None,
    beside: Mapping[str, object] | None = None,
) -> None:
    """What `torch.save` writes for a dict of tensors, under one more key where a publisher has it, beside others."""
    plain = {name: tensor.detach().cpu() for name, tensor in tensors.items()}
    value = {**(beside or {}), nest: plain} if nest else plain
    write_atomically(path, lambda file: torch.save(value, file))
