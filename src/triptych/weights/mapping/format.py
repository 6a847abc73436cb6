"""What a format is: how its files are recognized, read and written. The tables lie in one folder for each family."""

import copy
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from triptych.diffusion.config import Prediction
from triptych.errors import CheckpointError
from triptych.model_card import ModelCard
from triptych.models.configs.unet import UNetConfig
from triptych.weights.files.checkpoint import CheckpointFile
from triptych.weights.files.tensor_entry import Shape, TensorEntry
from triptych.weights.mapping.rules import Rule

Settings = dict[str, Any]
WeightsChoice = Literal["raw", "ema"]


@dataclass(frozen=True)
class Hints:
    """What the caller knows and a file may not store."""

    image_size: tuple[int, int] | None = None
    window_size: Any = None
    """As `models.configs.swin.windows_of` takes it."""
    certain: bool = False
    """Whether the hints belong to this very file, as those of a sidecar do. Arguments of a call may instead be sizes to
    resize to."""
    prediction: Prediction | None = None
    """What a denoising network predicts."""
    weights: WeightsChoice | None = None
    """Which of two sets in a file: raw, as training left them, or their exponential moving average."""
    heads: tuple[Any, Any] | None = None
    """Of a UNet: `num_heads` and `head_dim`, one of them 0. The order of attention's rows may depend on them."""


def hints_from_config(config: Any) -> Hints:
    """Return all hints that a reader could need for a network of this config."""
    config = getattr(config, "backbone", config)
    process, unet = getattr(config, "process", None), getattr(config, "network", config)
    return Hints(
        getattr(config, "image_size", None),
        getattr(config, "window_size", None),
        certain=True,
        prediction=None if process is None else process.prediction,
        heads=(unet.num_heads, unet.head_dim) if isinstance(unet, UNetConfig) else None,
    )


@dataclass
class LoadPlan:
    """The network that a checkpoint holds and the rules that fill it. What a format's reader returns."""

    family: str
    config: Any
    rules: list[Rule] | None
    """None if the file has our own keys."""
    card: ModelCard
    facts: dict[str, str] = field(default_factory=dict)
    """Where each value that shapes cannot determine came from: {"num_heads": "config.json", ...}."""
    notes: list[str] = field(default_factory=list)
    """What of the file is left out."""
    finish: Callable[[Any], None] | None = None
    """Gives the filled network what is no tensor: its tokenizer."""


@dataclass
class Draft:
    """A network in a foreign format, before it is written: tensors by their keys there, and JSON files."""

    tensors: dict[str, Tensor]
    settings: dict[str, Settings] = field(default_factory=dict)
    """JSON by file name without the suffix: config, preprocessor_config."""
    wrapper_key: str | None = None
    """Key under which a .pth stores the weights."""
    extras: Settings = field(default_factory=dict)
    """Plain values stored next to that key."""
    finish: Callable[[Path], None] | None = None
    """Writes the remaining files into the folder: a tokenizer."""


@dataclass(frozen=True)
class Format:
    """One published layout of keys and shapes, for the networks of one family."""

    name: str
    """The name that `export` takes. Formats of several families may share it: "timm" holds a ViT or a Swin."""
    family: str
    title: str
    container: Literal["folder", "npz", "torch", "pipeline"]
    """What is written: a folder with JSON and the weights, a .npz, a .pth (or single .safetensors), or a folder of such
    folders, whose names are prefixes of the keys of tensors and settings."""
    matches: Callable[["StateDictKeys"], bool]
    read: Callable[["StateDictKeys", Hints], LoadPlan]
    draft: Callable[[Any], Draft]
    stem: str = "model"
    """Name of the weights file in a folder, without suffix."""
    halves: tuple[str, ...] = ()
    """Prefixes of tensors that a folder has in a file each, without the prefix: STEM_encoder.pth holds `encoder.*`."""


class StateDictKeys:
    """The keys and shapes of a checkpoint's state dict, with the queries that readers need.

    Args:
        checkpoint: the file.
        tensors: tensors to read values from, of a draft that has no file yet.
    """

    def __init__(self, checkpoint: CheckpointFile, tensors: Mapping[str, Tensor] | None = None):
        self._read: Callable[[str], Tensor] = checkpoint.read if tensors is None else tensors.__getitem__
        self.path = checkpoint.path
        self.settings = checkpoint.settings
        self.metadata = checkpoint.metadata
        self.container = checkpoint.container
        self.notes = checkpoint.notes
        self.yaml = checkpoint.yaml
        self.shapes: dict[str, Shape] = dict(checkpoint.shapes)

    def __contains__(self, key: str) -> bool:
        return key in self.shapes

    def shape(self, key: str, ndim: int) -> Shape:
        """Return the shape of a tensor that must exist and have `ndim` axes.

        Raises:
            CheckpointError: it is missing, has another number of axes, or is empty.
        """
        if key not in self.shapes:
            raise CheckpointError(f"{self.path} lacks {key}; give a complete checkpoint")
        shape = self.shapes[key]
        if len(shape) != ndim or min(shape, default=1) < 1:
            raise CheckpointError(
                f"{self.path} has {key} of shape {list(shape)}, needs {ndim} axes; it is another kind of network"
            )
        return shape

    def subset(self, prefix: str) -> "StateDictKeys":
        """Return the keys that begin with `prefix`, without it."""
        part = copy.copy(self)
        part.shapes = {key[len(prefix) :]: s for key, s in self.shapes.items() if key.startswith(prefix)}
        part._read = lambda key: self._read(prefix + key)
        return part

    def prefix_before(self, suffix: str) -> str | None:
        """Return what precedes `suffix` in the first key that ends with it, or None."""
        return next((key.removesuffix(suffix) for key in self.shapes if key.endswith(suffix)), None)

    def read_small(self, key: str, max_numel: int = 2**24) -> Tensor | None:
        """Read a small tensor whose values are needed for the config; None if it is missing or large."""
        if key not in self.shapes or math.prod(self.shapes[key]) > max_numel:
            return None
        return self._read(key)

    def any_endswith(self, suffix: str) -> bool:
        """Return whether any key ends with `suffix`."""
        return any(key.endswith(suffix) for key in self.shapes)

    def any_startswith(self, prefix: str | tuple[str, ...]) -> bool:
        """Return whether any key starts with `prefix`, or one of several."""
        return any(key.startswith(prefix) for key in self.shapes)

    def count_blocks(self, pattern: str) -> int:
        """Return the number of blocks: `{i}` in the pattern counts from 0 while some key starts with it."""
        depth = 0
        while self.any_startswith(pattern.replace("{i}", str(depth))):
            depth += 1
        return depth


def draft_keys(draft: Draft, path: Path, container: str) -> StateDictKeys:
    """Return a draft as its reader would see it on disk."""
    entries = {key: TensorEntry(path, 0, tuple(t.shape), t.dtype) for key, t in draft.tensors.items()}
    settings = draft.settings | ({"inside": draft.extras} if draft.extras else {})
    return StateDictKeys(CheckpointFile(path, entries, container, settings=settings), draft.tensors)


def cpu_state_dict(net: nn.Module) -> dict[str, Tensor]:
    """Return the state dict of a network, detached and on the CPU."""
    return {key: tensor.detach().cpu() for key, tensor in net.state_dict().items()}


def state_dict_shapes(net: nn.Module) -> dict[str, Shape]:
    """Return the shape of every tensor in the state dict of a network."""
    return {key: tuple(tensor.shape) for key, tensor in net.state_dict().items()}


def zeros_factory(*shape: int) -> Callable[[], Tensor]:
    """Return a function that creates a tensor of zeros, as `restore` of a rule takes it."""
    return lambda: torch.zeros(shape)
