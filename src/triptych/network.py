"""What every network of the package has besides its parameters."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from triptych.model_card import Card


class Network(nn.Module):
    """A network with its `config` (what it is) and its `card` (what it was trained for)."""

    config: Any
    card: Card
    channels: list[int]
    """Of each map that `features` gives."""
    strides: list[int]
    """Pixels from one cell to the next in each of them."""
    by_block: bool = False
    """Whether `features(images, blocks)` gives the maps of chosen blocks, all of one size."""

    def features(self, images: Any, *args: Any) -> list[Any]:
        """Maps of normalised images, finest first."""
        raise NotImplementedError

    def blocks(self) -> list[nn.Module]:
        """The blocks in order: what checkpointing, compiling and sharding are applied to."""
        raise NotImplementedError

    def replace_head(self, num_classes: int, head: Any = "linear") -> None:
        """Give the network a fresh head, in place."""
        raise NotImplementedError


@contextmanager
def blank() -> Iterator[None]:
    """What is built inside has shapes and no numbers: it lies on the meta device, and nobody fills it.

    Filled there with normal numbers, an `nn.Embedding` for one, it would make torch import its compiler, which takes as
    long as importing torch.
    """
    with torch.device("meta"), _Unfilled():
        yield


class _Unfilled(TorchFunctionMode):
    """Leaves tensors as they are where `torch.nn.init` would fill them."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Tensor:
        kwargs = kwargs or {}
        if getattr(func, "__module__", None) == "torch.nn.init":
            return args[0] if args else kwargs["tensor"]
        return func(*args, **kwargs)
