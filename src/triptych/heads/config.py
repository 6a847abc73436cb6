"""Dense heads as data. Imports no torch."""

from dataclasses import dataclass
from typing import Any, Literal

from triptych.config import check
from triptych.errors import UserError


@dataclass(frozen=True, kw_only=True)
class HeadConfig:
    """What turns a backbone's maps into a class for each pixel. Checked when made."""

    kind: Literal["fpn", "unet", "upernet"] = "upernet"
    """Semantic FPN (Kirillov et al. 2019), U-Net's expanding path (Ronneberger et al. 2015), or UPerNet with pyramid
    pooling (Xiao et al. 2018)."""
    num_classes: int = 2
    """Training takes the data's."""
    width: int = 512
    """Channels of the head; of a U-Net's deepest step, halved at each next one."""
    blocks: tuple[int, ...] = ()
    """Of a backbone whose maps are all of one size (ViT): the blocks whose maps are taken; () is every quarter. Others
    take none."""
    pool_scales: tuple[int, ...] = (1, 2, 3, 6)
    """upernet: sides of the grids that pyramid pooling averages over."""
    image_width: int = 0
    """unet: channels of a convolution of the picture itself that joins at its full size; 0 ends at the finest map."""
    dropout: float = 0.1
    """Share of channels dropped before the classifier, in training."""
    aux_width: int = 0
    """Channels of an auxiliary head on the last map but one of several, which only training reads; 0 is none."""

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
    """The config of the backbone, of whatever family."""
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
