"""What every network of the package has besides its parameters."""

from typing import Any

from torch import nn

from triptych.card import Card


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
