"""Everything a run is at a step, as tensors under one name each: what a checkpoint holds."""

import torch
from torch import Tensor, nn

from triptych.errors import UserError
from triptych.train.adversary import Adversary
from triptych.train.checkpoints import RunCheckpoint
from triptych.train.ema import Ema


def gather(
    net: nn.Module, ema: Ema | None, optimizer: torch.optim.Optimizer, opponent: Adversary | None = None
) -> dict[str, Tensor]:
    """Every tensor of the run: "net.NAME", "ema.NAME", "optimizer.NAME.exp_avg" of the parameter NAME, and the same of
    an opponent under "opponent.". They are the run's own, not copies."""
    tensors = {f"net.{name}": value for name, value in net.state_dict().items()}
    if ema is not None:
        tensors |= {f"ema.{name}": value for name, value in ema.net.state_dict().items()}
    for name, parameter in net.named_parameters():
        for key, value in optimizer.state.get(parameter, {}).items():
            tensors[f"optimizer.{name}.{key}"] = value
    if opponent is not None:
        others = gather(opponent.net, None, opponent.optimizer)
        tensors |= {f"opponent.{name}": value for name, value in others.items()}
    return tensors


def scatter(
    checkpoint: RunCheckpoint,
    net: nn.Module,
    ema: Ema | None,
    optimizer: torch.optim.Optimizer,
    opponent: Adversary | None = None,
) -> None:
    """Put every tensor of a checkpoint where `gather` found it.

    Raises:
        UserError: it holds other tensors than this run has.
    """
    shapes = checkpoint.shapes()
    _make_room(optimizer, net, shapes, "optimizer.")
    if opponent is not None:
        _make_room(opponent.optimizer, opponent.net, shapes, "opponent.optimizer.")
    tensors = gather(net, ema, optimizer, opponent)
    mine = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    theirs = {name: tuple(kind.size) for name, kind in shapes.items()}
    if mine != theirs:
        name = min(name for name in {*mine, *theirs} if mine.get(name) != theirs.get(name))
        raise UserError(
            f"{checkpoint.path} has {theirs.get(name, 'nothing')} for {name}, and this run "
            f"{mine.get(name, 'nothing')}; go on with the version of triptych that began the run, or give another --out"
        )
    checkpoint.read_into({name: tensor.detach() for name, tensor in tensors.items()})


def _make_room(optimizer: torch.optim.Optimizer, net: nn.Module, shapes: dict, prefix: str) -> None:
    """Give the optimiser the state that a checkpoint has for it, yet to be filled: it makes its own when it steps."""
    parameters = dict(net.named_parameters())
    for name, kind in shapes.items():
        if not name.startswith(prefix):
            continue
        of, _, key = name.removeprefix(prefix).rpartition(".")
        if of in parameters:
            like = parameters[of]
            if key == "step":  # AdamW's count, which a fused step has beside the parameter
                room = torch.empty(kind.size, dtype=kind.properties.dtype, device=like.device)
            else:  # in the parameter's memory format, since a fused step walks both side by side; sharded as it is
                room = torch.empty_like(like, dtype=kind.properties.dtype, requires_grad=False)
            optimizer.state[like][key] = room
