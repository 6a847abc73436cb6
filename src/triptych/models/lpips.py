"""LPIPS (Zhang et al. 2018): perceptual distance of two images, in the features of VGG16 (Simonyan and Zisserman
2015)."""

import math

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from triptych.device import copy_to_device
from triptych.layers.initialization import initialize_weights

# Channels of the 3x3 convolutions of each of the five levels; between two levels the map is halved by max pooling.
LEVELS = ((64, 64), (128, 128), (256, 256, 256), (512, 512, 512), (512, 512, 512))
# Normalization of images in [-1, 1]: ImageNet's mean and standard deviation, as published.
SHIFT, SCALE = (-0.030, -0.088, -0.188), (0.458, 0.448, 0.450)

Images = Float[Tensor, "b 3 h w"]


class Vgg16(nn.Module):
    """The convolutions of VGG16, which return the last map of each level, after ReLU."""

    def __init__(self) -> None:
        super().__init__()
        self.levels = nn.ModuleList()
        inputs = 3
        for widths in LEVELS:
            convs = nn.ModuleList()
            for width in widths:
                convs.append(nn.Conv2d(inputs, width, 3, padding=1))
                inputs = width
            self.levels.append(convs)

    def forward(self, images: Images) -> list[Float[Tensor, "b c rows columns"]]:
        maps, x = [], images
        for i, convs in enumerate(self.levels):
            x = F.max_pool2d(x, 2) if i else x
            for conv in convs:  # type: ignore[union-attr]
                x = F.relu(conv(x))
            maps.append(x)
        return maps


class Lpips(nn.Module):
    """The distance of Equation 1: squared differences of unit-length features, weighted by channel, averaged over
    positions, summed over levels."""

    def __init__(self) -> None:
        super().__init__()
        self.vgg = Vgg16()
        self.heads = nn.ParameterList(torch.empty(widths[-1]) for widths in LEVELS)
        for parameter in self.parameters():
            nn.init.constant_(parameter, math.nan)
        initialize_weights(self)
        for head in self.heads:
            nn.init.constant_(head, 1 / len(head))

    def features(self, images: Images) -> list[Float[Tensor, "b c rows columns"]]:
        """Return feature maps of unit length at each position, of images in [-1, 1]."""
        shift, scale = copy_to_device(torch.tensor((SHIFT, SCALE), dtype=images.dtype), images.device)[..., None, None]
        return [unit_length(x) for x in self.vgg((images - shift) / scale)]

    def forward(self, images: Images, others: Images) -> Float[Tensor, "b"]:
        """Return the distance of each pair of images in [-1, 1]."""
        pairs = zip(self.features(images), self.features(others), self.heads, strict=True)
        distances = [((x - y) ** 2 * head[:, None, None]).sum(1).mean((1, 2)) for x, y, head in pairs]
        return torch.stack(distances).sum(0)


def unit_length(x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b c h w"]:
    """Return features normalized to length 1 at each position, in fp32."""
    x = x.float()
    return x / (x.square().sum(1, keepdim=True).sqrt() + 1e-10)
