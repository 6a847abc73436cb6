"""What is learnt: a task turns a batch into a loss, and a model and a loader into figures."""

from collections.abc import Iterable, Iterator
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from triptych.card import Card
from triptych.data.augment import augment, prepare
from triptych.data.config import AugmentConfig
from triptych.metrics.classification import ClassificationMetrics

Batch = dict[str, Any]


class Task(Protocol):
    """What the loop needs to know of a task."""

    def loss(self, model: nn.Module, batch: Batch) -> tuple[Float[Tensor, ""], dict[str, Tensor]]:
        """The mean loss of a batch in fp32, and what to log of it. `batch["seed"]` is all its randomness."""
        ...

    def evaluate(self, model: nn.Module, loader: Iterable[Batch]) -> Iterator[tuple[str, float]]:
        """Figures by name."""
        ...

    def rank(self, figures: dict[str, float]) -> tuple[float, ...]:
        """What orders evaluations; the greatest marks the best weights."""
        ...


class Classify:
    """Classification of augmented batches with soft targets: cross entropy, or one binary cross entropy a class
    whose targets are 1 for every class that was mixed in (DeiT III, Touvron et al. 2022, Section 3.1)."""

    def __init__(self, config: AugmentConfig, card: Card, num_classes: int, loss: str = "cross_entropy"):
        self.config, self.card, self.num_classes, self.kind = config, card, num_classes, loss

    def loss(self, model: nn.Module, batch: Batch) -> tuple[Float[Tensor, ""], dict[str, Tensor]]:
        with torch.autocast(batch["image"].device.type, enabled=False):  # pixels are warped and mixed in fp32
            images, targets = augment(
                batch["image"], batch["label"], self.config, batch["seed"], self.num_classes, batch["aspect"]
            )
        assert targets is not None  # there are labels
        logits = model(images).float()  # B K
        if self.kind == "binary":
            present = (targets > self.config.label_smoothing / self.num_classes).float()
            loss = F.binary_cross_entropy_with_logits(logits, present, reduction="none").sum(1).mean()
        else:
            loss = -(targets * logits.log_softmax(dim=1)).sum(1).mean()
        right = (logits.argmax(1) == batch["label"]).float().mean()
        return loss, {"train_top1": right.detach()}

    def evaluate(self, model: nn.Module, loader: Iterable[Batch]) -> Iterator[tuple[str, float]]:
        for name, value in self.measure(model, loader).items():
            if isinstance(value, int | float):
                yield name, value

    def rank(self, figures: dict[str, float]) -> tuple[float, ...]:
        """By top-1; among equals, as a small set has many, by the loss."""
        return figures["top1"], -figures["loss"]

    @torch.no_grad()
    def measure(self, model: nn.Module, loader: Iterable[Batch]) -> dict[str, Any]:
        """All of `ClassificationMetrics.compute`, arrays too."""
        device = next(model.parameters()).device
        metrics = ClassificationMetrics(self.num_classes, self.card.groupings).to(device)
        how = self.card.preprocess
        for batch in loader:
            images = prepare(batch["image"].to(device), how.mean, how.std, how.background)
            metrics.update(model(images).float(), batch["label"].to(device))
        return metrics.compute()
