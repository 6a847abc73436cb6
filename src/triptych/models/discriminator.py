"""PatchGAN (Isola et al. 2017, Section 3.2.2): a convolutional network that classifies each patch of an image as
real or generated."""

import math
from itertools import pairwise

import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from triptych.layers.initialization import initialize_weights
from triptych.layers.norm import BatchNorm
from triptych.network import Network


class Discriminator(Network):
    """Convolutions of 4x4: `layers` of stride 2 that double the channels up to eight times, two of stride 1.

    As published (64 channels, 3 layers) it has 2,765,633 parameters and a receptive field of 70 x 70 pixels; with 2
    layers 34 x 34, with 1 layer 16 x 16.

    Args:
        channels: channels of the first layer.
        layers: number of layers of stride 2.
        in_channels: channels of the images.
    """

    def __init__(self, channels: int = 64, layers: int = 3, in_channels: int = 3):
        super().__init__()
        widths = [channels * min(2**i, 8) for i in range(layers + 1)]
        self.conv_in = nn.Conv2d(in_channels, channels, 4, 2, 1)
        self.convs, self.norms = nn.ModuleList(), nn.ModuleList()
        for i, (inputs, width) in enumerate(pairwise(widths)):
            stride = 2 if i < layers - 1 else 1
            self.convs.append(nn.Conv2d(inputs, width, 4, stride, 1, bias=False))
            self.norms.append(BatchNorm(width))
        self.conv_out = nn.Conv2d(widths[-1], 1, 4, 1, 1)
        self.initialize()

    def initialize(self) -> None:
        """Initialize every parameter, with NaN first, so that a forgotten one is noticed, by normals of standard
        deviation 0.02, as published."""
        for parameter in self.parameters():
            nn.init.constant_(parameter, math.nan)
        initialize_weights(self)
        for part in self.modules():
            if isinstance(part, nn.Conv2d):
                nn.init.normal_(part.weight, std=0.02)
        for norm in self.norms:
            nn.init.normal_(norm.weight, 1.0, 0.02)  # type: ignore[arg-type]

    def blocks(self) -> list[nn.Module]:
        return list(self.convs)

    def forward(self, images: Float[Tensor, "b c height width"]) -> Float[Tensor, "b 1 rows columns"]:
        x = F.leaky_relu(self.conv_in(images), 0.2)                                      # b c H/2 W/2
        for conv, norm in zip(self.convs, self.norms, strict=True):
            x = F.leaky_relu(norm(conv(x)), 0.2)
        return self.conv_out(x)
