"""A backbone with a dense head: a class for each pixel."""

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from jaxtyping import Float
from torch import Tensor, nn

from triptych.errors import UserError
from triptych.heads.blocks import ConvNorm, Pyramid, resize
from triptych.heads.config import HeadConfig, SegmenterConfig
from triptych.heads.fpn import Fpn
from triptych.heads.unet_decoder import UNetDecoder
from triptych.heads.upernet import UPerNet
from triptych.layers.initialization import fill
from triptych.layers.residual import Dropout2d
from triptych.model_card import Card, Preprocess
from triptych.network import Network


class Segmenter(Network):
    """Semantic segmentation: images of any size that the backbone takes give logits at that size.

    Args:
        config: what it is; `config.backbone` is the backbone's own config.
        backbone: a network with `features`, `channels` and `strides`. Maps by block (a ViT's) are taken from the
            blocks of `config.head.blocks` and made a pyramid.

    Raises:
        UserError: blocks of a backbone that gives none, or an auxiliary head with one map alone.
    """

    config: SegmenterConfig

    def __init__(self, config: SegmenterConfig, backbone: Network):
        super().__init__()
        self.config = config
        self.card = Card(preprocess=Preprocess(size=config.image_size))
        self.backbone = backbone
        channels, strides = list(backbone.channels), list(backbone.strides)
        self.taken: tuple[int, ...] = ()
        self.pyramid = None
        if backbone.by_block:
            self.taken = config.head.blocks or quarters(len(backbone.blocks()))
            self.pyramid = Pyramid(channels * len(self.taken), strides * len(self.taken), config.head.width)
            channels = self.pyramid.channels
        elif config.head.blocks:
            raise UserError(
                f"head.blocks is {config.head.blocks}, and {type(backbone).__name__} has a map a stage; leave it out"
            )
        if config.head.aux_width and len(channels) < 2:
            raise UserError(
                f"head.aux_width is {config.head.aux_width}, and the auxiliary head reads the last map but one of "
                "several; there is one, so leave it at 0"
            )
        self.decoder = make_decoder(config.head, channels, config.in_channels)
        self.dropout = Dropout2d(config.head.dropout)
        self.classifier = nn.Conv2d(self.decoder.channels, config.num_classes, 1)  # type: ignore[arg-type]
        self.aux = None
        if config.head.aux_width:
            self.aux = nn.ModuleList([
                ConvNorm(channels[-2], config.head.aux_width), nn.Conv2d(config.head.aux_width, config.num_classes, 1)
            ])  # fmt: skip
        self.initialise()

    def initialise(self) -> None:
        """Fill all but the backbone, which comes filled."""
        for part in (self.pyramid, self.decoder, self.classifier, self.aux):
            if part is not None:
                for parameter in part.parameters():
                    nn.init.constant_(parameter, math.nan)
                fill(part)

    def blocks(self) -> list[nn.Module]:
        """The backbone's blocks."""
        return self.backbone.blocks()

    def replace_head(self, num_classes: int, head: Any = None) -> None:
        """Fresh classifiers for other classes, in place; the decoder stays."""
        self.config = replace(self.config, head=replace(self.config.head, num_classes=num_classes))
        like = next(self.parameters())
        self.classifier = nn.Conv2d(self.classifier.in_channels, num_classes, 1).to(like)
        fill(self.classifier)
        if self.aux is not None:
            self.aux[1] = nn.Conv2d(self.config.head.aux_width, num_classes, 1).to(like)
            fill(self.aux[1])
        self.card = replace(self.card, classes=None, colours=None, groupings={}, figures={})

    def maps(self, images: Float[Tensor, "b c h w"]) -> list[Float[Tensor, "b _ _ _"]]:
        """The pyramid that the head reads, finest first."""
        if self.pyramid is None:
            return self.backbone.features(images)
        return self.pyramid(self.backbone.features(images, self.taken))

    def decode(
        self, maps: Sequence[Float[Tensor, "b _ _ _"]], images: Float[Tensor, "b c h w"]
    ) -> Float[Tensor, "b classes rows columns"]:
        """Logits at the finest map's size."""
        maps = list(maps)
        decoded = self.decoder(maps, images) if isinstance(self.decoder, UNetDecoder) else self.decoder(maps)
        return self.classifier(self.dropout(decoded))

    def with_aux(self, images: Float[Tensor, "b c h w"]) -> tuple[Tensor, Tensor | None]:
        """Logits of the head, and of the auxiliary one if there is one, both at the images' size: for training."""
        maps, size = self.maps(images), (images.shape[-2], images.shape[-1])
        logits = resize(self.decode(maps, images), size)
        if self.aux is None:
            return logits, None
        conv, classifier = self.aux
        return logits, resize(classifier(self.dropout(conv(maps[-2]))), size)

    def forward(self, images: Float[Tensor, "b c h w"]) -> Float[Tensor, "b classes h w"]:
        return resize(self.decode(self.maps(images), images), (images.shape[-2], images.shape[-1]))


def make_decoder(config: HeadConfig, channels: list[int], image_channels: int) -> nn.Module:
    """The head that the config names, on maps of such channels, finest first."""
    if config.kind == "fpn":
        return Fpn(channels, config.width)
    if config.kind == "unet":
        return UNetDecoder(channels, config.width, image_channels, config.image_width)
    return UPerNet(channels, config.width, config.pool_scales)


def quarters(depth: int) -> tuple[int, ...]:
    """The last block of each quarter of a network: 2, 5, 8 and 11 of 12."""
    return tuple(dict.fromkeys(max(0, round(depth * i / 4) - 1) for i in (1, 2, 3, 4)))
