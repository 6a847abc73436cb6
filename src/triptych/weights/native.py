"""Our own format: .safetensors with the network's config and model card in the metadata.

metadata["triptych"] = {"version": 1, "family": "vit", "config": {...}, "card": {...}, "dtype": "float32"}

A part of a config that may be of any family (the backbone of a segmenter) has its family too: see `families.to_json`.
"""

import functools
import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from triptych.atomic_write import require_place
from triptych.config import from_json, to_json
from triptych.errors import CheckpointError, TriptychError
from triptych.model_card import ModelCard
from triptych.weights.files.checkpoint import CheckpointFile
from triptych.weights.files.write import write_shards
from triptych.weights.mapping import families
from triptych.weights.mapping.format import LoadPlan, cpu_state_dict

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
    """Save a network as a .safetensors file. `load` restores it bit for bit.

    Args:
        net: any network of this package. Its config and card are stored too.
        path: the file to create or replace, with the suffix .safetensors; it is written atomically.
        dtype: store floating point tensors in a smaller dtype, such as torch.float16. They are loaded in the network's
            own dtype, rounded. By default nothing is rounded.
        max_shard_size: largest size of one file, in bytes of tensors. If the network needs several, shards named
            model-00001-of-00002.safetensors, ... and model.safetensors.index.json are written to the folder of `path`,
            and no file at `path` itself: load the folder, or the index.

    Raises:
        CheckpointError: no network of this package, a quantized one, or another suffix.
        StorageError: the file cannot be written.
    """
    if Path(path).suffix != ".safetensors":
        raise CheckpointError(
            f"{path}: a network is saved as .safetensors; give a name that ends so, or use tp.export"
        )
    require_place(path)
    if any(hasattr(parameter, "tensor_data_names") for parameter in net.parameters()):  # torchao's
        raise CheckpointError("a quantized network cannot be saved; save the network that it was made from")
    tensors = cpu_state_dict(net)
    header = {
        "version": VERSION,
        "family": _family(net),
        "config": families.to_json(net.config),
        "card": to_json(getattr(net, "card", None) or ModelCard()),
        "dtype": str(_dtype(net)).removeprefix("torch."),
    }
    if (text := text_of(net)) is not None and text.has_tokenizer:
        header["tokenizer"] = text.tokenizer.to_json()
    if dtype is not None:
        tensors = {name: t.to(dtype) if t.is_floating_point() else t for name, t in tensors.items()}
    write_shards(path, tensors, {KEY: json.dumps(header, sort_keys=True)}, max_shard_size)


def is_ours(checkpoint: CheckpointFile) -> bool:
    """Return whether `save` wrote the checkpoint."""
    return KEY in checkpoint.metadata


def read(checkpoint: CheckpointFile) -> tuple[LoadPlan, torch.dtype]:
    """Return how to load a file of ours, and the dtype to load it in.

    Raises:
        CheckpointError: damaged metadata, an unknown family, or a newer version of the format.
    """
    try:
        header: dict[str, Any] = json.loads(checkpoint.metadata[KEY])
        version, family, dtype = header["version"], header["family"], getattr(torch, header["dtype"])
        config_json, card_json = header["config"], header["card"]
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as problem:
        raise CheckpointError(f"{checkpoint.path} has damaged triptych metadata; save it again") from problem
    if not isinstance(version, int) or version > VERSION:
        raise CheckpointError(
            f"{checkpoint.path} is of version {version}, this triptych reads up to {VERSION}; upgrade it"
        )
    if not isinstance(family, str) or family not in families.FAMILIES or not isinstance(dtype, torch.dtype):
        raise CheckpointError(
            f"{checkpoint.path} is of family {family!r}; this triptych knows {', '.join(families.FAMILIES)}"
        )
    try:
        config, card = families.from_json(family, config_json), from_json(ModelCard, card_json)
    except TriptychError as problem:
        raise CheckpointError(f"{checkpoint.path}: {problem}") from problem
    facts: dict[str, str] = dict.fromkeys(("config", "preprocess", "classes"), "the file itself")
    plan = LoadPlan(family, config, None, card, facts)
    if "tokenizer" in header:
        plan.finish = functools.partial(_set_tokenizer, header["tokenizer"])
    return plan, dtype


def text_of(net: Any) -> "TextEncoder | None":
    """Return the text encoder that a network is or has, or None."""
    from triptych.models.text import TextEncoder

    part = getattr(net, "text_encoder", net)
    return part if isinstance(part, TextEncoder) else None


def _set_tokenizer(tokenizer_json: Any, net: nn.Module) -> None:
    from triptych.models.tokenization.tokenizer import Tokenizer

    text = text_of(net)
    if text is not None:
        text.tokenizer = Tokenizer.from_json(tokenizer_json)


def _family(net: nn.Module) -> str:
    family = families.family_of(getattr(net, "config", None))
    if family is None:
        raise CheckpointError(
            f"{type(net).__name__} is no network of this package; save needs one with a config"
        )
    return family


def _dtype(net: nn.Module) -> torch.dtype:
    return next((p.dtype for p in net.parameters() if p.is_floating_point()), torch.float32)
