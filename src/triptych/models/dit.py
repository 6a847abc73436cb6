"""The Diffusion Transformer (Peebles and Xie 2023), Figure 3 from the bottom up: the Vision Transformer as denoiser."""

import math

import torch
import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Float, Shaped
from torch import Tensor, nn

from triptych.errors import ConfigError
from triptych.kernels.linear import linear
from triptych.layers.attention import Attention
from triptych.layers.cross_attention import Context, CrossAttention
from triptych.layers.mlp import Mlp
from triptych.layers.patch import PatchEmbed
from triptych.layers.position import sincos_positions
from triptych.layers.timestep import TimeEmbedding
from triptych.model_card import ModelCard
from triptych.models.configs.dit import DiTConfig
from triptych.models.denoiser import Prompted

FREQUENCIES = 256  # length of the sinusoidal embedding of the time


class Block(nn.Module):
    """Self-attention, cross-attention to the prompt, and an MLP. Time and class shift and scale the input of the first
    and the last, and gate their outputs (adaLN-zero, Section 3.2)."""

    def __init__(self, config: DiTConfig):
        super().__init__()
        dim, eps = config.embed_dim, config.norm_eps
        self.norm1 = norm(config)
        bias = "qkv" if config.bias else "none"
        self.attn = Attention(dim, config.num_heads, bias, config.qk_norm, eps, config.dropout)
        self.cross = None
        if config.context_dim:
            self.norm_cross = norm(config)
            self.cross = CrossAttention(dim, config.context_dim, config.num_heads)
        self.norm2 = norm(config)
        form = "tanh" if config.mlp == "gelu_tanh" else "none"
        self.mlp = Mlp(dim, config.mlp_dim, form, config.dropout, config.bias)

    def forward(
        self, z: Float[Tensor, "b n d"], modulation: Float[Tensor, "b six d"], context: Context | None
    ) -> Float[Tensor, "b n d"]:
        shift1, scale1, gate1, shift2, scale2, gate2 = modulation.split(1, dim=1)        # b 1 D
        z = z + gate1 * self.attn(self.norm1(z) * (1 + scale1) + shift1)                 # b n D
        if self.cross is not None and context is not None:
            z = z + self.cross(self.norm_cross(z), context)
        return z + gate2 * self.mlp(self.norm2(z) * (1 + scale2) + shift2)


class DiT(Prompted):
    """The denoising network of Figure 3: it predicts the noise, v, x0 or a flow from noisy latents of any size, their
    times, and prompts or classes. It is called as `UNet` is.

    ```python
    net = DiT(SIZES["dit-s2"])
    net(x, t, labels=labels)               # (B, 4, h, w), (B,), (B,) -> (B, 4, h, w)
    once = net.project_context(context)    # keys and values of a prompt, the same at every step
    net(x, t, once)
    ```
    """

    def __init__(self, config: DiTConfig):
        super().__init__()
        dim, depth = config.embed_dim, config.depth
        self.config = config
        self.card = ModelCard()
        self.patch = PatchEmbed(config.in_channels, dim, config.patch_size)
        self.time = TimeEmbedding(FREQUENCIES, dim, closed=config.time_frequencies == "closed")
        if config.num_classes:
            self.label = nn.Embedding(config.num_classes + int(config.null_class), dim)
        self.encoder = nn.ModuleList(Block(config) for _ in range(depth))
        self.norm = norm(config)
        self.out = nn.Linear(dim, config.patch_size**2 * config.predicted)
        single = config.modulation == "single"
        self.modulation = nn.Linear(dim, (6 if single else 6 * depth + 2) * dim)         # every block's in one product
        if single:
            self.table = nn.Parameter(torch.empty(1, 6 * depth + 2, dim))
        self._number_cross_attentions()
        self.initialize()

    def initialize(self) -> None:
        """Initialize every parameter, with NaN first, so that a forgotten one is noticed. Gates, and the last layers of
        branches without a gate, are zero: every block begins as the identity, and the network as a constant 0."""
        for parameter in self.parameters():
            nn.init.constant_(parameter, math.nan)
        for part in self.modules():
            if isinstance(part, nn.Linear | nn.Conv2d):
                nn.init.xavier_uniform_(part.weight.data.flatten(1))
                if part.bias is not None:
                    nn.init.zeros_(part.bias)
            elif isinstance(part, nn.LayerNorm) and part.elementwise_affine:
                part.reset_parameters()
            elif isinstance(part, nn.Embedding):
                nn.init.normal_(part.weight, std=0.02)
        for part in (self.time.fc1, self.time.fc2):
            nn.init.normal_(part.weight, std=0.02)
        for part in (self.modulation, self.out, *(part.proj for part in self._cross_attentions())):
            nn.init.zeros_(part.weight)
        if self.config.modulation == "single":
            nn.init.zeros_(self.table)

    def blocks(self) -> list[nn.Module]:
        """Return the blocks in order, for checkpointing, compilation and sharding."""
        return list(self.encoder)

    def forward(
        self,
        x: Float[Tensor, "b i h w"],
        t: Shaped[Tensor, "b"],
        context: Context | None = None,
        labels: Shaped[Tensor, "..."] | None = None,
    ) -> Float[Tensor, "b o h w"]:
        """Return the network's prediction for `x`, of the same size.

        Args:
            x: noisy latents, with conditioning channels concatenated (mask, masked image, depth).
            t: time of each sample, in steps of the process; may be fractional.
            context: tokens of the prompts, or their `project_context`.
            labels: a class for each sample, from 0; `config.num_classes` is the null class.

        Raises:
            ConfigError: channels, prompt or labels do not fit the network.
        """
        self._check(x, context, labels)
        condition = self.time(t)                                                         # b D
        if labels is not None:
            condition = condition + self.label(labels)
        z = self.patch(x)                                                                # b D rows columns
        rows, columns = z.shape[-2], z.shape[-1]
        z = rearrange(z, "b d rows columns -> b (rows columns) d").contiguous()          # b n D
        z = z + self._positions((rows, columns)).to(z)
        *modulations, last = self._modulations(condition)
        shift, scale = last.split(1, dim=1)                                              # b 1 D
        for block, modulation in zip(self.encoder, modulations, strict=True):
            z = block(z, modulation, context)
        z = linear(self.norm(z) * (1 + scale) + shift, self.out.weight, self.out.bias)   # b n PPo
        return self._unpatchify(z, (rows, columns), (x.shape[-2], x.shape[-1]))            # b o h w

    def _modulations(self, condition: Float[Tensor, "b d"]) -> tuple[Tensor, ...]:
        """Return shifts, scales and gates of every block (B, 6, D), then shift and scale of the last norm (B, 2, D)."""
        depth, dim = self.config.depth, self.config.embed_dim
        modulations = linear(F.silu(condition), self.modulation.weight, self.modulation.bias)
        modulations = rearrange(modulations, "b (parts d) -> b parts d", d=dim)          # b parts D
        if self.config.modulation == "single":
            last = condition.to(modulations)[:, None].expand(-1, 2, -1)
            modulations = torch.cat([modulations.repeat(1, depth, 1), last], dim=1) + self.table.to(modulations)
        return modulations.split([6] * depth + [2], dim=1)

    def _positions(self, grid: tuple[int, int]) -> Float[Tensor, "1 n d"]:
        """Return the position table, with the frequencies of the paper's code, which are MAE's."""
        steps = (1.0, 1.0)
        if self.config.position == "stretched":
            steps = (self.config.grid[0] / grid[0], self.config.grid[1] / grid[1])
        return sincos_positions(grid, self.config.embed_dim, closed=False, steps=steps)

    def _unpatchify(
        self, z: Float[Tensor, "b n ppc"], grid: tuple[int, int], size: tuple[int, int]
    ) -> Float[Tensor, "b o h w"]:
        """Return patches as latents of a size, without the predicted variance and the padding."""
        p = self.config.patch_size
        x = rearrange(z, "b (h w) (p q c) -> b c (h p) (w q)", h=grid[0], p=p, q=p)
        return x[:, : self.config.out_channels, : size[0], : size[1]]

    def _check(self, x: Tensor, context: Context | None, labels: Tensor | None) -> None:
        config = self.config
        self._check_inputs(x, context)
        if labels is None and config.num_classes:
            raise ConfigError(f"the network takes `labels`: one of {config.num_classes} classes for each sample")
        if labels is not None and not config.num_classes:
            raise ConfigError("the network takes no labels; leave them out")
        if labels is not None and labels.shape != x.shape[:1]:
            raise ConfigError(f"labels are {tuple(labels.shape)}, the network takes {tuple(x.shape[:1])}")


def norm(config: DiTConfig) -> nn.LayerNorm:
    """Return a LayerNorm without gain and bias, which come from the time or are part of the next product."""
    return nn.LayerNorm(config.embed_dim, eps=config.norm_eps, elementwise_affine=False)
