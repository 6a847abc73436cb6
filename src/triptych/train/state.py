"""Everything a run is at a step, in one file: written whole or not at all, checked when read."""

import json
import re
import zlib
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save as to_safetensors
from torch import Tensor, nn

from triptych.errors import UserError
from triptych.train.ema import Ema
from triptych.train.opponent import Opponent
from triptych.writing import write_atomically

Facts = dict[str, Any]  # what is not a tensor, as JSON


def save_checkpoint(folder: Path, step: int, tensors: dict[str, Tensor], facts: Facts, keep: int) -> Path:
    """Write `folder`/step-N.safetensors, then remove all but the newest `keep`.

    A checkpoint of a later step is of work that was lost with it (it was damaged, so an older one was gone on from):
    it makes room first.
    """
    for lost in checkpoints(folder):
        if lost.name > f"step-{step:09d}.safetensors":
            lost.unlink(missing_ok=True)
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    sums = {name: _checksum(tensor) for name, tensor in tensors.items()}
    data = to_safetensors(tensors, metadata={"facts": json.dumps(facts), "sums": json.dumps(sums)})
    path = folder / f"step-{step:09d}.safetensors"
    write_atomically(path, lambda file: file.write(data))
    for old in checkpoints(folder)[keep:]:
        old.unlink(missing_ok=True)
    return path


def checkpoints(folder: Path) -> list[Path]:
    """The checkpoints of a run, the newest first."""
    found = [
        path
        for path in folder.glob("step-*.safetensors")
        if re.fullmatch(r"step-\d+\.safetensors", path.name)
    ]
    return sorted(found, reverse=True)


def load_newest(folder: Path) -> tuple[dict[str, Tensor], Facts, list[str]] | None:
    """Tensors and facts of the newest checkpoint whose sums agree, and a line for each that was passed over.

    Raises:
        UserError: there are checkpoints, and every one is damaged.
    """
    damaged = []
    for path in checkpoints(folder):
        try:
            return *_read(path), damaged
        except (SafetensorError, ValueError, KeyError, OSError) as problem:
            damaged.append(f"{path} is damaged ({problem}); going on from the one before")
    if damaged:
        raise UserError(f"every checkpoint in {folder} is damaged; remove that folder to begin again")
    return None


def _read(path: Path) -> tuple[dict[str, Tensor], Facts]:
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata()
        sums = json.loads(metadata["sums"])
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    for name, tensor in tensors.items():
        if _checksum(tensor) != sums[name]:
            raise ValueError(f"the checksum of {name} differs")
    return tensors, json.loads(metadata["facts"])


def _checksum(tensor: Tensor) -> int:
    return zlib.crc32(tensor.reshape(-1).view(torch.uint8).numpy().data)


def gather(
    net: nn.Module, ema: Ema | None, optimizer: torch.optim.Optimizer, opponent: Opponent | None = None
) -> dict[str, Tensor]:
    """Every tensor of the run under one name each."""
    tensors = {f"net.{name}": value for name, value in net.state_dict().items()}
    if ema is not None:
        tensors |= {f"ema.{name}": value for name, value in ema.net.state_dict().items()}
    for index, state in optimizer.state_dict()["state"].items():
        tensors |= {f"optimizer.{index}.{name}": value for name, value in state.items()}
    if opponent is not None:
        others = gather(opponent.net, None, opponent.optimizer)
        tensors |= {f"opponent.{name}": value for name, value in others.items()}
    return tensors


def scatter(
    tensors: dict[str, Tensor],
    net: nn.Module,
    ema: Ema | None,
    optimizer: torch.optim.Optimizer,
    opponent: Opponent | None = None,
) -> None:
    """Put every tensor of `gather` back where it came from."""
    net.load_state_dict(_under(tensors, "net."))
    if ema is not None:
        ema.net.load_state_dict(_under(tensors, "ema."))
    state: dict[int, dict[str, Tensor]] = {}
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    for name, value in _under(tensors, "optimizer.").items():
        index, key = name.split(".", 1)
        like = parameters[int(index)]
        if (
            value.shape == like.shape
        ):  # in the parameter's memory format: a fused step walks both side by side
            value = torch.empty_like(like, dtype=value.dtype).copy_(value)
        state.setdefault(int(index), {})[key] = value
    # The groups' settings are a function of the config and the step; only the state is loaded.
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})
    if opponent is not None:
        scatter(_under(tensors, "opponent."), opponent.net, None, opponent.optimizer)


def _under(tensors: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name[len(prefix) :]: value for name, value in tensors.items() if name.startswith(prefix)}
