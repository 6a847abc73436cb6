"""Replacing tensors of a module by others that `nn.Module` would refuse."""

from torch import Tensor, nn


def swap_parameter(net: nn.Module, name: str, tensor: Tensor | nn.Parameter) -> Tensor:
    """Put a tensor in the place of a parameter and return what was there.

    Unlike `setattr` this takes tensors that are no parameters: results of other tensors, through which gradients pass.
    """
    owner, _, leaf = name.rpartition(".")
    parameters = net.get_submodule(owner)._parameters
    before, parameters[leaf] = parameters[leaf], tensor  # type: ignore[assignment]
    return before  # type: ignore[return-value]
