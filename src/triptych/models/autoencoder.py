"""The first stage of latent diffusion (Rombach et al. 2022, Section 3.1): encoder, regularized latent space,
decoder."""

import math
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Float, Int
from torch import Tensor, nn

from triptych import distributed
from triptych.device import copy_to_device
from triptych.errors import ConfigError
from triptych.kernels.conv import preferred_format
from triptych.layers.cross_attention import SpatialAttention
from triptych.layers.initialization import initialize_weights
from triptych.layers.norm import GroupNorm
from triptych.layers.resnet import Conv, Downsample, ResnetBlock, Upsample, seamless, silu
from triptych.layers.tiling import run_in_tiles
from triptych.model_card import ModelCard, Preprocess
from triptych.models.configs.autoencoder import AutoencoderConfig, FirstStageConfig
from triptych.network import Network

Images = Float[Tensor, "b channels height width"]
Latents = Float[Tensor, "b c h w"]


class FirstStage(Network):
    """Base of autoencoders: images in [-1, 1] to latents and back.

    Subclasses define `embed`, from images to the encoder's output, and `render`, from unscaled latents to images.
    """

    config: Any  # FirstStageConfig: each subclass narrows it

    def __init__(self, config: FirstStageConfig):
        super().__init__()
        self.config = config
        half = (0.5, 0.5, 0.5)
        self.card = ModelCard(preprocess=Preprocess(size=config.image_size, crop=1.0, mean=half, std=half))

    def embed(self, images: Images) -> Float[Tensor, "b moments h w"]:
        raise NotImplementedError

    def render(self, z: Latents) -> Images:
        raise NotImplementedError

    def draw(
        self,
        moments: Float[Tensor, "b moments h w"],
        sample: bool = False,
        noise: Latents | None = None,
        generator: torch.Generator | None = None,
    ) -> Latents:
        """Return unscaled latents from the encoder's output. Here they are that output; KL autoencoders sample."""
        return moments

    def encode(
        self,
        images: Images,
        sample: bool = False,
        noise: Latents | None = None,
        generator: torch.Generator | None = None,
    ) -> Latents:
        """Return the latents of images, (z - shift) * scale, which the second stage diffuses.

        Args:
            images: (B, 3, H, W) in [-1, 1], sides multiples of `config.downsample_factor`.
            sample: draw from the posterior instead of taking its mean. VQ and tiny ones have nothing to draw; VQ
                gives the latents before quantization (Appendix G).
            noise: standard normal numbers to sample with, (B, c, H / f, W / f); implies `sample`.
            generator: source of these numbers otherwise.

        Raises:
            ConfigError: channels or sides do not fit.
        """
        self._check_images(images)
        return self.scaled(self.draw(self.embed(images), sample, noise, generator))

    def decode(self, latents: Latents) -> Images:
        """Return images (B, 3, H, W) of scaled latents (B, c, H / f, W / f); near [-1, 1], not clamped.

        Raises:
            ConfigError: the channels do not fit.
        """
        self._check_latents(latents)
        return self.render(self.unscaled(latents))

    def encode_tiled(
        self,
        images: Images,
        tile: int = 64,
        overlap: int = 16,
        sample: bool = False,
        noise: Latents | None = None,
        generator: torch.Generator | None = None,
    ) -> Latents:
        """Encode in tiles of `tile` by `tile` latents, in memory that does not grow with the image; see `encode`."""
        self._check_images(images)
        moments = self._in_tiles(self.embed, images, tile, overlap, input_cell=self.config.downsample_factor)
        return self.scaled(self.draw(moments, sample, noise, generator))

    def decode_tiled(self, latents: Latents, tile: int = 64, overlap: int = 16) -> Images:
        """Decode in tiles of `tile` by `tile` latents, in memory that does not grow with the image; see `decode`.

        Neighboring tiles share at least `overlap` latents. Norms and attention are computed per tile, so colors may
        vary a little over the image; the blend is smooth.
        """
        self._check_latents(latents)
        factor = self.config.downsample_factor
        return self._in_tiles(self.render, self.unscaled(latents), tile, overlap, output_cell=factor)

    def scaled(self, z: Latents) -> Latents:
        """Return (z - shift) * scale."""
        if self.config.shift == 0 and self.config.scale == 1:
            return z
        return (z - _by_channel(self.config.shift, z)) * _by_channel(self.config.scale, z)

    def unscaled(self, latents: Latents) -> Latents:
        """Invert `scaled`."""
        if self.config.shift == 0 and self.config.scale == 1:
            return latents
        return latents / _by_channel(self.config.scale, latents) + _by_channel(self.config.shift, latents)

    def forward(self, images: Images) -> Float[Tensor, "b outputs height width"]:
        """Return the reconstructions of images."""
        return self.decode(self.encode(images))

    def replace_head(self, num_classes: int, head: Any = "linear") -> None:
        raise ConfigError("an autoencoder has no head to replace")

    def initialize(self) -> None:
        """Initialize every parameter, with NaN first, so that a forgotten one is noticed."""
        for parameter in self.parameters():
            nn.init.constant_(parameter, math.nan)
        initialize_weights(self)

    def _in_tiles(
        self,
        run: Callable[[Tensor], Tensor],
        x: Tensor,
        tile: int,
        overlap: int,
        input_cell: int = 1,
        output_cell: int = 1,
    ) -> Tensor:
        """Along an axis that wraps (`seamless`) and has several tiles, pad the map circularly, and do not wrap
        tiles."""
        wrap = next((part.wrap for part in self.modules() if isinstance(part, Conv)), (False, False))
        wide, high = x.shape[-1] > tile * input_cell, x.shape[-2] > tile * input_cell
        ahead = (overlap * (wrap[0] and wide), overlap * (wrap[1] and high))
        pads = [min(ahead[0] * input_cell, x.shape[-1]), min(ahead[1] * input_cell, x.shape[-2])]
        x = F.pad(x, (pads[0], pads[0], pads[1], pads[1]), mode="circular") if any(pads) else x
        with seamless(self, x=wrap[0] and not wide, y=wrap[1] and not high):
            out = run_in_tiles(run, x, tile, overlap, input_cell, output_cell)
        left, top = pads[0] // input_cell * output_cell, pads[1] // input_cell * output_cell
        return out[..., top : out.shape[-2] - top, left : out.shape[-1] - left]

    def _check_images(self, images: Tensor) -> None:
        _, channels, height, width = images.shape
        f = self.config.downsample_factor
        if channels != self.config.in_channels:
            raise ConfigError(f"images have {channels} channels, the autoencoder takes {self.config.in_channels}")
        if height % f or width % f or not height or not width:
            near = f"{max(-(-height // f), 1) * f} x {max(-(-width // f), 1) * f}"
            raise ConfigError(
                f"images are {height} x {width}, the autoencoder takes multiples of {f}; resize or pad them to {near}"
            )

    def _check_latents(self, latents: Tensor) -> None:
        if latents.shape[1] != self.config.latent_channels:
            raise ConfigError(
                f"latents have {latents.shape[1]} channels, the autoencoder has {self.config.latent_channels}"
            )


def _by_channel(value: float | tuple[float, ...], like: Tensor) -> float | Tensor:
    if not isinstance(value, tuple):
        return value
    return copy_to_device(torch.tensor(value, dtype=like.dtype), like.device)[:, None, None]


class Level(nn.Module):
    """Residual blocks at one resolution, each followed by attention if the level has it, then a change of
    resolution."""

    def __init__(
        self, config: AutoencoderConfig, inputs: int, outputs: int, depth: int, attends: bool, resample: nn.Module
    ):
        super().__init__()
        self.blocks, self.attentions = nn.ModuleList(), nn.ModuleList()
        for _ in range(depth):
            self.blocks.append(ResnetBlock(inputs, outputs, None, config.norm_groups, NORM_EPS, config.dropout))
            attention = SpatialAttention(outputs, 1, config.norm_groups, NORM_EPS) if attends else nn.Identity()
            self.attentions.append(attention)
            inputs = outputs
        self.resample = resample

    def parts(self) -> list[nn.Module]:
        """Return block, attention, block, attention, ..."""
        return [part for pair in zip(self.blocks, self.attentions, strict=True) for part in pair]

    def forward(self, x: Float[Tensor, "b i h w"]) -> Float[Tensor, "b o rows columns"]:
        for part in self.parts():
            x = part(x)                                                                  # b o h w
        return self.resample(x)


class Middle(nn.Module):
    """Attention between two residual blocks, at the lowest resolution."""

    def __init__(self, config: AutoencoderConfig, channels: int):
        super().__init__()
        self.block1 = ResnetBlock(channels, channels, None, config.norm_groups, NORM_EPS, config.dropout)
        self.attention = nn.Identity()
        if config.middle_attention:
            self.attention = SpatialAttention(channels, 1, config.norm_groups, NORM_EPS)
        self.block2 = ResnetBlock(channels, channels, None, config.norm_groups, NORM_EPS, config.dropout)

    def forward(self, x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b c h w"]:
        return self.block2(self.attention(self.block1(x)))

    def parts(self) -> list[nn.Module]:
        return [self.block1, self.attention, self.block2]


class Encoder(nn.Module):
    """E of Section 3.1: levels of decreasing resolution, the middle, and the projection to latent channels."""

    def __init__(self, config: AutoencoderConfig):
        super().__init__()
        widths = [config.base_channels * multiplier for multiplier in config.channel_multipliers]
        self.fold = nn.PixelUnshuffle(config.patch_size) if config.patch_size > 1 else nn.Identity()
        self.conv_in = Conv(config.in_channels * config.patch_size**2, widths[0])
        self.down = nn.ModuleList()
        for i, (inputs, width) in enumerate(zip([widths[0], *widths], widths, strict=False)):
            halve = Downsample(width, pad_after=True) if i < len(widths) - 1 else nn.Identity()
            attends = 2**i in config.attention_downsample_factors
            self.down.append(Level(config, inputs, width, config.num_res_blocks, attends, halve))
        self.middle = Middle(config, widths[-1])
        self.norm = GroupNorm(config.norm_groups, widths[-1], eps=NORM_EPS)
        self.conv_out = Conv(widths[-1], config.encoder_channels)

    def forward(self, images: Images) -> Float[Tensor, "b moments h w"]:
        x = preferred_format(self.fold(images), self.conv_in.weight, training=True)
        x = self.conv_in(x)                                                              # b widths[0] H/p W/p
        for level in self.down:
            x = level(x)                                                                 # b widths[i] H/p2^i W/p2^i
        x = self.middle(x)                                                               # b widths[-1] H/f W/f
        return self.conv_out(silu(self.norm(x))).contiguous()                            # b moments H/f W/f


class Decoder(nn.Module):
    """D of Section 3.1: the encoder in reverse, with one more block in each level."""

    def __init__(self, config: AutoencoderConfig):
        super().__init__()
        widths = [config.base_channels * multiplier for multiplier in config.channel_multipliers]
        self.conv_in = Conv(config.bottleneck_channels or config.latent_channels, widths[-1])
        self.middle = Middle(config, widths[-1])
        self.up = nn.ModuleList()
        for i, (inputs, width) in reversed(list(enumerate(zip([*widths[1:], widths[-1]], widths, strict=True)))):
            double = Upsample(width) if i else nn.Identity()
            attends = 2**i in config.attention_downsample_factors
            self.up.append(Level(config, inputs, width, config.num_res_blocks + 1, attends, double))
        self.norm = GroupNorm(config.norm_groups, widths[0], eps=NORM_EPS)
        self.conv_out = Conv(widths[0], config.out_channels * config.patch_size**2)
        self.unfold = nn.PixelShuffle(config.patch_size) if config.patch_size > 1 else nn.Identity()

    def forward(self, z: Latents) -> Images:
        z = preferred_format(z, self.conv_in.weight, training=True)
        x = self.middle(self.conv_in(z))                                                 # b widths[-1] h w
        for level in self.up:
            x = level(x)                                                                 # b widths[i] H/p2^i W/p2^i
        return self.unfold(self.conv_out(silu(self.norm(x)))).contiguous()               # b 3 H W


class Autoencoder(FirstStage):
    """The first stage, KL or VQ: `encode` gives scaled latents, `decode` takes them.

    KL: the encoder gives mean and log variance of a Gaussian for each latent. VQ: `decode` moves each latent to the
    nearest entry of the codebook first, so that what is diffused is not yet quantized (Appendix G).
    """

    config: AutoencoderConfig

    def __init__(self, config: AutoencoderConfig):
        super().__init__(config)
        self.encoder = Encoder(config)
        self.decoder = Decoder(config)
        self.quant = self.post_quant = nn.Identity()
        if config.quant_convs:
            latents = config.latent_channels * (2 if config.regularization == "kl" else 1)
            self.quant = nn.Conv2d(config.encoder_channels, latents, 1)
            self.post_quant = nn.Conv2d(config.latent_channels, config.bottleneck_channels or config.latent_channels, 1)
        if config.regularization == "vq":
            self.codebook = nn.Embedding(config.codebook_size, config.latent_channels)
        self.initialize()

    def initialize(self) -> None:
        """Initialize every parameter; the codebook uniformly in [-1 / |Z|, 1 / |Z|], as in van den Oord et al. 2017's
        code."""
        super().initialize()
        if self.config.regularization == "vq":
            nn.init.uniform_(self.codebook.weight, -1 / self.config.codebook_size, 1 / self.config.codebook_size)

    def blocks(self) -> list[nn.Module]:
        """Return residual blocks and attentions in order, encoder first."""
        levels = [part for part in self.modules() if isinstance(part, Level | Middle)]
        return [part for level in levels for part in level.parts() if not isinstance(part, nn.Identity)]

    def embed(self, images: Images) -> Float[Tensor, "b moments h w"]:
        """Return the encoder's output: KL mean and log variance, VQ the latents."""
        return self.quant(self.encoder(images))

    def posterior(self, images: Images) -> tuple[Latents, Latents]:
        """Return mean and log variance, clamped to [-30, 20], of q(z | x), before scale and shift; for KL only.

        Raises:
            ConfigError: channels or sides do not fit, or the autoencoder is VQ.
        """
        if self.config.regularization == "vq":
            raise ConfigError("a VQ autoencoder has no posterior; encode gives its latents, quantize their codes")
        self._check_images(images)
        return self.moments(self.embed(images))

    @staticmethod
    def moments(embedded: Float[Tensor, "b moments h w"]) -> tuple[Latents, Latents]:
        """Return mean and log variance, clamped, from the output of a KL encoder."""
        mean, logvar = embedded.chunk(2, dim=1)
        return mean, logvar.clamp(-30.0, 20.0)

    def draw(
        self,
        moments: Float[Tensor, "b moments h w"],
        sample: bool = False,
        noise: Latents | None = None,
        generator: torch.Generator | None = None,
    ) -> Latents:
        """Return z = mean + std * noise, or the mean; for VQ the latents themselves."""
        if self.config.regularization == "vq":
            return moments
        mean, logvar = self.moments(moments)
        if noise is None and not sample:
            return mean
        if noise is None:
            device = mean.device if generator is None else generator.device
            like: dict[str, Any] = {"generator": generator, "device": device, "dtype": mean.dtype}
            noise = distributed.draw_rows(len(mean), lambda n: torch.randn((n, *mean.shape[1:]), **like))
            noise = noise.to(mean.device)
        return mean + torch.exp(0.5 * logvar) * noise

    def quantize(self, latents: Latents) -> tuple[Latents, Int[Tensor, "b h w"]]:
        """Return the nearest entry of the codebook for each of the (scaled) latents, and its index.

        Gradients reach the codebook, not the latents: `latents + (quantized - latents).detach()` is the
        straight-through estimate, which `decode(..., quantized=True)` takes.

        Raises:
            ConfigError: the autoencoder is KL.
        """
        if self.config.regularization == "kl":
            raise ConfigError("a KL autoencoder has no codebook; an autoencoder with regularization='vq' has one")
        self._check_latents(latents)
        quantized, indices = self._nearest(self.unscaled(latents))
        return self.scaled(quantized), indices

    def decode(self, latents: Latents, quantized: bool = False) -> Images:
        """Return images (B, 3, H, W) of scaled latents (B, c, H / f, W / f); near [-1, 1], not clamped.

        Args:
            latents: scaled latents, as `encode` returns them.
            quantized: for VQ: they are codebook entries already. Otherwise each is replaced by the nearest entry, and
                gradients pass straight through to the latents.

        Raises:
            ConfigError: the channels do not fit.
        """
        if not quantized:
            return super().decode(latents)
        self._check_latents(latents)
        return self.decoder(self.post_quant(self.unscaled(latents)))

    def render(self, z: Latents) -> Images:
        """Quantize (VQ only), then decode."""
        if self.config.regularization == "vq":
            entries, _ = self._nearest(z)
            trains = torch.is_grad_enabled() and z.requires_grad
            # A traced graph is the same with and without gradients.
            z = z + (entries - z).detach() if trains or torch.jit.is_tracing() else entries
        return self.decoder(self.post_quant(z))

    def _nearest(self, z: Latents) -> tuple[Latents, Int[Tensor, "b h w"]]:
        entries = self.codebook.weight
        device = z.device.type
        exact = torch.autocast(device, enabled=False) if torch.amp.is_autocast_available(device) else nullcontext()
        with torch.no_grad(), exact:
            # argmin |z - e|^2 = argmin |e|^2 - 2 z e. In fp32, because half precision cannot separate close entries.
            e = entries.float()
            flat = rearrange(z.float(), "b c h w -> (b h w) c")
            parts = flat.split(max(1, _DISTANCES // len(e)))
            indices = torch.cat([torch.addmm((e * e).sum(1), part, e.T, alpha=-2).argmin(1) for part in parts])
        b, _, h, w = z.shape
        indices = indices.view(b, h, w)
        return rearrange(F.embedding(indices, entries), "b h w c -> b c h w").contiguous(), indices


_DISTANCES = 2**24  # distances in memory at a time: 64 MB
NORM_EPS = 1e-6  # epsilon of every norm, in all published autoencoders
