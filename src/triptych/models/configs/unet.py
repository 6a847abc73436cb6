"""Config of the denoising UNet, its published sizes, and their costs in closed form. Imports no torch."""

from dataclasses import dataclass, replace
from typing import Literal

from triptych.config import check
from triptych.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class UNetConfig:
    """Config of a denoising UNet (Rombach et al. 2022, Section 3.3 and Tables 12 to 15), checked on construction.

    With `context_dim`, levels with attention have transformers that attend to the prompt; without it, plain
    self-attention (Dhariwal and Nichol 2021).
    """

    latent_size: tuple[int, int] = (64, 64)
    """Height and width of the training latents; forward takes any size."""
    in_channels: int = 4
    """Channels of the noisy latents and of the concatenated conditions (a mask, a masked image, depth)."""
    out_channels: int = 4
    base_channels: int
    """Channels of the first level."""
    channel_multipliers: tuple[int, ...]
    """Channels of each level, in units of `base_channels`. Each level halves the resolution of the previous one."""
    num_res_blocks: int = 2
    """Residual blocks per level of the down path; the up path has one more."""
    attention_downsample_factors: tuple[int, ...] = ()
    """Downsampling factors (1, 2, 4, ..., one per level) at which residual blocks are followed by attention."""
    middle_attention: bool = True
    num_heads: int = 0
    """Number of attention heads at every level; 0 if `head_dim` is given."""
    head_dim: int = 0
    """Channels of a head; 0 if `num_heads` is given."""
    context_dim: int = 0
    """Channels of the prompt's tokens; 0 means that the network takes no prompt."""
    transformer_depth: int | tuple[int, ...] = 1
    """Transformer blocks at levels with attention: one number, or one per level. The middle equals the last level."""
    cross_only_downsample_factors: tuple[int, ...] = ()
    """Downsampling factors at which a transformer's first attention is cross-attention to the prompt, too."""
    projection: Literal["conv", "linear"] = "conv"
    """Form of a transformer's outer projections in files: 1x1 convolutions or matrices, which are equivalent."""
    num_classes: int = 0
    """Number of labels (class, noise level), whose embedding is added to the time's; 0 means none."""
    vector_dim: int = 0
    """Length of a vector (an image's embedding) that an MLP adds to the time's embedding; 0 means none."""
    resample: Literal["conv", "resnet"] = "conv"
    """Change of resolution: a convolution, or a residual block that pools or repeats (`resblock_updown`)."""
    scale_shift: bool = False
    """Whether the time scales and shifts the output of a residual block's second norm instead of being added."""
    norm_groups: int = 32
    """Groups of every GroupNorm."""
    dropout: float = 0.0

    def __post_init__(self):
        check(self)
        for name in ("in_channels", "out_channels", "base_channels", "num_res_blocks", "norm_groups"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} is {getattr(self, name)}, which must be at least 1")
        for name in ("num_heads", "head_dim", "context_dim", "num_classes", "vector_dim"):
            if getattr(self, name) < 0:
                raise ConfigError(f"{name} is {getattr(self, name)}, which must be 0 or more")
        if min(self.latent_size) < 1 or not self.channel_multipliers or min(self.channel_multipliers) < 1:
            raise ConfigError(
                f"latent_size {self.latent_size} and channel_multipliers {self.channel_multipliers} must be positive, "
                "for example channel_multipliers=(1, 2, 4, 4)"
            )
        if self.base_channels % self.norm_groups:
            raise ConfigError(
                f"base_channels {self.base_channels} is not a multiple of the {self.norm_groups} groups "
                "of a norm; change one"
            )
        for name in ("attention_downsample_factors", "cross_only_downsample_factors"):
            if min(getattr(self, name), default=1) < 1:
                raise ConfigError(f"{name} is {getattr(self, name)}; factors are 1, 2, 4, ..., one per level")
        if self.cross_only_downsample_factors and not self.context_dim:
            raise ConfigError(
                "cross_only_downsample_factors needs context_dim, the channels of a prompt to attend to"
            )
        if self.num_classes and self.vector_dim:
            raise ConfigError("num_classes and vector_dim are both given; a network takes either labels or vectors")
        if isinstance(self.transformer_depth, tuple) and len(self.transformer_depth) != len(
            self.channel_multipliers
        ):
            raise ConfigError(
                f"transformer_depth has {len(self.transformer_depth)} numbers for "
                f"{len(self.channel_multipliers)} levels; "
                "give one a level, or a single number"
            )
        depths = (
            self.transformer_depth if isinstance(self.transformer_depth, tuple) else (self.transformer_depth,)
        )
        if min(depths) < 1:
            raise ConfigError(f"transformer_depth is {self.transformer_depth}, which must be at least 1")
        if not 0 <= self.dropout < 1:
            raise ConfigError(f"dropout is {self.dropout}, which must be at least 0 and below 1")
        self._check_heads()

    def _check_heads(self) -> None:
        """Check that heads divide the channels wherever there is attention."""
        down, middle, _ = levels(self)
        attending = {level.channels for level in (*down, middle) if level.attention}
        if attending and bool(self.num_heads) == bool(self.head_dim):
            raise ConfigError(
                f"num_heads is {self.num_heads} and head_dim {self.head_dim}; give one of the two, not 0"
            )
        for channels in attending:
            if channels % (self.num_heads or self.head_dim):
                name = "num_heads" if self.num_heads else "head_dim"
                raise ConfigError(
                    f"{name} {getattr(self, name)} does not divide the {channels} channels of a level with attention"
                )

    @property
    def downsample_factor(self) -> int:
        """Rows and columns of the latents per cell of the deepest level."""
        return 2 ** (len(self.channel_multipliers) - 1)


@dataclass(frozen=True)
class UNetLevel:
    """One level of the UNet's down or up path."""

    factor: int
    """Downsampling factor: rows of the latents per row of the level's map."""
    channels: int
    blocks: tuple[int, ...]
    """Input channels of each residual block; its output has `channels`."""
    attention: int
    """Transformer blocks (or one self-attention) after each residual block; 0 means none."""
    cross_only: bool
    """Whether the first attention of each is cross-attention, too."""
    resampled: bool
    """Whether another level of the path follows."""


def levels(config: UNetConfig) -> tuple[list[UNetLevel], UNetLevel, list[UNetLevel]]:
    """Return the levels in the order in which they run: down, the middle, and up from the deepest one.

    A block of the up path also takes the output of a block of the down path (or of a convolution between levels), last
    in first out.
    """
    widths = [config.base_channels * multiplier for multiplier in config.channel_multipliers]
    last = len(widths) - 1
    depths = config.transformer_depth
    depths = (depths,) * len(widths) if isinstance(depths, int) else depths

    def make(i: int, blocks: list[int], resampled: bool) -> UNetLevel:
        attention = depths[i] if 2**i in config.attention_downsample_factors else 0
        cross_only = 2**i in config.cross_only_downsample_factors
        return UNetLevel(2**i, widths[i], tuple(blocks), attention, cross_only, resampled)

    down, up, skips, x = [], [], [config.base_channels], config.base_channels
    for i, width in enumerate(widths):
        down.append(make(i, [x] + [width] * (config.num_res_blocks - 1), i < last))
        skips += [width] * (config.num_res_blocks + int(i < last))
        x = width
    middle = UNetLevel(2**last, x, (x, x), depths[last] if config.middle_attention else 0, False, False)
    for i, width in reversed(list(enumerate(widths))):
        blocks = []
        for _ in range(config.num_res_blocks + 1):
            blocks.append(x + skips.pop())
            x = width
        up.append(make(i, blocks, i > 0))
    return down, middle, up


SD1_UNET = UNetConfig(
    base_channels=320,
    channel_multipliers=(1, 2, 4, 4),
    attention_downsample_factors=(1, 2, 4),
    num_heads=8,
    context_dim=768,
)
SD2 = replace(SD1_UNET, num_heads=0, head_dim=64, context_dim=1024, projection="linear")
LDM4 = UNetConfig(  # on the latents of VQ-f4
    in_channels=3,
    out_channels=3,
    base_channels=224,
    channel_multipliers=(1, 2, 3, 4),
    attention_downsample_factors=(2, 4, 8),
    head_dim=32,
)

SIZES: dict[str, UNetConfig] = {
    # To train from scratch: for a folder of images, and for emoji.
    "unet-s": UNetConfig(
        latent_size=(32, 32),
        base_channels=128,
        channel_multipliers=(1, 2, 3),
        attention_downsample_factors=(2, 4),
        head_dim=32,
        context_dim=256,
    ),
    "unet-emoji": UNetConfig(
        latent_size=(8, 8),
        base_channels=64,
        channel_multipliers=(1, 2, 2),
        num_res_blocks=1,
        attention_downsample_factors=(2,),
        norm_groups=16,
        head_dim=32,
    ),
    "sd1": SD1_UNET,
    "sd1-inpaint": replace(SD1_UNET, in_channels=9),
    "sd2": replace(SD2, latent_size=(96, 96)),
    "sd2-base": SD2,
    "sd2-inpaint": replace(SD2, in_channels=9),
    "sd2-depth": replace(SD2, in_channels=5),
    "sd2-unclip-l": replace(SD2, latent_size=(96, 96), vector_dim=1536),
    "sd2-unclip-h": replace(SD2, latent_size=(96, 96), vector_dim=2048),
    "x4-upscaler": UNetConfig(
        latent_size=(128, 128),
        in_channels=7,
        base_channels=256,
        channel_multipliers=(1, 2, 2, 4),
        attention_downsample_factors=(2, 4, 8),
        num_heads=8,
        context_dim=1024,
        cross_only_downsample_factors=(1, 2, 4),
        projection="linear",
        num_classes=1000,
    ),
    "celeba": LDM4,
    "ffhq": LDM4,
    "bedrooms": LDM4,
    "churches": UNetConfig(
        latent_size=(32, 32),
        base_channels=192,
        channel_multipliers=(1, 2, 2, 4, 4),
        attention_downsample_factors=(1, 2, 4, 8),
        num_heads=8,
        scale_shift=True,
        resample="resnet",
    ),
    "cin256": UNetConfig(
        latent_size=(32, 32),
        base_channels=256,
        channel_multipliers=(1, 2, 4),
        attention_downsample_factors=(1, 2, 4),
        head_dim=32,
        context_dim=512,
    ),
    "cin256-v2": replace(
        LDM4, base_channels=192, channel_multipliers=(1, 2, 3, 5), num_heads=1, head_dim=0, context_dim=512
    ),
    "txt2img-1p4B": replace(SD1_UNET, latent_size=(32, 32), context_dim=1280),
    "text2img256": replace(LDM4, base_channels=192, channel_multipliers=(1, 2, 3, 5), context_dim=640),
    "layout": replace(LDM4, base_channels=128, context_dim=512, transformer_depth=3),
    # Its file names attention at 8, 16 and 32, where there is no level, so only the middle has attention.
    "semantic": UNetConfig(
        latent_size=(128, 128),
        in_channels=6,
        out_channels=3,
        base_channels=128,
        channel_multipliers=(1, 4, 8),
        num_heads=8,
    ),
    "inpainting-big": replace(
        LDM4, in_channels=7, base_channels=256, num_heads=8, head_dim=0, resample="resnet"
    ),
    "bsr-sr": replace(
        LDM4,
        in_channels=6,
        base_channels=160,
        channel_multipliers=(1, 2, 2, 4),
        attention_downsample_factors=(8,),
    ),
}


def parameters(config: UNetConfig) -> int:
    """Return the number of parameters in closed form, which a test compares with the built network's."""
    time, width = 4 * config.base_channels, config.base_channels

    def residual(inputs: int, outputs: int) -> int:
        embedding = (time + 1) * outputs * (2 if config.scale_shift else 1)
        skip = (inputs + 1) * outputs if inputs != outputs else 0
        return 2 * inputs + (9 * inputs + 1) * outputs + embedding + 2 * outputs + (9 * outputs + 1) * outputs + skip

    def attention(level: UNetLevel) -> int:
        c, m = level.channels, config.context_dim
        if not level.attention:
            return 0
        if not m:
            return 2 * c + (c + 1) * 3 * c + (c + 1) * c
        cross = c * c + 2 * m * c + (c + 1) * c
        first = cross if level.cross_only else 3 * c * c + (c + 1) * c
        block = 3 * 2 * c + first + cross + (c + 1) * 8 * c + (4 * c + 1) * c
        return 2 * c + 2 * (c + 1) * c + level.attention * block

    down, middle, up = levels(config)
    total = (width + 1) * time + (time + 1) * time + config.num_classes * time
    total += (config.vector_dim + 1) * time + (time + 1) * time if config.vector_dim else 0
    total += (9 * config.in_channels + 1) * width + 2 * width + (9 * width + 1) * config.out_channels
    total += 2 * residual(middle.channels, middle.channels) + attention(middle)
    for level in (*down, *up):
        c = level.channels
        total += sum(residual(inputs, c) + attention(level) for inputs in level.blocks)
        if level.resampled:
            total += residual(c, c) if config.resample == "resnet" else (9 * c + 1) * c
    return total


def macs(config: UNetConfig, latent_size: tuple[int, int] | None = None, tokens: int = 77) -> int:
    """Return the multiply-accumulates of products and convolutions of one step for one image, in closed form.

    Args:
        latent_size: rows and columns of the latents; by default the config's.
        tokens: tokens of the prompt, if the network takes one.
    """
    sizes = [latent_size or config.latent_size]
    for _ in config.channel_multipliers[1:]:
        sizes.append((-(-sizes[-1][0] // 2), -(-sizes[-1][1] // 2)))
    cells = {2**i: rows * columns for i, (rows, columns) in enumerate(sizes)}
    time, width = 4 * config.base_channels, config.base_channels

    def residual(inputs: int, outputs: int, n: int) -> int:
        embedding = time * outputs * (2 if config.scale_shift else 1)
        skip = inputs * outputs if inputs != outputs else 0
        return n * (9 * inputs * outputs + 9 * outputs * outputs + skip) + embedding

    def attention(level: UNetLevel) -> int:
        c, m, n = level.channels, config.context_dim, cells[level.factor]
        if not level.attention:
            return 0
        itself = n * 4 * c * c + 2 * n * n * c
        if not m:
            return itself
        cross = n * 2 * c * c + tokens * 2 * m * c + 2 * n * tokens * c
        block = (cross if level.cross_only else itself) + cross + n * 12 * c * c
        return n * 2 * c * c + level.attention * block

    down, middle, up = levels(config)
    total = width * time + time * time + (config.vector_dim * time + time * time if config.vector_dim else 0)
    total += cells[1] * 9 * width * (config.in_channels + config.out_channels)
    total += 2 * residual(middle.channels, middle.channels, cells[middle.factor]) + attention(middle)
    for way in (down, up):
        for level in way:
            c = level.channels
            total += sum(residual(inputs, c, cells[level.factor]) + attention(level) for inputs in level.blocks)
            if level.resampled:
                n = cells[level.factor * 2 if way is down else level.factor // 2]
                total += residual(c, c, n) if config.resample == "resnet" else n * 9 * c * c
    return total
