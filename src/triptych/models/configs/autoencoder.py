"""Configs of first stages, their published sizes, and their costs in closed form. Imports no torch."""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Literal, NamedTuple

from triptych.config import check
from triptych.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class AutoencoderConfig:
    """Config of a first stage (Rombach et al. 2022, Section 3.1 and Appendix G), checked on construction."""

    image_size: tuple[int, int] = (256, 256)
    """Height and width of the training images; encode takes any multiples of `downsample_factor`."""
    regularization: Literal["kl", "vq"]
    """Regularization of the latents: a slight KL penalty toward a standard normal, or a codebook."""
    in_channels: int = 3
    out_channels: int = 3
    base_channels: int = 128
    """Channels of the first level."""
    patch_size: int = 1
    """Side in pixels of the squares that are folded into channels before the first convolution, and unfolded after the
    last. 2 divides the cost of the finest level by four; 1 in all published autoencoders."""
    channel_multipliers: tuple[int, ...]
    """Channels of each level, in units of `base_channels`. Each level halves the resolution of the previous one."""
    num_res_blocks: int = 2
    """Residual blocks per level of the encoder; the decoder has one more."""
    latent_channels: int
    """Channels of the latents, and of a codebook's entries: c of Table 8."""
    bottleneck_channels: int = 0
    """Channels at the end of the encoder and the start of the decoder; 0 means `latent_channels`."""
    codebook_size: int = 0
    """Entries of the codebook, |Z| of Table 8; VQ only."""
    attention_downsample_factors: tuple[int, ...] = ()
    """Downsampling factors after the patch (1, 2, 4, ..., one per level) at which residual blocks are followed by
    self-attention."""
    middle_attention: bool = True
    quant_convs: bool = True
    """1x1 convolutions between encoder and latents, and between latents and decoder."""
    scale: float | tuple[float, ...] = 1.0
    """Encode returns (z - shift) * scale, which should have unit variance; one number, or one per channel."""
    shift: float | tuple[float, ...] = 0.0
    norm_groups: int = 32
    """Groups of every GroupNorm."""
    dropout: float = 0.0

    def __post_init__(self):
        check(self)
        _check_sizes(
            self,
            "in_channels",
            "out_channels",
            "base_channels",
            "patch_size",
            "num_res_blocks",
            "latent_channels",
            "norm_groups",
        )
        if not self.channel_multipliers or min(self.channel_multipliers) < 1:
            raise ConfigError(
                f"channel_multipliers are {self.channel_multipliers}, which must be positive, for example (1, 2, 4, 4)"
            )
        if self.base_channels % self.norm_groups:
            raise ConfigError(
                f"base_channels {self.base_channels} is not a multiple of the {self.norm_groups} groups "
                "of a norm; change one"
            )
        if self.bottleneck_channels < 0:
            raise ConfigError(
                f"bottleneck_channels is {self.bottleneck_channels}, which must be 0 (as latent_channels) or more"
            )
        if self.bottleneck_channels not in (0, self.latent_channels) and not self.quant_convs:
            raise ConfigError(
                f"bottleneck_channels {self.bottleneck_channels} with latent_channels "
                f"{self.latent_channels} needs quant_convs=True"
            )
        if (self.regularization == "vq") != (self.codebook_size > 0) or self.codebook_size < 0:
            needed = (
                "at least 1 with regularization='vq'"
                if self.regularization == "vq"
                else "0 with regularization='kl'"
            )
            raise ConfigError(f"codebook_size is {self.codebook_size}, which must be {needed}")
        known = [2**i for i in range(len(self.channel_multipliers))]
        if any(factor not in known for factor in self.attention_downsample_factors):
            levels = ", ".join(map(str, known))
            raise ConfigError(
                f"attention_downsample_factors are {self.attention_downsample_factors}; the levels' "
                f"factors are {levels}"
            )
        if not 0 <= self.dropout < 1:
            raise ConfigError(f"dropout is {self.dropout}, which must be at least 0 and below 1")
        _check_normalisation(self)

    @property
    def downsample_factor(self) -> int:
        """f: pixels per latent along one axis."""
        return self.patch_size * 2 ** (len(self.channel_multipliers) - 1)

    @property
    def encoder_channels(self) -> int:
        """Output channels of the encoder before the 1x1 convolution; KL has mean and log variance."""
        return (self.bottleneck_channels or self.latent_channels) * (2 if self.regularization == "kl" else 1)


@dataclass(frozen=True, kw_only=True)
class TinyAutoencoderConfig:
    """Config of TAESD (Bohan 2023), a small autoencoder for the latents of a larger first stage."""

    image_size: tuple[int, int] = (512, 512)
    in_channels: int = 3
    out_channels: int = 3
    base_channels: int = 64
    num_levels: int = 4
    """Number of resolutions, each half of the previous one."""
    num_res_blocks: int = 3
    """Residual blocks per level; the finest level has one."""
    latent_channels: int = 4
    scale: float | tuple[float, ...] = 1.0
    """As in `AutoencoderConfig`; the published networks return scaled latents already."""
    shift: float | tuple[float, ...] = 0.0

    def __post_init__(self):
        check(self)
        _check_sizes(
            self,
            "in_channels",
            "out_channels",
            "base_channels",
            "num_levels",
            "num_res_blocks",
            "latent_channels",
        )
        _check_normalisation(self)

    @property
    def downsample_factor(self) -> int:
        """f: pixels per latent along one axis."""
        return 2 ** (self.num_levels - 1)


FirstStageConfig = AutoencoderConfig | TinyAutoencoderConfig


def _check_sizes(config: FirstStageConfig, *names: str) -> None:
    for name in names:
        if getattr(config, name) < 1:
            raise ConfigError(f"{name} is {getattr(config, name)}, which must be at least 1")
    if min(config.image_size) < 1:
        raise ConfigError(f"image_size is {config.image_size}, which must be two positive numbers of pixels")


def _check_normalisation(config: FirstStageConfig) -> None:
    for name in ("scale", "shift"):
        value = getattr(config, name)
        if isinstance(value, tuple) and len(value) != config.latent_channels:
            raise ConfigError(
                f"{name} has {len(value)} numbers for latents of {config.latent_channels} channels; "
                "give one a channel, or a single number"
            )
    scales = config.scale if isinstance(config.scale, tuple) else (config.scale,)
    if not all(0 < scale < float("inf") for scale in scales):
        raise ConfigError(
            f"scale is {config.scale}, which must be positive: 1 / (standard deviation of the latents)"
        )


KL_F8 = AutoencoderConfig(regularization="kl", channel_multipliers=(1, 2, 4, 4), latent_channels=4)
KL_F4 = replace(KL_F8, channel_multipliers=(1, 2, 4), latent_channels=3)
DEEP = {"channel_multipliers": (1, 1, 2, 2, 4), "attention_downsample_factors": (16,)}
VQ_F4 = replace(KL_F4, regularization="vq", codebook_size=8192)
VQ_F8 = replace(
    VQ_F4,
    channel_multipliers=(1, 2, 2, 4),
    attention_downsample_factors=(8,),
    latent_channels=4,
    codebook_size=16384,
)
SD3 = replace(
    KL_F8, image_size=(1024, 1024), latent_channels=16, quant_convs=False, scale=1.5305, shift=0.0609
)

SIZES: dict[str, FirstStageConfig] = {
    # Rombach et al. 2022, Table 8, as published.
    "kl-f4": KL_F4,
    "kl-f8": KL_F8,
    "kl-f16": replace(KL_F8, latent_channels=16, **DEEP),
    "kl-f32": replace(
        KL_F8,
        latent_channels=64,
        channel_multipliers=(1, 1, 2, 2, 4, 4),
        attention_downsample_factors=(16, 32),
    ),
    "vq-f4": VQ_F4,
    "vq-f4-noattn": replace(VQ_F4, middle_attention=False),
    "vq-f8": VQ_F8,
    "vq-f8-n256": replace(VQ_F8, codebook_size=256),
    "vq-f16": replace(VQ_F8, latent_channels=8, **DEEP),
    # First stages of later models. SD 1 and 2 use KL-f8, with the scale of its latents.
    "sd-vae": replace(KL_F8, image_size=(512, 512), scale=0.18215),
    "sd-x4-vae": replace(KL_F4, image_size=(512, 512), latent_channels=4, scale=0.08333),
    "sdxl-vae": replace(KL_F8, image_size=(1024, 1024), scale=0.13025),
    "sd3-vae": SD3,
    "flux-vae": replace(SD3, scale=0.3611, shift=0.1159),
    "taesd": TinyAutoencoderConfig(),
    "taesd3": TinyAutoencoderConfig(latent_channels=16),
}


class Layer(NamedTuple):
    """A convolution, a norm (inputs = outputs) or the product of all pairs of pixels (attention), with its place."""

    operation: Literal["conv", "norm", "pairs"]
    inputs: int
    outputs: int
    kernel: int
    factor: int
    """Rows of the image per row of the layer's output."""
    bias: bool = True


def layers(config: FirstStageConfig) -> Iterator[tuple[str, Layer]]:
    """Yield every layer of a first stage and its part: encoder, decoder, or between."""
    if isinstance(config, TinyAutoencoderConfig):
        yield from _tiny_layers(config)
        return
    c, f, p = (
        config.bottleneck_channels or config.latent_channels,
        config.downsample_factor,
        config.patch_size,
    )
    widths = [config.base_channels * multiplier for multiplier in config.channel_multipliers]

    def block(inputs: int, outputs: int, factor: int) -> Iterator[Layer]:
        yield Layer("norm", inputs, inputs, 1, factor)
        yield Layer("conv", inputs, outputs, 3, factor)
        yield Layer("norm", outputs, outputs, 1, factor)
        yield Layer("conv", outputs, outputs, 3, factor)
        if inputs != outputs:
            yield Layer("conv", inputs, outputs, 1, factor)

    def attention(channels: int, factor: int, present: bool) -> Iterator[Layer]:
        if present:
            yield Layer("norm", channels, channels, 1, factor)
            yield Layer("conv", channels, 3 * channels, 1, factor)
            yield Layer("pairs", channels, channels, 1, factor)
            yield Layer("conv", channels, channels, 1, factor)

    def middle() -> Iterator[Layer]:
        yield from block(widths[-1], widths[-1], f)
        yield from attention(widths[-1], f, config.middle_attention)
        yield from block(widths[-1], widths[-1], f)

    def encoder() -> Iterator[Layer]:
        yield Layer("conv", config.in_channels * p**2, widths[0], 3, p)
        x = widths[0]
        for i, width in enumerate(widths):
            for _ in range(config.num_res_blocks):
                yield from block(x, width, p * 2**i)
                yield from attention(width, p * 2**i, 2**i in config.attention_downsample_factors)
                x = width
            if p * 2**i < f:
                yield Layer("conv", x, x, 3, p * 2 ** (i + 1))
        yield from middle()
        yield Layer("norm", x, x, 1, f)
        yield Layer("conv", x, config.encoder_channels, 3, f)

    def decoder() -> Iterator[Layer]:
        x = widths[-1]
        yield Layer("conv", c, x, 3, f)
        yield from middle()
        for i, width in reversed(list(enumerate(widths))):
            for _ in range(config.num_res_blocks + 1):
                yield from block(x, width, p * 2**i)
                yield from attention(width, p * 2**i, 2**i in config.attention_downsample_factors)
                x = width
            if i:
                yield Layer("conv", x, x, 3, p * 2 ** (i - 1))
        yield Layer("norm", x, x, 1, p)
        yield Layer("conv", x, config.out_channels * p**2, 3, p)

    yield from (("encoder", layer) for layer in encoder())
    if config.quant_convs:
        latents = config.latent_channels * (2 if config.regularization == "kl" else 1)
        yield "between", Layer("conv", config.encoder_channels, latents, 1, f)
        yield "between", Layer("conv", config.latent_channels, c, 1, f)
    yield from (("decoder", layer) for layer in decoder())


def _tiny_layers(config: TinyAutoencoderConfig) -> Iterator[tuple[str, Layer]]:
    w, f = config.base_channels, config.downsample_factor
    yield "encoder", Layer("conv", config.in_channels, w, 3, 1)
    for i in range(config.num_levels):
        if i:
            yield "encoder", Layer("conv", w, w, 3, 2**i, bias=False)
        yield from [("encoder", Layer("conv", w, w, 3, 2**i))] * (3 * (config.num_res_blocks if i else 1))
    yield "encoder", Layer("conv", w, config.latent_channels, 3, f)
    yield "decoder", Layer("conv", config.latent_channels, w, 3, f)
    for i in reversed(range(config.num_levels)):
        yield from [("decoder", Layer("conv", w, w, 3, 2**i))] * (3 * (config.num_res_blocks if i else 1))
        if i:
            yield "decoder", Layer("conv", w, w, 3, 2 ** (i - 1), bias=False)
    yield "decoder", Layer("conv", w, config.out_channels, 3, 1)


def parameters(config: FirstStageConfig, part: Literal["all", "encoder", "decoder"] = "all") -> int:
    """Return the number of parameters, of the full network or one half (without the 1x1 convolutions between them)."""
    total = 0
    for where, (operation, inputs, outputs, kernel, _, bias) in layers(config):
        if part in ("all", where):
            weights = {"conv": kernel**2 * inputs * outputs, "norm": outputs, "pairs": 0}[operation]
            total += weights + (outputs if bias and operation != "pairs" else 0)
    if part == "all" and isinstance(config, AutoencoderConfig):
        total += config.codebook_size * config.latent_channels
    return total


def macs(
    config: FirstStageConfig,
    image_size: tuple[int, int] | None = None,
    part: Literal["all", "encoder", "decoder"] = "all",
) -> int:
    """Return the multiply-accumulates of products and convolutions for one image, encoded, decoded or both."""
    height, width = image_size or config.image_size
    total = 0
    for where, (operation, inputs, outputs, kernel, factor, _) in layers(config):
        if part in ("all", where) and operation != "norm":
            cells = (height // factor) * (width // factor)
            total += cells * (kernel**2 * inputs * outputs if operation == "conv" else 2 * cells * inputs)
    return total
