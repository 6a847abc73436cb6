"""The state of a run: everything that changes while it trains, which is what a checkpoint holds."""

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from triptych.data.loading.loader import Loader
from triptych.errors import CheckpointError
from triptych.network import Network
from triptych.training.adversary import Adversary
from triptych.training.checkpoints import RunCheckpoint
from triptych.training.ema import Ema
from triptych.training.monitoring.anomalies import AnomalyDetector


@dataclass
class TrainState:
    """Networks and optimizers, the position in the data, and what has been reached.

    `tensors` and `state_dict` are all of it: a run that is restored from the two continues bit for bit.
    """

    net: Network
    optimizer: torch.optim.Optimizer
    loader: Loader
    anomalies: AnomalyDetector
    ema: Ema | None = None
    adversary: Adversary | None = None
    step: int = 0
    """Steps done."""
    last_evaluated: int = 0
    """Step of the last evaluation; 0 before the first one."""
    best: dict[str, float] = field(default_factory=dict)
    """Metrics of the best evaluation, with its "step"."""

    @property
    def evaluated_net(self) -> Network:
        """The network that is evaluated and saved: the moving average if there is one."""
        return self.ema.net if self.ema else self.net

    def state_dict(self) -> dict[str, Any]:
        """Return what is not a tensor, as JSON values."""
        return {
            "step": self.step,
            "last_evaluated": self.last_evaluated,
            "best": self.best,
            "loader": self.loader.state_dict(),
            "anomalies": self.anomalies.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what `state_dict` returned."""
        self.step, self.last_evaluated, self.best = state["step"], state["last_evaluated"], state["best"]
        self.loader.load_state_dict(state["loader"])
        self.anomalies.load_state_dict(state["anomalies"])

    def tensors(self) -> dict[str, Tensor]:
        """Return all tensors by name; see `collect_tensors`."""
        return collect_tensors(self.net, self.ema, self.optimizer, self.adversary)

    def load_tensors(self, checkpoint: RunCheckpoint) -> None:
        """Fill all tensors from a checkpoint.

        Raises:
            CheckpointError: its tensors are not those of this run.
        """
        shapes = checkpoint.shapes()
        _add_optimizer_state(self.optimizer, self.net, shapes, "optimizer.")
        if self.adversary is not None:
            _add_optimizer_state(self.adversary.optimizer, self.adversary.net, shapes, "adversary.optimizer.")
        tensors = self.tensors()
        needed = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
        stored = {name: tuple(metadata.size) for name, metadata in shapes.items()}
        if needed != stored:
            name = min(name for name in {*needed, *stored} if needed.get(name) != stored.get(name))
            raise CheckpointError(
                f"{checkpoint.path} has {stored.get(name, 'nothing')} for {name}, and this run needs "
                f"{needed.get(name, 'nothing')}; resume with the version of triptych that started the run, or give "
                "another --out"
            )
        checkpoint.read_into({name: tensor.detach() for name, tensor in tensors.items()})


def collect_tensors(
    net: nn.Module, ema: Ema | None, optimizer: torch.optim.Optimizer, adversary: Adversary | None = None
) -> dict[str, Tensor]:
    """Return every tensor of a run by name: "net.NAME", "ema.NAME", "optimizer.NAME.exp_avg" of the parameter NAME, and
    the same of the adversary under "adversary.". They are the run's own, not copies."""
    tensors = {f"net.{name}": value for name, value in net.state_dict().items()}
    if ema is not None:
        tensors |= {f"ema.{name}": value for name, value in ema.net.state_dict().items()}
    for name, parameter in net.named_parameters():
        for key, value in optimizer.state.get(parameter, {}).items():
            tensors[f"optimizer.{name}.{key}"] = value
    if adversary is not None:
        others = collect_tensors(adversary.net, None, adversary.optimizer)
        tensors |= {f"adversary.{name}": value for name, value in others.items()}
    return tensors


def _add_optimizer_state(
    optimizer: torch.optim.Optimizer, net: nn.Module, shapes: dict[str, Any], prefix: str
) -> None:
    """Give the optimizer empty tensors for the state that a checkpoint has: it creates its own in its first step."""
    parameters = dict(net.named_parameters())
    for name, metadata in shapes.items():
        if not name.startswith(prefix):
            continue
        parameter_name, _, key = name.removeprefix(prefix).rpartition(".")
        if parameter_name in parameters:
            parameter = parameters[parameter_name]
            dtype = metadata.properties.dtype
            if key == "step":  # AdamW's counter, which a fused step has on the parameter's device
                state = torch.empty(metadata.size, dtype=dtype, device=parameter.device)
            else:  # in the parameter's memory format, since a fused step walks both together; sharded like it
                state = torch.empty_like(parameter, dtype=dtype, requires_grad=False)
            optimizer.state[parameter][key] = state
