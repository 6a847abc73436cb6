"""What a run of masked pre-training is made of."""

from dataclasses import replace
from typing import Any

import torch

from triptych.data.loading.loader import make_loader
from triptych.data.open import train_and_eval
from triptych.errors import UserError
from triptych.heads.simmim import MaskedImageModel
from triptych.models.registry import build, config_for
from triptych.train.configs.base import PretrainConfig
from triptych.train.runner import Run, make_run, match_preprocessing
from triptych.train.task import MaskedPixels
from triptych.train.tasks.initial_network import origin, parsed, set_drop_path, started_from


def prepare(config: PretrainConfig) -> Run:
    """Open the data, build the network, and place it."""
    loading = config.loading
    source, held_out = train_and_eval(config.data, loading.eval_fraction, config.loop.seed, **loading.columns)
    net = build_network(config)
    how = net.card.preprocess
    return make_run(
        config,
        net,
        MaskedPixels(
            match_preprocessing(config.augment, how), net.card, config.mask_patch, config.mask_ratio
        ),
        make_loader(source, loading, how, train=True, seed=config.loop.seed),
        make_loader(held_out, loading, how, train=False),
        source.fingerprint,
        (len(source), len(held_out)),
    )


def build_network(config: PretrainConfig) -> MaskedImageModel:
    """The backbone without its head, by name or loaded, and the head that guesses pixels."""
    with torch.random.fork_rng():
        torch.manual_seed(config.loop.seed)
        if config.init is None:
            changes: dict[str, Any] = {**parsed(config.model_args), "num_classes": 0}
            if config.image_size is not None:
                changes["image_size"] = config.image_size
            backbone = build(config_for(config.model, **changes))
        else:
            backbone = started_from(config.init, config.image_size)
            backbone.replace_head(0)
        patch, size = getattr(backbone, "patch", None), backbone.config.image_size
        if patch is None:
            raise UserError(f"{type(backbone).__name__} has no patches to mask; pre-train a ViT or a Swin")
        first = backbone.config.stride
        if config.mask_patch % first or any(side % config.mask_patch for side in size):
            raise UserError(
                f"mask_patch is {config.mask_patch}, which must be a multiple of the patch of {first} pixels "
                f"and divide the image size {size[0]} x {size[1]}"
            )
        if config.drop_path is not None:
            set_drop_path(backbone, config.drop_path)
        net = MaskedImageModel(backbone)
    how = replace(backbone.card.preprocess, size=size)
    backbone.card = replace(
        backbone.card, preprocess=how, classes=None, groupings={}, figures={}, **origin(config)
    )
    net.card = backbone.card
    return net
