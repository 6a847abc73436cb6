"""The denoising UNet as data: its config, the published sizes, and their closed-form costs. Imports no torch."""

from dataclasses import dataclass, replace
from typing import Literal

from triptych.config import check
from triptych.errors import UserError


@dataclass(frozen=True, kw_only=True)
class UNetConfig:
    """Sizes and forms of a denoising UNet (Rombach et al. 2022, Section 3.3 and Tables 12 to 15). Checked when made.

    With `context_dim` each attending level is a transformer that looks at the prompt; without, plain
    self-attention (Dhariwal and Nichol 2021).
    """

    latent_size: tuple[int, int] = (64, 64)
    """Height and width of the latents that it was trained on; forward takes any size."""
    in_channels: int = 4
    """Channels of the noisy latents, and of what is concatenated to them (a mask, a masked image, depth)."""
    out_channels: int = 4
    base_channels: int
    """Channels of the first level."""
    channel_multipliers: tuple[int, ...]
    """Channels of each level, in `base_channels`. A level has half the rows and columns of the one before."""
    num_res_blocks: int = 2
    """Residual blocks a level on the way down; one more on the way up."""
    attention_downsample_factors: tuple[int, ...] = ()
    """Downsampling factors (1, 2, 4, ...: one a level) whose residual blocks are followed by attention."""
    middle_attention: bool = True
    num_heads: int = 0
    """Attention heads at every level; or"""
    head_dim: int = 0
    """channels a head. One of the two is given."""
    context_dim: int = 0
    """Channels of a token of the prompt; 0: the network takes no prompt."""
    transformer_depth: int | tuple[int, ...] = 1
    """Transformer blocks where there is attention: everywhere, or for each level. The middle is as the last level."""
    cross_only_downsample_factors: tuple[int, ...] = ()
    """Factors at which a transformer's first attention looks at the prompt too, instead of at the map itself."""
    projection: Literal["conv", "linear"] = "conv"
    """How files store the projections into and out of a transformer, 1x1 convolutions or matrices: the same product."""
    num_classes: int = 0
    """Labels (class, level of noise) with an embedding that is added to the time's; 0: none."""
    vector_dim: int = 0
    """Length of a vector (an image's embedding) that is added to the time's embedding through an MLP; 0: none."""
    resample: Literal["conv", "resnet"] = "conv"
    """Between levels: a convolution, or a residual block that pools or repeats (`resblock_updown`)."""
    scale_shift: bool = False
    """The time scales and shifts the second norm of a residual block, instead of being added before it."""
    norm_groups: int = 32
    """Groups of every GroupNorm."""
    dropout: float = 0.0

    def __post_init__(self):
        check(self)
        for name in ("in_channels", "out_channels", "base_channels", "num_res_blocks", "norm_groups"):
            if getattr(self, name) < 1:
                raise UserError(f"{name} is {getattr(self, name)}, which must be at least 1")
        for name in ("num_heads", "head_dim", "context_dim", "num_classes", "vector_dim"):
            if getattr(self, name) < 0:
                raise UserError(f"{name} is {getattr(self, name)}, which must be 0 or more")
        if min(self.latent_size) < 1 or not self.channel_multipliers or min(self.channel_multipliers) < 1:
            raise UserError(
                f"latent_size {self.latent_size} and channel_multipliers {self.channel_multipliers} must be positive, "
                "for example channel_multipliers=(1, 2, 4, 4)"
            )
        if self.base_channels % self.norm_groups:
            raise UserError(
                f"base_channels {self.base_channels} is not a multiple of the {self.norm_groups} groups "
                "of a norm; change one"
            )
        for name in ("attention_downsample_factors", "cross_only_downsample_factors"):
            if min(getattr(self, name), default=1) < 1:
                raise UserError(f"{name} is {getattr(self, name)}; factors are 1, 2, 4, ...: one a level")
        if self.cross_only_downsample_factors and not self.context_dim:
            raise UserError(
                "cross_only_downsample_factors needs a context_dim: there is no prompt to look at"
            )
        if self.num_classes and self.vector_dim:
            raise UserError("num_classes and vector_dim are both given; a network takes labels or vectors")
        if isinstance(self.transformer_depth, tuple) and len(self.transformer_depth) != len(
            self.channel_multipliers
        ):
            raise UserError(
                f"transformer_depth has {len(self.transformer_depth)} numbers for "
                f"{len(self.channel_multipliers)} levels; "
                "give one a level, or a single number"
            )
        depths = (
            self.transformer_depth if isinstance(self.transformer_depth, tuple) else (self.transformer_depth,)
        )
        if min(depths) < 1:
            raise UserError(f"transformer_depth is {self.transformer_depth}, which must be at least 1")
        if not 0 <= self.dropout < 1:
            raise UserError(f"dropout is {self.dropout}, which must be at least 0 and below 1")
        self._check_heads()

    def _check_heads(self) -> None:
        """Heads must divide the channels wherever there is attention."""
        down, middle, _ = levels(self)
        attending = {level.channels for level in (*down, middle) if level.attention}
        if attending and bool(self.num_heads) == bool(self.head_dim):
            raise UserError(
                f"num_heads is {self.num_heads} and head_dim {self.head_dim}; give one of the two, not 0"
            )
        for channels in attending:
            if channels % (self.num_heads or self.head_dim):
                name = "num_heads" if self.num_heads else "head_dim"
                raise UserError(
                    f"{name} {getattr(self, name)} does not divide the {channels} channels of a level with attention"
                )

    @property
    def downsample_factor(self) -> int:
        """Rows and columns of the latents for one of the deepest level."""
        return 2 ** (len(self.channel_multipliers) - 1)


@dataclass(frozen=True)
class UNetLevel:
    """One level of the UNet, on its way down or up."""

    factor: int
    """Rows of the latents for one row here."""
    channels: int
    blocks: tuple[int, ...]
    """Channels that each residual block takes; it gives `channels`."""
    attention: int
    """Transformer blocks (or one self-attention) after each residual block; 0: none."""
    cross_only: bool
    """The first attention of each looks at the prompt too."""
    resampled: bool
    """Another level comes after it on this way."""


def levels(config: UNetConfig) -> tuple[list[UNetLevel], UNetLevel, list[UNetLevel]]:
    """The levels in the order in which they run: down, the middle, and up from the deepest one.

    A block on the way up also takes what one on the way down (or a convolution between levels) gave, last in
    first out.
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


SD1 = UNetConfig(
    base_channels=320,
    channel_multipliers=(1, 2, 4, 4),
    attention_downsample_factors=(1, 2, 4),
    num_heads=8,
    context_dim=768,
)
SD2 = replace(SD1, num_heads=0, head_dim=64, context_dim=1024, projection="linear")
LDM4 = UNetConfig(  # on the latents of VQ-f4
    in_channels=3,
    out_channels=3,
    base_channels=224,
    channel_multipliers=(1, 2, 3, 4),
    attention_downsample_factors=(2, 4, 8),
    head_dim=32,
)

SIZES: dict[str, UNetConfig] = {
    # To train from scratch: for a folder of images, and for small drawings.
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
    "sd1": SD1,
    "sd1-inpaint": replace(SD1, in_channels=9),
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
    "txt2img-1p4B": replace(SD1, latent_size=(32, 32), context_dim=1280),
    "text2img256": replace(LDM4, base_channels=192, channel_multipliers=(1, 2, 3, 5), context_dim=640),
    "layout": replace(LDM4, base_channels=128, context_dim=512, transformer_depth=3),
    # Its file asks for attention at 8, 16 and 32, where it has no level: only the middle attends.
    "semantic": UNetConfig(
        in_channels=6, out_channels=3, base_channels=128, channel_multipliers=(1, 4, 8), num_heads=8
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
    """Number of parameters in closed form; a test holds it equal to the built network's."""
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
    """Multiply-accumulates of the products and convolutions of one step for one image, in closed form.

    Args:
        latent_size: rows and columns; those of the config unless given.
        tokens: of the prompt, where the network takes one.
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
