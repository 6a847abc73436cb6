"""Spatial conditions: maps of classes as channels, and boxes as tokens."""

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int, Integer
from torch import Tensor, nn

from triptych.errors import ConfigError
from triptych.models.configs.latent_diffusion import SemanticMapConfig
from triptych.models.configs.text import TextConfig

NO_CLASS = 255
"""Label of pixels without a class."""

LayoutBox = tuple[int, float, float, float, float]
"""Class, left, top, right, bottom, as shares of the image's width and height."""


class MapEncoder(nn.Module):
    """A semantic map at the size of the latents, projected to a few channels (Rombach et al. 2022, Section 4.3.1).

    CompVis' SpatialRescaler halves a one-hot map repeatedly, then projects its channels. Both are linear, so projecting
    first gives the same with a hundredth of the memory.
    """

    def __init__(self, config: SemanticMapConfig):
        super().__init__()
        self.mix = nn.Conv2d(config.num_classes, config.channels, 1, bias=False)

    def forward(self, classes: Integer[Tensor, "b H W"], factor: int) -> Float[Tensor, "b channels h w"]:
        """Return conditioning channels at the size of the latents.

        Args:
            classes: class of each pixel, from 0; 255 is none.
            factor: pixels per latent along one axis.
        """
        known = classes != NO_CLASS
        x = F.embedding(classes.long() * known, self.mix.weight.flatten(1).T)            # b H W channels
        x = (x * known[..., None]).permute(0, 3, 1, 2)                                   # b channels H W
        return F.avg_pool2d(x, factor)


def box_tokens(config: TextConfig, boxes: Sequence[LayoutBox]) -> Int[Tensor, "1 n"]:
    """Return boxes as the tokens of a layout (Rombach et al. 2022, Appendix C), in the order of CompVis'
    taming-transformers: for each box the class and the cells of its top left and bottom right corners; empty boxes;
    and the corners of the crop, which is the full image. The paper's text names the class last.

    An image has floor(sqrt(vocabulary))^2 cells, 90 x 90 for 8,192; the last token marks empty boxes.

    Raises:
        ConfigError: too many boxes, a class without a token, or corners outside the image.
    """
    most, none, side = (config.max_length - 2) // 3, config.vocab_size - 1, math.isqrt(config.vocab_size)
    if len(boxes) > most:
        raise ConfigError(f"{len(boxes)} boxes are given, but this model reads at most {most}")

    def cell(x: float, y: float) -> int:
        return round(y * (side - 1)) * side + round(x * (side - 1))

    tokens: list[int] = []
    for label, left, top, right, bottom in boxes:
        if not 0 <= label < none:
            raise ConfigError(f"a box has class {label}, which must be from 0 to {none - 1}")
        if not (0 <= left < right <= 1 and 0 <= top < bottom <= 1):
            raise ConfigError(
                f"a box is {left}, {top}, {right}, {bottom}, which must be left, top, right and bottom from 0 to 1"
            )
        tokens += [label, cell(left, top), cell(right, bottom)]
    tokens += [none] * (3 * most - len(tokens)) + [cell(0.0, 0.0), cell(1.0, 1.0)]
    return torch.tensor([tokens + [none] * (config.max_length - len(tokens))])
