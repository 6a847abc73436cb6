"""What a format is: how its files are recognised, read and written. The tables live in a folder a family."""

import copy
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from triptych.diffusion.config import Prediction
from triptych.errors import UserError
from triptych.model_card import ModelCard
from triptych.models.configs.unet import UNetConfig
from triptych.weights.files.checkpoint import CheckpointFile
from triptych.weights.files.tensor_entry import Shape, TensorEntry
from triptych.weights.mapping.rules import Rule

Settings = dict[str, Any]
Weights = Literal["raw", "ema"]


@dataclass(frozen=True)
class Hints:
    """What the caller knows and a file may not say."""

    image_size: tuple[int, int] | None = None
    window: Any = None
    """As `models.configs.swin.windows_of` takes it."""
    certain: bool = False
    """Whether it was written down for this very file; what a call asks for may be another size to move to."""
    prediction: Prediction | None = None
    """What a denoising network's output stands for."""
    weights: Weights | None = None
    """Which of two sets in a file: as training left them, or their running average."""
    heads: tuple[Any, Any] | None = None
    """Of a UNet: `heads` and `head_dim`, one of them 0. The order of rows may depend on them."""


def hints_of(config: Any) -> Hints:
    """All hints that a reader could want for a network of this config."""
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
class Reading:
    """What a format's reader found out about a checkpoint, before reading a tensor."""

    family: str
    config: Any
    rules: list[Rule] | None
    """None where the file names its tensors as the network does."""
    card: ModelCard
    facts: dict[str, str] = field(default_factory=dict)
    """Where each thing that shapes cannot tell came from: {"num_heads": "config.json", ...}."""
    finish: Callable[[Any], None] | None = None
    """Gives the filled network what is no tensor: its tokenizer."""


@dataclass
class Draft:
    """A network in a foreign format, not yet written: tensors by their names there, and JSON beside them."""

    tensors: dict[str, Tensor]
    settings: dict[str, Settings] = field(default_factory=dict)
    """By file name without the ending: config, preprocessor_config."""
    nest: str | None = None
    """Key under which a .pth holds the weights."""
    beside: Settings = field(default_factory=dict)
    """Plain values beside that key."""
    finish: Callable[[Path], None] | None = None
    """Writes into the folder what is neither: a tokenizer."""


@dataclass(frozen=True)
class Format:
    """One published layout of names and shapes, for the networks of one family."""

    name: str
    """What `export` is told. Formats of several families may share it: "timm" holds a ViT or a Swin."""
    family: str
    title: str
    container: Literal["folder", "npz", "torch", "pipeline"]
    """What writing makes: a folder with JSON beside the weights, a .npz, a .pth (or bare .safetensors), or a folder of
    such folders, whose names stand in front of tensors' and settings'."""
    recognises: Callable[["Names"], bool]
    read: Callable[["Names", Hints], Reading]
    draft: Callable[[Any], Draft]
    stem: str = "model"
    """What the weights in a folder are called, without ending."""


class Names:
    """The names and shapes of a checkpoint, with the questions that every reader asks of them."""

    def __init__(self, checkpoint: CheckpointFile, tensors: Mapping[str, Tensor] | None = None):
        self._read: Callable[[str], Tensor] = checkpoint.read if tensors is None else tensors.__getitem__
        self.path = checkpoint.path
        self.settings = checkpoint.settings
        self.metadata = checkpoint.metadata
        self.container = checkpoint.container
        self.notes = checkpoint.notes
        self.yaml = checkpoint.yaml
        self.shapes: dict[str, Shape] = dict(checkpoint.shapes)

    def __contains__(self, name: str) -> bool:
        return name in self.shapes

    def shape(self, name: str, ndim: int) -> Shape:
        """The shape of a tensor that must be there, with so many axes."""
        if name not in self.shapes:
            raise UserError(f"{self.path} lacks {name}; give a whole checkpoint")
        shape = self.shapes[name]
        if len(shape) != ndim or min(shape, default=1) < 1:
            raise UserError(
                f"{self.path} has {name} of shape {list(shape)}, needs {ndim} axes; it is another kind"
            )
        return shape

    def within(self, beginning: str) -> "Names":
        """The part of the names that begin so, without that beginning."""
        part = copy.copy(self)
        part.shapes = {n[len(beginning) :]: s for n, s in self.shapes.items() if n.startswith(beginning)}
        part._read = lambda name: self._read(beginning + name)
        return part

    def before(self, ending: str) -> str | None:
        """What stands in front of the first name that ends like that; none if no name does."""
        return next((name.removesuffix(ending) for name in self.shapes if name.endswith(ending)), None)

    def numbers(self, name: str, most: int = 2**24) -> Tensor | None:
        """A small tensor itself, where its numbers say what no shape does; none if it is missing or large."""
        if name not in self.shapes or math.prod(self.shapes[name]) > most:
            return None
        return self._read(name)

    def any(self, ending: str) -> bool:
        """Whether some name ends like that."""
        return any(name.endswith(ending) for name in self.shapes)

    def starts(self, beginning: str) -> bool:
        """Whether some name begins like that."""
        return any(name.startswith(beginning) for name in self.shapes)

    def count(self, pattern: str) -> int:
        """How many blocks there are: `{i}` in the pattern runs from 0 while some name begins with it."""
        depth = 0
        while self.starts(pattern.replace("{i}", str(depth))):
            depth += 1
        return depth


def drafted(draft: Draft, path: Path, container: str) -> Names:
    """A draft as its reader would find it on disk."""
    entries = {name: TensorEntry(path, 0, tuple(t.shape), t.dtype) for name, t in draft.tensors.items()}
    settings = draft.settings | ({"inside": draft.beside} if draft.beside else {})
    return Names(CheckpointFile(path, entries, container, settings=settings), draft.tensors)


def state(net: nn.Module) -> dict[str, Tensor]:
    """Every saved tensor of a network by name, on the CPU, as it is."""
    return {name: tensor.detach().cpu() for name, tensor in net.state_dict().items()}


def shapes_of(net: nn.Module) -> dict[str, Shape]:
    """The shape of every saved tensor of a network."""
    return {name: tuple(tensor.shape) for name, tensor in net.state_dict().items()}


def zeros(*shape: int) -> Callable[[], Tensor]:
    """Makes a tensor of zeros when called."""
    return lambda: torch.zeros(shape)
