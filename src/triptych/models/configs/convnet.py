"""Config of a plain convolutional encoder. Imports no torch."""

from dataclasses import dataclass

from triptych.config import check
from triptych.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class ConvNetConfig:
    """Config of the contracting path of U-Net, checked on construction."""

    image_size: tuple[int, int] = (128, 128)
    in_channels: int = 3
    widths: tuple[int, ...] = (16, 32, 64, 128, 256)
    """Channels of each step; every step but the first begins by halving the map."""
    num_classes: int = 0
    """Always 0, since the network returns maps."""

    def __post_init__(self):
        check(self)
        if min(self.widths, default=0) < 1 or min(*self.image_size, self.in_channels) < 1 or self.num_classes:
            raise ConfigError(
                f"widths {self.widths}, image_size {self.image_size} and in_channels {self.in_channels} must be at "
                "least 1, and num_classes 0"
            )


SIZES = {"convnet-unet": ConvNetConfig()}


def parameters(config: ConvNetConfig) -> int:
    """Return the number of parameters in closed form, which a test compares with the built network's."""
    inputs = (config.in_channels, *config.widths[:-1])
    return sum(9 * i * o + 9 * o * o + 4 * o for i, o in zip(inputs, config.widths, strict=True))


def macs(config: ConvNetConfig, image_size: tuple[int, int] | None = None) -> int:
    """Return the multiply-accumulates of the convolutions for one image in closed form: 9 h w (I O + O^2) per step."""
    rows, columns = image_size or config.image_size
    channels, total = config.in_channels, 0
    for step, width in enumerate(config.widths):
        if step:
            rows, columns = -(-rows // 2), -(-columns // 2)
        total += 9 * rows * columns * (channels * width + width * width)
        channels = width
    return total
