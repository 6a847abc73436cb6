"""The contracting path of U-Net (Ronneberger et al. 2015, Figure 1): the plain baseline of dense prediction."""

import math

import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from triptych.errors import ConfigError
from triptych.layers.initialization import initialize_weights
from triptych.layers.norm import BatchNorm
from triptych.model_card import ModelCard, Preprocess
from triptych.models.configs.convnet import ConvNetConfig
from triptych.network import Network


class Step(nn.Module):
    """Two 3x3 convolutions, each with batch norm and ReLU, at constant map size."""

    def __init__(self, inputs: int, outputs: int):
        super().__init__()
        self.conv1, self.norm1 = nn.Conv2d(inputs, outputs, 3, padding=1, bias=False), BatchNorm(outputs)
        self.conv2, self.norm2 = nn.Conv2d(outputs, outputs, 3, padding=1, bias=False), BatchNorm(outputs)

    def forward(self, x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b d h w"]:
        return F.relu(self.norm2(self.conv2(F.relu(self.norm1(self.conv1(x))))))


class ConvNet(Network):
    """Steps of two convolutions with max pooling between them. Returns maps at strides 1, 2, 4, ..., no classes."""

    config: ConvNetConfig

    def __init__(self, config: ConvNetConfig):
        super().__init__()
        self.config = config
        self.card = ModelCard(preprocess=Preprocess(size=config.image_size))
        inputs = (config.in_channels, *config.widths[:-1])
        self.steps = nn.ModuleList(Step(i, o) for i, o in zip(inputs, config.widths, strict=True))
        self.channels = list(config.widths)
        self.strides = [2**i for i in range(len(config.widths))]
        for parameter in self.parameters():
            nn.init.constant_(parameter, math.nan)
        initialize_weights(self)

    def blocks(self) -> list[nn.Module]:
        return list(self.steps)

    def replace_head(self, num_classes: int, head: str = "linear") -> None:
        if num_classes:
            raise ConfigError("a ConvNet has no classifier; use it with a dense head")

    def features(self, images: Float[Tensor, "b c h w"]) -> list[Float[Tensor, "b _ _ _"]]:
        """Return the map of each step."""
        x, maps = images, []
        for i, step in enumerate(self.steps):
            x = step(F.max_pool2d(x, 2, ceil_mode=True) if i else x)
            maps.append(x)
        return maps

    def forward(self, images: Float[Tensor, "b c h w"]) -> Float[Tensor, "b d rows columns"]:
        return self.features(images)[-1]
