"""Files written by `torch.save`, in the zip form of today or the older one, as a table of tensors."""

import io
import itertools
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from triptych.weights.files.safe_unpickle import (
    GlobalName,
    RecordedCall,
    StorageRef,
    TensorView,
    parse_pickle,
)
from triptych.weights.files.tensor_entry import DamagedFileError, FileContents, TensorEntry, is_contiguous
from triptych.weights.files.zip_members import Member, list_members

MAX_PICKLE = 2**27
"""Largest pickle that is read, in bytes. Published checkpoints have a few megabytes of opcodes."""
_MAX_NESTS = 8
"""Number of dicts around a dict of tensors."""
_LEGACY_MAGIC = 0x1950A86A20F9469CFC6C

Parsed = tuple[Any, dict[str, int], dict[str, int]]
"""The pickled value; of each storage, by key, its offset in the file and its number of bytes."""


def read_table(path: Path) -> FileContents:
    """Return names, shapes and locations of the tensors in a file written by `torch.save`.

    Tensors in a dict inside the saved dict get its key in front: `model/head.weight`.

    Raises:
        DamagedFileError: truncated, damaged, or a TorchScript archive.
    """
    with path.open("rb") as file:
        zipped = file.read(4) == b"PK\x03\x04"
    value, offsets, sizes = _parse_zip(path) if zipped else _parse_legacy(path)
    entries = {}
    for name, view in dict(_tensor_views(value)).items():
        key, itemsize = view.storage.key, view.dtype.itemsize
        unit = view.storage.dtype.itemsize if view.storage.dtype is not None else 1
        if key not in offsets or sizes[key] < view.storage.numel * unit:
            raise DamagedFileError(f"the numbers of {name} are missing or truncated")
        strides = None if is_contiguous(view.shape, view.strides) else view.strides
        entries[name] = TensorEntry(
            path, offsets[key] + view.offset * itemsize, view.shape, view.dtype, strides
        )
    if not entries and _holds_numpy(value, _MAX_NESTS, set()):
        raise DamagedFileError("its arrays are NumPy's; save them as tensors (torch.from_numpy), or as .npz")
    return FileContents(entries, "pickle", settings=_plain_settings(value))


# ------------------------------------------------------------------------------------------------- tensors


def _tensor_views(value: Any) -> Iterator[tuple[str, TensorView]]:
    if any(key == "_parameters" for key, _ in _attributes(value)):
        yield from _module_state(value, "", set())
        return
    if isinstance(value, list | tuple):  # what is in it gets its number as its name
        value = {str(i): item for i, item in enumerate(value)}
    yield from _nested_views(value, "", _MAX_NESTS, set())


def _nested_views(value: Any, prefix: str, depth: int, visited: set[int]) -> Iterator[tuple[str, TensorView]]:
    """Yield the tensors in dicts in dicts, under their keys joined by slashes; a dict with several names, once."""
    if id(value) in visited:  # else a dict of itself, or a few dicts of each other, would take forever
        return
    visited.add(id(value))
    for key, item in _attributes(value):
        if any(name == "_parameters" for name, _ in _attributes(item)):
            yield from _module_state(item, f"{prefix}{key}/", set())
        elif isinstance(item, TensorView):
            yield prefix + key, item
        elif depth:
            yield from _nested_views(item, f"{prefix}{key}/", depth - 1, visited)


def _holds_numpy(value: Any, depth: int, visited: set[int]) -> bool:
    """Return whether dicts in dicts hold a pickled NumPy array."""
    if id(value) in visited:  # as in `_nested_views`
        return False
    visited.add(id(value))
    for _, item in _attributes(value):
        function = item.function if isinstance(item, RecordedCall) else None
        if (
            isinstance(function, GlobalName)
            and function.name == "_reconstruct"
            and "numpy" in function.module
        ):
            return True
        if depth and _holds_numpy(item, depth - 1, visited):
            return True
    return False


def _module_state(module: Any, prefix: str, visited: set[int]) -> Iterator[tuple[str, TensorView]]:
    """Yield the tensors of a pickled nn.Module under the keys of its state dict."""
    if id(module) in visited or len(prefix) > 1000:
        return
    visited.add(id(module))
    fields = dict(_attributes(module))
    for group in ("_parameters", "_buffers"):
        for name, item in _attributes(fields.get(group)):
            if isinstance(item, TensorView):
                yield prefix + name, item
    for name, child in _attributes(fields.get("_modules")):
        yield from _module_state(child, f"{prefix}{name}.", visited)


def _attributes(value: Any) -> Iterator[tuple[str, Any]]:
    """Yield the items of a dict with string keys; of a pickled object, its items and the attributes in its state."""
    if isinstance(value, RecordedCall):
        yield from ((key, item) for key, item in value.items.items() if isinstance(key, str))
        value = value.state
    if isinstance(value, dict):
        yield from ((key, item) for key, item in value.items() if isinstance(key, str))


# ------------------------------------------------------------------------------------------------ settings

_SCALARS = (str, int, float, bool)
_SETTINGS_KEYS = ("args", "config", "hyper_parameters", "meta")
"""Where training scripts store their arguments."""
_MAX_VALUES = 2**17
"""Number of values that are read of these."""


def _plain_settings(value: Any) -> dict[str, Any]:
    """Return the plain values stored next to the weights.

    These are scalars at the top level (`arch`, `epoch`), and the nested values of `_SETTINGS_KEYS`, whether stored as
    a dict, a namespace or a config object.
    """
    settings: dict[str, Any] = {}
    budget = [_MAX_VALUES]
    for key, item in _attributes(value):
        if isinstance(item, _SCALARS):
            settings[key] = item
        elif key in _SETTINGS_KEYS:
            inner = ((name, _plain(inner, 4, budget)) for name, inner in _attributes(item))
            settings[key] = {name: plain for name, plain in inner if plain is not None}
    return settings


def _plain(value: Any, depth: int, budget: list[int]) -> Any:
    """Return a value as nested scalars, lists and dicts, at most `depth` levels; None if it is nothing of that kind."""
    budget[0] -= 1
    if isinstance(value, _SCALARS) or depth == 0 or budget[0] < 0:
        return value if isinstance(value, _SCALARS) else None
    if isinstance(value, list | tuple):
        items = [_plain(item, depth - 1, budget) for item in itertools.islice(value, max(budget[0], 0))]
        return items if items and all(item is not None for item in items) else None
    inner = {
        key: plain
        for key, item in itertools.islice(_attributes(value), max(budget[0], 0))
        if (plain := _plain(item, depth - 1, budget)) is not None
    }
    return inner or None


# ---------------------------------------------------------------------------------------------- containers


def _parse_zip(path: Path) -> Parsed:
    members = {member.name: member for member in list_members(path)}
    pickles = [name for name in members if name == "data.pkl" or name.endswith("/data.pkl")]
    if not pickles and any("/models/" in name or name.endswith("/archive_format") for name in members):
        raise DamagedFileError("it is a program of torch.export; save the state_dict of its network")
    if len(pickles) != 1:
        raise DamagedFileError("it is a zip archive without PyTorch's data.pkl")
    root = pickles[0].removesuffix("data.pkl")
    if f"{root}constants.pkl" in members:
        raise DamagedFileError("it is a TorchScript program; load it with torch.jit and save its state_dict")
    if any(member.compressed for member in members.values()):
        raise DamagedFileError("its members are compressed, which PyTorch never does")
    byteorder = _read_member(path, members.get(f"{root}byteorder")).strip()
    if byteorder not in (b"", b"little") or sys.byteorder != "little":
        raise DamagedFileError("its byte order differs from this machine's")
    if members[pickles[0]].size > MAX_PICKLE:
        raise DamagedFileError(f"its pickle has more than {MAX_PICKLE} bytes")
    value = parse_pickle(io.BytesIO(_read_member(path, members[pickles[0]])))
    data = {
        name.removeprefix(f"{root}data/"): m for name, m in members.items() if name.startswith(f"{root}data/")
    }
    return value, {key: m.offset for key, m in data.items()}, {key: m.size for key, m in data.items()}


def _read_member(path: Path, member: Member | None) -> bytes:
    if member is None:
        return b""
    with path.open("rb") as file:
        file.seek(member.offset)
        return file.read(member.size)


def _parse_legacy(path: Path) -> Parsed:
    """Parse the form before PyTorch 1.6: magic, version, machine, value, keys of the storages, their numbers."""
    file_size = path.stat().st_size
    with path.open("rb") as file:
        if parse_pickle(file) != _LEGACY_MAGIC:
            raise DamagedFileError("it is a plain pickle, not a PyTorch checkpoint")
        parse_pickle(file)  # protocol version
        machine = parse_pickle(file)
        if isinstance(machine, dict) and machine.get("little_endian") is False:
            raise DamagedFileError("its byte order differs from this machine's")
        storages: dict[str, StorageRef] = {}
        value, keys = parse_pickle(file, storages), parse_pickle(file)
        if not isinstance(keys, list) or not all(isinstance(key, str | int) for key in keys):
            raise DamagedFileError("its list of storages is damaged")
        units = {key: (storage.dtype or torch.uint8).itemsize for key, storage in storages.items()}
        offsets, sizes = {}, {}
        for key in map(str, keys):
            count = file.read(8)
            numel = int.from_bytes(count, "little", signed=True)
            if (
                len(count) < 8
                or numel < 0
                or key not in units
                or file.tell() + numel * units[key] > file_size
            ):
                raise DamagedFileError(f"the numbers of storage {key} are missing or truncated")
            offsets[key], sizes[key] = file.tell(), numel * units[key]
            file.seek(numel * units[key], 1)
    return value, offsets, sizes
