"""An image as a prompt, as data. Imports no torch."""

from dataclasses import dataclass

from triptych.config import check
from triptych.errors import UserError
from triptych.models.configs.swin import SwinConfig
from triptych.models.configs.vit import ViTConfig


@dataclass(frozen=True, kw_only=True)
class ImageTokensConfig:
    """An image as a prompt: a token for each cell of a ViT's or Swin's last map. Checked when made."""

    backbone: ViTConfig | SwinConfig
    embed_dim: int = 256
    """Of a token."""
    image_size: tuple[int, int] = (224, 224)
    """Height and width that the backbone is fed."""
    mean: tuple[float, float, float] = (0.5, 0.5, 0.5)
    std: tuple[float, float, float] = (0.5, 0.5, 0.5)
    """Of what it is fed, of values from 0 to 1."""

    def __post_init__(self):
        check(self)
        if self.embed_dim < 1 or min(self.image_size) < 1 or min(self.std) <= 0:
            raise UserError(
                f"width is {self.embed_dim}, size {self.image_size} and std {self.std}, which must all be positive"
            )
