"""Write tensors to files atomically, with at most one tensor copied in memory at a time."""

import json
import os
import pathlib
from collections.abc import Mapping
from typing import BinaryIO

import numpy as np
import torch
from torch import Tensor

from triptych.atomic_write import write_atomically, write_text_atomically
from triptych.weights.files.safetensors_header import DTYPES

Path = str | os.PathLike[str]


def write_safetensors(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """Write a .safetensors file: eight bytes of length, a JSON header, the bytes of the tensors.

    The widest dtypes come first, as in files of the safetensors library, so that every tensor is aligned.
    """
    dtype_names = {dtype: name for name, dtype in DTYPES.items()}
    order = sorted(tensors, key=lambda name: (-tensors[name].dtype.itemsize, name))
    header: dict[str, object] = {"__metadata__": dict(metadata)} if metadata else {}
    end = 0
    for name in order:
        start, end = end, end + tensors[name].nbytes
        header[name] = {
            "dtype": dtype_names[tensors[name].dtype],
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


def write_shards(
    path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str], max_bytes: int | None = None
) -> None:
    """Write one .safetensors file, or shards and their index if the tensors take more than `max_bytes`.

    The first shard has the metadata. A tensor larger than `max_bytes` gets a shard of its own.
    """
    shards: list[dict[str, Tensor]] = [{}]
    for name, tensor in tensors.items():
        shard_bytes = sum(other.nbytes for other in shards[-1].values())
        if max_bytes is not None and shards[-1] and shard_bytes + tensor.nbytes > max_bytes:
            shards.append({})
        shards[-1][name] = tensor
    if len(shards) == 1:
        write_safetensors(path, tensors, metadata)
        return
    single, weight_map = pathlib.Path(path), {}
    for number, shard in enumerate(shards, 1):
        name = f"{single.stem}-{number:05d}-of-{len(shards):05d}.safetensors"
        write_safetensors(single.with_name(name), shard, metadata if number == 1 else {})
        weight_map |= dict.fromkeys(shard, name)
    size = sum(tensor.nbytes for tensor in tensors.values())
    index = {"metadata": {"total_size": size}, "weight_map": dict(sorted(weight_map.items()))}
    write_text_atomically(single.with_name(f"{single.name}.index.json"), json.dumps(index, indent=1) + "\n")
    single.unlink(missing_ok=True)  # left by an earlier save; readers would prefer it


def as_bytes(tensor: Tensor) -> Tensor:
    """Return the bytes of a tensor in row-major order, as uint8 on the CPU."""
    return tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)


def write_npz(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Write an uncompressed .npz file. bfloat16 is stored as two opaque bytes, as in JAX's checkpoints."""
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
    wrapper_key: str | None = None,
    extras: Mapping[str, object] | None = None,
) -> None:
    """Write a dict of tensors with `torch.save`.

    Args:
        wrapper_key: key to store the dict under, such as "state_dict"; None stores the tensors at the top level.
        extras: values stored next to `wrapper_key`.
    """
    state_dict = {name: tensor.detach().cpu() for name, tensor in tensors.items()}
    value = {**(extras or {}), wrapper_key: state_dict} if wrapper_key else state_dict
    write_atomically(path, lambda file: torch.save(value, file))
