"""`open_checkpoint`: from a file or folder to the table of its tensors.

It takes .safetensors, .bin/.pth/.pt (today's zip and the older form), .npz, and folders that hold one of these as one
file or in shards. Nothing in a file is executed: pickles are parsed by `weights.files.safe_unpickle`, which makes no
calls.
"""

import json
import os
import re
from collections.abc import Callable
from pathlib import Path

from triptych.errors import CheckpointError
from triptych.weights.files import npz, safetensors_header, torch_zip
from triptych.weights.files.checkpoint import CheckpointFile
from triptych.weights.files.folder import (
    PIPELINE,
    SUFFIXES,
    UNUSED,
    find_halves,
    find_weights,
    find_yaml,
    read_configs,
    read_json,
)
from triptych.weights.files.sanitize import printable
from triptych.weights.files.tensor_entry import DamagedFileError, FileContents

# Keys under which training scripts store the weights. Averaged weights come first: they are what is published.
WRAPPER_KEYS = (
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
NPZ_WRAPPERS = ("opt/target/", "params/img/", "img/", "params/", "target/")
PREFIXES = ("module.", "_orig_mod.", "model.", "net.", "backbone.", "encoder_q.", "teacher.backbone.")
"""Prefixes that wrappers such as DistributedDataParallel and torch.compile put in front of every key."""

_READERS: dict[str, Callable[[Path], FileContents]] = {
    "safetensors": safetensors_header.read_table,
    "pickle": torch_zip.read_table,
    "npz": npz.read_table,
}


def open_checkpoint(source: str | os.PathLike[str]) -> CheckpointFile:
    """Return the table of a checkpoint's tensors. Only headers are read.

    Args:
        source: a file, or a folder that holds one, as one file or in shards next to their index.

    Raises:
        CheckpointError: missing, empty, truncated, damaged, or no checkpoint at all.
    """
    path = Path(source)
    try:
        if not path.exists():
            raise CheckpointError(f"no file or folder {path}; check the path")
        if (path / PIPELINE).is_file():
            return _open_pipeline(path)
        if (halves := find_halves(path)) is not None:
            return _open_halves(path, *halves)
        file = find_weights(path) if path.is_dir() else path
        is_index = re.search(r"\.index(\.fp16)?\.json$", file.name)
        contents = _read_shards(file) if is_index else _read_file(file)
    except OSError as problem:
        raise CheckpointError(
            f"cannot read {path}: {problem.strerror or problem}; check its permissions"
        ) from problem
    checkpoint = CheckpointFile(path, contents.entries, contents.container, contents.metadata, contents.notes)
    checkpoint.settings = read_configs(file) | ({"inside": contents.settings} if contents.settings else {})
    checkpoint.yaml = find_yaml(file)
    _unwrap(checkpoint)
    return checkpoint


def _open_halves(path: Path, encoder: Path, decoder: Path) -> CheckpointFile:
    """Open the two files of a tiny autoencoder as one, under `encoder.` and `decoder.`."""
    both = CheckpointFile(path, {}, "pickle", notes=[f"{encoder.name} and {decoder.name}"])
    for half, file in (("encoder", encoder), ("decoder", decoder)):
        contents = _read_file(file)
        both.container = contents.container
        both.entries |= {f"{half}.{name}": entry for name, entry in contents.entries.items()}
    both.everything = both.entries
    return both


def _open_pipeline(folder: Path) -> CheckpointFile:
    """Open a diffusers pipeline: tensors of its parts as `unet/conv_in.weight`, its JSON as `unet/config`."""
    index = read_json(folder / PIPELINE)
    pipeline = CheckpointFile(folder, {}, "safetensors", settings={PIPELINE.removesuffix(".json"): index})
    listed = {name for name, classes in index.items() if isinstance(classes, list)}
    for part in sorted(path for path in folder.iterdir() if path.is_dir()):
        if part.name in UNUSED or (listed and part.name not in listed):  # such as a training's checkpoint-500
            pipeline.notes.append(f"{part.name} left out")
            continue
        for name in ("config", "scheduler_config"):
            if (part / f"{name}.json").is_file():
                pipeline.settings[f"{part.name}/{name}"] = read_json(part / f"{name}.json")
        if any(path.suffix in SUFFIXES for path in part.iterdir()):
            entries = open_checkpoint(part).entries
            pipeline.entries |= {f"{part.name}/{name}": entry for name, entry in entries.items()}
    if not pipeline.entries:
        raise CheckpointError(f"{folder} has a {PIPELINE} and no weights in its folders; fetch all of it")
    return pipeline


def _read_file(file: Path) -> FileContents:
    size = file.stat().st_size
    if size == 0:
        raise CheckpointError(f"{file} is empty; fetch it again")
    with file.open("rb") as opened:
        head = opened.read(16)
    container = _container(file, head, size)
    try:
        return _READERS[container](file)
    except DamagedFileError as problem:
        line = printable(problem)
        remedy = "" if ";" in line else "; fetch it again"
        raise CheckpointError(f"{file} is not a valid {container} checkpoint: {line}{remedy}") from problem


def _container(file: Path, head: bytes, size: int) -> str:
    """Tell the container from the first bytes. File suffixes are unreliable: many a .bin is a safetensors file."""
    if head[:4] == b"PK\x03\x04":
        return "npz" if file.suffix == ".npz" else "pickle"
    header = int.from_bytes(head[:8], "little")
    if head[8:9] == b"{" and header <= size - 8:
        return "safetensors"
    if head[:2] in (b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05"):
        return "pickle"
    if head[:24].startswith(b"version https://"):
        raise CheckpointError(
            f"{file} is a Git LFS pointer, not the checkpoint itself; run `git lfs pull` or fetch it again"
        )
    if file.suffix == ".safetensors" and head[8:9] == b"{":
        raise CheckpointError(
            f"{file} is truncated: its header alone has {header} bytes, the file {size}; fetch it again"
        )
    raise CheckpointError(
        f"{file} is no checkpoint (it begins with {head[:8]!r}); give a .safetensors, .bin, .pth, .pt or .npz"
    )


def _read_shards(index: Path) -> FileContents:
    """Read the tables of all shards named in an index."""
    try:
        weight_map = json.loads(index.read_text())["weight_map"]
        files = sorted(set(weight_map.values()))
        local = all(isinstance(name, str) and Path(name).name == name for name in files)
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as problem:
        raise CheckpointError(f"{index} is not an index of shards: {problem!r}; fetch it again") from problem
    if not local:
        raise CheckpointError(
            f"{index} names shards outside its folder; fetch the checkpoint again from a source you trust"
        )
    missing = [name for name in files if not (index.parent / name).is_file()]
    if missing:
        raise CheckpointError(
            f"{index.parent} lacks {len(missing)} of {len(files)} shards ({missing[0]}, ...); fetch them"
        )
    merged = FileContents({}, "safetensors" if files[0].endswith(".safetensors") else "pickle")
    for name in files:
        shard = _read_file(index.parent / name)
        expected = {key for key, file in weight_map.items() if file == name}
        if expected != set(shard.entries):
            different = sorted(expected ^ set(shard.entries))
            raise CheckpointError(
                f"{index.parent / name} does not hold the tensors that {index.name} lists ({different[0]}); "
                "fetch both again"
            )
        merged.entries |= shard.entries
        merged.metadata |= shard.metadata
    merged.notes.append(f"{len(files)} shards")
    return merged


def _unwrap(checkpoint: CheckpointFile) -> None:
    """Remove what training scripts wrap weights in: an outer dict, and a prefix shared by all keys."""
    entries = checkpoint.everything = checkpoint.entries
    if not entries:
        raise CheckpointError(f"{checkpoint.path} holds no tensors; give a checkpoint of weights")
    wrappers: tuple[str, ...] = ()
    if checkpoint.container == "pickle":
        wrappers = tuple(f"{key}/" for key in WRAPPER_KEYS)
    elif checkpoint.container == "npz":
        wrappers = NPZ_WRAPPERS
    for wrapper in wrappers:
        inner = {name[len(wrapper) :]: entry for name, entry in entries.items() if name.startswith(wrapper)}
        if inner:
            others = sorted({name.split("/")[0] for name in entries if not name.startswith(wrapper)})
            omitted = f", leaving out {', '.join(others[:4])}" if others else ""
            omitted += '; weights="raw" takes other weights' if others and "ema" in wrapper else ""
            checkpoint.notes.append(f"weights taken from {wrapper.rstrip('/')!r}{omitted}")
            entries = inner
            break
    for prefix in PREFIXES:
        if all(name.startswith(prefix) for name in entries):
            entries = {name[len(prefix) :]: entry for name, entry in entries.items()}
            checkpoint.notes.append(f"prefix {prefix!r} removed from every key")
    checkpoint.entries = entries
