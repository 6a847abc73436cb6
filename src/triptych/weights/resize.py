"""Changes to a loaded network: another number of classes, image size or window size."""

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from triptych.errors import ConfigError
from triptych.heads.config import SegmenterConfig
from triptych.layers.position import resample_bias_table, resample_positions
from triptych.layers.window import WindowAttention
from triptych.models.configs.convnet import ConvNetConfig
from triptych.models.configs.swin import SwinConfig, fitting, with_window
from triptych.models.configs.vit import ViTConfig, grid_at
from triptych.network import Network
from triptych.weights.mapping.defaults import imagenet_1k_in_22k, imagenet_names


def fine_tuning_head(net: Network, num_classes: int) -> Network:
    """Replace the head by a linear layer that is initialized to zero, in place (Dosovitskiy et al. 2020, Section 3.1).

    The classifiers of a segmenter are reinitialized. The old head is discarded, and its class names are removed from
    the card.

    Raises:
        ConfigError: fewer than one class.
    """
    if num_classes < 1:
        raise ConfigError(
            f"num_classes is {num_classes}, which must be at least 1; leave it out to keep the head as it is"
        )
    net.replace_head(num_classes)
    return net


def map_head(net: Network, indices: Sequence[int] | None = None) -> Network:
    """Keep some classes of a linear head, in place: logit i becomes what logit `indices[i]` was.

    By default the classes of ImageNet-1k are selected from the 21,841 of ImageNet-22k by synset, so that fine-tuning
    starts from the pre-trained classifier, as in Swin's own code. Swin's data/map22kto1k.txt indexes another list, of
    21,843 classes, and from class 718 on selects rows one or two too far; pass its numbers as `indices` to reproduce
    the authors' results.

    Args:
        net: a classifier with one linear head.
        indices: indices of the classes to keep.

    Raises:
        ConfigError: there is no single linear head, or it lacks these classes.
    """
    head = getattr(net, "head", None)
    if not isinstance(head, nn.Linear) or hasattr(net, "head_distill"):
        raise ConfigError(f"{type(net).__name__} has no single linear head to select classes from")
    if indices is None and head.out_features != 21841:
        raise ConfigError(f"the head has {head.out_features} classes, not ImageNet-22k's 21841; give indices")
    selected = imagenet_1k_in_22k() if indices is None else list(indices)
    if not selected or min(selected) < 0 or max(selected) >= head.out_features:
        raise ConfigError(f"indices must name classes from 0 to {head.out_features - 1}; correct the list")
    new_head = nn.Linear(head.in_features, len(selected), bias=head.bias is not None).to(head.weight)
    with torch.no_grad():
        new_head.weight.copy_(head.weight[selected])
        if head.bias is not None:
            new_head.bias.copy_(head.bias[selected])
    names = net.card.classes
    net.head = new_head.train(head.training)
    net.config = replace(net.config, num_classes=len(selected))
    classes = imagenet_names(1000) if indices is None else names and tuple(names[i] for i in selected)
    net.card = replace(net.card, classes=classes, groupings={}, figures={})
    return net


def resize_positions(net: Network, image_size: int | tuple[int, int]) -> Network:
    """Change the image size of a network, in place.

    Learned positions of a ViT are resampled permanently. A Swin has none; only its config and card change.

    Raises:
        ConfigError: a size below one pixel.
    """
    size = (image_size, image_size) if isinstance(image_size, int) else (image_size[0], image_size[1])
    if min(size) < 1:
        raise ConfigError(f"image_size is {size}, which must be positive numbers of pixels")
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


def adapt_in_channels(net: Network, in_channels: int) -> Network:
    """Change the number of input channels of a classifier, a backbone or a segmenter, in place.

    The rule is that of timm's `adapt_input_conv`. For one channel the weights of the first layer are summed over the
    channels, so that a gray image has the embedding that it had as RGB. For more, the channels are repeated in turn up
    to the new number, and weights are scaled by old over new, so that activations keep their size.

    Raises:
        ConfigError: fewer than one channel, or a network that takes no images alone.
    """
    if in_channels < 1:
        raise ConfigError(f"in_channels is {in_channels}, which must be at least 1")
    backbone: Any = net.backbone if isinstance(net.config, SegmenterConfig) else net
    if not isinstance(backbone.config, ViTConfig | SwinConfig | ConvNetConfig):
        raise ConfigError(
            f"{type(net).__name__} is no classifier or segmenter, whose images may have other channels; leave "
            "in_channels out"
        )
    if backbone.config.in_channels == in_channels:
        return net
    parts = [[backbone.stem, backbone.patch] if hasattr(backbone, "stem") else [backbone]]
    if isinstance(image_branch := getattr(getattr(net, "decoder", None), "image", None), nn.Module):
        parts.append([image_branch])
    for modules in parts:
        convs = (m for part in modules for m in part.modules() if isinstance(m, nn.Conv2d))
        _adapt_conv(next(convs), in_channels)
    backbone.config = replace(backbone.config, in_channels=in_channels)
    if backbone is not net:
        net.config = replace(net.config, backbone=backbone.config)
    return net


def _adapt_conv(conv: nn.Conv2d, in_channels: int) -> None:
    """Sum or repeat a convolution's weights for another number of input channels."""
    with torch.no_grad():
        if in_channels == 1:
            weight = conv.weight.sum(1, keepdim=True)
        else:
            repeats = math.ceil(in_channels / conv.in_channels)
            weight = conv.weight.repeat(1, repeats, 1, 1)[:, :in_channels] * (conv.in_channels / in_channels)
    conv.weight = nn.Parameter(weight.contiguous(), requires_grad=conv.weight.requires_grad)
    conv.in_channels = in_channels


def _resample(net: Any, config: ViTConfig, size: tuple[int, int]) -> None:
    old, new = config.grid, grid_at(config, size)
    if config.position == "learned" and old != new:
        prefix = net.positions.shape[1] - math.prod(old)
        with torch.no_grad():
            table = resample_positions(net.positions, old, new, prefix, config.position_resampling)
        net.positions = nn.Parameter(table.clone())


def windows_in(config: Any) -> Any:
    """Return the window sizes of a network or of its backbone; None if it has no windows."""
    return getattr(getattr(config, "backbone", config), "window_size", None)


def resize_windows(net: Network, window_size: Any) -> Network:
    """Change the window size of a Swin, in place.

    The relative position bias tables of version 1 are interpolated (`layers.position.resample_bias_table`). The bias of
    version 2 is a function of log-spaced distances, scaled by the windows that it was trained with; no weight changes.

    Args:
        net: a Swin, or a segmenter on one.
        window_size: one number or (height, width) for all stages, reduced where the map of a stage is smaller at the
            network's image size; or one of these for each stage, used as they are.

    Raises:
        ConfigError: the network has no windows, or their number is not that of the stages.
    """
    if isinstance(net.config, SegmenterConfig):
        backbone: Any = net.backbone
        resize_windows(backbone, window_size)
        net.config = replace(net.config, backbone=backbone.config)
        return net
    if not isinstance(net.config, SwinConfig):
        raise ConfigError(f"{type(net).__name__} has no windows; leave window_size out")
    old, new = net.config, with_window(net.config, fitting(net.config, window_size))
    for stage, window in enumerate(new.window_size):
        for block in net.stages[stage].blocks:  # type: ignore[index, union-attr]
            _resize_window(
                block.attn, old.window_size[stage], window, new.pretrained_window_size[stage : stage + 1]
            )
    net.config = new
    return net


def _resize_window(attn: WindowAttention, old: Any, new: Any, pretrained: Any) -> None:
    if not attn.cosine and old != new:
        with torch.no_grad():
            table = resample_bias_table(attn.bias_table, old, new)
        attn.bias_table = nn.Parameter(table.clone())
    attn.window, attn.pretrained = new, pretrained[0] if pretrained else (0, 0)
