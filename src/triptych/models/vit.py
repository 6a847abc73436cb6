"""The Vision Transformer (Dosovitskiy et al. 2021), Figure 1 from left to right: patches, tokens, encoder, head."""

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Literal

import torch
import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Float
from torch import Tensor, nn

from triptych.errors import ConfigError
from triptych.layers.attention import Attention, AttentionPool, Rotate
from triptych.layers.initialization import initialize_weights
from triptych.layers.mlp import Mlp, QuickMlp, SwiGLU
from triptych.layers.patch import ConvStem, PatchEmbed, PatchMask, ResNetStem
from triptych.layers.position import RotaryPositions, resample_positions, sincos_positions
from triptych.layers.residual import DropPath, LayerScale
from triptych.model_card import ModelCard, Preprocess
from triptych.models.configs.vit import ViTConfig
from triptych.network import Network


class Block(nn.Module):
    """One encoder block: z' = MSA(LN(z)) + z, then MLP(LN(z')) + z' (Equations 2 and 3)."""

    def __init__(self, config: ViTConfig, drop_path_rate: float):
        super().__init__()
        dim, eps = config.embed_dim, config.norm_eps
        self.norm1 = nn.LayerNorm(dim, eps=eps)
        self.attn = Attention(dim, config.num_heads, config.qkv_bias, config.qk_norm, eps, config.dropout)
        self.scale1 = LayerScale(dim, config.layer_scale) if config.layer_scale is not None else nn.Identity()
        self.norm2 = nn.LayerNorm(dim, eps=eps)
        self.mlp = make_mlp(config)
        self.scale2 = LayerScale(dim, config.layer_scale) if config.layer_scale is not None else nn.Identity()
        self.drop_path = DropPath(drop_path_rate)

    def forward(self, z: Float[Tensor, "b n d"], rotate: Rotate | None = None) -> Float[Tensor, "b n d"]:
        z = z + self.drop_path(self.scale1(self.attn(self.norm1(z), rotate)))
        return z + self.drop_path(self.scale2(self.mlp(self.norm2(z))))


class MlpHead(nn.Module):
    """The pre-training head: an MLP with one hidden tanh layer (Section 3.1), which is the output without classes."""

    def __init__(self, dim: int, hidden: int, classes: int):
        super().__init__()
        self.hidden = nn.Linear(dim, hidden)
        self.out = nn.Linear(hidden, classes) if classes else nn.Identity()

    def forward(self, x: Float[Tensor, "b d"]) -> Float[Tensor, "b classes"]:
        return self.out(torch.tanh(self.hidden(x)))


class CosineHead(nn.Module):
    """Logits are scaled cosines between the token and a direction for each class (Gidaris and Komodakis 2018,
    Equation 3), so that rare classes have directions as long as those of common ones."""

    def __init__(self, dim: int, classes: int, scale: float = 16.0):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(classes, dim))
        self.scale = nn.Parameter(torch.tensor(scale))
        self.initial = scale

    def fill(self) -> None:
        nn.init.trunc_normal_(self.weight, std=0.02)
        nn.init.constant_(self.scale, self.initial)

    def forward(self, x: Float[Tensor, "b d"]) -> Float[Tensor, "b classes"]:
        return self.scale * F.linear(F.normalize(x, dim=-1), F.normalize(self.weight, dim=-1))


class ViT(Network):
    """The network of Figure 1. It maps normalized images of any height and width to logits.

    `config` describes the network, `card` its training. With `num_classes=0` the output is the pooled token.
    """

    by_block = True

    def __init__(self, config: ViTConfig):
        super().__init__()
        dim = config.embed_dim
        self.config = config
        self.card = ModelCard(preprocess=Preprocess(size=config.image_size))
        self.stem, channels = nn.Identity(), config.in_channels
        if config.stem == "conv":
            self.stem = ConvStem(channels, config.stem_widths)
            channels = self.stem.channels
        if config.stem == "resnet":
            self.stem = ResNetStem(channels, config.stem_depths, config.stem_widths[0])
            channels = self.stem.channels
        self.patch = PatchEmbed(channels, dim, config.patch_size)
        if config.class_token:
            self.class_token = nn.Parameter(torch.empty(1, 1, dim))
        if config.distill_token:
            self.distill_token = nn.Parameter(torch.empty(1, 1, dim))
        if config.num_registers:
            self.registers = nn.Parameter(torch.empty(1, config.num_registers, dim))
        self.placed = int(config.class_token) + int(config.distill_token) if config.prefix_positions else 0
        if config.position == "learned":
            self.positions = nn.Parameter(torch.empty(1, math.prod(config.grid) + self.placed, dim))
        if config.position == "rotary":
            self.rotary = RotaryPositions(dim // config.num_heads, config.rotary_base)
        self.input_norm = nn.LayerNorm(dim, eps=config.norm_eps) if config.pre_norm else nn.Identity()
        rates = [config.drop_path_rate * i / max(config.depth - 1, 1) for i in range(config.depth)]
        self.encoder = nn.ModuleList(Block(config, rate) for rate in rates)
        self.norm = nn.LayerNorm(dim, eps=config.norm_eps)
        if config.pool == "attention":
            self.pool = AttentionPool(dim, config.num_heads, make_mlp(config), config.norm_eps)
        self.head = make_head(config)
        if config.distill_token:
            self.head_distill = make_head(config)
        self.channels, self.strides = [dim], [config.stride]
        self.initialize()

    def initialize(self) -> None:
        """Initialize every parameter, with NaN first, so that a forgotten one is noticed. The linear head starts at
        zero (Section 3.1), so that the first logits of fine-tuning are its bias."""
        for parameter in self.parameters():
            nn.init.constant_(parameter, math.nan)
        initialize_weights(self)
        for name in ("class_token", "distill_token", "registers", "positions"):
            if hasattr(self, name):
                nn.init.trunc_normal_(getattr(self, name), std=0.02)
        for name in ("head", "head_distill"):
            if isinstance(getattr(self, name, None), nn.Linear):
                nn.init.zeros_(getattr(self, name).weight)

    def replace_head(self, num_classes: int, head: Literal["linear", "mlp", "cosine"] = "linear") -> None:
        """Replace the head by a new one, in place. `replace_head(classes)` goes from the pre-training MLP to the
        zero-initialized linear layer of fine-tuning (Section 3.1); 0 classes remove the head."""
        like = next(self.parameters())
        self.config = replace(self.config, num_classes=num_classes, head=head, head_dim=0)
        for name in ("head", "head_distill") if self.config.distill_token else ("head",):
            layer = make_head(self.config)
            initialize_weights(layer)
            if isinstance(layer, nn.Linear):
                nn.init.zeros_(layer.weight)
            setattr(self, name, layer.to(like))
        self.card = replace(self.card, classes=None, colors=None, groupings={}, figures={})

    def blocks(self) -> list[nn.Module]:
        """Return the encoder's blocks in order, for checkpointing, compilation and sharding."""
        return list(self.encoder)

    def embed(
        self, images: Float[Tensor, "b c h w"], masked: PatchMask | None = None
    ) -> tuple[Float[Tensor, "b n d"], tuple[int, int]]:
        """Return z_0 of Equation 1: tokens with their positions, prefix first; and the grid of the patches."""
        if images.shape[1] != self.config.in_channels:
            raise ConfigError(f"images have {images.shape[1]} channels, the network takes {self.config.in_channels}")
        x = self.patch(self.stem(images), masked)                                                # b D rows columns
        grid = (x.shape[-2], x.shape[-1])
        x = rearrange(x, "b d h w -> b (h w) d")                                         # b n D
        if self.config.position == "sincos":
            x = x + sincos_positions(grid, x.shape[-1]).to(x)
        prefix = [getattr(self, name).expand(x.shape[0], -1, -1) for name in self._placed_tokens()]
        if self.config.position == "learned":
            resampling = self.config.position_resampling
            table = resample_positions(self.positions, self.config.grid, grid, self.placed, resampling)
            if self.placed:
                x = torch.cat([*prefix, x], dim=1) + table                               # b N D
            else:
                x = torch.cat([*prefix, x + table], dim=1)
        else:
            x = torch.cat([*prefix, x], dim=1)
        if self.config.num_registers:
            at = len(prefix)
            x = torch.cat([x[:, :at], self.registers.expand(x.shape[0], -1, -1), x[:, at:]], dim=1)
        return self.input_norm(x), grid

    def encode(
        self, images: Float[Tensor, "b c h w"], blocks: Sequence[int] = (), masked: PatchMask | None = None
    ) -> tuple[Float[Tensor, "b n d"], list[Tensor], tuple[int, int]]:
        """Return z_L before the final norm, z after each block of `blocks`, and the grid."""
        z, grid = self.embed(images, masked)
        rotate = self._rotate(grid, z.device)
        outputs = []
        for i, block in enumerate(self.encoder):
            z = block(z, rotate)
            if i in blocks:
                outputs.append(z)
        return z, outputs, grid

    def features(
        self,
        images: Float[Tensor, "b c h w"],
        blocks: Sequence[int] | None = None,
        masked: PatchMask | None = None,
    ) -> list[Float[Tensor, "b d rows columns"]]:
        """Return maps of the patches after the final norm: of the last block, or of each block in `blocks` (from 0;
        negative ones count from the end)."""
        depth = self.config.depth
        wanted = [depth - 1] if blocks is None else [i + depth if i < 0 else i for i in blocks]
        if any(not 0 <= i < depth for i in wanted):
            raise ConfigError(f"blocks is {list(blocks or ())}, which must be from {-depth} to {depth - 1}")
        _, outputs, (h, w) = self.encode(images, wanted, masked)
        by_block = dict(zip(sorted(set(wanted)), outputs, strict=True))
        maps = [self.norm(by_block[i])[:, self.config.prefix :] for i in wanted]
        return [rearrange(z, "b (h w) d -> b d h w", h=h, w=w) for z in maps]

    def pooled(self, z: Float[Tensor, "b n d"]) -> Float[Tensor, "b width"]:
        """Return the input of the head (Equation 4 for the class token)."""
        config = self.config
        if not config.norm_after_pool:
            z = self.norm(z)
        patches = z[:, config.prefix :]
        if config.pool == "token":
            y = z[:, 0]
        elif config.pool == "mean":
            y = patches.mean(dim=1)
        elif config.pool == "attention":
            y = self.pool(z)
        else:
            y = torch.cat([z[:, 0], patches.mean(dim=1)], dim=-1)
        return self.norm(y) if config.norm_after_pool else y

    def forward(self, images: Float[Tensor, "b c h w"]) -> Float[Tensor, "b classes"]:
        z, _, _ = self.encode(images)
        if self.config.distill_token:
            z = self.norm(z)
            return (self.head(z[:, 0]) + self.head_distill(z[:, 1])) / 2
        return self.head(self.pooled(z))

    def _placed_tokens(self) -> list[str]:
        return [name for name in ("class_token", "distill_token") if getattr(self.config, name)]

    def _rotate(self, grid: tuple[int, int], device: torch.device) -> Rotate | None:
        if self.config.position != "rotary":
            return None
        angles = self.rotary.angles(grid, device)
        return lambda x: self.rotary(x, angles)


def make_mlp(config: ViTConfig) -> nn.Module:
    """Return the block's MLP in the form that the config names."""
    if config.mlp == "swiglu":
        return SwiGLU(config.embed_dim, config.mlp_dim, config.dropout)
    if config.mlp == "quick_gelu":
        return QuickMlp(config.embed_dim, config.mlp_dim, dropout=config.dropout)
    form = "tanh" if config.mlp == "gelu_tanh" else "none"
    return Mlp(config.embed_dim, config.mlp_dim, form, config.dropout)


def make_head(config: ViTConfig) -> nn.Module:
    """Return the head that the config names; the identity for 0 classes."""
    width = config.embed_dim * (2 if config.pool == "token+mean" else 1)
    if config.head == "mlp":
        return MlpHead(width, config.head_dim or config.embed_dim, config.num_classes)
    if config.num_classes == 0:
        return nn.Identity()
    if config.head == "cosine":
        return CosineHead(width, config.num_classes)
    return nn.Linear(width, config.num_classes)
