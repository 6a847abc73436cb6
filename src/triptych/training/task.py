"""The contract between a training task and the training loop."""

from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple, Protocol

from jaxtyping import Float
from torch import Tensor, nn

from triptych.data.config import AugmentConfig
from triptych.data.example import Batch, TrainBatch
from triptych.distributed import SINGLE_PROCESS, ProcessGroup


class AdversaryInputs(NamedTuple):
    """What an adversary is trained to tell apart, without gradients to the trained network."""

    real: Float[Tensor, "b 3 h w"]
    """Training images, as the network got them."""
    generated: Float[Tensor, "b 3 h w"]
    """What the network made of them."""


class LossOutput(NamedTuple):
    """What a task computes for a batch. A named tuple, in which DDP and FSDP find the loss."""

    loss: Float[Tensor, ""]
    """Mean loss of the batch, in fp32."""
    logs: dict[str, Tensor]
    """Values for the log, without gradients."""
    adversary_inputs: AdversaryInputs | None = None
    """Inputs of the adversary; None if the run has none, or if it does not take part yet."""


class Task(Protocol):
    """What the training loop needs to know of a task."""

    headline: str
    """The metric that says how good a model is."""
    config: AugmentConfig

    def loss(self, model: nn.Module, batch: TrainBatch) -> LossOutput:
        """Return the loss of a batch. All randomness is a function of `batch["seed"]`; `batch["progress"]` is the
        fraction of the run that is done."""
        ...

    def evaluate(
        self, model: nn.Module, loader: Iterable[Batch], group: ProcessGroup = SINGLE_PROCESS
    ) -> Iterator[tuple[str, float]]:
        """Yield metrics by name, over the batches of all processes in `group`."""
        ...

    def rank(self, metrics: dict[str, float], /) -> tuple[float, ...]:
        """Return a key that orders evaluations: the greatest is of the best weights."""
        ...

    def product(self, net: Any) -> Any:
        """Return the network to save, made from the trained network."""
        ...
