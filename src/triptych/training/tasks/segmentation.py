"""Semantic segmentation: the task, its losses, and how a run of it is built."""

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
from triptych.distributed import SINGLE_PROCESS, ProcessGroup
from triptych.errors import UserError
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
from triptych.training.tasks.initial_network import freeze, origin, parsed, set_drop_path


class Segment:
    """Semantic segmentation: image and mask augmented alike, a weighted sum of losses."""

    headline = "miou"

    def __init__(self, config: AugmentConfig, card: ModelCard, num_classes: int, loss: LossConfig):
        self.config, self.card, self.num_classes, self.weights = config, card, num_classes, loss

    def loss(self, model: nn.Module, batch: TrainBatch) -> LossOutput:
        assert "mask" in batch
        with torch.autocast(batch["image"].device.type, enabled=False):
            images, masks = augment_with_masks(
                batch["image"], batch["mask"], self.config, batch["seed"], batch["aspect"]
            )
        assert isinstance(model, Segmenter)
        logits, aux = model.with_aux(images)
        masks = masks.long()
        loss = pixel_loss(logits.float(), masks, self.weights)
        if aux is not None and self.weights.aux:
            loss = loss + self.weights.aux * pixel_loss(aux.float(), masks, self.weights)
        known = masks != void_label(self.num_classes)
        right = distributed.sum_over_batch(((logits.argmax(1) == masks) & known).sum())
        return LossOutput(
            loss, {"train_pixels": right / distributed.sum_over_batch(known.sum()).clamp(min=1)}
        )

    def evaluate(
        self, model: nn.Module, loader: Iterable[Batch], group: ProcessGroup = SINGLE_PROCESS
    ) -> Iterator[tuple[str, float]]:
        figures = measure_segmentation(model, loader, self.card.preprocess, self.num_classes, group)
        for name, value in figures.items():
            if isinstance(value, int | float):
                yield name, value

    def rank(self, figures: dict[str, float]) -> tuple[float, ...]:
        return figures["miou"], figures["pixel_accuracy"]

    def product(self, net: Any) -> Any:
        return net


def pixel_loss(
    logits: Float[Tensor, "b k h w"], masks: Int[Tensor, "b h w"], weights: LossConfig
) -> Float[Tensor, ""]:
    """The weighted sum of `LossConfig` over the pixels of known class (`data.masks.void_label`); 0 where there is none.
    Of a batch that several processes share it is that of the whole, in each of them."""
    K = logits.shape[1]
    known = masks != void_label(K)
    count = distributed.sum_over_batch(known.sum()).clamp(min=1)
    logs = logits.log_softmax(dim=1)
    target = masks.masked_fill(~known, 0)
    right = logs.gather(1, target[:, None]).squeeze(1)  # b h w: log of the probability of the true class
    loss = logits.new_zeros(())
    if weights.cross_entropy:
        smooth = weights.label_smoothing
        each = -(1 - smooth) * right - smooth * logs.mean(dim=1)
        loss = (
            loss
            + weights.cross_entropy * distributed.sum_over_batch(each.masked_fill(~known, 0.0).sum()) / count
        )
    if weights.focal:
        # 1 - p, never 0: below gamma = 1 the slope of its power has no end there, though the loss is flat.
        wrong = (-right.expm1()).clamp(min=torch.finfo(right.dtype).tiny)
        each = -(wrong**weights.focal_gamma) * right
        loss = loss + weights.focal * distributed.sum_over_batch(each.masked_fill(~known, 0.0).sum()) / count
    if weights.dice:
        # Sums of each class over all pixels, without a map that says for each class where it is.
        hits = right.new_zeros(K).index_add(0, target.flatten(), (right.exp() * known).flatten())
        guessed = torch.einsum("bkhw,bhw->k", logs.exp(), known.to(logs))
        hits, guessed = distributed.sum_over_batch(hits), distributed.sum_over_batch(guessed)
        counted = known.flatten().int()
        truth = distributed.sum_over_batch(counted.new_zeros(K).index_add(0, target.flatten(), counted))
        dice = (2 * hits + 1) / (guessed + truth + 1)
        there = truth > 0
        loss = loss + weights.dice * (1 - dice).masked_fill(~there, 0.0).sum() / there.sum().clamp(min=1)
    return loss


def prepare(config: SegmentConfig) -> Run:
    """Open the data, build the network, and place it."""
    loading = config.loading
    source, held_out = train_and_eval(config.data, loading.eval_fraction, config.loop.seed, **loading.columns)
    classes = tuple(source.mask_classes or ())
    if not classes:
        raise UserError(
            f"{config.data} has no masks, and segmentation needs them; name --loading.mask-column"
        )
    net = build_network(config, classes)
    net.card = replace(net.card, colors=source.mask_colors)
    how = net.card.preprocess
    return make_run(
        config,
        net,
        Segment(match_preprocessing(config.augment, how), net.card, len(classes), config.loss),
        make_loader(source, loading, how, train=True, seed=config.loop.seed),
        make_loader(held_out, loading, how, train=False),
        source.fingerprint,
        (len(source), len(held_out)),
    )


def build_network(config: SegmentConfig, classes: tuple[str, ...]) -> Segmenter:
    """The segmenter to train: loaded, or a head on a backbone that is loaded or made by name."""
    head = replace(config.head, num_classes=len(classes))
    with torch.random.fork_rng():
        torch.manual_seed(config.loop.seed)
        start: Network | None = None
        if config.init is not None:
            start = weights.load(config.init, image_size=config.image_size).float()
        if isinstance(start, Segmenter):
            net = start
            require_same_head(net, head, str(config.init))
            if net.card.classes != classes:
                net.replace_head(len(classes))
        else:
            backbone = _named(config) if start is None else start
            prepare_backbone(backbone)
            net = Segmenter(SegmenterConfig(backbone=backbone.config, head=head), backbone)
            net.card = ModelCard(preprocess=backbone.card.preprocess)
        if config.drop_path_rate is not None:
            set_drop_path(net.backbone, config.drop_path_rate)
            net.config = replace(net.config, backbone=net.backbone.config)
    # The whole picture, squeezed into the size: what is cut away could not be parsed.
    how = replace(net.card.preprocess, size=net.config.image_size, mode="squash", crop=1.0)
    net.card = replace(net.card, preprocess=how, classes=classes, groupings={}, figures={}, **origin(config))
    if config.frozen_blocks:
        freeze(net, config.frozen_blocks)
    return net


def require_same_head(net: Segmenter, asked: HeadConfig, name: str) -> None:
    """See that the head of a loaded segmenter is the one that the run asks for; its dropout has no weights and changes.

    Raises:
        UserError: it is another; says which flags are its own.
    """
    has = net.config.head
    if net.pyramid is not None:  # of a backbone without, no blocks are chosen
        has = replace(has, blocks=net.blocks_read)
        asked = replace(asked, blocks=asked.blocks or quarters(len(net.backbone.blocks())))
    names = ["type", "channels", *(["blocks"] if net.pyramid is not None else []), "aux_channels"]
    names += {"upernet": ["pool_scales"], "unet": ["image_branch_channels"]}.get(has.type, [])
    if any(getattr(has, name) != getattr(asked, name) for name in names):
        flags = " ".join(f"--head.{name.replace('_', '-')} {_words(getattr(has, name))}" for name in names)
        raise UserError(
            f"{name} is a segmenter with a head of its own, which is not the one of --head; train it on with {flags}, "
            "or give --init a classifier or a backbone to start another head"
        )
    net.config = replace(net.config, head=replace(net.config.head, dropout=asked.dropout))
    net.dropout.p = asked.dropout


def _words(value: Any) -> str:
    return " ".join(map(str, value)) if isinstance(value, tuple) else str(value)


def _named(config: SegmentConfig) -> Network:
    changes: dict[str, Any] = {**parsed(config.model_args), "num_classes": 0}
    if config.image_size is not None:
        changes["image_size"] = config.image_size
    net = build(config_for(config.model, **changes))
    net.card = replace(net.card, preprocess=Preprocess(size=net.config.image_size))
    return net


def prepare_backbone(net: Network) -> None:
    """Take a classifier's head off, in place, and give a Swin the norms of its maps."""
    if isinstance(net, Swin):
        net.prepare_maps()
    else:
        net.replace_head(0)
