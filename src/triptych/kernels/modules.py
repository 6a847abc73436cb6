"""Replacing tensors of a module by others that `nn.Module` would refuse."""

from torch import Tensor, nn


def swap_parameter(net: nn.Module, name: str, tensor: Tensor | nn.Parameter) -> Tensor:
    """Replace a parameter by a tensor and return the parameter.

    Unlike `setattr`, this accepts tensors that are not parameters, such as results of operations with a gradient.
    """
    owner, _, leaf = name.rpartition(".")
    parameters = net.get_submodule(owner)._parameters
    before, parameters[leaf] = parameters[leaf], tensor  # type: ignore[assignment]
    return before  # type: ignore[return-value]
