"""The base class of all networks, and their construction on the meta device."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from triptych.model_card import ModelCard


class Network(nn.Module):
    """A network with its `config` (architecture) and its `card` (preprocessing, classes, scores, license)."""

    config: Any
    card: ModelCard
    channels: list[int]
    """Number of channels of each map that `features` returns."""
    strides: list[int]
    """Stride of each of these maps, in pixels."""
    by_block: bool = False
    """Whether `features(images, blocks)` returns the outputs of chosen blocks, all of one size."""

    def features(self, images: Any, *args: Any, **options: Any) -> list[Any]:
        """Return feature maps of normalized images, the finest first.

        Args:
            images: (B, C, H, W).

        Returns:
            One (B, channels[i], H / strides[i], W / strides[i]) for each entry of `channels`.
        """
        raise NotImplementedError

    def blocks(self) -> list[nn.Module]:
        """Return the blocks in order: the units of activation checkpointing, compilation and sharding."""
        raise NotImplementedError

    def replace_head(self, num_classes: int, head: Any = "linear") -> None:
        """Replace the head by a new one with `num_classes` outputs, in place."""
        raise NotImplementedError


@contextmanager
def on_meta_device() -> Iterator[None]:
    """Build networks on the meta device, with shapes and without values; `torch.nn.init` does nothing.

    Normal initialization on the meta device, of an `nn.Embedding` for example, would make torch import its compiler,
    which takes as long as importing torch.
    """
    with torch.device("meta"), _NoInitialization():
        yield


class _NoInitialization(TorchFunctionMode):
    """Makes the functions of `torch.nn.init` return their tensor unchanged."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Tensor:
        kwargs = kwargs or {}
        if getattr(func, "__module__", None) == "torch.nn.init":
            return args[0] if args else kwargs["tensor"]
        return func(*args, **kwargs)
