"""Top-1, top-5, per class and per coarser name: an accumulator of logits and labels.

A subclass of torchmetrics' `Metric`, so that processes add up and devices move as torchmetrics does it.
What is kept are facts of each sample (its class, the predicted class, the rank of its class, its loss), not
means of batches: a last batch of another size, or any other split of the samples, gives the same figures to
the last bit.
"""

import math
from collections.abc import Mapping, Sequence

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from triptych.errors import UserError
from triptych.metrics.torchmetrics_import import Metric, dim_zero_cat

# A confusion matrix of ImageNet-21k would take 3.8 GB; up to here it takes at most 134 MB.
MOST_CLASSES_OF_A_CONFUSION = 4096

_FIGURES = ("count", "loss", "top1", "top5", "mean_per_class", "per_class", "per_class_count", "confusion")


class ClassificationMetrics(Metric):
    """Accumulates logits and labels; `compute()` gives the figures.

    Args:
        num_classes: classes the logits have.
        groupings: name of a grouping -> the coarser name of each class, `{"group": ("animals", "food")}`. A
            sample is right in a grouping when the coarser name of the largest summed probability is its own.

    Raises:
        UserError: a grouping does not name every class, or bears the name of another figure.
    """

    full_state_update = False
    higher_is_better = True
    is_differentiable = False

    labels: list[Tensor]
    predicted: list[Tensor]
    ranks: list[Tensor]
    losses: list[Tensor]

    def __init__(self, num_classes: int, groupings: Mapping[str, Sequence[str]] | None = None) -> None:
        super().__init__()
        if num_classes < 1:
            raise UserError(f"num_classes is {num_classes}, which must be at least 1")
        self.num_classes = num_classes
        self.groupings = tuple(groupings or ())
        for fact in ("labels", "predicted", "ranks", "losses"):
            self.add_state(fact, default=[], dist_reduce_fx="cat")
        for name, coarser in (groupings or {}).items():
            if name in _FIGURES:
                raise UserError(f"a grouping is named {name!r}, which is another figure's name; rename it")
            if len(coarser) != num_classes:
                got = len(coarser)
                raise UserError(f"grouping {name!r} names {got} classes, which must be {num_classes}")
            index = {word: i for i, word in enumerate(dict.fromkeys(coarser))}
            member = torch.tensor([index[word] for word in coarser])
            self.register_buffer(f"member_{name}", member, persistent=False)
            self.add_state(f"right_{name}", default=torch.zeros((), dtype=torch.int64), dist_reduce_fx="sum")

    def update(self, logits: Float[Tensor, "B C"], labels: Int[Tensor, " B"]) -> None:
        """Add a batch. A logit that is not a number never wins; it makes `loss` not a number."""
        logits, labels = self._checked(logits.detach().to(self.device), labels.to(self.device))
        self.losses.append(F.cross_entropy(logits, labels, reduction="none"))
        logits = logits.nan_to_num(nan=-math.inf, posinf=math.inf, neginf=-math.inf)

        # The rank of the right class; among equals the lower index goes first, as argmax has it.
        own = logits.gather(1, labels[:, None])
        before = torch.arange(self.num_classes, device=self.device) < labels[:, None]
        self.ranks.append(((logits > own) | ((logits == own) & before)).sum(1))
        self.predicted.append(logits.argmax(1))
        self.labels.append(labels)

        probabilities = logits.softmax(1)
        for name in self.groupings:
            member = getattr(self, f"member_{name}")
            summed = probabilities.new_zeros(len(labels), int(member.max()) + 1)
            summed.index_add_(1, member, probabilities)
            right = getattr(self, f"right_{name}")
            right += (summed.argmax(1) == member[labels]).sum()

    def compute(self) -> dict[str, object]:
        """The figures so far.

        Returns:
            count: samples seen.
            loss: mean cross entropy in nats.
            top1, top5: fractions; top5 of fewer than five classes is of as many as there are.
            per_class, per_class_count: arrays (C,); the accuracy is not a number where no sample was seen.
            mean_per_class: the mean over the classes seen.
            confusion: int64 array (C, C), rows the truth, columns the prediction; None above 4096 classes.
            One fraction for each grouping, by its name.

        Raises:
            UserError: no sample was seen.
        """
        if not len(self.labels):
            raise UserError("no labelled image was seen; evaluate data with labels")
        labels, predicted, ranks = (
            dim_zero_cat(fact).cpu().numpy() for fact in (self.labels, self.predicted, self.ranks)
        )
        losses = dim_zero_cat(self.losses).cpu().tolist()
        seen = np.bincount(labels, minlength=self.num_classes)
        right = np.bincount(labels[ranks == 0], minlength=self.num_classes)
        per_class = np.divide(right, seen, out=np.full(self.num_classes, np.nan), where=seen > 0)
        return {
            "count": len(labels),
            "loss": math.fsum(losses) / len(losses),  # fsum: the same to the last bit in any order
            "top1": float((ranks == 0).mean()),
            "top5": float((ranks < 5).mean()),
            "mean_per_class": float(np.nanmean(per_class)),
            "per_class": per_class,
            "per_class_count": seen,
            "confusion": self._confusion(labels, predicted),
            **{name: int(getattr(self, f"right_{name}")) / len(labels) for name in self.groupings},
        }

    def _confusion(self, labels: np.ndarray, predicted: np.ndarray) -> np.ndarray | None:
        C = self.num_classes
        if C > MOST_CLASSES_OF_A_CONFUSION:
            return None
        return np.bincount(labels * C + predicted, minlength=C * C).reshape(C, C)

    def _checked(self, logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        if logits.ndim != 2 or logits.shape[1] != self.num_classes or labels.shape != logits.shape[:1]:
            raise UserError(
                f"logits are {tuple(logits.shape)} and labels {tuple(labels.shape)}, "
                f"which must be (B, {self.num_classes}) and (B,)"
            )
        outside = labels[(labels < 0) | (labels >= self.num_classes)]
        if len(outside):
            last = self.num_classes - 1
            raise UserError(f"label {int(outside[0])} is outside the {last + 1} classes 0..{last}")
        return logits.float(), labels.long()


def most_confused(confusion: Int[np.ndarray, "C C"], top: int = 10) -> list[tuple[int, int, int]]:
    """The (truth, prediction, count) taken for one another most often, most frequent first."""
    wrong = confusion.copy()
    np.fill_diagonal(wrong, 0)
    order = np.argsort(-wrong, axis=None, kind="stable")[:top]
    pairs = [divmod(int(i), len(wrong)) for i in order]
    return [(truth, guess, int(wrong[truth, guess])) for truth, guess in pairs if wrong[truth, guess]]
