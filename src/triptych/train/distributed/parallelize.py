"""Several processes that train one network: who they are, how the network is spread over them, and what they agree on.

torchrun starts the processes; DDP, or FSDP2's `fully_shard`, exchanges gradients. A batch is that of one process, cut
into as many runs of rows; whatever is drawn for it is drawn for all of it (`triptych.distributed`). The loop talks to a
`Team`: `Alone` does nothing in any of its methods.
"""

import contextlib
import copy
import functools
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from triptych import distributed
from triptych.data.loading.loader import Loader
from triptych.distributed import BatchShard, ProcessGroup
from triptych.network import Network
from triptych.torch_compile import compile_blocks
from triptych.train.adversary import Adversary
from triptych.train.configs.base import LoopConfig
from triptych.train.ema import Ema
from triptych.train.task import Batch, Task

Logs = dict[str, Tensor]
Learn = Callable[[Batch], tuple[Tensor, Logs]]


class SingleProcess:
    """One process, and what all teams can be asked for."""

    rank, size = 0, 1

    @property
    def first(self) -> bool:
        """Whether this is the process that writes."""
        return self.rank == 0

    def divide(self, train: Loader, evaluate: Loader) -> None:
        """Leave each loader this process's part."""

    def place(self, net: Network, ema: Ema | None, task: Task, opponent: Adversary | None) -> Learn:
        """Spread the networks over the processes, before optimisers are made; gives the loss of a batch."""
        return functools.partial(task.loss, net)

    def batches(self, loader: Loader) -> Iterable[Batch]:
        """An epoch. No process is ahead of another."""
        return loader

    def share(self, batch: Batch, last: bool) -> contextlib.AbstractContextManager[None]:
        """What the passes over a batch run in; `last` of those whose gradients are summed into one step."""
        return contextlib.nullcontext()

    def agree(self, *flags: bool) -> tuple[bool, ...]:
        """Which of them any process raises."""
        return flags

    def means(self, logs: Sequence[Logs]) -> Sequence[Logs]:
        """Numbers of several steps, each the mean over the processes."""
        return logs

    def whole(self, net: Network) -> contextlib.AbstractContextManager[Network]:
        """A network with all its parameters in this process, to be evaluated or kept."""
        return contextlib.nullcontext(net)

    def evaluated(self, loader: Loader) -> Iterable[Batch]:
        """This process's batches of an evaluation, each with its "number" among all."""
        return loader

    def merged(self, found: Mapping[str, str]) -> dict[str, str]:
        """What all processes found."""
        return dict(found)


class MultiProcess(SingleProcess):
    """Processes under torchrun.

    Args:
        sharded: FSDP2 instead of DDP.
        device: of this process.
        dtype: that products are computed in.
    """

    def __init__(self, world: ProcessGroup, sharded: bool, device: torch.device, dtype: torch.dtype):
        self.rank, self.size, self.sharded = world.rank, world.size, sharded
        self.device, self.dtype, self.control = device, dtype, world.cpu_group
        self.replicas: list[Any] = []  # under DDP
        self.shards: list[Any] = []  # roots under FSDP2
        self.numbers: list[Tensor] = []  # which FSDP2 leaves as they are
        self.shells: dict[int, Network] = {}
        self.replica: Any = None  # of what is learnt
        self.nets: list[nn.Module] = []
        self.last = True
        # DDP's words on a name that all versions know, and on memory formats that it copes with.
        for words in (".*broadcast_buffers. is deprecated", "Grad strides do not match bucket view strides"):
            warnings.filterwarnings("ignore", message=words)

    def divide(self, train: Loader, evaluate: Loader) -> None:
        train.divide(self.rank, self.size, within=True)
        evaluate.divide(self.rank, self.size, within=False)

    def place(self, net: Network, ema: Ema | None, task: Task, opponent: Adversary | None) -> Learn:
        if opponent is not None:  # small: a replica each
            loss = opponent.loss
            opponent.net.requires_grad_(True)
            of_opponent = Pass(opponent.net, lambda _net, batch: loss(batch))
            opponent.loss = functools.partial(_through, of_opponent, self._replicated(of_opponent))
            opponent.net.requires_grad_(False)
        step = Pass(net, task.loss)
        if not self.sharded:
            self.nets = [net, *([opponent.net] if opponent else [])]
            return functools.partial(self._learn, step)
        self._shard(net, step)
        if ema is not None:
            self._shard(ema.net, ema.net)
        self.shards.append(step)
        return functools.partial(_through, step, step)

    def _learn(self, step: "Pass", batch: Batch) -> tuple[Tensor, Logs]:
        """A pass under DDP, which is made at the first one: it wants to know whether a task leaves parameters out (an
        auxiliary head without weight, say), and looks for them at every step if it does."""
        if self.replica is None:
            self.replica = self._replicated(step, find_unused_parameters=leaves_out(step, batch, self.nets))
            with contextlib.nullcontext() if self.last else self.replica.no_sync():
                return _through(step, self.replica, batch)
        return _through(step, self.replica, batch)

    def _replicated(self, step: "Pass", **how: Any) -> Any:
        from torch.nn.parallel import DistributedDataParallel

        self.replicas.append(DistributedDataParallel(step, broadcast_buffers=False, **how))
        return self.replicas[-1]

    def _shard(self, net: Network, root: nn.Module) -> None:
        """Each block a group of its own, which is gathered when it runs, and one for the rest.

        On CUDA blocks are gathered and computed in the run's precision. What is outside of them stays in fp32, as do
        gradients on their way, the residual stream, and under autocast the statistics of norms and all losses. A CPU's
        norms take no bf16 weights beside fp32, so there it is autocast alone that makes bf16.
        """
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

        for parameter in net.parameters():
            parameter.data = parameter.data.contiguous()
        self.shells[id(net)] = _shell(net)
        mesh = init_device_mesh(self.device.type, (self.size,))
        half = self.dtype if self.device.type == "cuda" and self.dtype != torch.float32 else None
        policy = MixedPrecisionPolicy(param_dtype=half, reduce_dtype=torch.float32, cast_forward_inputs=False)
        for block in net.blocks():
            if any(True for _ in block.parameters()):
                fully_shard(block, mesh=mesh, mp_policy=policy)
        # A single number cannot be sharded: every process has it, and its gradient is averaged in `share`.
        numbers = {parameter for parameter in net.parameters() if parameter.ndim == 0}
        self.numbers += [parameter for parameter in numbers if parameter.requires_grad]
        fully_shard(root, mesh=mesh, ignored_params=numbers)

    def batches(self, loader: Loader) -> Iterator[Batch]:
        for batch in loader:
            counts = self._counts(len(batch["id"]))
            whole = sum(counts)
            if whole == 0:
                continue
            mine, first = counts[self.rank], sum(counts[: self.rank])
            if 0 in counts:
                lent = self._lent(batch, counts.index(max(counts)))
                batch, first = (batch, first) if mine else (lent, 0)
            yield {**batch, "share": BatchShard(first, max(mine, 1), whole, mine * self.size / whole)}

    def _counts(self, mine: int) -> list[int]:
        import torch.distributed as dist

        found = torch.zeros(self.size, dtype=torch.int64)
        found[self.rank] = mine
        dist.all_reduce(found, group=self.control)
        return found.tolist()

    def _lent(self, batch: Batch, giver: int) -> Batch:
        """A picture of another process, for those whose own are all damaged: they take part, and do not count."""
        import torch.distributed as dist

        lent: list[Any] = [{k: v[:1] if isinstance(v, Tensor | list) else v for k, v in batch.items()}]
        dist.broadcast_object_list(lent, giver, self.control)
        return lent[0]

    @contextlib.contextmanager
    def share(self, batch: Batch, last: bool) -> Iterator[None]:
        self.last = last
        with contextlib.ExitStack() as stack:
            stack.enter_context(distributed.use_shard(batch["share"]))
            for made in self.shards:
                made.set_requires_gradient_sync(last)
            for made in self.replicas if not last else []:
                stack.enter_context(made.no_sync())
            yield
        for number in self.numbers if last else []:
            if number.grad is not None:
                number.grad = distributed.total(number.grad) / self.size

    def agree(self, *flags: bool) -> tuple[bool, ...]:
        # Between processors, as all of `totalled` and `pooled`: what is queued on the devices is not waited for.
        return tuple(n > 0 for n in distributed.all_sum(0.0, *map(float, flags)))[1:]

    def means(self, logs: Sequence[Logs]) -> Sequence[Logs]:
        import torch.distributed as dist

        if not logs:
            return logs
        numbers = torch.stack(
            [_plain(n).to(self.device, torch.float32) for row in logs for n in row.values()]
        )
        dist.all_reduce(numbers)
        values = iter((numbers / self.size).unbind())
        return [{name: next(values) for name in row} for row in logs]

    @contextlib.contextmanager
    def whole(self, net: Network) -> Iterator[Network]:
        if not self.sharded:
            yield net
            return
        shell = self.shells[id(net)]
        for name, parameter in net.named_parameters():
            _put(shell, name, nn.Parameter(_plain(parameter.detach()), requires_grad=False))
        for mine, its in zip(shell.buffers(), net.buffers(), strict=True):
            mine.copy_(its)
        try:
            yield shell
        finally:
            for name, parameter in list(shell.named_parameters()):
                _put(shell, name, nn.Parameter(parameter.to("meta"), requires_grad=False))

    def evaluated(self, loader: Loader) -> Iterator[Batch]:
        for i, batch in enumerate(loader):
            yield {**batch, "number": i * self.size + self.rank}

    def merged(self, found: Mapping[str, str]) -> dict[str, str]:
        return {name: why for part in distributed.all_gather(dict(found)) for name, why in part.items()}


class Pass(nn.Module):
    """A loss as the forward pass of a module: DDP and FSDP see where it begins and ends, whatever parts of the network
    a task calls. The batch is no argument, which they would copy, and tasks leave things in it."""

    def __init__(self, net: nn.Module, loss: Callable[[Any, Batch], tuple[Tensor | None, Logs]]):
        super().__init__()
        self.net, self.loss = net, loss
        self.batch: Batch = {}

    def forward(self) -> tuple[Tensor | None, Logs]:
        return self.loss(self.net, self.batch)


def _through(step: Pass, made: nn.Module, batch: Batch) -> Any:
    step.batch = batch
    return made()


def leaves_out(step: Pass, batch: Batch, nets: Sequence[nn.Module]) -> bool:
    """Whether a loss does not depend on all parameters that learn. The pass leaves no trace in `nets`."""
    before = [{name: tensor.clone() for name, tensor in net.state_dict().items()} for net in nets]
    step.batch = dict(batch)
    with torch.random.fork_rng():
        loss, _ = step()
    used, seen, ways = set(), set(), [loss.grad_fn]
    while ways:
        node = ways.pop()
        if node is not None and node not in seen:
            seen.add(node)
            used.add(id(getattr(node, "variable", None)))
            ways += [way for way, _ in node.next_functions]
    for net, state in zip(nets, before, strict=True):
        net.load_state_dict(state)
    return any(p.requires_grad and id(p) not in used for p in step.net.parameters())


def _plain(tensor: Tensor) -> Tensor:
    """All of a sharded tensor."""
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor  # type: ignore[operator]


def _shell(net: Network) -> Network:
    """A copy of a network without its parameters' memory."""
    memo: dict[int, Any] = {
        id(p): nn.Parameter(p.detach().to("meta"), requires_grad=False) for p in net.parameters()
    }
    return copy.deepcopy(net, memo)


def _put(net: nn.Module, name: str, parameter: nn.Parameter) -> None:
    owner, _, leaf = name.rpartition(".")
    setattr(net.get_submodule(owner), leaf, parameter)


class Recomputed:
    """A block's forward pass whose activations are not kept but computed again when the gradient comes (Chen et al.
    2016), with the same chance."""

    def __init__(self, forward: Callable[..., Any]):
        self.forward = forward

    def __call__(self, *args: Any, **named: Any) -> Any:
        if not torch.is_grad_enabled():
            return self.forward(*args, **named)
        return checkpoint(self.forward, *args, use_reentrant=False, **named)


def prepare_blocks(net: Network, config: LoopConfig) -> None:
    """What is done to each block before the network is spread: activations are recomputed, then it is compiled."""
    for block in net.blocks():
        if config.recompute:
            block.forward = Recomputed(block.forward)
    if config.compile:
        compile_blocks(net)


def team_of(
    world: ProcessGroup, config: LoopConfig, device: torch.device, dtype: torch.dtype
) -> SingleProcess:
    """The processes as the loop speaks to them."""
    if world.cpu_group is None:
        return SingleProcess()
    return MultiProcess(world, config.parallel == "fsdp", device, dtype)
