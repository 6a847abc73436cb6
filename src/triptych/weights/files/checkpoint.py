"""Checkpoint files as tables: every tensor's name, shape and place are known before a byte of it is read.

`open_checkpoint` takes .safetensors, .bin/.pth/.pt (zip and older), .npz, and folders that hold them whole
or in shards. Nothing in a file is ever executed: pickles are walked by `weights.files.safe_unpickle`, which calls
nothing.
"""

import json
import mmap
import os
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from triptych.errors import UserError
from triptych.weights.files import npz, safetensors_header, torch_zip
from triptych.weights.files.sanitize import legible
from triptych.weights.files.tensor_entry import Broken, Contents, Entry

# How files of a folder are looked for, first come first taken.
WEIGHTS_NAMES = (
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
    "diffusion_pytorch_model.safetensors",
    "diffusion_pytorch_model.safetensors.index.json",
    "diffusion_pytorch_model.fp16.safetensors",
    "diffusion_pytorch_model.safetensors.index.fp16.json",
    "model.fp16.safetensors",
    "model.safetensors.index.fp16.json",
    "diffusion_pytorch_model.bin",
    "diffusion_pytorch_model.bin.index.json",
    "diffusion_pytorch_model.fp16.bin",
    "pytorch_model.fp16.bin",
    "open_clip_model.safetensors",
)
SUFFIXES = (".safetensors", ".bin", ".pth", ".pt", ".npz", ".ckpt")

# What says that a folder holds several networks, and which of them nothing here reads.
PIPELINE = "model_index.json"
UNUSED = ("safety_checker", "feature_extractor", "image_encoder", "depth_estimator")

# Where training scripts put the weights among other things; averaged weights are what they publish.
NESTS = (
    "state_dict_ema",
    "model_ema",
    "ema_state_dict",
    "ema",
    "state_dict",
    "model",
    "teacher",
    "module",
    "net",
    "params",
)
PREFIXES = ("module.", "_orig_mod.", "model.", "net.", "backbone.", "encoder_q.", "teacher.backbone.")
NPZ_NESTS = ("opt/target/", "params/img/", "params/", "target/")


@dataclass
class Checkpoint:
    """An opened checkpoint: names, shapes and places of its tensors, and the settings lying beside it."""

    path: Path
    """What the user named: a file or a folder."""
    entries: dict[str, Entry]
    container: str
    """safetensors, pickle or npz."""
    metadata: dict[str, str] = field(default_factory=dict)
    """Strings in a safetensors header."""
    notes: list[str] = field(default_factory=list)
    """What was chosen on the way in: which nesting was unwrapped, what was left out."""
    settings: dict[str, Any] = field(default_factory=dict)
    """JSON beside the weights by name (config, preprocessor_config); plain values in a pickle as "inside"."""
    yaml: Path | None = None
    """CompVis' config beside the weights, not yet read."""
    lent_pages: bool = False
    """Whether all that was lent last are the file's own pages."""
    _maps: dict[Path, mmap.mmap] = field(default_factory=dict, repr=False)
    _scratch: Tensor = field(default_factory=lambda: torch.empty(0, dtype=torch.uint8), repr=False)
    _lent: list[str] = field(default_factory=list, repr=False)

    @property
    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        return {name: entry.shape for name, entry in self.entries.items()}

    def read(self, name: str, slab: int | None = None, into: Tensor | None = None) -> Tensor:
        """A tensor, or one slab of its first axis, copied out of the file."""
        entry = self.entries[name]
        try:
            return entry.read(slab, into)
        except Exception as problem:  # zip, zlib and NumPy each have errors of their own
            raise UserError(
                f"{entry.path} cannot be read at {name}: {legible(problem)}; fetch it again"
            ) from problem

    def mapped(self, name: str) -> Tensor:
        """A tensor as the file's own pages: fetched when touched, copied when written to, never changed there."""
        entry = self.entries[name]
        if not entry.mappable:
            return self.read(name)
        if entry.path not in self._maps:
            with entry.path.open("rb") as file:
                self._maps[entry.path] = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
        pages = self._maps[entry.path]
        return torch.frombuffer(pages, dtype=entry.dtype, count=entry.numel, offset=entry.offset).view(
            entry.shape
        )

    def lend(self, names: Sequence[tuple[str, int | None]]) -> tuple[Tensor, ...]:
        """Tensors, or slabs of them, to copy from until the next call: mapped, else in memory used over and over.

        Fresh memory for each would fragment the heap and take half as much again as the weights.
        """
        self._give_back()
        need = [self._need(name, slab) for name, slab in names]
        if sum(need) >= self._scratch.numel():
            self._scratch = torch.empty(
                sum(need) + 64, dtype=torch.uint8
            )  # more than any tensor: never its storage
        lent, start = [], 0
        for (name, slab), size in zip(names, need, strict=True):
            if size:
                lent.append(self.read(name, slab, self._scratch[start : start + size]))
                start += size
            else:
                whole = self.mapped(name)
                lent.append(whole if slab is None else whole[slab])
        self._lent = [name for (name, _), size in zip(names, need, strict=True) if not size]
        self.lent_pages = not sum(need)
        return tuple(lent)

    def _need(self, name: str, slab: int | None) -> int:
        """Bytes of scratch memory for a tensor that cannot be mapped, aligned."""
        entry = self.entries[name]
        size = entry.nbytes if slab is None else entry.nbytes // max(entry.shape[0], 1)
        return 0 if entry.mappable else -(-size // 64) * 64

    def _give_back(self) -> None:
        """Free the memory of pages that were copied; what is still used is fetched again when touched."""
        for name in self._lent:
            entry = self.entries[name]
            if entry.path in self._maps and hasattr(mmap, "MADV_DONTNEED"):
                start = entry.offset // mmap.PAGESIZE * mmap.PAGESIZE
                self._maps[entry.path].madvise(mmap.MADV_DONTNEED, start, entry.offset + entry.nbytes - start)
        self._lent = []


def open_checkpoint(source: str | os.PathLike[str]) -> Checkpoint:
    """The table of a checkpoint's tensors. Reads headers only.

    Args:
        source: a file, or a folder holding one, whole or in shards beside their index.

    Raises:
        UserError: missing, empty, truncated, damaged, or no checkpoint at all; one line with name and remedy.
    """
    path = Path(source)
    try:
        if not path.exists():
            raise UserError(f"no file or folder {path}; check the path")
        if (path / PIPELINE).is_file():
            return _pipeline(path)
        file = _in_folder(path) if path.is_dir() else path
        contents = _sharded(file) if re.search(r"\.index(\.fp16)?\.json$", file.name) else _one(file)
    except OSError as problem:
        raise UserError(
            f"cannot read {path}: {problem.strerror or problem}; check its permissions"
        ) from problem
    checkpoint = Checkpoint(path, contents.entries, contents.container, contents.metadata, contents.notes)
    checkpoint.settings = beside(file) | ({"inside": contents.settings} if contents.settings else {})
    checkpoint.yaml = _yaml_beside(file)
    _unwrap(checkpoint)
    return checkpoint


def _yaml_beside(file: Path) -> Path | None:
    """A file's own .yaml; or, where there is one checkpoint in the folder, config.yaml or the only one."""
    own = file.with_suffix(".yaml")
    if own.is_file():
        return own
    if len([path for path in file.parent.iterdir() if path.suffix in SUFFIXES]) > 1:
        return None
    found = sorted(path for path in file.parent.iterdir() if path.suffix in (".yaml", ".yml"))
    named = [path for path in found if path.stem == "config"]
    return named[0] if named else found[0] if len(found) == 1 else None


def _pipeline(folder: Path) -> Checkpoint:
    """A folder of diffusers: its parts' tensors as `unet/conv_in.weight`, its JSON as `unet/config`."""
    whole = Checkpoint(folder, {}, "safetensors", settings={PIPELINE[:-5]: read_json(folder / PIPELINE)})
    for part in sorted(path for path in folder.iterdir() if path.is_dir()):
        if part.name in UNUSED:
            whole.notes.append(f"{part.name} left out")
            continue
        for name in ("config", "scheduler_config"):
            if (part / f"{name}.json").is_file():
                whole.settings[f"{part.name}/{name}"] = read_json(part / f"{name}.json")
        if any(path.suffix in SUFFIXES for path in part.iterdir()):
            opened = open_checkpoint(part)
            whole.entries |= {f"{part.name}/{name}": entry for name, entry in opened.entries.items()}
    if not whole.entries:
        raise UserError(f"{folder} has a {PIPELINE} and no weights in its folders; fetch it whole")
    return whole


def read_json(path: Path) -> dict[str, Any]:
    """An object out of a file.

    Raises:
        UserError: it is too large, no JSON, or no object.
    """
    try:
        value = json.loads(path.read_text()) if path.stat().st_size <= 2**24 else None
    except (ValueError, RecursionError) as problem:
        raise UserError(f"{path} is not JSON: {problem}; fetch it again or remove it") from problem
    if not isinstance(value, dict):
        raise UserError(f"{path} holds no JSON object; fetch it again")
    return value


def beside(file: Path) -> dict[str, Any]:
    """The JSON settings that lie beside a weights file, by their name without the ending."""
    found: dict[str, Any] = {}
    for name in ("config", "preprocessor_config"):
        path = file.parent / f"{name}.json"
        if not path.is_file() or path.stat().st_size > 2**24:
            continue
        try:
            value = json.loads(path.read_text())
        except (ValueError, RecursionError) as problem:
            raise UserError(f"{path} is not JSON: {problem}; fetch it again or remove it") from problem
        if isinstance(value, dict):
            found[name] = value
    return found


def _in_folder(folder: Path) -> Path:
    for name in WEIGHTS_NAMES:
        if (folder / name).is_file():
            return folder / name
    found = sorted(path for path in folder.iterdir() if path.suffix in SUFFIXES and path.is_file())
    if len(found) == 1:
        return found[0]
    if found:
        names = ", ".join(path.name for path in found[:4])
        raise UserError(f"{folder} holds {len(found)} checkpoints ({names}); name the one to load")
    raise UserError(f"{folder} holds no checkpoint ({', '.join(SUFFIXES)}); name a folder that does")


def _one(file: Path) -> Contents:
    size = file.stat().st_size
    if size == 0:
        raise UserError(f"{file} is empty; fetch it again")
    with file.open("rb") as opened:
        head = opened.read(16)
    readers: dict[str, Callable[[Path], Contents]] = {
        "safetensors": safetensors_header.read_table,
        "pickle": torch_zip.read_table,
        "npz": npz.read_table,
    }
    kind = _kind(file, head, size)
    try:
        return readers[kind](file)
    except Broken as problem:
        raise UserError(
            f"{file} is not a whole {kind} checkpoint: {legible(problem)}; fetch it again"
        ) from problem


def _kind(file: Path, head: bytes, size: int) -> str:
    """By the first bytes, not by the ending: many a .bin is a safetensors file and the other way round."""
    if head[:4] == b"PK\x03\x04":
        return "npz" if file.suffix == ".npz" else "pickle"
    header = int.from_bytes(head[:8], "little")
    if head[8:9] == b"{" and header <= size - 8:
        return "safetensors"
    if head[:2] in (b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05"):
        return "pickle"
    if head[:24].startswith(b"version https://"):
        raise UserError(
            f"{file} is a Git LFS pointer, not the checkpoint itself; run `git lfs pull` or fetch it again"
        )
    if file.suffix == ".safetensors" and head[8:9] == b"{":
        raise UserError(
            f"{file} is truncated: its header alone has {header} bytes, the file {size}; fetch it again"
        )
    raise UserError(
        f"{file} is no checkpoint (it begins with {head[:8]!r}); give a .safetensors, .bin, .pth, .pt or .npz"
    )


def _sharded(index: Path) -> Contents:
    """All shards named in an index, as one table."""
    try:
        places = json.loads(index.read_text())["weight_map"]
        files = sorted(set(places.values()))
        named = all(isinstance(name, str) and Path(name).name == name for name in files)
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as problem:
        raise UserError(f"{index} is not an index of shards: {problem!r}; fetch it again") from problem
    if not named:
        raise UserError(
            f"{index} names shards outside its folder; fetch the checkpoint again from a source you trust"
        )
    missing = [name for name in files if not (index.parent / name).is_file()]
    if missing:
        raise UserError(
            f"{index.parent} lacks {len(missing)} of {len(files)} shards ({missing[0]}, ...); fetch them"
        )
    whole = Contents({}, "safetensors" if files[0].endswith(".safetensors") else "pickle")
    for name in files:
        shard = _one(index.parent / name)
        expected = {key for key, place in places.items() if place == name}
        if expected != set(shard.entries):
            odd = sorted(expected ^ set(shard.entries))
            raise UserError(
                f"{index.parent / name} does not hold what {index.name} says ({odd[0]}); fetch both again"
            )
        whole.entries |= shard.entries
        whole.metadata |= shard.metadata
    whole.notes.append(f"{len(files)} shards")
    return whole


def _unwrap(checkpoint: Checkpoint) -> None:
    """Undo the wrapping that training scripts leave: nesting, and a prefix that every name shares."""
    entries = checkpoint.entries
    if not entries:
        raise UserError(f"{checkpoint.path} holds no tensors; give a checkpoint of weights")
    nests = tuple(f"{nest}/" for nest in NESTS) if checkpoint.container == "pickle" else NPZ_NESTS
    for nest in nests if checkpoint.container in ("pickle", "npz") else ():
        inner = {name[len(nest) :]: entry for name, entry in entries.items() if name.startswith(nest)}
        if inner:
            others = sorted({name.split("/")[0] for name in entries if not name.startswith(nest)})
            left = f", leaving out {', '.join(others[:4])}" if others else ""
            checkpoint.notes.append(f"weights taken from {nest.rstrip('/')!r}{left}")
            entries = inner
            break
    for prefix in PREFIXES:
        if all(name.startswith(prefix) for name in entries):
            entries = {name[len(prefix) :]: entry for name, entry in entries.items()}
            checkpoint.notes.append(f"prefix {prefix!r} taken off every name")
    checkpoint.entries = entries
