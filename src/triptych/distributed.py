"""The processes of a training run, and the rows of a batch that each of them holds.

`ProcessGroup` names the processes. The run owns it and passes it to everything that sums or gathers outside a training
step: evaluations, checkpoints, caches, the log. `SINGLE_PROCESS` is the group of one process.

`BatchShard` says which rows of the current batch this process holds. Layers cannot take it as an argument, since their
`forward` takes tensors only, so `use_shard` sets it for a block of code. Inside that block every process draws random
numbers for the full batch and keeps its own rows (`draw_rows`), and sums over the batch, such as the statistics of a
batch norm, are taken over all processes (`sum_over_batch`). So the noise, crop and dropped paths of a sample depend on
its index in the batch, not on the number of processes. Outside `use_shard`, as in every run of a single process,
`draw_rows` only draws and `sum_over_batch` is the identity.
"""

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor

T = TypeVar("T")


@dataclass(frozen=True)
class ProcessGroup:
    """Processes that work together. All of them must call each method, at the same point of the program."""

    rank: int = 0
    size: int = 1
    cpu_group: Any = None
    """The group of torch.distributed for values on the CPU."""
    checkpoint_group: Any = None
    """The group in which checkpoints are written in the background."""

    @property
    def is_main(self) -> bool:
        """Whether this is the process that writes files and logs."""
        return self.rank == 0

    def all_sum(self, *numbers: float) -> tuple[float, ...]:
        """Return each number summed over all processes, in fp64."""
        if self.size == 1:
            return numbers
        return tuple(_all_reduce(torch.tensor(numbers, dtype=torch.float64), self.cpu_group).tolist())

    def all_gather(self, value: T) -> list[T]:
        """Return the value of every process, in the order of ranks. Tensors in it must be on the CPU."""
        if self.size == 1:
            return [value]
        import torch.distributed as dist

        values: list[Any] = [None] * self.size
        dist.all_gather_object(values, value, self.cpu_group)
        return values

    def gather_tensors(self, tensor: Tensor, group: Any = None) -> list[Tensor]:
        """Return the tensors of all processes except empty ones. For the `dist_sync_fn` of torchmetrics, whose own
        function needs samples in every process; `group` is part of its signature and not used."""
        parts = [part.to(tensor.device) for part in self.all_gather(tensor.detach().cpu()) if part.numel()]
        return parts or [tensor]

    def sum_tensor(self, x: Tensor) -> Tensor:
        """Return the sum of a tensor over all processes, without a gradient."""
        return _all_reduce(x)

    def barrier(self) -> None:
        """Wait for all processes."""
        self.all_sum(0.0)


SINGLE_PROCESS = ProcessGroup()


@dataclass(frozen=True)
class BatchShard:
    """The rows `start` to `start + count` of a batch of `total` rows."""

    start: int
    count: int
    total: int
    weight: float
    """Weight of this process's mean over its rows: the mean of the weighted means over all processes is the mean over
    the batch."""
    group: ProcessGroup = SINGLE_PROCESS
    """The processes that hold the batch."""


# Global and not per thread: the backward pass of CUDA runs in a thread of its own and draws and sums too.
_shard: BatchShard | None = None


@contextlib.contextmanager
def use_shard(shard: BatchShard | None) -> Iterator[None]:
    """Make `shard` the rows of this process inside the block."""
    global _shard
    before, _shard = _shard, shard
    try:
        yield
    finally:
        _shard = before


def current_shard() -> BatchShard | None:
    """Return the shard of the current batch; None if this process holds all of it."""
    return _shard


def shard_weight() -> float:
    """Return the weight of this process's mean over its rows."""
    return 1.0 if _shard is None else _shard.weight


def draw_rows(count: int, draw: Callable[[int], T]) -> T:
    """Return this process's rows of `draw(number of rows in the full batch)`.

    Args:
        count: number of rows to return: those of the shard, or a multiple of it where each image has several successive
            rows (the windows of a Swin). Any other count is not part of the batch and is drawn locally.
        draw: returns an array or tensor with the given number of rows in its first axis.
    """
    shard = _shard
    if shard is None or count % shard.count:
        return draw(count)
    per_image = count // shard.count
    return draw(shard.total * per_image)[shard.start * per_image :][:count]  # type: ignore[index]


class _Sum(torch.autograd.Function):
    """Sum over processes. The gradient of a sum that all processes continue from is the sum of their gradients."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return _all_reduce(x)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> Tensor:
        return _all_reduce(grad_outputs[0])


def sum_over_batch(x: Tensor) -> Tensor:
    """Return the sum over all processes that hold the batch, with a gradient; x itself if one process holds it."""
    return x if _shard is None else _Sum.apply(x)  # type: ignore[return-value]


def mean_over_processes(x: Tensor) -> Tensor:
    """Return the mean over all processes that hold the batch, with a gradient; x itself if one process holds it."""
    return x if _shard is None else sum_over_batch(x) / _shard.group.size


def _all_reduce(x: Tensor, group: Any = None) -> Tensor:
    import torch.distributed as dist

    x = x.detach().clone(memory_format=torch.contiguous_format)
    dist.all_reduce(x, group=group)
    return x
