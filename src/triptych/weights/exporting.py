"""`export`: write a network in a published format, after our own reader has checked the result."""

import json
import logging
import os
from collections.abc import Sequence
from pathlib import Path
from typing import cast

from torch import Tensor, nn

from triptych.atomic_write import require_place, write_text_atomically
from triptych.errors import CheckpointError, ConfigError, TriptychError, near_names_hint
from triptych.network import Network
from triptych.weights import native
from triptych.weights.files.write import write_npz, write_safetensors, write_torch
from triptych.weights.mapping.families import TITLES, family_of
from triptych.weights.mapping.format import Draft, Format, Hints, draft_keys
from triptych.weights.mapping.registry import all_formats
from triptych.weights.mapping.round_trip import (
    SidecarFields,
    hints_from_sidecar,
    required_hints,
    sidecar_path,
    unstored_fields,
    with_sidecar,
)

log = logging.getLogger(__name__)

SUFFIXES = {
    "folder": (".safetensors", ".bin", ".pth", ".pt"),
    "torch": (".pth", ".pt", ".bin", ".ckpt", ".safetensors"),
    "npz": (".npz",),
    "pipeline": (),
}


GRAPH_FORMATS = ("onnx", "pt2", "openvino")
"""Formats of graphs, which `export` takes for every family."""


def formats(family: str | None = None) -> list[str]:
    """Return the formats of weights that `export` takes, for the networks of one family or for all."""
    return ["triptych", *dict.fromkeys(f.name for f in all_formats() if family in (None, f.family))]


def export(net: nn.Module, path: str | os.PathLike[str], format: str | None = None) -> Path:
    """Write a network in a published format: its weights for another library, or its graph for another runtime.

    ```python
    tp.export(net, "out", "hf")               # transformers: AutoModelForImageClassification.from_pretrained("out")
    tp.export(net, "out", "timm")             # timm.create_model("local-dir:out")
    tp.export(net, "net.onnx")                # onnxruntime.InferenceSession("net.onnx")
    ```

    Args:
        net: a network of this package.
        path: a file with one of the format's suffixes, or a folder to create. "hf" and "timm" folders hold config,
            preprocessing and model.safetensors.
        format: one of `formats()`; or "onnx", "pt2" or "openvino", which None means for .onnx, .pt2 and .xml: see
            `triptych.weights.graphs.exporting.export_graphs`.

    Returns:
        The file that was written; of a pipeline, or of several graphs, their folder.

    Raises:
        ConfigError: an unknown format, or a suffix that it does not have.
        CheckpointError: the format cannot represent the network.
        StorageError: the file cannot be written.
    """
    path = Path(path)
    require_place(path)
    if format is None or format in GRAPH_FORMATS:
        from triptych.weights.graphs.exporting import export_graphs

        results = export_graphs(net, path, format)
        return results[0].path if len(results) == 1 else path
    if format == "triptych":
        target = path if path.suffix else path / "model.safetensors"
        native.save(net, target)
        return target
    target_format = _format(net, format)
    net = cast(Network, net)
    if target_format.container == "pipeline":
        return _write_pipeline(path, target_format.draft(net), target_format.title)
    target = _target(path, target_format)
    draft = target_format.draft(net)
    if path == target.parent and target_format.container == "folder":
        _require_stored(target_format, draft, target, net)
        _write(target, draft)
        for name, value in draft.settings.items():
            _write_json(path / f"{name}.json", value)
        return target
    fields = _sidecar_fields(target_format, draft, target, net)
    if target_format.halves and path == target.parent:
        halves = _write_halves(target, draft, target_format.halves)
        _write_sidecar(halves[0], fields, target_format.title)
        return path
    if target_format.halves:
        log.warning("other programs read %s from two files; give a folder to write them", target_format.title)
    _write(target, draft)
    _write_sidecar(target, fields, target_format.title)
    return target


def _write_halves(target: Path, draft: Draft, halves: Sequence[str]) -> list[Path]:
    """Write the tensors under each prefix into a file of their own, without it; return the files."""
    paths = []
    for half in halves:
        tensors = {
            key.removeprefix(f"{half}."): tensor
            for key, tensor in draft.tensors.items()
            if key.startswith(f"{half}.")
        }
        paths.append(target.with_stem(f"{target.stem}_{half}"))
        _write(paths[-1], Draft(tensors))
    return paths


def _format(net: nn.Module, name: str) -> Format:
    """Return the format of that name for a network's family."""
    named = [format for format in all_formats() if format.name == name]
    if not named:
        known = [*formats(), *GRAPH_FORMATS]
        hint = near_names_hint(name, known, otherwise=f"choose one of {', '.join(known)}")
        raise ConfigError(f"no format is called {name!r}; {hint}")
    family = family_of(getattr(net, "config", None))
    for format in named:
        if format.family == family:
            return format
    titles = " or ".join(TITLES[format.family] for format in named)
    possible = f"choose one of {', '.join(formats(family))}" if family else "give a network of this package"
    raise ConfigError(f"{name} holds {titles}, not {type(net).__name__}; {possible}")


def _require_stored(format: Format, draft: Draft, target: Path, net: Network) -> None:
    """Refuse a folder whose config leaves fields to defaults that are not this network's."""
    keys = draft_keys(draft, target, format.container)
    missing = unstored_fields(net.config, format.read(keys, Hints()).config)
    if missing:
        words = ", ".join(f"{name} {value!r}" for name, value in missing.items())
        raise CheckpointError(
            f"the config of {format.title} cannot store {words}; write a single file, which a JSON of ours goes beside"
        )


def _sidecar_fields(format: Format, draft: Draft, target: Path, net: Network) -> SidecarFields:
    """Return the fields of `net` that the weights alone would be read back without."""
    keys = draft_keys(Draft(draft.tensors, {}, draft.wrapper_key), target, format.container)
    try:
        fields = unstored_fields(net.config, format.read(keys, Hints()).config)
    except TriptychError:  # a grid or window that is not square: the reader needs its shape
        fields = required_hints(net.config)
    while fields:  # a stored field may change the default of another
        config = with_sidecar(format.read(keys, hints_from_sidecar(fields)).config, fields)
        if not (more := unstored_fields(net.config, config)):
            break
        fields |= more
    return fields


def _write_sidecar(target: Path, fields: SidecarFields, title: str) -> None:
    """Write the fields that the format does not store into a JSON file next to the weights, and log this."""
    if not fields:
        sidecar_path(target).unlink(missing_ok=True)  # left by an earlier file of that name
        return
    write_text_atomically(sidecar_path(target), json.dumps({"triptych": fields}, indent=2) + "\n")
    words = ", ".join(f"{name} {value!r}" for name, value in fields.items())
    log.warning(
        "%s cannot store %s: it is in %s, which other programs do not read",
        title,
        words,
        sidecar_path(target).name,
    )


def _target(path: Path, format: Format) -> Path:
    suffixes = SUFFIXES[format.container]
    if path.is_dir() or path.suffix == "":
        return path / f"{format.stem}{suffixes[0]}"
    if path.suffix in suffixes:
        return path
    raise ConfigError(
        f"{format.title} is written to a folder or to {', '.join(suffixes)}, not to {path.name}"
    )


def _write_pipeline(folder: Path, draft: Draft, title: str) -> Path:
    """Write a folder for each part of a pipeline. model_index.json comes last: it marks the folder as complete."""
    if folder.suffix or folder.is_file():
        raise ConfigError(f"{title} is written to a folder, not to {folder.name}")
    parts: dict[str, dict[str, Tensor]] = {}
    for key, tensor in draft.tensors.items():
        part, _, inner = key.partition("/")
        parts.setdefault(part, {})[inner] = tensor
    for part, tensors in parts.items():
        of_diffusers = "_class_name" in draft.settings[f"{part}/config"]  # else of transformers
        stem = "diffusion_pytorch_model" if of_diffusers else "model"
        write_safetensors(folder / part / f"{stem}.safetensors", tensors, {"format": "pt"})
    if draft.finish is not None:
        draft.finish(folder)
    for name, value in sorted(draft.settings.items(), key=lambda item: "/" not in item[0]):
        _write_json(folder / f"{name}.json", value)
    return folder


def _write_json(path: Path, value: object) -> None:
    write_text_atomically(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def _write(path: Path, draft: Draft) -> None:
    if path.suffix == ".npz":
        write_npz(path, draft.tensors)
    elif path.suffix == ".safetensors":
        write_safetensors(path, draft.tensors, {"format": "pt"})
    else:
        write_torch(path, draft.tensors, draft.wrapper_key, draft.extras)
