"""Fill a network that was built on the meta device with the tensors of a checkpoint."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from triptych.errors import CheckpointError
from triptych.weights.files.checkpoint import CheckpointFile
from triptych.weights.mapping.format import LoadPlan, state_dict_shapes
from triptych.weights.mapping.rules import Rule, plan_rules, rename, split_slice


def rules_for(net: nn.Module, plan: LoadPlan) -> Sequence[Rule]:
    """Return the rules of a plan; if the file has our own keys, a rule for each of them."""
    return [rename(key, key) for key in state_dict_shapes(net)] if plan.rules is None else plan.rules


def fill_network(
    net: nn.Module,
    checkpoint: CheckpointFile,
    rules: Sequence[Rule],
    what: str,
    dtype: torch.dtype | None = None,
) -> None:
    """Set every parameter and saved buffer of a network on the meta device, one at a time.

    A tensor that needs no conversion stays mapped to the file; the pages of one that does are released as soon as it is
    converted. The peak of memory is the weights and one tensor.

    Args:
        what: start of error messages, which names the file and the format.
        dtype: of all parameters; by default the file's own, or the widest that it has.

    Raises:
        CheckpointError: the tensors do not match the network exactly (see `plan_rules`), or those of a parameter are
            not floating point.
    """
    steps = plan_rules(rules, checkpoint.shapes, state_dict_shapes(net), what)
    parameters = dict(net.named_parameters())
    dtype = dtype or _common_dtype(checkpoint, steps, parameters)
    for step in steps:
        if step.restore is not None:
            tensors: tuple[Tensor, ...] = (step.restore(),)
        else:
            borrowed = checkpoint.borrow([split_slice(key) for key in step.theirs])
            tensors = step.operation.forward(tuple(t.to(widened(t.dtype)) for t in borrowed))
        for key, tensor in zip(step.ours, tensors, strict=True):
            owner, _, name = key.rpartition(".")
            module = net.get_submodule(owner)
            if key not in parameters:
                buffer_dtype = dtype if tensor.is_floating_point() else tensor.dtype
                setattr(module, name, tensor.to(buffer_dtype, copy=True))
                continue
            if not tensor.is_floating_point():
                raise CheckpointError(
                    f"{what}: {', '.join(step.theirs)} holds {tensor.dtype}; needed are floating point numbers"
                )
            setattr(module, name, nn.Parameter(_unshared(tensor.to(dtype), checkpoint.borrowed_from_file)))
    unfilled = [name for name, t in (*net.named_parameters(), *net.named_buffers()) if t.is_meta]
    if unfilled:
        raise RuntimeError(f"{type(net).__name__} keeps {unfilled} outside its state; build them in forward")


def _unshared(tensor: Tensor, from_file: bool) -> Tensor:
    """Return a contiguous tensor in memory that no other tensor uses: pages of the file, or a storage of its own."""
    tensor = tensor.contiguous()
    return tensor if from_file or tensor.untyped_storage().nbytes() == tensor.nbytes else tensor.clone()


def widened(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype in which weights are computed with: float16, which holds all float8 numbers, for these."""
    return torch.float16 if dtype.is_floating_point and dtype.itemsize == 1 else dtype


def _common_dtype(
    checkpoint: CheckpointFile, steps: Sequence[Rule], parameters: dict[str, Any]
) -> torch.dtype:
    """Return the dtype of the file's parameters; if it mixes several, the widest."""
    dtypes = {
        widened(checkpoint.entries[split_slice(key)[0]].dtype)
        for step in steps
        if any(key in parameters for key in step.ours)
        for key in step.theirs
    }
    widest = torch.float32 if not dtypes else dtypes.pop()
    for dtype in dtypes:
        widest = torch.promote_types(widest, dtype)
    return widest
