"""The contract between a training task and the loop."""

from collections.abc import Iterable, Iterator
from typing import Any, Protocol

from jaxtyping import Float
from torch import Tensor, nn

from triptych.data.config import AugmentConfig

Batch = dict[str, Any]


class Task(Protocol):
    """What the loop needs to know of a task."""

    headline: str
    """The figure that says how good a model is."""
    config: AugmentConfig

    def loss(self, model: nn.Module, batch: Batch) -> tuple[Float[Tensor, ""], dict[str, Tensor]]:
        """The mean loss of a batch in fp32, and what to log of it. `batch["seed"]` is all its randomness,
        `batch["progress"]` the share of the run that is done. What an opponent needs is left in the batch."""
        ...

    def evaluate(self, model: nn.Module, loader: Iterable[Batch]) -> Iterator[tuple[str, float]]:
        """Figures by name."""
        ...

    def rank(self, figures: dict[str, float]) -> tuple[float, ...]:
        """What orders evaluations; the greatest marks the best weights."""
        ...

    def product(self, net: Any) -> Any:
        """Of what was trained, the network that is kept."""
        ...
