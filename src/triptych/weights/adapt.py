"""Changes that a caller asks for when loading: another number of classes, another image size."""

import math
from dataclasses import replace

import torch
from torch import nn

from triptych.errors import UserError
from triptych.layers.position import resample_positions
from triptych.models.vit import ViT
from triptych.models.vit_config import grid_at


def fine_tuning_head(net: ViT, num_classes: int) -> ViT:
    """Replace the head by fine-tuning's: one linear layer that starts at zero (ViT, Section 3.1), in place.

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


def resize_positions(net: ViT, image_size: int | tuple[int, int]) -> ViT:
    """Lay the network out for another image size, in place: learned positions are resampled for good.

    Raises:
        UserError: a size below one pixel.
    """
    size = (image_size, image_size) if isinstance(image_size, int) else (image_size[0], image_size[1])
    if min(size) < 1:
        raise UserError(f"image_size is {size}, which must be positive numbers of pixels")
    config = net.config
    old, new = config.grid, grid_at(config, size)
    if config.position == "learned" and old != new:
        prefix = net.positions.shape[1] - math.prod(old)
        with torch.no_grad():
            table = resample_positions(net.positions, old, new, prefix)  # type: ignore[arg-type]
        net.positions = nn.Parameter(table.clone())
    net.config = replace(config, image_size=size)
    net.card = replace(net.card, preprocess=replace(net.card.preprocess, size=size))
    return net
