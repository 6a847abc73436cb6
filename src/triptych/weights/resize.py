"""Changes that a caller asks for when loading: another number of classes, another image size, other windows."""

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from triptych.errors import UserError
from triptych.heads.config import SegmenterConfig
from triptych.layers.position import resample_bias_table, resample_positions
from triptych.layers.window import WindowAttention
from triptych.models.configs.swin import SwinConfig, fitting, with_window
from triptych.models.configs.vit import ViTConfig, grid_at
from triptych.network import Network
from triptych.weights.mapping.defaults import imagenet_1k_in_22k, imagenet_names


def fine_tuning_head(net: Network, num_classes: int) -> Network:
    """Replace the head by fine-tuning's, in place: one linear layer that starts at zero (ViT, Section 3.1); of a
    segmenter, fresh classifiers.

    A pre-training head (the MLP with a tanh layer, or other classes) is thrown away. The card loses its class
    names, which belonged to that head.

    Raises:
        UserError: fewer than one class.
    """
    if num_classes < 1:
        raise UserError(
            f"num_classes is {num_classes}, which must be at least 1; leave it out to keep the head as it is"
        )
    net.replace_head(num_classes)
    return net


def map_head(net: Network, indices: Sequence[int] | None = None) -> Network:
    """Keep some classes of a linear head, in the order given, in place: logit i is what logit `indices[i]` was.

    By default ImageNet-1k's classes are taken out of ImageNet-22k's 21,841, so that fine-tuning starts from what
    pre-training knows of them (Swin's own code does so). They are found by synset. Swin's data/map22kto1k.txt counts
    in another list, of 21,843, and from class 718 on names rows one or two too far; its numbers, given as `indices`,
    repeat what its authors did.

    Args:
        net: a classifier with one linear head.
        indices: places of the classes to keep.

    Raises:
        UserError: the head is none, not linear, one of two, or lacks such classes.
    """
    head = getattr(net, "head", None)
    if not isinstance(head, nn.Linear) or hasattr(net, "head_distill"):
        raise UserError(f"{type(net).__name__} has no single linear head to take classes from")
    if indices is None and head.out_features != 21841:
        raise UserError(f"the head has {head.out_features} classes, not ImageNet-22k's 21841; give indices")
    chosen = imagenet_1k_in_22k() if indices is None else list(indices)
    if not chosen or min(chosen) < 0 or max(chosen) >= head.out_features:
        raise UserError(f"indices must name classes from 0 to {head.out_features - 1}; correct the list")
    kept = nn.Linear(head.in_features, len(chosen), bias=head.bias is not None).to(head.weight)
    with torch.no_grad():
        kept.weight.copy_(head.weight[chosen])
        if head.bias is not None:
            kept.bias.copy_(head.bias[chosen])
    names = net.card.classes
    net.head = kept.train(head.training)
    net.config = replace(net.config, num_classes=len(chosen))
    classes = imagenet_names(1000) if indices is None else names and tuple(names[i] for i in chosen)
    net.card = replace(net.card, classes=classes, groupings={}, figures={})
    return net


def resize_positions(net: Network, image_size: int | tuple[int, int]) -> Network:
    """Lay the network out for another image size, in place: a ViT's learned positions are resampled for good. A
    Swin has no positions of pixels; only its config and card change.

    Raises:
        UserError: a size below one pixel.
    """
    size = (image_size, image_size) if isinstance(image_size, int) else (image_size[0], image_size[1])
    if min(size) < 1:
        raise UserError(f"image_size is {size}, which must be positive numbers of pixels")
    if isinstance(net.config, SegmenterConfig):
        backbone: Any = net.backbone
        resize_positions(backbone, size)
        net.config = replace(net.config, backbone=backbone.config)
    else:
        if isinstance(net.config, ViTConfig):
            _resample(net, net.config, size)
        net.config = replace(net.config, image_size=size)
    net.card = replace(net.card, preprocess=replace(net.card.preprocess, size=size))
    return net


def _resample(net: Any, config: ViTConfig, size: tuple[int, int]) -> None:
    old, new = config.grid, grid_at(config, size)
    if config.position == "learned" and old != new:
        prefix = net.positions.shape[1] - math.prod(old)
        with torch.no_grad():
            table = resample_positions(net.positions, old, new, prefix)
        net.positions = nn.Parameter(table.clone())


def windows_in(config: Any) -> Any:
    """The windows of a network, or of the backbone in it; none where it has none."""
    return getattr(getattr(config, "backbone", config), "window_size", None)


def resize_windows(net: Network, window: Any) -> Network:
    """Move a Swin to other windows, in place. Version 1's tables of relative position bias are interpolated
    (`layers.position.resample_bias_table`); version 2's bias is a function of log-spaced distances that keep the
    scale of the windows it was trained with, and no weight changes.

    Args:
        net: a Swin, or a segmenter on one.
        window: one number or (height, width) for every stage, made smaller where a stage's map at the network's
            image size is; or one of these for each stage, taken as they are.

    Raises:
        UserError: the network has no windows, or there are not as many as stages.
    """
    if isinstance(net.config, SegmenterConfig):
        backbone: Any = net.backbone
        resize_windows(backbone, window)
        net.config = replace(net.config, backbone=backbone.config)
        return net
    if not isinstance(net.config, SwinConfig):
        raise UserError(f"{type(net).__name__} has no windows; leave window out")
    old, new = net.config, with_window(net.config, fitting(net.config, window))
    for stage, stage_now in enumerate(new.window_size):
        for block in net.stages[stage].blocks:  # type: ignore[index, union-attr]
            _move(
                block.attn, old.window_size[stage], stage_now, new.pretrained_window_size[stage : stage + 1]
            )
    net.config = new
    return net


def _move(attn: WindowAttention, old: Any, new: Any, before: Any) -> None:
    if not attn.cosine and old != new:
        with torch.no_grad():
            table = resample_bias_table(attn.bias_table, old, new)
        attn.bias_table = nn.Parameter(table.clone())
    attn.window, attn.pretrained = new, before[0] if before else (0, 0)
