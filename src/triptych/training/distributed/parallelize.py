"""Distributed training: how a run is spread over one or several processes.

torchrun starts the processes; DDP, or FSDP2's `fully_shard`, exchanges gradients. A batch is that of one process, cut
into as many runs of consecutive rows; whatever is drawn at random is drawn for the whole batch
(`triptych.distributed`). The training loop calls a `SingleProcess`, whose methods do nothing, or a `MultiProcess`.
"""

import contextlib
import copy
import functools
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn

from triptych import distributed
from triptych.data.example import Batch, TrainBatch
from triptych.data.loading.loader import Loader
from triptych.distributed import SINGLE_PROCESS, BatchShard, ProcessGroup
from triptych.network import Network
from triptych.torch_compile import compile_blocks
from triptych.training.adversary import Adversary
from triptych.training.configs.base import LoopConfig
from triptych.training.distributed.activation_checkpointing import checkpoint_activations, outer_blocks
from triptych.training.ema import Ema
from triptych.training.task import LossOutput, Task

Logs = dict[str, Tensor]


class SingleProcess:
    """A run in one process. `MultiProcess` has the same methods."""

    def __init__(self, group: ProcessGroup = SINGLE_PROCESS):
        self.group = group

    def split_loaders(self, train_loader: Loader, eval_loader: Loader) -> None:
        """Leave this process's part in each loader."""

    def parallelize(self, net: Network, ema: Ema | None, task: Task, adversary: Adversary | None) -> None:
        """Spread the networks over the processes. Called before the optimizers are created."""
        self.loss: Callable[[TrainBatch], LossOutput] = functools.partial(task.loss, net)

    def train_batches(self, loader: Loader) -> Iterable[Batch]:
        """Return the batches of an epoch, each with its "shard"; all processes have the same number of them."""
        return loader

    def step_context(self, batch: TrainBatch, last: bool) -> contextlib.AbstractContextManager[None]:
        """Return the context for forward and backward pass of a batch.

        Args:
            last: whether it is the last of the batches whose gradients are summed into one step.
        """
        return contextlib.nullcontext()

    def any(self, *flags: bool) -> tuple[bool, ...]:
        """Return for each flag whether it is set in any process."""
        return flags

    def mean(self, logs: Logs) -> Logs:
        """Return the mean of each value over the processes."""
        return logs

    def full_network(self, net: Network) -> contextlib.AbstractContextManager[Network]:
        """Return a context that gives `net` with all its parameters in this process, to be evaluated or saved."""
        return contextlib.nullcontext(net)

    def eval_batches(self, loader: Loader) -> Iterable[Batch]:
        """Return this process's batches of an evaluation, each with its "number" among those of all processes."""
        return loader


class MultiProcess(SingleProcess):
    """A run in several processes under torchrun.

    Args:
        group: the processes.
        sharded: use FSDP2 instead of DDP.
        device: the device of this process.
        dtype: the dtype of matrix products.
    """

    def __init__(self, group: ProcessGroup, sharded: bool, device: torch.device, dtype: torch.dtype):
        super().__init__(group)
        self.sharded, self.device, self.dtype = sharded, device, dtype
        self.replicas: list[Any] = []  # wrapped by DDP
        self.shards: list[Any] = []  # the roots of FSDP2
        self.scalars: list[Tensor] = []  # parameters that FSDP2 leaves as they are
        self.shells: dict[int, Network] = {}
        self.replica: Any = None  # of the trained network; made at the first batch
        self.networks: list[nn.Module] = []
        self.last = True

    def split_loaders(self, train_loader: Loader, eval_loader: Loader) -> None:
        train_loader.divide(self.group.rank, self.group.size, within=True)
        eval_loader.divide(self.group.rank, self.group.size, within=False)

    def parallelize(self, net: Network, ema: Ema | None, task: Task, adversary: Adversary | None) -> None:
        if adversary is not None:  # it is small: a replica in each process
            adversary.net.requires_grad_(True)
            module = LossModule(adversary.net, _without_network(adversary.loss))
            adversary.loss = functools.partial(_call, module, self._replicate(module))
            adversary.net.requires_grad_(False)
        module = LossModule(net, task.loss)
        if not self.sharded:
            self.networks = [net, *([adversary.net] if adversary else [])]
            self.loss = functools.partial(self._replicated_loss, module)
            return
        self._shard(net, module)
        if ema is not None:
            self._shard(ema.net, ema.net)
        self.shards.append(module)
        self.loss = functools.partial(_call, module, module)

    def _replicated_loss(self, module: "LossModule", batch: TrainBatch) -> LossOutput:
        """Call the loss under DDP. The replica is made at the first batch, since DDP must know whether the loss leaves
        parameters out (those of an auxiliary head of weight 0, for example); it then looks for them in every step."""
        if self.replica is None:
            unused = has_unused_parameters(module, batch, self.networks)
            self.replica = self._replicate(module, find_unused_parameters=unused)
            with contextlib.nullcontext() if self.last else self.replica.no_sync():
                return _call(module, self.replica, batch)
        return _call(module, self.replica, batch)

    def _replicate(self, module: "LossModule", **options: Any) -> Any:
        from torch.nn.parallel import DistributedDataParallel

        with (
            warnings.catch_warnings()
        ):  # DDP calls its own argument deprecated, under a name that old versions lack
            warnings.filterwarnings("ignore", message=".*broadcast_buffers. is deprecated")
            self.replicas.append(DistributedDataParallel(module, broadcast_buffers=False, **options))
        return self.replicas[-1]

    def _shard(self, net: Network, root: nn.Module) -> None:
        """Shard each block as a group of its own, which is gathered when it runs, and the rest as one more group.

        On CUDA, blocks are gathered and computed in the run's precision. What is outside of them stays in fp32, as do
        the reduction of gradients, the residual stream, and under autocast the statistics of norms and all losses. The
        norms of a CPU take no bf16 weights for fp32 inputs, so there only autocast computes in bf16.
        """
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

        for parameter in net.parameters():
            parameter.data = parameter.data.contiguous()
        self.shells[id(net)] = _without_memory(net)
        mesh = init_device_mesh(self.device.type, (self.group.size,))
        half = self.dtype if self.device.type == "cuda" and self.dtype != torch.float32 else None
        policy = MixedPrecisionPolicy(param_dtype=half, reduce_dtype=torch.float32, cast_forward_inputs=False)
        for block in outer_blocks(net):
            if any(True for _ in block.parameters()):
                fully_shard(block, mesh=mesh, mp_policy=policy)
        # A scalar cannot be sharded: every process has it, and `step_context` averages its gradient.
        scalars = {parameter for parameter in net.parameters() if parameter.ndim == 0}
        self.scalars += [parameter for parameter in scalars if parameter.requires_grad]
        fully_shard(root, mesh=mesh, ignored_params=scalars)

    def train_batches(self, loader: Loader) -> Iterator[Batch]:
        rank = self.group.rank
        for batch in loader:
            counts = self._gather_counts(len(batch["id"]))
            total = sum(counts)
            if total == 0:
                continue
            count, start = counts[rank], sum(counts[:rank])
            if 0 in counts:
                borrowed = self._broadcast_image(batch, counts.index(max(counts)))
                if not count:
                    batch, start = borrowed, 0
            weight = count * self.group.size / total
            shard = BatchShard(start, max(count, 1), total, weight, self.group)
            yield cast(Batch, {**batch, "shard": shard})

    def _gather_counts(self, count: int) -> list[int]:
        import torch.distributed as dist

        counts = torch.zeros(self.group.size, dtype=torch.int64)
        counts[self.group.rank] = count
        dist.all_reduce(counts, group=self.group.cpu_group)
        return counts.tolist()

    def _broadcast_image(self, batch: Batch, source: int) -> Batch:
        """Return one image of the process `source`. A process whose own images are all damaged computes with it, at
        weight 0, so that it takes part in every exchange."""
        import torch.distributed as dist

        images: list[Any] = [{k: v[:1] if isinstance(v, Tensor | list) else v for k, v in batch.items()}]
        dist.broadcast_object_list(images, source, self.group.cpu_group)
        return images[0]

    @contextlib.contextmanager
    def step_context(self, batch: TrainBatch, last: bool) -> Iterator[None]:
        self.last = last
        with contextlib.ExitStack() as stack:
            stack.enter_context(distributed.use_shard(batch.get("shard")))
            stack.enter_context(
                warnings.catch_warnings()
            )  # DDP's hint about memory formats, which are on purpose
            warnings.filterwarnings("ignore", message="Grad strides do not match bucket view strides")
            for module in self.shards:
                module.set_requires_gradient_sync(last)
            for replica in self.replicas if not last else []:
                stack.enter_context(replica.no_sync())
            yield
        for scalar in self.scalars if last else []:
            if scalar.grad is not None:
                scalar.grad = self.group.sum_tensor(scalar.grad) / self.group.size

    def any(self, *flags: bool) -> tuple[bool, ...]:
        # Between CPUs, as all that the group exchanges: without waiting for the work that is queued on the devices.
        return tuple(n > 0 for n in self.group.all_sum(0.0, *map(float, flags)))[1:]

    def mean(self, logs: Logs) -> Logs:
        import torch.distributed as dist

        values = torch.stack([_full(value).to(self.device, torch.float32) for value in logs.values()])
        dist.all_reduce(values)
        return dict(zip(logs, (values / self.group.size).unbind(), strict=True))

    @contextlib.contextmanager
    def full_network(self, net: Network) -> Iterator[Network]:
        if not self.sharded:
            yield net
            return
        shell = self.shells[id(net)]
        for name, parameter in net.named_parameters():
            _set_parameter(shell, name, nn.Parameter(_full(parameter.detach()), requires_grad=False))
        for target, source in zip(shell.buffers(), net.buffers(), strict=True):
            target.copy_(source)
        try:
            yield shell
        finally:
            for name, parameter in list(shell.named_parameters()):
                _set_parameter(shell, name, nn.Parameter(parameter.to("meta"), requires_grad=False))

    def eval_batches(self, loader: Loader) -> Iterator[Batch]:
        for i, batch in enumerate(loader):
            yield cast(Batch, {**batch, "number": i * self.group.size + self.group.rank})


class LossModule(nn.Module):
    """A loss as the forward pass of a module, so that DDP and FSDP see where it begins and ends, whatever parts of the
    network a task calls. The batch is set beforehand: they would copy an argument to the device, all of it."""

    def __init__(self, net: nn.Module, loss: Callable[[Any, Any], Any]):
        super().__init__()
        self.net, self.loss = net, loss
        self.batch: Any = None

    def forward(self) -> Any:
        return self.loss(self.net, self.batch)


def _call(module: LossModule, wrapped: nn.Module, batch: Any) -> Any:
    """Compute the loss of a batch through what DDP or FSDP made of its module."""
    module.batch = batch
    return wrapped()


def _without_network(loss: Callable[[Any], Any]) -> Callable[[nn.Module, Any], Any]:
    return lambda _net, inputs: loss(inputs)


def has_unused_parameters(module: LossModule, batch: TrainBatch, networks: Sequence[nn.Module]) -> bool:
    """Return whether the loss does not depend on all trained parameters. State of `networks` that the forward pass
    changes is restored."""
    before = [{name: tensor.clone() for name, tensor in net.state_dict().items()} for net in networks]
    module.batch = dict(batch)
    with torch.random.fork_rng():
        loss = module().loss
    used, visited, pending = set(), set(), [loss.grad_fn]
    while pending:
        node = pending.pop()
        if node is not None and node not in visited:
            visited.add(node)
            used.add(id(getattr(node, "variable", None)))
            pending += [function for function, _ in node.next_functions]
    for net, state in zip(networks, before, strict=True):
        net.load_state_dict(state)
    return any(p.requires_grad and id(p) not in used for p in module.net.parameters())


def _full(tensor: Tensor) -> Tensor:
    """Return all of a sharded tensor."""
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor  # type: ignore[operator]


def _without_memory(net: Network) -> Network:
    """Return a copy of a network whose parameters are on the meta device."""
    memo: dict[int, Any] = {
        id(p): nn.Parameter(p.detach().to("meta"), requires_grad=False) for p in net.parameters()
    }
    return copy.deepcopy(net, memo)


def _set_parameter(net: nn.Module, name: str, parameter: nn.Parameter) -> None:
    owner, _, leaf = name.rpartition(".")
    setattr(dict(net.named_modules())[owner], leaf, parameter)


def prepare_blocks(net: Network, config: LoopConfig) -> None:
    """Apply activation checkpointing and compilation to each block, in this order and before the network is spread
    over processes."""
    if config.recompute:
        checkpoint_activations(net)
    if config.compile:
        compile_blocks(net)


def make_parallel(
    group: ProcessGroup, config: LoopConfig, device: torch.device, dtype: torch.dtype
) -> SingleProcess:
    """Return how a run is spread over the processes of `group`."""
    if group.cpu_group is None:
        return SingleProcess(group)
    return MultiProcess(group, config.parallel == "fsdp", device, dtype)
