"""Masked image modeling (SimMIM): the task, and building a run."""

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor, nn

from triptych import distributed
from triptych.data.augment.batch import augment, preprocess_batch
from triptych.data.config import AugmentConfig
from triptych.data.example import Batch, TrainBatch
from triptych.data.loading.loader import make_loader
from triptych.data.open import train_and_eval
from triptych.device import copy_to_device
from triptych.distributed import SINGLE_PROCESS, ProcessGroup
from triptych.errors import CheckpointError, ConfigError
from triptych.heads.simmim import MaskedImageModel
from triptych.model_card import ModelCard
from triptych.models.registry import build, config_for
from triptych.training.configs.base import PretrainConfig
from triptych.training.runner import Run, make_run, match_preprocessing
from triptych.training.task import LossOutput
from triptych.training.tasks.initial_network import (
    describe_origin,
    load_backbone,
    parse_model_args,
    set_drop_path,
)


class MaskedPixels:
    """SimMIM (Xie et al. 2022, Section 3): squares of the image are masked, and the loss is the mean absolute error of
    the predicted pixels in them, normalized like the network's input.

    Args:
        config: augmentation.
        card: model card of the network.
        patch: side of a square in pixels.
        ratio: fraction of the squares that are masked.
    """

    headline = "loss"

    def __init__(self, config: AugmentConfig, card: ModelCard, patch: int, ratio: float):
        self.config, self.card, self.patch, self.ratio = config, card, patch, ratio

    def loss(self, model: nn.Module, batch: TrainBatch) -> LossOutput:
        with torch.autocast(batch["image"].device.type, enabled=False):
            images, _ = augment(batch["image"], None, self.config, batch["seed"], aspect=batch["aspect"])
        return LossOutput(self.error(model, images, batch["seed"]), {})

    def error(
        self, model: nn.Module, images: Float[Tensor, "b c h w"], seed: Sequence[int]
    ) -> Float[Tensor, ""]:
        """Return the loss of normalized images, with masks drawn by `seed`."""
        mask = random_squares(images, self.patch, self.ratio, seed)
        predicted = model(images, mask).float()
        error = (predicted - images).abs().mean(dim=1)
        return (error * mask).sum() / mask.sum()

    @torch.no_grad()
    def evaluate(
        self, model: nn.Module, loader: Iterable[Batch], group: ProcessGroup = SINGLE_PROCESS
    ) -> Iterator[tuple[str, float]]:
        """Yield the loss, with the same masks at each evaluation."""
        device, preprocess = next(model.parameters()).device, self.card.preprocess
        total, count = 0.0, 0
        for i, batch in enumerate(loader):
            images = preprocess_batch(
                batch["image"].to(device), preprocess.mean, preprocess.std, preprocess.background
            )
            total += self.error(model, images, (0, batch.get("number", i))).item() * len(images)
            count += len(images)
        total, count = group.all_sum(total, count)
        yield "loss", total / count
        yield "count", int(count)

    def rank(self, metrics: dict[str, float], /) -> tuple[float, ...]:
        return (-metrics["loss"],)

    def product(self, net: Any) -> Any:
        """Return the backbone, which fine-tuning starts from."""
        return net.backbone


def random_squares(
    images: Float[Tensor, "b c h w"], side: int, ratio: float, seed: Sequence[int]
) -> Bool[Tensor, "b h w"]:
    """Return random masks, which are True in the masked squares: the same number in each image, drawn by `seed`."""
    b, (rows, columns) = images.shape[0], (images.shape[-2] // side, images.shape[-1] // side)
    rng = np.random.default_rng([n % 2**64 for n in seed])
    order = distributed.draw_rows(b, lambda n: rng.random((n, rows * columns))).argsort(axis=1)
    mask = torch.from_numpy(order < math.ceil(ratio * rows * columns)).view(b, rows, columns)
    mask = copy_to_device(mask, images.device).repeat_interleave(side, 1).repeat_interleave(side, 2)
    return F.pad(mask, (0, images.shape[-1] - columns * side, 0, images.shape[-2] - rows * side))


def prepare(config: PretrainConfig) -> Run:
    """Open the data, build the network, and place it on the device.

    Raises:
        ConfigError, DataError, CheckpointError: config, data and weights do not fit together.
    """
    loading = config.loading
    source, held_out = train_and_eval(config.data, loading.eval_fraction, config.loop.seed, **loading.columns)
    net = build_network(config)
    preprocess = net.card.preprocess
    return make_run(
        config,
        net,
        MaskedPixels(
            match_preprocessing(config.augment, preprocess), net.card, config.mask_patch, config.mask_ratio
        ),
        make_loader(source, loading, preprocess, train=True, seed=config.loop.seed),
        make_loader(held_out, loading, preprocess, train=False),
        source.fingerprint,
        (len(source), len(held_out)),
    )


def build_network(config: PretrainConfig) -> MaskedImageModel:
    """Return the backbone without its head, created by name or loaded, with a head that predicts pixels."""
    with torch.random.fork_rng():
        torch.manual_seed(config.loop.seed)
        if config.init is None:
            changes: dict[str, Any] = {**parse_model_args(config.model_args), "num_classes": 0}
            if config.image_size is not None:
                changes["image_size"] = config.image_size
            backbone = build(config_for(config.model, **changes))
        else:
            backbone = load_backbone(config.init, config.image_size)
            backbone.replace_head(0)
        patch, size = getattr(backbone, "patch", None), backbone.config.image_size
        if patch is None:
            raise CheckpointError(f"{type(backbone).__name__} has no patches to mask; name a ViT or a Swin")
        patch_size = backbone.config.stride
        if config.mask_patch % patch_size or any(side % config.mask_patch for side in size):
            raise ConfigError(
                f"mask_patch is {config.mask_patch}, which must be a multiple of the patch of {patch_size} pixels "
                f"and divide the image size {size[0]} x {size[1]}"
            )
        if config.drop_path_rate is not None:
            set_drop_path(backbone, config.drop_path_rate)
        net = MaskedImageModel(backbone)
    preprocess = replace(backbone.card.preprocess, size=size)
    backbone.card = replace(
        backbone.card,
        preprocess=preprocess,
        classes=None,
        groupings={},
        figures={},
        **describe_origin(config),
    )
    net.card = backbone.card
    return net
