"""The header of a .safetensors file: validated by the safetensors library, then parsed for the tensors' offsets."""

import json
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from triptych.weights.files.tensor_entry import DamagedFileError, FileContents, TensorEntry

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U64": torch.uint64,
    "U32": torch.uint32,
    "U16": torch.uint16,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}


def read_table(path: Path) -> FileContents:
    """Return names, shapes and locations of the tensors in a .safetensors file.

    Raises:
        DamagedFileError: the header is invalid (the library checks lengths, overlaps and gaps), or a dtype is unknown.
    """
    try:
        with safe_open(path, "pt"):
            pass
    except (SafetensorError, ValueError) as problem:
        raise DamagedFileError(str(problem).splitlines()[0]) from problem
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(length))
    metadata = header.pop("__metadata__", None) or {}
    entries = {}
    for name, tensor in header.items():
        dtype = DTYPES.get(tensor["dtype"])
        if dtype is None:
            raise DamagedFileError(f"{name} has type {tensor['dtype']}, which PyTorch cannot hold")
        start = 8 + length + tensor["data_offsets"][0]
        entries[name] = TensorEntry(path, start, tuple(tensor["shape"]), dtype)
    return FileContents(entries, "safetensors", metadata=metadata)
