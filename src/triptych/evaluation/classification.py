"""Measure a classifier: accuracy over all images, by class and by coarser group."""

import logging
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor, nn

from triptych.data.augment.batch import preprocess_batch
from triptych.data.config import DataConfig
from triptych.data.example import Batch
from triptych.data.loading.loader import make_loader
from triptych.data.source import Source
from triptych.distributed import SINGLE_PROCESS, ProcessGroup
from triptych.errors import DataError
from triptych.evaluation.class_names import describe_unmeasured, match_classes
from triptych.evaluation.results import ClassificationResult
from triptych.evaluation.runtime import Runtime
from triptych.metrics.classification import ClassificationMetrics
from triptych.model_card import Preprocess
from triptych.network import Network

log = logging.getLogger(__name__)


@torch.no_grad()
def measure_classification(
    net: nn.Module,
    batches: Iterable[Batch],
    preprocess: Preprocess,
    num_classes: int,
    groupings: Mapping[str, Sequence[str]] | None = None,
    group: ProcessGroup = SINGLE_PROCESS,
) -> dict[str, Any]:
    """Measure a classifier on batches of labeled images.

    Args:
        net: maps normalized images (b, 3, h, w) to logits (b, num_classes); on its device.
        batches: as `make_loader(..., train=False)` yields them; "label" holds indices of the network's classes.
        preprocess: gives the mean, the standard deviation and the background that images are normalized with.
        num_classes: number of classes of the logits.
        groupings: as in `ClassificationMetrics`.
        group: processes that each pass a part of the batches; the metrics are gathered over all of them.

    Returns:
        What `ClassificationMetrics.compute` returns.
    """
    device = next(net.parameters()).device
    metrics = ClassificationMetrics(num_classes, groupings).to(device)
    metrics.dist_sync_fn = group.gather_tensors
    for batch in batches:
        images = preprocess_batch(
            batch["image"].to(device), preprocess.mean, preprocess.std, preprocess.background
        )
        metrics.update(net(images).float(), batch["label"].to(device))
    return metrics.compute()


def evaluate_classifier(
    net: Network, source: Source, loading: DataConfig, runtime: Runtime, name: str = "the data"
) -> ClassificationResult:
    """Evaluate a classifier on labeled images, preprocessed as its card says.

    Args:
        net: the classifier; it is moved to the device of `runtime`.
        source: images with labels.
        loading: batch size, worker processes, what to do about damaged images.
        runtime: device and precision.
        name: name of the data, for messages.

    Raises:
        DataError: there are no labels, the network does not have their classes, or no image can be read.
    """
    if not source.classes:
        raise DataError(f"{name} has no labels, and evaluation needs them; name --label-column")
    match = match_classes(net.card, net.config.num_classes, source.classes, source.groupings)
    net = runtime.place(net)
    loader = make_loader(source, loading, net.card.preprocess, train=False)
    batches = _relabel(runtime.batches(loader, len(source)), torch.tensor(match.index))
    with runtime.autocast():
        metrics = measure_classification(net, batches, net.card.preprocess, len(match.names), match.groupings)
    if note := describe_unmeasured(metrics["per_class_count"], match.names):
        log.warning(note)
    return ClassificationResult.of(metrics, match.names, match.groupings, loader.bad)


def _relabel(batches: Iterable[Batch], index: Int[Tensor, " k"]) -> Iterator[Batch]:
    """Yield the batches with the network's class indices as labels, instead of the data's."""
    for batch in batches:
        yield {**batch, "label": index[batch["label"]]}
