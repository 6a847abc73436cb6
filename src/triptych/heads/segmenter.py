"""A backbone with a dense head, which predicts a class for each pixel."""

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from jaxtyping import Float
from torch import Tensor, nn

from triptych.errors import ConfigError
from triptych.heads.blocks import ConvNorm, Pyramid, resize_map
from triptych.heads.config import HeadConfig, SegmenterConfig
from triptych.heads.fpn import Fpn
from triptych.heads.unet_decoder import UNetDecoder
from triptych.heads.upernet import UPerNet
from triptych.layers.initialization import initialize_weights
from triptych.layers.residual import Dropout2d
from triptych.model_card import ModelCard, Preprocess
from triptych.network import Network


class Segmenter(Network):
    """Semantic segmentation: logits at the size of the images, which may be any that the backbone takes.

    Args:
        config: config of head and backbone; `config.backbone` is that of `backbone`.
        backbone: a network with `features`, `channels` and `strides`. From one with maps by block (a ViT) the blocks
            `config.head.blocks` are read, and their maps turned into a pyramid.

    Raises:
        ConfigError: `config.head.blocks` for a backbone without maps by block, or an auxiliary head for a single map.
    """

    config: SegmenterConfig

    def __init__(self, config: SegmenterConfig, backbone: Network):
        super().__init__()
        self.config = config
        self.card = ModelCard(preprocess=Preprocess(size=config.image_size))
        self.backbone = backbone
        channels, strides = list(backbone.channels), list(backbone.strides)
        self.blocks_read: tuple[int, ...] = ()
        self.pyramid = None
        if backbone.by_block:
            self.blocks_read = config.head.blocks or quarters(len(backbone.blocks()))
            self.pyramid = Pyramid(
                channels * len(self.blocks_read), strides * len(self.blocks_read), config.head.channels
            )
            channels = self.pyramid.channels
        elif config.head.blocks:
            raise ConfigError(
                f"head.blocks is {config.head.blocks}, but {type(backbone).__name__} has a map per stage; leave it out"
            )
        if config.head.aux_channels and len(channels) < 2:
            raise ConfigError(
                f"head.aux_channels is {config.head.aux_channels}, and the auxiliary head reads the "
                "last map but one of "
                "several; there is one, so leave it at 0"
            )
        self.decoder = make_decoder(config.head, channels, config.in_channels)
        self.dropout = Dropout2d(config.head.dropout)
        self.classifier = nn.Conv2d(self.decoder.channels, config.num_classes, 1)  # type: ignore[arg-type]
        self.aux = None
        if config.head.aux_channels:
            self.aux = nn.ModuleList([
                ConvNorm(channels[-2], config.head.aux_channels),
                nn.Conv2d(config.head.aux_channels, config.num_classes, 1),
            ])  # fmt: skip
        self.initialize()

    def initialize(self) -> None:
        """Initialize all but the backbone, which is initialized already."""
        for part in (self.pyramid, self.decoder, self.classifier, self.aux):
            if part is not None:
                for parameter in part.parameters():
                    nn.init.constant_(parameter, math.nan)
                initialize_weights(part)

    def blocks(self) -> list[nn.Module]:
        """Return the backbone's blocks."""
        return self.backbone.blocks()

    def replace_head(self, num_classes: int, head: Any = None) -> None:
        """Replace the classifiers by new ones for other classes, in place; the decoder stays."""
        self.config = replace(self.config, head=replace(self.config.head, num_classes=num_classes))
        like = next(self.parameters())
        self.classifier = nn.Conv2d(self.classifier.in_channels, num_classes, 1).to(like)
        initialize_weights(self.classifier)
        if self.aux is not None:
            self.aux[1] = nn.Conv2d(self.config.head.aux_channels, num_classes, 1).to(like)
            initialize_weights(self.aux[1])
        self.card = replace(self.card, classes=None, colors=None, groupings={}, figures={})

    def maps(self, images: Float[Tensor, "b c h w"]) -> list[Float[Tensor, "b _ _ _"]]:
        """Return the pyramid that the head reads, finest first."""
        if self.pyramid is None:
            return self.backbone.features(images)
        return self.pyramid(self.backbone.features(images, self.blocks_read))

    def decode(
        self, maps: Sequence[Float[Tensor, "b _ _ _"]], images: Float[Tensor, "b c h w"]
    ) -> Float[Tensor, "b classes rows columns"]:
        """Return logits at the finest map's size."""
        maps = list(maps)
        decoded = self.decoder(maps, images) if isinstance(self.decoder, UNetDecoder) else self.decoder(maps)
        return self.classifier(self.dropout(decoded))

    def with_aux(self, images: Float[Tensor, "b c h w"]) -> tuple[Tensor, Tensor | None]:
        """Return logits of the head and of the auxiliary head, if there is one, at the images' size: for training."""
        maps, size = self.maps(images), (images.shape[-2], images.shape[-1])
        logits = resize_map(self.decode(maps, images), size)
        if self.aux is None:
            return logits, None
        conv, classifier = self.aux
        return logits, resize_map(classifier(self.dropout(conv(maps[-2]))), size)

    def forward(self, images: Float[Tensor, "b c h w"]) -> Float[Tensor, "b classes h w"]:
        return resize_map(self.decode(self.maps(images), images), (images.shape[-2], images.shape[-1]))


def make_decoder(config: HeadConfig, channels: list[int], image_channels: int) -> nn.Module:
    """Return the head that the config names, for maps with these channels, finest first."""
    if config.type == "fpn":
        return Fpn(channels, config.channels)
    if config.type == "unet":
        return UNetDecoder(channels, config.channels, image_channels, config.image_branch_channels)
    return UPerNet(channels, config.channels, config.pool_scales)


def quarters(depth: int) -> tuple[int, ...]:
    """Return the last block of each quarter of a network: 2, 5, 8 and 11 of 12."""
    return tuple(dict.fromkeys(max(0, round(depth * i / 4) - 1) for i in (1, 2, 3, 4)))
