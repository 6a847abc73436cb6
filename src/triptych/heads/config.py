"""Configs of dense heads. Imports no torch."""

from dataclasses import dataclass
from typing import Any, Literal

from triptych.config import check
from triptych.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class HeadConfig:
    """A dense head, which turns a backbone's maps into a class for each pixel."""

    type: Literal["fpn", "unet", "upernet"] = "upernet"
    """Semantic FPN (Kirillov et al. 2019), U-Net's expanding path (Ronneberger et al. 2015), or UPerNet with pyramid
    pooling (Xiao et al. 2018)."""
    num_classes: int = 2
    """Number of classes; training sets it to that of the data."""
    channels: int = 512
    """Channels of the head; for a U-Net those of the deepest step, halved at each further one."""
    blocks: tuple[int, ...] = ()
    """Blocks whose maps are read, for a backbone whose maps all have one size (ViT); () is one at each quarter of its
    depth. Empty for other backbones."""
    pool_scales: tuple[int, ...] = (1, 2, 3, 6)
    """upernet: sides of the grids of pyramid pooling."""
    image_branch_channels: int = 0
    """unet: channels of a convolution of the image, concatenated at full size; 0 ends at the finest map."""
    dropout: float = 0.1
    """Share of channels dropped before the classifier, in training."""
    aux_channels: int = 0
    """Channels of an auxiliary head on the last map but one, used in training only; 0 is none."""

    def __post_init__(self):
        check(self)
        for name in ("num_classes", "channels"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} is {getattr(self, name)}, which must be at least 1")
        if min(self.image_branch_channels, self.aux_channels) < 0 or not 0 <= self.dropout < 1:
            raise ConfigError(
                f"image_branch_channels {self.image_branch_channels} and aux_channels "
                f"{self.aux_channels} cannot be negative, "
                f"dropout {self.dropout} must be at least 0 and below 1"
            )
        if self.type == "upernet" and min(self.pool_scales, default=0) < 1:
            raise ConfigError(
                f"pool_scales is {self.pool_scales}, which must be one side or more, each at least 1"
            )
        if self.image_branch_channels and self.type != "unet":
            raise ConfigError(f"image_branch_channels is the U-Net's; leave it at 0 for type={self.type!r}")


@dataclass(frozen=True, kw_only=True)
class SegmenterConfig:
    """A backbone and a dense head."""

    backbone: Any
    """Config of the backbone, of any family."""
    head: HeadConfig

    @property
    def num_classes(self) -> int:
        return self.head.num_classes

    @property
    def image_size(self) -> tuple[int, int]:
        return self.backbone.image_size

    @property
    def in_channels(self) -> int:
        return self.backbone.in_channels
