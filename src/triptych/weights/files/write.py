"""Tensors to files, each whole or not at all, one tensor in memory at a time."""

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


def write_shards(
    path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str], most: int | None = None
) -> None:
    """One .safetensors file; or, where the tensors take more than `most` bytes, shards of them in order, the first
    with the metadata, and at last their index. A tensor that is larger by itself has its own shard."""
    shards: list[dict[str, Tensor]] = [{}]
    for name, tensor in tensors.items():
        held = sum(other.nbytes for other in shards[-1].values())
        if most is not None and shards[-1] and held + tensor.nbytes > most:
            shards.append({})
        shards[-1][name] = tensor
    if len(shards) == 1:
        write_safetensors(path, tensors, metadata)
        return
    whole, places = pathlib.Path(path), {}
    for number, shard in enumerate(shards, 1):
        name = f"{whole.stem}-{number:05d}-of-{len(shards):05d}.safetensors"
        write_safetensors(whole.with_name(name), shard, metadata if number == 1 else {})
        places |= dict.fromkeys(shard, name)
    size = sum(tensor.nbytes for tensor in tensors.values())
    index = {"metadata": {"total_size": size}, "weight_map": dict(sorted(places.items()))}
    write_text_atomically(whole.with_name(f"{whole.name}.index.json"), json.dumps(index, indent=1) + "\n")
    whole.unlink(missing_ok=True)  # of an earlier save, which readers would take first


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
