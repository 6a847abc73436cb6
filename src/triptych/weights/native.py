"""Our own format: one .safetensors, whose metadata hold what the network is and what it was trained for.

metadata["triptych"] = {"version": 1, "family": "vit", "config": {...}, "card": {...}, "dtype": "float32"}

A config that holds another network's (a dense head's backbone) names that one's family too, see `families.to_json`.
"""

import functools
import json
import os
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from triptych.config import from_json, to_json
from triptych.errors import UserError
from triptych.model_card import ModelCard
from triptych.weights.files.checkpoint import CheckpointFile
from triptych.weights.files.write import write_shards
from triptych.weights.mapping import families
from triptych.weights.mapping.format import Reading, state

if TYPE_CHECKING:
    from triptych.models.text import TextEncoder

KEY = "triptych"
VERSION = 1


def save(
    net: nn.Module,
    path: str | os.PathLike[str],
    dtype: torch.dtype | None = None,
    max_shard_size: int | None = None,
) -> None:
    """Write a network as one .safetensors file; `load` gives it back bit for bit.

    Args:
        net: any network of this package; its config and card go along.
        path: the file to make or replace; it appears whole or not at all.
        dtype: a smaller type to keep the floating numbers in, such as torch.float16. Loading gives them
            back in the network's own type, rounded; without it nothing is rounded.
        max_shard_size: bytes of tensors a file, at most. What needs more than one lies in `path`'s folder as
            model-00001-of-00002.safetensors and so on beside model.safetensors.index.json, and none is at `path`:
            load the folder, or the index.

    Raises:
        UserError: the file cannot be written, or the network is quantised.
    """
    if any(hasattr(parameter, "tensor_data_names") for parameter in net.parameters()):  # a name of torchao's
        raise UserError("a quantised network cannot be saved; save the network that it was made of")
    tensors = state(net)
    said = {
        "version": VERSION,
        "family": _family(net),
        "config": families.to_json(net.config),
        "card": to_json(getattr(net, "card", None) or ModelCard()),
        "dtype": str(_dtype(net)).removeprefix("torch."),
    }
    if (text := text_of(net)) is not None and text.has_tokenizer:
        said["tokenizer"] = text.tokenizer.to_json()
    if dtype is not None:
        tensors = {name: t.to(dtype) if t.is_floating_point() else t for name, t in tensors.items()}
    write_shards(path, tensors, {KEY: json.dumps(said, sort_keys=True)}, max_shard_size)


def is_ours(checkpoint: CheckpointFile) -> bool:
    """Whether `save` wrote it."""
    return KEY in checkpoint.metadata


def read(checkpoint: CheckpointFile) -> tuple[Reading, torch.dtype]:
    """What our own file says it is, and the type that its numbers are loaded in.

    Raises:
        UserError: damaged metadata, an unknown family, or a version from the future.
    """
    try:
        said: dict[str, Any] = json.loads(checkpoint.metadata[KEY])
        version, family, dtype = said["version"], said["family"], getattr(torch, said["dtype"])
        config_json, card_json = said["config"], said["card"]
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as problem:
        raise UserError(f"{checkpoint.path} has damaged triptych metadata; save it again") from problem
    if not isinstance(version, int) or version > VERSION:
        raise UserError(
            f"{checkpoint.path} is of version {version}, this triptych reads up to {VERSION}; upgrade it"
        )
    if not isinstance(family, str) or family not in families.FAMILIES or not isinstance(dtype, torch.dtype):
        raise UserError(
            f"{checkpoint.path} is of family {family!r}; this triptych knows {', '.join(families.FAMILIES)}"
        )
    try:
        config, card = families.from_json(family, config_json), from_json(ModelCard, card_json)
    except UserError as problem:
        raise UserError(f"{checkpoint.path}: {problem}") from problem
    facts: dict[str, str] = dict.fromkeys(("config", "preprocess", "classes"), "the file itself")
    reading = Reading(family, config, None, card, facts)
    if "tokenizer" in said:
        reading.finish = functools.partial(_give_tokenizer, said["tokenizer"])
    return reading, dtype


def text_of(net: Any) -> "TextEncoder | None":
    """The text encoder that a network is or holds."""
    from triptych.models.text import TextEncoder

    part = getattr(net, "text_encoder", net)
    return part if isinstance(part, TextEncoder) else None


def _give_tokenizer(said: Any, net: nn.Module) -> None:
    from triptych.models.tokenization.tokenizer import Tokenizer

    text = text_of(net)
    if text is not None:
        text.tokenizer = Tokenizer.from_json(said)


def _family(net: nn.Module) -> str:
    family = families.family_of(getattr(net, "config", None))
    if family is None:
        raise UserError(f"{type(net).__name__} is no network of this package; save needs one with a config")
    return family


def _dtype(net: nn.Module) -> torch.dtype:
    return next((p.dtype for p in net.parameters() if p.is_floating_point()), torch.float32)
