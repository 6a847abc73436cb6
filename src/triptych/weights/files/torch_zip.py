"""What `torch.save` wrote, today's zip or the older form, as a table of tensors."""

import io
import itertools
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from triptych.weights.files.safe_unpickle import Call, Storage, View, walk
from triptych.weights.files.tensor_entry import Broken, Contents, Entry, contiguous
from triptych.weights.files.zip_members import Member, open_zip

MAX_PICKLE = 2**27
"""Bytes of opcodes; the largest published checkpoint has a few megabytes of them."""
_LEGACY_MAGIC = 0x1950A86A20F9469CFC6C


def read_table(path: Path) -> Contents:
    """Names, shapes and places of the tensors in what `torch.save` wrote, today's zip or the older form.

    Tensors one level down get their dict's name in front, `model/head.weight`.

    Raises:
        Broken: cut short, damaged, or a TorchScript archive.
    """
    with path.open("rb") as file:
        zipped = file.read(4) == b"PK\x03\x04"
    value, places, lengths = _zipped(path) if zipped else _legacy(path)
    views = dict(_views(value))
    entries = {}
    for name, view in views.items():
        key, size = view.storage.key, view.dtype.itemsize
        unit = view.storage.dtype.itemsize if view.storage.dtype is not None else 1
        if key not in places or lengths[key] < view.storage.numel * unit:
            raise Broken(f"the numbers of {name} are missing or cut short")
        strides = None if contiguous(view.shape, view.strides) else view.strides
        entries[name] = Entry(path, places[key] + view.offset * size, view.shape, view.dtype, strides)
    return Contents(entries, "pickle", settings=_settings(value))


def _views(value: Any) -> Iterator[tuple[str, View]]:
    if any(key == "_parameters" for key, _ in _attributes(value)):
        yield from _of_module(value, "", set())
        return
    for key, item in _attributes(value):
        if any(name == "_parameters" for name, _ in _attributes(item)):
            yield from _of_module(item, f"{key}/", set())
        if isinstance(item, View):
            yield key, item
            continue
        for inner, deeper in _attributes(item):
            if isinstance(deeper, View):
                yield f"{key}/{inner}", deeper


def _of_module(module: Any, prefix: str, seen: set[int]) -> Iterator[tuple[str, View]]:
    """The tensors of a whole pickled network, under the names its state_dict would give them."""
    if id(module) in seen or len(prefix) > 1000:
        return
    seen.add(id(module))
    fields = dict(_attributes(module))
    for kind in ("_parameters", "_buffers"):
        yield from (
            (prefix + name, item) for name, item in _attributes(fields.get(kind)) if isinstance(item, View)
        )
    for name, child in _attributes(fields.get("_modules")):
        yield from _of_module(child, f"{prefix}{name}.", seen)


def _attributes(value: Any) -> Iterator[tuple[str, Any]]:
    """Named values of a dict; of a pickled module or other object, its items and those of its state."""
    if isinstance(value, Call):
        yield from ((key, item) for key, item in value.items.items() if isinstance(key, str))
        value = value.state
    if isinstance(value, dict):
        yield from ((key, item) for key, item in value.items() if isinstance(key, str))


_PLAIN = (str, int, float, bool)
_BESIDE = ("args", "config", "hyper_parameters", "meta")
"""Where training scripts keep what they ran with."""
_MOST = 2**17
"""Values that are read of it."""


def _settings(value: Any) -> dict[str, Any]:
    """Plain settings that lie beside the weights: `arch`, `epoch`; `args` as a dict or a namespace, `config` as a dict
    of whatever kind, their parts too."""
    found: dict[str, Any] = {}
    left = [_MOST]
    for key, item in _attributes(value):
        if isinstance(item, _PLAIN):
            found[key] = item
        elif key in _BESIDE:
            found[key] = {k: v for k, inner in _attributes(item) if (v := _plain(inner, 4, left)) is not None}
    return found


def _plain(value: Any, depth: int, left: list[int]) -> Any:
    """A value as strings, numbers, lists and dicts of such, so deep; none where there is nothing of that kind."""
    left[0] -= 1
    if isinstance(value, _PLAIN) or depth == 0 or left[0] < 0:
        return value if isinstance(value, _PLAIN) else None
    if isinstance(value, list | tuple):
        made = [_plain(item, depth - 1, left) for item in itertools.islice(value, max(left[0], 0))]
        return made if made and all(item is not None for item in made) else None
    inside = {
        key: made
        for key, item in itertools.islice(_attributes(value), max(left[0], 0))
        if (made := _plain(item, depth - 1, left)) is not None
    }
    return inside or None


def _zipped(path: Path) -> tuple[Any, dict[str, int], dict[str, int]]:
    members = {member.name: member for member in open_zip(path)}
    pickled = [name for name in members if name == "data.pkl" or name.endswith("/data.pkl")]
    if len(pickled) != 1:
        raise Broken("it is a zip archive without PyTorch's data.pkl")
    root = pickled[0].removesuffix("data.pkl")
    if f"{root}constants.pkl" in members:
        raise Broken("it is a TorchScript program; load it with torch.jit and save its state_dict")
    if any(member.compressed for member in members.values()):
        raise Broken("its members are compressed, as PyTorch never writes them")
    if (
        _content(path, members.get(f"{root}byteorder")).strip() not in (b"", b"little")
        or sys.byteorder != "little"
    ):
        raise Broken("its byte order is not this machine's")
    if members[pickled[0]].size > MAX_PICKLE:
        raise Broken(f"its pickle has more than {MAX_PICKLE} bytes")
    value = walk(io.BytesIO(_content(path, members[pickled[0]])))
    data = {
        name.removeprefix(f"{root}data/"): m for name, m in members.items() if name.startswith(f"{root}data/")
    }
    return value, {key: m.offset for key, m in data.items()}, {key: m.size for key, m in data.items()}


def _content(path: Path, member: Member | None) -> bytes:
    if member is None:
        return b""
    with path.open("rb") as file:
        file.seek(member.offset)
        return file.read(member.size)


def _legacy(path: Path) -> tuple[Any, dict[str, int], dict[str, int]]:
    """Before PyTorch 1.6: magic, version, machine, the value, the storages' keys, then their numbers."""
    size = path.stat().st_size
    with path.open("rb") as file:
        if walk(file) != _LEGACY_MAGIC:
            raise Broken("it is a plain pickle, not a PyTorch checkpoint")
        walk(file)  # protocol version
        machine = walk(file)
        if isinstance(machine, dict) and machine.get("little_endian") is False:
            raise Broken("its byte order is not this machine's")
        storages: dict[str, Storage] = {}
        value, keys = walk(file, storages), walk(file)
        if not isinstance(keys, list) or not all(isinstance(key, str | int) for key in keys):
            raise Broken("its list of storages is damaged")
        units = {key: (storage.dtype or torch.uint8).itemsize for key, storage in storages.items()}
        places, lengths = {}, {}
        for key in map(str, keys):
            count = file.read(8)
            numel = int.from_bytes(count, "little", signed=True)
            if len(count) < 8 or numel < 0 or key not in units or file.tell() + numel * units[key] > size:
                raise Broken(f"the numbers of storage {key} are missing or cut short")
            places[key], lengths[key] = file.tell(), numel * units[key]
            file.seek(numel * units[key], 1)
    return value, places, lengths
