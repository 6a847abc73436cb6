"""The denoising UNet of latent diffusion (Rombach et al. 2022, Figure 3, the box in the middle): down, middle, up."""

import math
from typing import Any, Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float, Shaped
from torch import Tensor, nn

from triptych.errors import ConfigError
from triptych.kernels.conv import preferred_format
from triptych.layers.cross_attention import (
    Context,
    SpatialAttention,
    SpatialTransformer,
)
from triptych.layers.norm import GroupNorm
from triptych.layers.resnet import Conv, Downsample, ResnetBlock, Upsample, silu
from triptych.layers.timestep import TimeEmbedding
from triptych.model_card import ModelCard
from triptych.models.configs.unet import UNetConfig, UNetLevel, levels
from triptych.models.denoiser import Prompted


class TimedBlock(ResnetBlock):
    """The residual block, with the options of some UNets (Dhariwal and Nichol 2021, Section 3).

    With `config.scale_shift` the time scales and shifts the output of the second norm, instead of being added before
    it. With `resample` branch and skip are pooled or repeated after the first norm; such a block connects two levels.
    """

    def __init__(self, config: UNetConfig, inputs: int, outputs: int, resample: Literal["none", "down", "up"] = "none"):
        time_dim = 4 * config.base_channels
        super().__init__(inputs, outputs, time_dim, config.norm_groups, 1e-5, config.dropout)
        self.resample = resample
        self.scale_shift = config.scale_shift
        if config.scale_shift:
            self.time = nn.Linear(time_dim, 2 * outputs)

    def forward(
        self, x: Float[Tensor, "b i h w"], time: Float[Tensor, "b t"] | None = None, size: tuple[int, int] | None = None
    ) -> Float[Tensor, "b o rows columns"]:
        assert time is not None  # every block of a denoiser has it
        h = silu(self.norm1(x))                                                          # b i h w
        if self.resample == "down":
            h, x = F.avg_pool2d(h, 2, ceil_mode=True), F.avg_pool2d(x, 2, ceil_mode=True)
        elif self.resample == "up":
            h, x = F.interpolate(h, size), F.interpolate(x, size)                        # b i rows columns
        h = self.conv1(h)                                                                # b o rows columns
        embedded = self.time(F.silu(time))[:, :, None, None]
        if self.scale_shift:
            scale, shift = embedded.chunk(2, dim=1)                                        # b o 1 1
            h = self.norm2(h) * (1 + scale) + shift
        else:
            h = self.norm2(h + embedded)
        return self.skip(x) + self.conv2(self.dropout(silu(h)))


class UNetBlock(nn.Module):
    """A residual block, then attention if the level has it: a transformer that attends to the prompt, or
    self-attention."""

    def __init__(self, config: UNetConfig, level: UNetLevel, inputs: int):
        super().__init__()
        self.res = TimedBlock(config, inputs, level.channels)
        c = level.channels
        heads = config.num_heads or c // max(config.head_dim, 1)
        self.transformer = self.attention = None
        if level.attention and config.context_dim:
            self.transformer = SpatialTransformer(
                c, config.context_dim, heads, level.attention, level.cross_only, config.norm_groups, config.dropout
            )
        elif level.attention:
            self.attention = SpatialAttention(c, heads, config.norm_groups)

    def forward(
        self, x: Float[Tensor, "b i h w"], time: Float[Tensor, "b t"], context: Context | None
    ) -> Float[Tensor, "b o h w"]:
        x = self.res(x, time)
        if self.transformer is not None:
            return self.transformer(x, context)
        return x if self.attention is None else self.attention(x)


class Middle(UNetBlock):
    """Attention between two residual blocks, at the lowest resolution."""

    def __init__(self, config: UNetConfig, level: UNetLevel):
        super().__init__(config, level, level.channels)
        self.res2 = TimedBlock(config, level.channels, level.channels)

    def forward(
        self, x: Float[Tensor, "b i h w"], time: Float[Tensor, "b t"], context: Context | None
    ) -> Float[Tensor, "b i h w"]:
        return self.res2(super().forward(x, time, context), time)


class Down(nn.Module):
    """One level of the down path: blocks, then half the resolution unless it is the last."""

    def __init__(self, config: UNetConfig, level: UNetLevel):
        super().__init__()
        self.blocks = nn.ModuleList(UNetBlock(config, level, inputs) for inputs in level.blocks)
        self.downsample = None
        if level.resampled:
            by_block = config.resample == "resnet"
            c = level.channels
            self.downsample = TimedBlock(config, c, c, "down") if by_block else Downsample(c)

    def forward(
        self, x: Float[Tensor, "b i h w"], time: Float[Tensor, "b t"], context: Context | None
    ) -> list[Tensor]:
        """Return every map, as skip connections for the up path."""
        maps = []
        for block in self.blocks:
            x = block(x, time, context)
            maps.append(x)
        if isinstance(self.downsample, TimedBlock):
            maps.append(self.downsample(x, time))
        elif self.downsample is not None:
            maps.append(self.downsample(x))
        return maps


class Up(nn.Module):
    """One level of the up path: blocks, each with a map of the down path concatenated, then twice the resolution unless
    it is the finest."""

    def __init__(self, config: UNetConfig, level: UNetLevel):
        super().__init__()
        self.blocks = nn.ModuleList(UNetBlock(config, level, inputs) for inputs in level.blocks)
        self.upsample = None
        if level.resampled:
            by_block = config.resample == "resnet"
            c = level.channels
            self.upsample = TimedBlock(config, c, c, "up") if by_block else Upsample(c)

    def forward(
        self,
        x: Float[Tensor, "b i h w"],
        skips: list[Tensor],
        time: Float[Tensor, "b t"],
        context: Context | None,
    ) -> Float[Tensor, "b o rows columns"]:
        """Return the level's map. Each block pops the last of `skips`."""
        for block in self.blocks:
            x = block(torch.cat([x, skips.pop()], dim=1), time, context)
        if self.upsample is None:
            return x
        size = (skips[-1].shape[-2], skips[-1].shape[-1])  # odd sides were rounded up on the way down
        return self.upsample(x, time, size) if isinstance(self.upsample, TimedBlock) else self.upsample(x, size)


class UNet(Prompted):
    """The denoising network: it predicts the noise, v or x0 from noisy latents of any size, their times and prompts.

    ```python
    net = UNet(SIZES["sd1"])
    net(x, t, context)                     # (B, 4, h, w), (B,), (B, L, 768) -> (B, 4, h, w)
    once = net.project_context(context)    # keys and values of the prompt, the same at every step
    net(x, t, once)
    ```
    """

    def __init__(self, config: UNetConfig):
        super().__init__()
        self.config = config
        self.card = ModelCard()
        down, middle, up = levels(config)
        time_dim = 4 * config.base_channels
        self.time = TimeEmbedding(config.base_channels, time_dim)
        if config.num_classes:
            self.label = nn.Embedding(config.num_classes, time_dim)
        if config.vector_dim:
            self.vector = TimeEmbedding(config.vector_dim, time_dim)
        self.input = Conv(config.in_channels, config.base_channels)
        self.down = nn.ModuleList(Down(config, level) for level in down)
        self.middle: nn.Module = Middle(config, middle)
        self.up = nn.ModuleList(Up(config, level) for level in up)
        self.norm = GroupNorm(config.norm_groups, config.base_channels, eps=1e-5)
        self.out = Conv(config.base_channels, config.out_channels)
        self._number_cross_attentions()
        self.initialize()

    def initialize(self) -> None:
        """Initialize every parameter, with NaN first, so that a forgotten one is noticed. The last layer of each branch
        is zero, so that a block begins as the identity, and the network as a constant 0."""
        for parameter in self.parameters():
            nn.init.constant_(parameter, math.nan)
        for part in self.modules():
            if hasattr(part, "reset_parameters"):
                part.reset_parameters()  # type: ignore[operator]
        ends: list[Any] = [self.out]
        for part in self.modules():
            if isinstance(part, TimedBlock):
                ends.append(part.conv2)
            elif isinstance(part, SpatialTransformer):
                ends.append(part.proj_out)
            elif isinstance(part, SpatialAttention):
                ends.append(part.attn.proj)
        for end in ends:
            nn.init.zeros_(end.weight)
            nn.init.zeros_(end.bias)

    def blocks(self) -> list[nn.Module]:
        """Return the blocks in the order in which they run, for checkpointing, compilation and sharding."""
        return [part for part in self.modules() if isinstance(part, UNetBlock)]

    def forward(
        self,
        x: Float[Tensor, "b i h w"],
        t: Shaped[Tensor, "b"],
        context: Context | None = None,
        labels: Shaped[Tensor, "b *vector"] | None = None,
    ) -> Float[Tensor, "b o h w"]:
        """Return the network's prediction for `x`, of the same size.

        Args:
            x: noisy latents, with conditioning channels concatenated (mask, masked image, depth).
            t: time of each sample, in steps of the process; may be fractional.
            context: tokens of the prompts, or their `project_context`.
            labels: a class for each sample (B,), or a vector (B, vector_dim).

        Raises:
            ConfigError: channels, prompt or labels do not fit the network.
        """
        self._check(x, context, labels)
        time = self.embed(t, labels)                                                     # b 4C
        skips = [self.input(preferred_format(x, self.input.weight))]                     # b C h w
        for level in self.down:
            skips += level(skips[-1], time, context)
        x = self.middle(skips[-1], time, context)                                        # b C_last rows columns
        for level in self.up:
            x = level(x, skips, time, context)
        return self.predict(x)                                                           # b o h w

    def embed(self, t: Shaped[Tensor, "b"], labels: Shaped[Tensor, "b *vector"] | None) -> Float[Tensor, "b width"]:
        """Return the embedding that conditions every residual block: of the time, and of the class or vector."""
        time = self.time(t)
        if labels is None:
            return time
        return time + (self.label(labels) if self.config.num_classes else self.vector(labels))

    def predict(self, x: Float[Tensor, "b i h w"]) -> Float[Tensor, "b o h w"]:
        """Return the prediction from the last block's map."""
        return self.out(silu(self.norm(x))).contiguous()

    def _check(self, x: Tensor, context: Context | None, labels: Tensor | None) -> None:
        config = self.config
        self._check_inputs(x, context)
        if labels is None and (config.num_classes or config.vector_dim):
            what = f"one of {config.num_classes} classes" if config.num_classes else f"a vector of {config.vector_dim}"
            raise ConfigError(f"the network takes `labels`: {what} for each sample")
        if labels is not None:
            if not config.num_classes and not config.vector_dim:
                raise ConfigError("the network takes no labels; leave them out")
            shape = (x.shape[0], config.vector_dim) if config.vector_dim else (x.shape[0],)
            if labels.shape != shape:
                raise ConfigError(f"labels are {tuple(labels.shape)}, the network takes {shape}")
