"""What a classification run is made of."""

from dataclasses import replace
from typing import Any

import torch

from triptych import weights
from triptych.data.loading.loader import make_loader
from triptych.data.open import train_and_eval
from triptych.errors import UserError
from triptych.heads.segmenter import Segmenter
from triptych.layers.lora import add_low_rank
from triptych.models.registry import build, config_for
from triptych.network import Network
from triptych.train.configs.base import ClassifyConfig
from triptych.train.runner import Run, make_run, match_preprocessing
from triptych.train.task import Classify, Teacher
from triptych.train.tasks.initial_network import freeze, origin, parsed, set_drop_path, started_from


def prepare(config: ClassifyConfig) -> Run:
    """Open the data, build the network, and place it."""
    loading = config.loading
    source, held_out = train_and_eval(config.data, loading.eval_fraction, config.loop.seed, **loading.columns)
    classes = tuple(source.classes or ())
    if not classes:
        raise UserError(
            f"{config.data} has no labels, and classification needs them; name --loading.label-column"
        )
    if len(classes) == 1:
        raise UserError(
            f"{config.data} has one class, {classes[0]!r}, and two are needed; add another folder of images"
        )
    net = build_network(config, classes, dict(source.groupings))
    how = net.card.preprocess
    return make_run(
        config,
        net,
        Classify(
            match_preprocessing(config.augment, how),
            net.card,
            len(classes),
            config.loss,
            load_teacher(config, classes),
        ),
        make_loader(source, loading, how, train=True, seed=config.loop.seed),
        make_loader(held_out, loading, how, train=False),
        source.fingerprint,
        (len(source), len(held_out)),
    )


def load_teacher(config: ClassifyConfig, classes: tuple[str, ...]) -> Teacher | None:
    """The network to learn from, if one is named."""
    if config.teacher is None:
        return None
    net = weights.load(config.teacher).float()
    if (
        isinstance(net, Segmenter)
        or net.config.num_classes != len(classes)
        or (net.card.classes or classes) != classes
    ):
        raise UserError(
            f"the teacher {config.teacher} knows {net.config.num_classes} classes, which are not the {len(classes)} of "
            f"{config.data}; give a classifier that was trained on them"
        )
    return Teacher(net, config.teacher_share, config.temperature)


def build_network(
    config: ClassifyConfig, classes: tuple[str, ...], groupings: dict[str, tuple[str, ...]]
) -> Network:
    """The network to train: by name with random weights, or loaded; with a head for `classes`."""
    with torch.random.fork_rng():
        torch.manual_seed(config.loop.seed)
        if config.init is None:
            changes: dict[str, Any] = parsed(config.model_args)
            changes["num_classes"] = len(classes)
            if config.image_size is not None:
                changes["image_size"] = config.image_size
            if config.head is not None:
                changes["head"] = config.head
            net = build(config_for(config.model, **changes))
        else:
            net = started_from(config.init, config.image_size)
            if net.card.classes != classes or config.head is not None:
                net.replace_head(len(classes), config.head or "linear")
        if config.drop_path is not None:
            set_drop_path(net, config.drop_path)
        if config.train == "lora":
            add_low_rank(net, config.lora_rank)
    how = replace(net.card.preprocess, size=net.config.image_size)
    if config.eval_crop is not None:
        how = replace(how, crop=config.eval_crop)
    net.card = replace(
        net.card, preprocess=how, classes=classes, groupings=groupings, figures={}, **origin(config)
    )
    if config.train != "all":
        if config.train == "head":
            net.requires_grad_(False)
        for name in ("head", "head_distill"):
            if hasattr(net, name):
                getattr(net, name).requires_grad_(True)
    elif config.frozen_blocks:
        freeze(net, config.frozen_blocks)
    return net
