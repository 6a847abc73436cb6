"""What a format is: how its files are recognised, read and written. The tables live in a folder a family."""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from triptych.card import Card
from triptych.config import to_json
from triptych.errors import UserError
from triptych.models.vit import ViT
from triptych.models.vit_config import ViTConfig
from triptych.weights.entry import Entry, Shape
from triptych.weights.files import Checkpoint
from triptych.weights.rules import Rule

Settings = dict[str, Any]


@dataclass(frozen=True)
class Hints:
    """What the caller knows and a file may not say."""

    image_size: tuple[int, int] | None = None


@dataclass
class Reading:
    """What a format's reader found out about a checkpoint, before reading a tensor."""

    family: str
    config: ViTConfig
    rules: list[Rule]
    card: Card
    facts: dict[str, str] = field(default_factory=dict)
    """Where each thing that shapes cannot tell came from: {"num_heads": "config.json", ...}."""


@dataclass
class Draft:
    """A network in a foreign format, not yet written: tensors by their names there, and JSON beside them."""

    tensors: dict[str, Tensor]
    settings: dict[str, Settings] = field(default_factory=dict)
    """By file name without the ending: config, preprocessor_config."""
    nest: str | None = None
    """Key under which a .pth holds the weights."""


@dataclass(frozen=True)
class Format:
    """One published layout of names and shapes."""

    name: str
    title: str
    container: Literal["folder", "npz", "torch"]
    """What writing makes: a folder with JSON beside the weights, a .npz, or a .pth (or bare .safetensors)."""
    recognises: Callable[["Names"], bool]
    read: Callable[["Names", Hints], Reading]
    draft: Callable[[ViT], Draft]


class Names:
    """The names and shapes of a checkpoint, with the questions that every reader asks of them."""

    def __init__(self, checkpoint: Checkpoint):
        self.path = checkpoint.path
        self.settings = checkpoint.settings
        self.container = checkpoint.container
        self.notes = checkpoint.notes
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
    entries = {name: Entry(path, 0, tuple(t.shape), t.dtype) for name, t in draft.tensors.items()}
    return Names(Checkpoint(path, entries, container, settings=dict(draft.settings)))


# What a bare file of weights leaves to its reader's conventions, though no tensor's place depends on it. `export` puts
# these into a small JSON of ours beside the file, which `load` prefers to the conventions.
UNSAID = ("mlp", "norm_eps", "image_size")


def aside(weights: Path) -> Path:
    """Where that JSON lies: net.npz has net.npz.json."""
    return weights.with_name(weights.name + ".json")


def unsaid(net: ViT, back: ViTConfig) -> dict[str, Any]:
    """The fields of `UNSAID` that a file would be read back with other values of, and ours."""
    ours, theirs = to_json(net.config), to_json(back)
    return {name: ours[name] for name in UNSAID if ours[name] != theirs[name]}


def require_same(net: ViT, back: ViTConfig, title: str) -> None:
    """Refuse to write a format that would be read back as another network, but for what `unsaid` says.

    Raises:
        UserError: names every field that the format has no way to say.
    """
    ours, theirs = _comparable(net.config), _comparable(back)
    gelu = {ours.mlp, theirs.mlp} <= {"gelu", "gelu_tanh"}
    differing = [
        f"{name} (here {getattr(ours, name)!r}, read back as {getattr(theirs, name)!r})"
        for name in ours.__dataclass_fields__
        if getattr(ours, name) != getattr(theirs, name) and not (name in UNSAID and (name != "mlp" or gelu))
    ]
    if differing:
        raise UserError(f"{title} cannot say {', '.join(differing)}; choose another format")


def _comparable(config: ViTConfig) -> ViTConfig:
    """The config less what only training reads and what its other fields make meaningless."""
    placed = config.position == "learned" and (config.class_token or config.distill_token)
    return replace(
        config,
        drop_path=0.0,
        dropout=0.0,
        layer_scale=None if config.layer_scale is None else 1.0,
        head_dim=(config.head_dim or config.embed_dim) if config.head == "mlp" else 0,
        prefix_positions=config.prefix_positions or not placed,
        rotary_base=config.rotary_base if config.position == "rotary" else 100.0,
    )


def state(net: nn.Module) -> dict[str, Tensor]:
    """Every saved tensor of a network by name, on the CPU, as it is."""
    return {name: tensor.detach().cpu() for name, tensor in net.state_dict().items()}


def shapes_of(net: nn.Module) -> dict[str, Shape]:
    """The shape of every saved tensor of a network."""
    return {name: tuple(tensor.shape) for name, tensor in net.state_dict().items()}


def zeros(*shape: int) -> Callable[[], Tensor]:
    """Makes a tensor of zeros when called."""
    return lambda: torch.zeros(shape)
