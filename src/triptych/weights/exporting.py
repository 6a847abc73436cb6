"""`export`: a network in a format that others read, checked by our own reader before a byte is written."""

import json
import logging
import os
from pathlib import Path
from typing import Any

from torch import nn

from triptych.errors import UserError
from triptych.models.vit import ViT
from triptych.weights import store
from triptych.weights.formats import Draft, Format, Hints, aside, drafted, unsaid
from triptych.weights.vit import FORMATS
from triptych.weights.writers import write_npz, write_safetensors, write_torch
from triptych.writing import write_text_atomically

log = logging.getLogger(__name__)

ENDINGS = {
    "folder": (".safetensors", ".bin", ".pth", ".pt"),
    "torch": (".pth", ".pt", ".bin", ".safetensors"),
    "npz": (".npz",),
}


def formats() -> list[str]:
    """Names that `export` takes."""
    return ["triptych", *(known.name for known in FORMATS)]


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
        store.save(net, target)
        return target
    known = next((known for known in FORMATS if known.name == format), None)
    if known is None:
        raise UserError(f"no format is called {format!r}; choose one of {', '.join(formats())}")
    if not isinstance(net, ViT):
        raise UserError(f"{known.title} holds a ViT, not {type(net).__name__}; choose triptych's own format")
    target = _target(path, known)
    draft = known.draft(net)
    _write(target, draft)
    if path != target.parent or known.container != "folder":
        _set_aside(target, _conventional(known, draft, target, net), known.title)
    if path == target.parent and known.container == "folder":
        for name, value in draft.settings.items():
            write_text_atomically(
                path / f"{name}.json", json.dumps(value, indent=2, ensure_ascii=False) + "\n"
            )
    return target


def _conventional(known: Format, draft: Draft, target: Path, net: ViT) -> dict[str, Any]:
    """What of `net` the bare file would be read back without."""
    names = drafted(Draft(draft.tensors, {}, draft.nest), target, known.container)
    size = net.config.image_size
    try:
        return unsaid(net, known.read(names, Hints()).config)
    except UserError:  # a grid that is not square: its shape has to be told
        return unsaid(net, known.read(names, Hints(size)).config) | {"image_size": list(size)}


def _set_aside(target: Path, missing: dict[str, Any], title: str) -> None:
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
        return path / f"model{endings[0]}"
    if path.suffix in endings:
        return path
    raise UserError(f"{known.title} is written to a folder or to {', '.join(endings)}, not to {path.name}")


def _write(path: Path, draft: Draft) -> None:
    if path.suffix == ".npz":
        write_npz(path, draft.tensors)
    elif path.suffix == ".safetensors":
        write_safetensors(path, draft.tensors, {"format": "pt"})
    else:
        write_torch(path, draft.tensors, draft.nest)
