"""What a run of semantic segmentation is made of."""

from dataclasses import replace
from typing import Any

import torch

from triptych import weights
from triptych.data.loading.loader import make_loader
from triptych.data.open import train_and_eval
from triptych.errors import UserError
from triptych.heads.config import HeadConfig, SegmenterConfig
from triptych.heads.segmenter import Segmenter, quarters
from triptych.model_card import Card, Preprocess
from triptych.models.registry import build, config_for
from triptych.models.swin import Swin
from triptych.network import Network
from triptych.train.configs.base import SegmentConfig
from triptych.train.runner import Run, make_run, match_preprocessing
from triptych.train.task import Segment
from triptych.train.tasks.initial_network import freeze, origin, parsed, set_drop_path


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
    net.card = replace(net.card, colours=source.mask_colors)
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
            keep_head(net, head, str(config.init))
            if net.card.classes != classes:
                net.replace_head(len(classes))
        else:
            backbone = _named(config) if start is None else start
            as_backbone(backbone)
            net = Segmenter(SegmenterConfig(backbone=backbone.config, head=head), backbone)
            net.card = Card(preprocess=backbone.card.preprocess)
        if config.drop_path is not None:
            set_drop_path(net.backbone, config.drop_path)
            net.config = replace(net.config, backbone=net.backbone.config)
    # The whole picture, squeezed into the size: what is cut away could not be parsed.
    how = replace(net.card.preprocess, size=net.config.image_size, mode="squash", crop=1.0)
    net.card = replace(net.card, preprocess=how, classes=classes, groupings={}, figures={}, **origin(config))
    if config.frozen_blocks:
        freeze(net, config.frozen_blocks)
    return net


def keep_head(net: Segmenter, asked: HeadConfig, name: str) -> None:
    """See that the head of a loaded segmenter is the one that the run asks for; its dropout has no weights and changes.

    Raises:
        UserError: it is another; says which flags are its own.
    """
    has = net.config.head
    if net.pyramid is not None:  # of a backbone without, no blocks are chosen
        has = replace(has, blocks=net.taken)
        asked = replace(asked, blocks=asked.blocks or quarters(len(net.backbone.blocks())))
    names = ["kind", "width", *(["blocks"] if net.pyramid is not None else []), "aux_width"]
    names += {"upernet": ["pool_scales"], "unet": ["image_width"]}.get(has.kind, [])
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


def as_backbone(net: Network) -> None:
    """Take a classifier's head off, in place, and give a Swin the norms of its maps."""
    if isinstance(net, Swin):
        net.prepare_maps()
    else:
        net.replace_head(0)
