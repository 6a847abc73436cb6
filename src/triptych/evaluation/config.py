"""Settings of measurements. Imports no torch."""

from dataclasses import dataclass

from triptych.config import check, need
from triptych.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class PerceptualConfig:
    """The perceptual distance between images and their reconstructions."""

    weight: float = 1.0
    """Weight of the distance in the training loss, relative to the mean error of pixels; 0 turns it off."""
    model: str = "vit-emoji"
    """ViT or Swin whose features are compared: a file, RUN, hub id or shipped name. Ignored if `vgg` is given."""
    vgg: str | None = None
    """Weights of VGG16 for LPIPS (Zhang et al. 2018): a file or hub id, from torchvision, timm or a full LPIPS."""
    heads: str | None = None
    """Published linear heads of LPIPS, if they are in a separate file."""

    def __post_init__(self) -> None:
        check(self)
        need(self.weight >= 0, self, "weight", "at least 0")
        if self.heads is not None and self.vgg is None:
            raise ConfigError(
                f"perceptual.heads is {self.heads}, and LPIPS heads need their VGG network; give perceptual.vgg too"
            )
