"""Configs of dense heads. Imports no torch."""

from dataclasses import dataclass
from typing import Any, Literal

from triptych.config import check
from triptych.errors import UserError


@dataclass(frozen=True, kw_only=True)
class HeadConfig:
    """A dense head, which turns a backbone's maps into a class for each pixel."""

    kind: Literal["fpn", "unet", "upernet"] = "upernet"
    """Semantic FPN (Kirillov et al. 2019), U-Net's expanding path (Ronneberger et al. 2015), or UPerNet with pyramid
    pooling (Xiao et al. 2018)."""
    num_classes: int = 2
    """Number of classes; training sets it to that of the data."""
    width: int = 512
    """Channels of the head; for a U-Net those of the deepest step, halved at each further one."""
    blocks: tuple[int, ...] = ()
    """Blocks whose maps are read, for a backbone whose maps all have one size (ViT); () is one at each quarter of its
    depth. Empty for other backbones."""
    pool_scales: tuple[int, ...] = (1, 2, 3, 6)
    """upernet: sides of the grids of pyramid pooling."""
    image_width: int = 0
    """unet: channels of a convolution of the image, concatenated at full size; 0 ends at the finest map."""
    dropout: float = 0.1
    """Share of channels dropped before the classifier, in training."""
    aux_width: int = 0
    """Channels of an auxiliary head on the last map but one, used in training only; 0 is none."""

    def __post_init__(self):
        check(self)
        for name in ("num_classes", "width"):
            if getattr(self, name) < 1:
                raise UserError(f"{name} is {getattr(self, name)}, which must be at least 1")
        if min(self.image_width, self.aux_width) < 0 or not 0 <= self.dropout < 1:
            raise UserError(
                f"image_width {self.image_width} and aux_width {self.aux_width} cannot be negative, "
                f"dropout {self.dropout} must be at least 0 and below 1"
            )
        if self.kind == "upernet" and min(self.pool_scales, default=0) < 1:
            raise UserError(
                f"pool_scales is {self.pool_scales}, which must be one side or more, each at least 1"
            )
        if self.image_width and self.kind != "unet":
            raise UserError(f"image_width is the U-Net's; leave it at 0 for kind={self.kind!r}")


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
