"""`export`: a network in a format that others read, checked by our own reader before a byte is written."""

import json
import logging
import os
from pathlib import Path
from typing import cast

from torch import Tensor, nn

from triptych.atomic_write import write_text_atomically
from triptych.errors import UserError
from triptych.network import Network
from triptych.weights import native
from triptych.weights.files.write import write_npz, write_safetensors, write_torch
from triptych.weights.mapping.families import TITLES, family_of
from triptych.weights.mapping.format import Draft, Format, Hints, drafted
from triptych.weights.mapping.registry import all_formats
from triptych.weights.mapping.round_trip import Said, aside, hints_in, shapes_to_tell, told, unsaid

log = logging.getLogger(__name__)

ENDINGS = {
    "folder": (".safetensors", ".bin", ".pth", ".pt"),
    "torch": (".pth", ".pt", ".bin", ".ckpt", ".safetensors"),
    "npz": (".npz",),
    "pipeline": (),
}


def formats(family: str | None = None) -> list[str]:
    """Names that `export` takes, for networks of a family or for all."""
    return ["triptych", *dict.fromkeys(f.name for f in all_formats() if family in (None, f.family))]


def export(net: nn.Module, path: str | os.PathLike[str], format: str) -> Path:
    """Write a network in a published format.

    Args:
        net: a network of this package.
        path: a file with one of the format's endings, or a folder to make. "hf" and "timm" folders hold
            config, preprocessing and model.safetensors, as `from_pretrained` and timm's "local-dir:" read.
        format: one of `formats()`.

    Returns:
        The file of the weights that was written.

    Raises:
        UserError: unknown format, a network that the format cannot say, a wrong ending, or no space.
    """
    path = Path(path)
    if format == "triptych":
        target = path if path.suffix == ".safetensors" else path / "model.safetensors"
        native.save(net, target)
        return target
    known = _format(net, format)
    net = cast(Network, net)
    if known.container == "pipeline":
        return _write_parts(path, known.draft(net), known.title)
    target = _target(path, known)
    draft = known.draft(net)
    if path == target.parent and known.container == "folder":
        _require_said(known, draft, target, net)
        _write(target, draft)
        for name, value in draft.settings.items():
            write_text_atomically(
                path / f"{name}.json", json.dumps(value, indent=2, ensure_ascii=False) + "\n"
            )
    else:
        _write(target, draft)
        _set_aside(target, _conventional(known, draft, target, net), known.title)
    return target


def _format(net: nn.Module, name: str) -> Format:
    """The format of that name for a network's family."""
    named = [format for format in all_formats() if format.name == name]
    if not named:
        raise UserError(f"no format is called {name!r}; choose one of {', '.join(formats())}")
    family = family_of(getattr(net, "config", None))
    for format in named:
        if format.family == family:
            return format
    held = " or ".join(TITLES[format.family] for format in named)
    possible = f"choose one of {', '.join(formats(family))}" if family else "give a network of this package"
    raise UserError(f"{name} holds {held}, not {type(net).__name__}; {possible}")


def _require_said(known: Format, draft: Draft, target: Path, net: Network) -> None:
    """Refuse a folder whose config leaves something to conventions that are not this network's."""
    missing = unsaid(net.config, known.read(drafted(draft, target, known.container), Hints()).config)
    if missing:
        words = ", ".join(f"{name} {value!r}" for name, value in missing.items())
        raise UserError(
            f"the config of {known.title} cannot say {words}; write a single file, which a JSON of ours goes beside"
        )


def _conventional(known: Format, draft: Draft, target: Path, net: Network) -> Said:
    """What of `net` the bare file would be read back without."""
    names = drafted(Draft(draft.tensors, {}, draft.nest), target, known.container)
    try:
        said = unsaid(net.config, known.read(names, Hints()).config)
    except UserError:  # a grid or window that is not square: its shape has to be told
        said = shapes_to_tell(net.config)
    while said:  # one thing told may change the convention of another
        back = told(known.read(names, hints_in(said)).config, said)
        if not (more := unsaid(net.config, back)):
            break
        said |= more
    return said


def _set_aside(target: Path, missing: Said, title: str) -> None:
    """Keep what the format leaves to conventions in a JSON beside the weights, and say so."""
    if not missing:
        aside(target).unlink(missing_ok=True)  # of an earlier file of that name
        return
    write_text_atomically(aside(target), json.dumps({"triptych": missing}, indent=2) + "\n")
    words = ", ".join(f"{name} {value!r}" for name, value in missing.items())
    log.warning("%s cannot say %s: it is in %s, which others do not read", title, words, aside(target).name)


def _target(path: Path, known: Format) -> Path:
    endings = ENDINGS[known.container]
    if path.is_dir() or path.suffix == "":
        return path / f"{known.stem}{endings[0]}"
    if path.suffix in endings:
        return path
    raise UserError(f"{known.title} is written to a folder or to {', '.join(endings)}, not to {path.name}")


def _write_parts(folder: Path, draft: Draft, title: str) -> Path:
    """A folder for each part of a pipeline; the JSON that says they are all there comes last."""
    if folder.suffix or folder.is_file():
        raise UserError(f"{title} is written to a folder, not to {folder.name}")
    parts: dict[str, dict[str, Tensor]] = {}
    for name, tensor in draft.tensors.items():
        part, _, inner = name.partition("/")
        parts.setdefault(part, {})[inner] = tensor
    for part, tensors in parts.items():
        ours = "_class_name" in draft.settings[f"{part}/config"]  # else transformers'
        stem = "diffusion_pytorch_model" if ours else "model"
        write_safetensors(folder / part / f"{stem}.safetensors", tensors, {"format": "pt"})
    if draft.finish is not None:
        draft.finish(folder)
    for name, value in sorted(draft.settings.items(), key=lambda item: "/" not in item[0]):
        write_text_atomically(folder / f"{name}.json", json.dumps(value, indent=2, ensure_ascii=False) + "\n")
    return folder


def _write(path: Path, draft: Draft) -> None:
    if path.suffix == ".npz":
        write_npz(path, draft.tensors)
    elif path.suffix == ".safetensors":
        write_safetensors(path, draft.tensors, {"format": "pt"})
    else:
        write_torch(path, draft.tensors, draft.nest, draft.beside)
