"""Semantic segmentation: the task, its losses, and building a run."""

from collections.abc import Iterable, Iterator
from dataclasses import replace
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from triptych import distributed, weights
from triptych.data.augment.batch import augment_with_masks
from triptych.data.config import AugmentConfig
from triptych.data.example import Batch, TrainBatch
from triptych.data.loading.loader import make_loader
from triptych.data.masks import void_label
from triptych.data.open import train_and_eval
from triptych.data.sources.mask_folders import MASK_LAYOUTS
from triptych.distributed import SINGLE_PROCESS, ProcessGroup
from triptych.errors import CheckpointError, DataError
from triptych.evaluation.segmentation import measure_segmentation
from triptych.heads.config import HeadConfig, SegmenterConfig
from triptych.heads.segmenter import Segmenter, quarters
from triptych.model_card import ModelCard, Preprocess
from triptych.models.registry import build, config_for
from triptych.models.swin import Swin
from triptych.network import Network
from triptych.training.configs.base import LossConfig, SegmentConfig
from triptych.training.runner import Run, make_run, match_preprocessing
from triptych.training.task import LossOutput
from triptych.training.tasks.class_weights import count_pixels, read_class_weights
from triptych.training.tasks.initial_network import (
    describe_origin,
    freeze,
    parse_model_args,
    read_as,
    set_drop_path,
)


class Segment:
    """Semantic segmentation with a weighted sum of losses; images and masks get the same geometric augmentation.

    Args:
        config: augmentation.
        card: model card of the network.
        num_classes: number of classes.
        loss: weights of the losses.
        class_weights: weight of each class in the cross entropy; None is 1.
    """

    headline = "miou"

    def __init__(
        self,
        config: AugmentConfig,
        card: ModelCard,
        num_classes: int,
        loss: LossConfig,
        class_weights: Float[Tensor, " k"] | None = None,
    ):
        self.config, self.card, self.num_classes, self.weights = config, card, num_classes, loss
        self.class_weights = class_weights

    def loss(self, model: nn.Module, batch: TrainBatch) -> LossOutput:
        assert "mask" in batch
        with torch.autocast(batch["image"].device.type, enabled=False):
            images, masks = augment_with_masks(
                batch["image"], batch["mask"], self.config, batch["seed"], batch["aspect"]
            )
        assert isinstance(model, Segmenter)
        logits, aux = model.with_aux(images)
        masks = masks.long()
        if self.class_weights is not None:
            self.class_weights = self.class_weights.to(logits.device)
        loss = pixel_loss(logits.float(), masks, self.weights, self.class_weights)
        if aux is not None and self.weights.aux:
            loss = loss + self.weights.aux * pixel_loss(aux.float(), masks, self.weights, self.class_weights)
        known = masks != void_label(self.num_classes)
        correct = distributed.sum_over_batch(((logits.argmax(1) == masks) & known).sum())
        return LossOutput(
            loss, {"train_pixels": correct / distributed.sum_over_batch(known.sum()).clamp(min=1)}
        )

    def evaluate(
        self, model: nn.Module, loader: Iterable[Batch], group: ProcessGroup = SINGLE_PROCESS
    ) -> Iterator[tuple[str, float]]:
        metrics = measure_segmentation(model, loader, self.card.preprocess, self.num_classes, group)
        for name, value in metrics.items():
            if isinstance(value, int | float):
                yield name, value

    def rank(self, metrics: dict[str, float], /) -> tuple[float, ...]:
        return metrics["miou"], metrics["pixel_accuracy"]

    def product(self, net: Any) -> Any:
        return net


def pixel_loss(
    logits: Float[Tensor, "b k h w"],
    masks: Int[Tensor, "b h w"],
    weights: LossConfig,
    class_weights: Float[Tensor, " k"] | None = None,
) -> Float[Tensor, ""]:
    """Return the weighted sum of the losses of `LossConfig` over all pixels of known class; 0 if there are none.

    Pixels of unknown class have the value of `data.masks.void_label`. If several processes share a batch, each returns
    the loss of the full batch. With class weights the cross entropy is the weighted mean of `F.cross_entropy`.
    """
    K = logits.shape[1]
    known = masks != void_label(K)
    count = distributed.sum_over_batch(known.sum()).clamp(min=1)
    logs = logits.log_softmax(dim=1)
    target = masks.masked_fill(~known, 0)
    log_probability = logs.gather(1, target[:, None]).squeeze(
        1
    )  # b h w: log of the probability of the true class
    loss = logits.new_zeros(())
    if weights.cross_entropy:
        smooth = weights.label_smoothing
        total: Tensor = count
        if class_weights is None:
            losses = -(1 - smooth) * log_probability - smooth * logs.mean(dim=1)
        else:
            of_pixel = class_weights[target]  # b h w
            weighted = torch.einsum("bkhw,k->bhw", logs, class_weights / K)
            losses = -(1 - smooth) * of_pixel * log_probability - smooth * weighted
            total = distributed.sum_over_batch((of_pixel * known).sum()).clamp(min=1e-12)
        cross_entropy = distributed.sum_over_batch(losses.masked_fill(~known, 0.0).sum()) / total
        loss = loss + weights.cross_entropy * cross_entropy
    if weights.focal:
        # 1 - p, but not 0, where the gradient of its power is infinite for gamma below 1.
        error = (-log_probability.expm1()).clamp(min=torch.finfo(log_probability.dtype).tiny)
        losses = -(error**weights.focal_gamma) * log_probability
        loss = (
            loss + weights.focal * distributed.sum_over_batch(losses.masked_fill(~known, 0.0).sum()) / count
        )
    if weights.dice:
        # Sums over the pixels of each class, without one-hot maps.
        hits = log_probability.new_zeros(K).index_add(
            0, target.flatten(), (log_probability.exp() * known).flatten()
        )
        predicted = torch.einsum("bkhw,bhw->k", logs.exp(), known.to(logs))
        hits, predicted = distributed.sum_over_batch(hits), distributed.sum_over_batch(predicted)
        counted = known.flatten().int()
        truth = distributed.sum_over_batch(counted.new_zeros(K).index_add(0, target.flatten(), counted))
        dice = (2 * hits + 1) / (predicted + truth + 1)
        occurs = truth > 0
        loss = loss + weights.dice * (1 - dice).masked_fill(~occurs, 0.0).sum() / occurs.sum().clamp(min=1)
    return loss


def prepare(config: SegmentConfig) -> Run:
    """Open the data, build the network, and place it on the device.

    Raises:
        ConfigError, DataError, CheckpointError: config, data and weights do not fit together.
    """
    loading = config.loading
    source, held_out = train_and_eval(config.data, loading.eval_fraction, config.loop.seed, **loading.columns)
    classes = tuple(source.mask_classes or ())
    if not classes:
        raise DataError(
            f"{config.data} has no masks, and segmentation needs them: {MASK_LAYOUTS} (named by --loading.mask-column)"
        )
    net = build_network(config, classes)
    net.card = replace(net.card, colors=source.mask_colors)
    preprocess = net.card.preprocess
    return make_run(
        config,
        net,
        Segment(
            match_preprocessing(config.augment, preprocess),
            net.card,
            len(classes),
            config.loss,
            read_class_weights(config.loss.class_weights, classes, lambda: count_pixels(source)),
        ),
        make_loader(source, loading, preprocess, train=True, seed=config.loop.seed),
        make_loader(held_out, loading, preprocess, train=False),
        source.fingerprint,
        (len(source), len(held_out)),
    )


def build_network(config: SegmentConfig, classes: tuple[str, ...]) -> Segmenter:
    """Return the segmenter to train: loaded, or a new head on a backbone that is loaded or created by name."""
    head = replace(config.head, num_classes=len(classes))
    with torch.random.fork_rng():
        torch.manual_seed(config.loop.seed)
        start: Network | None = None
        if config.init is not None:
            start = weights.load(
                config.init, image_size=config.image_size, in_channels=config.in_channels
            ).float()
        if isinstance(start, Segmenter):
            net = start
            require_same_head(net, head, str(config.init))
            if net.card.classes != classes:
                net.replace_head(len(classes))
        else:
            backbone = _build_backbone(config) if start is None else start
            prepare_backbone(backbone)
            net = Segmenter(SegmenterConfig(backbone=backbone.config, head=head), backbone)
            net.card = ModelCard(preprocess=backbone.card.preprocess)
        if config.drop_path_rate is not None:
            set_drop_path(net.backbone, config.drop_path_rate)
            net.config = replace(net.config, backbone=net.backbone.config)
    # The full image is squashed to the size, since parts that are cropped away could not be segmented.
    preprocess = replace(net.card.preprocess, size=net.config.image_size, mode="squash", crop=1.0)
    preprocess = read_as(preprocess, config.loading, net.config.in_channels)
    net.card = replace(
        net.card, preprocess=preprocess, classes=classes, groupings={}, figures={}, **describe_origin(config)
    )
    if config.frozen_blocks:
        freeze(net, config.frozen_blocks)
    return net


def require_same_head(net: Segmenter, requested: HeadConfig, name: str) -> None:
    """Require that a loaded segmenter has the requested head, and set the requested dropout.

    Args:
        requested: the head of the run's config.
        name: name of the segmenter, for messages.

    Raises:
        CheckpointError: it has another head; names the flags of its own.
    """
    current = net.config.head
    if net.pyramid is not None:  # without a pyramid, no blocks are chosen
        current = replace(current, blocks=net.blocks_read)
        requested = replace(requested, blocks=requested.blocks or quarters(len(net.backbone.blocks())))
    names = ["type", "channels", *(["blocks"] if net.pyramid is not None else []), "aux_channels"]
    names += {"upernet": ["pool_scales"], "unet": ["image_branch_channels"]}.get(current.type, [])
    if any(getattr(current, name) != getattr(requested, name) for name in names):
        flags = " ".join(
            f"--head.{name.replace('_', '-')} {_words(getattr(current, name))}" for name in names
        )
        raise CheckpointError(
            f"{name} is a segmenter with another head than --head; continue training its own with {flags}, or give "
            "--init a classifier or a backbone to train a new head"
        )
    net.config = replace(net.config, head=replace(net.config.head, dropout=requested.dropout))
    net.dropout.p = requested.dropout


def _words(value: Any) -> str:
    return " ".join(map(str, value)) if isinstance(value, tuple) else str(value)


def _build_backbone(config: SegmentConfig) -> Network:
    """Return the backbone of a config, with random weights."""
    changes: dict[str, Any] = {**parse_model_args(config.model_args), "num_classes": 0}
    if config.image_size is not None:
        changes["image_size"] = config.image_size
    if config.in_channels is not None:
        changes["in_channels"] = config.in_channels
    net = build(config_for(config.model, **changes))
    net.card = replace(net.card, preprocess=Preprocess(size=net.config.image_size))
    return net


def prepare_backbone(net: Network) -> None:
    """Remove the head of a classifier, in place, and add the norms of the maps of a Swin."""
    if isinstance(net, Swin):
        net.prepare_maps()
    else:
        net.replace_head(0)
