"""Config of images as prompts. Imports no torch."""

from dataclasses import dataclass

from triptych.config import check
from triptych.errors import ConfigError
from triptych.models.configs.swin import SwinConfig
from triptych.models.configs.vit import ViTConfig


@dataclass(frozen=True, kw_only=True)
class ImageTokensConfig:
    """Config of an image as a prompt: a token for each cell of a ViT's or Swin's last map. Checked on construction."""

    backbone: ViTConfig | SwinConfig
    embed_dim: int = 256
    """Channels of a token."""
    image_size: tuple[int, int] = (224, 224)
    """Height and width of the backbone's input."""
    mean: tuple[float, ...] = (0.5, 0.5, 0.5)
    std: tuple[float, ...] = (0.5, 0.5, 0.5)
    """Mean and standard deviation of the backbone's input, of values from 0 to 1."""

    def __post_init__(self):
        check(self)
        if self.embed_dim < 1 or min(self.image_size) < 1 or min(self.std) <= 0:
            raise ConfigError(
                f"embed_dim is {self.embed_dim}, image_size {self.image_size} and std {self.std}; all must be positive"
            )
