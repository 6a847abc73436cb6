"""The part of a batch that one of several processes has, and sums over all of them.

What is drawn for a batch is drawn for all of it, by every process alike, and each keeps the rows of its own pictures:
so a sample's noise, crop and dropped paths depend on its place in the batch and not on how many processes share it.
What is a sum over the batch (the statistics of a batch norm, the pixels of a class) is summed over all processes.
Outside of `sharing`, as in every run of one process, `drawn` draws and `summed` is the identity.
"""

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor

T = TypeVar("T")


@dataclass(frozen=True)
class BatchShard:
    """Rows `first` to `first + count` of a batch of `whole`."""

    start: int
    count: int
    total: int
    weight: float
    """Of this process's mean over its rows: the mean over processes of weighted means is that over the batch."""


@dataclass
class ProcessGroup:
    """Who trains together; set by `triptych.train.distributed.process_group`."""

    rank: int = 0
    size: int = 1
    cpu_group: Any = None
    """The process group that numbers on the processor are agreed in."""
    checkpoint_group: Any = None
    """The one that checkpoints are written in, meanwhile."""


world = ProcessGroup()
_share: BatchShard | None = (
    None  # of the module and not of the thread: CUDA's backward passes run in another one
)


@contextlib.contextmanager
def use_shard(share: BatchShard | None) -> Iterator[None]:
    """What runs inside sees the rows of `share` alone."""
    global _share
    before, _share = _share, share
    try:
        yield
    finally:
        _share = before


def current_shard() -> BatchShard | None:
    """The share of the batch that is being worked on; None of a whole one."""
    return _share


def shard_weight() -> float:
    """What this process's mean over its rows is to be multiplied by."""
    return 1.0 if _share is None else _share.weight


def draw_rows(count: int, draw: Callable[[int], T]) -> T:
    """This process's rows of `draw(rows of the whole batch)`, whose first axis are rows.

    Args:
        count: rows that are wanted: those of the share, or a multiple where each picture has several, one after
            another (Swin's windows). Other numbers have no place in the batch; they are drawn as they are.
    """
    share = _share
    if share is None or count % share.count:
        return draw(count)
    each = count // share.count
    return draw(share.total * each)[share.start * each :][:count]  # type: ignore[index]


class _Sum(torch.autograd.Function):
    """The gradient of a sum that every process has gone on from is the sum of what each says of it."""

    @staticmethod
    def forward(_ctx: Any, x: Tensor) -> Tensor:
        return _all_reduced(x)

    @staticmethod
    def backward(_ctx: Any, *grads: Tensor) -> Tensor:
        return _all_reduced(grads[0])


def sum_over_batch(x: Tensor) -> Tensor:
    """The sum over all processes that share the batch; x, where none does."""
    return x if _share is None else _Sum.apply(x)  # type: ignore[return-value]


def all_sum(*numbers: float) -> tuple[float, ...]:
    """Each number summed over all processes, in fp64; outside of a batch, such as for the figures of an evaluation."""
    if world.size == 1:
        return numbers
    return tuple(_all_reduced(torch.tensor(numbers, dtype=torch.float64), world.cpu_group).tolist())


def gather_tensors(tensor: Tensor, group: Any = None) -> list[Tensor]:
    """The tensors of all processes but the empty ones, for torchmetrics' `dist_sync_fn`: its own wants every process to
    have some samples."""
    return [part.to(tensor.device) for part in all_gather(tensor.detach().cpu()) if part.numel()] or [tensor]


def all_gather(value: T) -> list[T]:
    """What every process has of something, tensors on the processor; to be called by all."""
    if world.size == 1:
        return [value]
    import torch.distributed as dist

    found: list[Any] = [None] * world.size
    dist.all_gather_object(found, value, world.cpu_group)
    return found


def barrier() -> None:
    """Wait for all processes."""
    all_sum(0.0)


def total(x: Tensor) -> Tensor:
    """The sum over all processes, whatever they work on; without a gradient."""
    return _all_reduced(x)


def _all_reduced(x: Tensor, group: Any = None) -> Tensor:
    import torch.distributed as dist

    x = x.detach().clone(memory_format=torch.contiguous_format)
    dist.all_reduce(x, group=group)
    return x
