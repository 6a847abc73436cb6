"""Measure a segmenter: mean intersection over union, pixel accuracy, and the metrics of each class."""

import logging
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from triptych.data.augment.batch import preprocess_batch
from triptych.data.config import DataConfig
from triptych.data.example import Batch
from triptych.data.loading.loader import make_full_image_loader
from triptych.data.loading.test_time_views import ViewOptions
from triptych.data.masks import mask_dtype, void_label
from triptych.data.source import Source
from triptych.data.sources.mask_folders import MASK_LAYOUTS
from triptych.distributed import SINGLE_PROCESS, ProcessGroup
from triptych.errors import DataError
from triptych.evaluation.class_names import describe_unmeasured, match_classes
from triptych.evaluation.results import SegmentationResult
from triptych.evaluation.runtime import Runtime
from triptych.heads.segmenter import Segmenter
from triptych.heads.sliding_window import logits_of_views, predicted_bands
from triptych.metrics.segmentation import SegmentationMetrics
from triptych.model_card import Preprocess

log = logging.getLogger(__name__)
DEFAULT_BATCH_SIZE = 4  # full images whose logits are in memory at the same time


@torch.no_grad()
def measure_segmentation(
    net: nn.Module,
    batches: Iterable[Batch],
    preprocess: Preprocess,
    num_classes: int,
    group: ProcessGroup = SINGLE_PROCESS,
) -> dict[str, Any]:
    """Measure a segmenter on images and masks at the size of the network's input.

    Args:
        net: maps normalized images (b, 3, h, w) to logits (b, num_classes, h, w); on its device.
        batches: as `make_loader(..., train=False)` yields them.
        preprocess: gives the mean, the standard deviation and the background that images are normalized with.
        num_classes: number of classes of the logits.
        group: processes that each pass a part of the batches; the metrics are gathered over all of them.

    Returns:
        What `SegmentationMetrics.compute` returns.
    """
    device = next(net.parameters()).device
    metrics = SegmentationMetrics(num_classes, void_label(num_classes)).to(device)
    metrics.dist_sync_fn = group.gather_tensors
    for batch in batches:
        images = preprocess_batch(
            batch["image"].to(device), preprocess.mean, preprocess.std, preprocess.background
        )
        masks = batch.get("mask")
        assert masks is not None  # the loader's source has masks
        metrics.update(net(images).float(), masks.to(device))
    return metrics.compute()


@torch.no_grad()
def measure_full_segmentation(
    net: nn.Module,
    batches: Iterable[Mapping[str, Any]],
    preprocess: Preprocess,
    num_classes: int,
    passes: ViewOptions,
    batch_size: int,
) -> dict[str, Any]:
    """Measure a segmenter on full images at the size of their masks. Logits are enlarged to it.

    Args:
        net: maps normalized images (b, 3, h, w) to logits (b, num_classes, h, w); on its device.
        batches: as `make_full_image_loader` yields them, with masks of the network's classes.
        preprocess: gives the mean and the standard deviation that images are normalized with.
        num_classes: number of classes of the logits.
        passes: sizes, windows and flips at test time.
        batch_size: views in a forward pass.

    Returns:
        What `SegmentationMetrics.compute` returns.
    """
    device = next(net.parameters()).device
    metrics = SegmentationMetrics(num_classes, void_label(num_classes)).to(device)

    def forward(views: Sequence[np.ndarray]) -> Tensor:
        images = torch.from_numpy(np.stack(views)).to(device).permute(0, 3, 1, 2)
        return net(preprocess_batch(images.contiguous(), preprocess.mean, preprocess.std)).float()

    for batch in batches:
        logits_of_images = logits_of_views(
            forward, batch["image"], passes.window_size, passes.overlap, passes.flip, batch_size
        )
        for strips, mask in zip(logits_of_images, batch["mask"], strict=True):
            truth, top = torch.as_tensor(mask).to(device), 0
            for predicted, _ in predicted_bands(strips, mask.shape, num_classes):
                metrics.update(predicted[None], truth[None, top : top + len(predicted)])
                top += len(predicted)
    return metrics.compute()


def evaluate_segmenter(
    net: Segmenter,
    source: Source,
    loading: DataConfig,
    runtime: Runtime,
    passes: ViewOptions | None = None,
    name: str = "the data",
) -> SegmentationResult:
    """Evaluate a segmenter on full images and their masks.

    Args:
        net: the segmenter; it is moved to the device of `runtime`.
        source: images with masks.
        loading: batch size, worker processes, what to do about damaged images.
        runtime: device and precision.
        passes: sizes, windows and flips at test time; None is one pass, as the card says.
        name: name of the data, for messages.

    Raises:
        ConfigError: `passes` do not fit the network.
        DataError: there are no masks, the network does not have their classes, or no image can be read.
    """
    if not source.mask_classes:
        raise DataError(
            f"{name} has no masks, and evaluation needs them: {MASK_LAYOUTS} (named by --mask-column)"
        )
    match = match_classes(net.card, net.config.num_classes, source.mask_classes, source.groupings)
    net = runtime.place(net)
    passes, batch_size = passes or ViewOptions(), loading.eval_batch_size or DEFAULT_BATCH_SIZE
    stride = net.backbone.strides[0]
    passes.check_window(stride)
    loader = make_full_image_loader(source, loading, net.card.preprocess, passes, stride, batch_size)
    num_data, num_classes = len(source.mask_classes), len(match.names)
    index = np.full(void_label(num_data) + 1, void_label(num_classes), mask_dtype(num_classes))
    index[:num_data] = match.index
    batches: Iterable[dict[str, Any]] = (
        {**batch, "mask": [index[mask] for mask in batch.get("mask", ())]}
        for batch in runtime.batches(loader, len(source))
    )
    with runtime.autocast():
        metrics = measure_full_segmentation(
            net, batches, net.card.preprocess, num_classes, passes, batch_size
        )
    if note := describe_unmeasured(metrics["per_class_count"], match.names):
        log.warning(note)
    return SegmentationResult.of(metrics, match.names, match.groupings, loader.bad)
