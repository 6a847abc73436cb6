"""Activation checkpointing (Chen et al. 2016): a block's activations are recomputed in the backward pass."""

from collections.abc import Generator
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from triptych.network import Network


class CheckpointedBlock(nn.Module):
    """Wrap a block so that its activations are recomputed in the backward pass, with the same RNG state.

    The wrapper does not show: names of parameters and keys of the state dict are those of the block, and attributes
    are looked up in the block.
    """

    def __init__(self, block: nn.Module):
        super().__init__()
        self.block = block
        self.training = block.training
        self.register_load_state_dict_pre_hook(_add_block_to_keys)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        if not torch.is_grad_enabled():
            return self.block(*args, **kwargs)
        return checkpoint(self.block, *args, use_reentrant=False, **kwargs)

    def named_modules(
        self, memo: set[nn.Module] | None = None, prefix: str = "", remove_duplicate: bool = True
    ) -> Generator[tuple[str, nn.Module], None, None]:
        """The wrapper, then the block and its parts, all under the names that they have without it."""
        memo = set() if memo is None else memo
        if self not in memo:
            if remove_duplicate:
                memo.add(self)
            yield prefix, self
            yield from self.block.named_modules(memo, prefix, remove_duplicate)

    def state_dict(self, *args: Any, **kwargs: Any) -> Any:
        return self.block.state_dict(*args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("block"), name)


def _add_block_to_keys(_wrapper: nn.Module, state_dict: dict[str, Any], prefix: str, *_args: Any) -> None:
    for name in [name for name in state_dict if name.startswith(prefix)]:
        state_dict[f"{prefix}block.{name.removeprefix(prefix)}"] = state_dict.pop(name)


def checkpoint_activations(net: Network) -> None:
    """Wrap every block of a network, in place."""
    blocks = {id(block) for block in net.blocks()}
    for parent in list(net.modules()):
        for name, child in list(parent.named_children()):
            if id(child) in blocks:
                setattr(parent, name, CheckpointedBlock(child))


def outer_blocks(net: Network) -> list[nn.Module]:
    """Return the blocks of a network, each with its wrapper if it has one."""
    wrappers = {id(part.block): part for part in net.modules() if isinstance(part, CheckpointedBlock)}
    return [wrappers.get(id(block), block) for block in net.blocks()]
