"""Accuracy of a classifier: top-1, top-5, by class and by coarser group.

The accumulator is a `torchmetrics.Metric`, which gathers it over processes and moves it between devices. It stores the
class, the predicted class, the rank of the true class and the loss of every image instead of means of batches, so the
metrics are bitwise the same for any division into batches.
"""

import math
from collections.abc import Mapping, Sequence

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from triptych.errors import ConfigError, DataError
from triptych.metrics.torchmetrics_import import Metric, dim_zero_cat

# A confusion matrix of this size takes 134 MB; that of ImageNet-21k would take 3.8 GB.
MAX_CONFUSION_CLASSES = 4096

_METRIC_NAMES = (
    "count",
    "loss",
    "top1",
    "top5",
    "mean_per_class",
    "per_class",
    "per_class_count",
    "confusion",
)


class ClassificationMetrics(Metric):
    """Accumulates logits and labels; `compute()` returns the metrics.

    Args:
        num_classes: number of classes of the logits.
        groupings: for each grouping the coarser name of each class, such as `{"group": ("animals", "food")}`. An image
            is correct in a grouping if its coarser name has the largest sum of probabilities.

    Raises:
        ConfigError: `num_classes` is below 1, a grouping does not name every class, or it has the name of a metric.
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
            raise ConfigError(f"num_classes is {num_classes}, which must be at least 1")
        self.num_classes = num_classes
        self.groupings = tuple(groupings or ())
        for state in ("labels", "predicted", "ranks", "losses"):
            self.add_state(state, default=[], dist_reduce_fx="cat")
        for name, coarser in (groupings or {}).items():
            if name in _METRIC_NAMES:
                raise ConfigError(f"a grouping is called {name!r}, which is the name of a metric; rename it")
            if len(coarser) != num_classes:
                raise ConfigError(
                    f"grouping {name!r} names {len(coarser)} classes, which must be {num_classes}"
                )
            index = {group: i for i, group in enumerate(dict.fromkeys(coarser))}
            group_of_class = torch.tensor([index[group] for group in coarser])
            self.register_buffer(f"group_of_class_{name}", group_of_class, persistent=False)
            self.add_state(
                f"correct_{name}", default=torch.zeros((), dtype=torch.int64), dist_reduce_fx="sum"
            )

    def update(self, logits: Float[Tensor, "B C"], labels: Int[Tensor, " B"]) -> None:
        """Add a batch. A NaN logit is never the largest; it makes `loss` NaN.

        Raises:
            ConfigError: the shapes do not fit.
            DataError: a label is not one of the classes.
        """
        logits, labels = self._check(logits.detach().to(self.device), labels.to(self.device))
        self.losses.append(F.cross_entropy(logits, labels, reduction="none"))
        logits = logits.nan_to_num(nan=-math.inf, posinf=math.inf, neginf=-math.inf)

        # The rank of the true class. Among equal logits the lower index comes first, as in argmax.
        true_logit = logits.gather(1, labels[:, None])
        before = torch.arange(self.num_classes, device=self.device) < labels[:, None]
        self.ranks.append(((logits > true_logit) | ((logits == true_logit) & before)).sum(1))
        self.predicted.append(logits.argmax(1))
        self.labels.append(labels)

        probabilities = logits.softmax(1)
        for name in self.groupings:
            group_of_class = getattr(self, f"group_of_class_{name}")
            sums = probabilities.new_zeros(len(labels), int(group_of_class.max()) + 1)
            sums.index_add_(1, group_of_class, probabilities)
            correct = getattr(self, f"correct_{name}")
            correct += (sums.argmax(1) == group_of_class[labels]).sum()

    def compute(self) -> dict[str, object]:
        """Return the metrics of all images so far.

        Returns:
            count: number of images.
            loss: mean cross entropy in nats.
            top1, top5: fractions; with fewer than five classes, top5 is 1.
            per_class, per_class_count: arrays (C,) of accuracy and number of images; the accuracy of a class without
                images is NaN.
            mean_per_class: mean accuracy over the classes that have images.
            confusion: int64 array (C, C), a row for each true class and a column for each predicted one; None for more
                than 4096 classes.
            And one fraction for each grouping, by its name.

        Raises:
            DataError: there were no images.
        """
        if not len(self.labels):
            raise DataError("there is no labeled image to evaluate; use data with labels")
        labels, predicted, ranks = (
            dim_zero_cat(state).cpu().numpy() for state in (self.labels, self.predicted, self.ranks)
        )
        losses = dim_zero_cat(self.losses).cpu().tolist()
        counts = np.bincount(labels, minlength=self.num_classes)
        correct = np.bincount(labels[ranks == 0], minlength=self.num_classes)
        per_class = np.divide(correct, counts, out=np.full(self.num_classes, np.nan), where=counts > 0)
        return {
            "count": len(labels),
            "loss": math.fsum(losses) / len(losses),  # fsum is exact in any order
            "top1": float((ranks == 0).mean()),
            "top5": float((ranks < 5).mean()),
            "mean_per_class": float(np.nanmean(per_class)),
            "per_class": per_class,
            "per_class_count": counts,
            "confusion": self._confusion(labels, predicted),
            **{name: int(getattr(self, f"correct_{name}")) / len(labels) for name in self.groupings},
        }

    def _confusion(self, labels: np.ndarray, predicted: np.ndarray) -> np.ndarray | None:
        C = self.num_classes
        if C > MAX_CONFUSION_CLASSES:
            return None
        return np.bincount(labels * C + predicted, minlength=C * C).reshape(C, C)

    def _check(self, logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        if logits.ndim != 2 or logits.shape[1] != self.num_classes or labels.shape != logits.shape[:1]:
            raise ConfigError(
                f"logits are {tuple(logits.shape)} and labels {tuple(labels.shape)}, "
                f"which must be (B, {self.num_classes}) and (B,)"
            )
        outside = labels[(labels < 0) | (labels >= self.num_classes)]
        if len(outside):
            last = self.num_classes - 1
            raise DataError(f"label {int(outside[0])} is outside the {last + 1} classes 0..{last}")
        return logits.float(), labels.long()


def most_confused(confusion: Int[np.ndarray, "C C"], top: int = 10) -> list[tuple[int, int, int]]:
    """Return the pairs of classes that are confused most often, as (truth, prediction, count), most frequent first."""
    errors = confusion.copy()
    np.fill_diagonal(errors, 0)
    order = np.argsort(-errors, axis=None, kind="stable")[:top]
    pairs = [divmod(int(i), len(errors)) for i in order]
    return [
        (truth, predicted, int(errors[truth, predicted]))
        for truth, predicted in pairs
        if errors[truth, predicted]
    ]
