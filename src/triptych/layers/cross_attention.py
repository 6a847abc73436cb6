"""The transformer by which a map attends to a prompt (Rombach et al. 2022, Section 3.3 and Table 15)."""

from typing import NamedTuple

import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Float
from torch import Tensor, nn

from triptych.kernels.dispatch import onednn_allowed
from triptych.kernels.linear import blocked_geglu, linear
from triptych.layers.attention import Attention, AttentionModule, attention
from triptych.layers.norm import GroupNorm
from triptych.layers.residual import Dropout


class ProjectedContext(NamedTuple):
    """Keys and values of a prompt, (B, heads, L, D), for each cross-attention of a network in order of its `index`.

    They are the same at every step of sampling, so they are computed once.
    """

    keys: tuple[Tensor, ...]
    values: tuple[Tensor, ...]


Context = Float[Tensor, "b m width"] | ProjectedContext
"""A prompt as its tokens (B, L, C), or as the keys and values that `project` computes from them."""


class CrossAttention(AttentionModule):
    """Attention with queries from the map, and keys and values from the prompt, by one product.

    Args:
        dim: channels of the map's tokens, and of all heads together.
        context_dim: channels of the prompt's tokens.
        heads: number of heads; must divide `dim`.
    """

    def __init__(self, dim: int, context_dim: int, heads: int):
        super().__init__()
        self.heads = heads
        self.q = nn.Linear(dim, dim, bias=False)
        self.kv = nn.Linear(context_dim, 2 * dim, bias=False)
        self.proj = nn.Linear(dim, dim)
        self.index = 0                                   # among the network's cross-attentions; set by the network

    def project(self, context: Float[Tensor, "b m width"]) -> tuple[Float[Tensor, "b h m d"], Float[Tensor, "b h m d"]]:
        """Return keys and values of a prompt, each contiguous: the kernel then reads them a quarter faster."""
        k, v = rearrange(self.kv(context), "b m (two h d) -> two b h m d", two=2, h=self.heads)
        return k.contiguous(), v.contiguous()

    def forward(self, x: Float[Tensor, "b n d"], context: Context) -> Float[Tensor, "b n d"]:
        if isinstance(context, ProjectedContext):
            k, v = context.keys[self.index], context.values[self.index]                  # b h m d
        else:
            k, v = self.project(context)
        q = rearrange(linear(x, self.q.weight), "b n (h d) -> b h n d", h=self.heads)
        x = rearrange(attention(q, k, v, self.tap), "b h n d -> b n (h d)")              # b n D
        return linear(x, self.proj.weight, self.proj.bias)


class GEGLU(nn.Module):
    """fc2(value * gelu(gate)), with value and gate the two halves of fc1 x (Shazeer 2020, Equation 6)."""

    def __init__(self, dim: int, hidden: int, dropout: float = 0.0):
        super().__init__()
        self.fc1 = nn.Linear(dim, 2 * hidden)
        self.fc2 = nn.Linear(hidden, dim)
        self.dropout = Dropout(dropout)

    def forward(self, x: Float[Tensor, "b n d"]) -> Float[Tensor, "b n d"]:
        if onednn_allowed(x, self.fc1.weight) and not self.training:
            fc1, fc2 = self.fc1, self.fc2
            return blocked_geglu(x.flatten(0, 1), fc1.weight, fc1.bias, fc2.weight, fc2.bias).view_as(x)
        value, gate = linear(x, self.fc1.weight, self.fc1.bias).chunk(2, dim=-1)         # b n hidden
        return linear(self.dropout(value * F.gelu(gate)), self.fc2.weight, self.fc2.bias)


class TransformerBlock(nn.Module):
    """Self-attention, cross-attention and GEGLU, each after a LayerNorm and with a skip connection.

    With `cross_only` the first attention is a cross-attention too.
    """

    def __init__(self, dim: int, context_dim: int, heads: int, cross_only: bool = False, dropout: float = 0.0):
        super().__init__()
        self.cross_only = cross_only
        self.norm1 = nn.LayerNorm(dim)
        self.attn = CrossAttention(dim, context_dim, heads) if cross_only else Attention(dim, heads, "none")
        self.norm2 = nn.LayerNorm(dim)
        self.cross = CrossAttention(dim, context_dim, heads)
        self.norm3 = nn.LayerNorm(dim)
        self.mlp = GEGLU(dim, 4 * dim, dropout)

    def forward(self, x: Float[Tensor, "b n d"], context: Context) -> Float[Tensor, "b n d"]:
        x = x + (self.attn(self.norm1(x), context) if self.cross_only else self.attn(self.norm1(x)))
        x = x + self.cross(self.norm2(x), context)
        return x + self.mlp(self.norm3(x))


class SpatialTransformer(nn.Module):
    """Transformer blocks over the pixels of a map, which attend to the prompt, with a skip connection.

    The projections in and out are linear layers, also where files store them as 1x1 convolutions.
    """

    def __init__(
        self,
        channels: int,
        context_dim: int,
        heads: int,
        depth: int = 1,
        cross_only: bool = False,
        groups: int = 32,
        dropout: float = 0.0,
    ):
        super().__init__()
        self.norm = GroupNorm(groups, channels, eps=1e-6)
        self.proj_in = nn.Linear(channels, channels)
        self.blocks = nn.ModuleList(
            TransformerBlock(channels, context_dim, heads, cross_only, dropout) for _ in range(depth)
        )
        self.proj_out = nn.Linear(channels, channels)

    def forward(self, x: Float[Tensor, "b c h w"], context: Context) -> Float[Tensor, "b c h w"]:
        z = rearrange(self.norm(x), "b c h w -> b (h w) c")                              # b n c
        z = linear(z, self.proj_in.weight, self.proj_in.bias)
        for block in self.blocks:
            z = block(z, context)
        z = linear(z, self.proj_out.weight, self.proj_out.bias)
        return x + rearrange(z, "b (h w) c -> b c h w", h=x.shape[2])


class SpatialAttention(nn.Module):
    """Self-attention over the pixels of a map with a skip connection: "AttentionBlock" of Dhariwal and Nichol 2021."""

    def __init__(self, channels: int, heads: int, groups: int = 32, eps: float = 1e-5):
        super().__init__()
        self.norm = GroupNorm(groups, channels, eps=eps)
        self.attn = Attention(channels, heads)

    def forward(self, x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b c h w"]:
        z = self.attn(rearrange(self.norm(x), "b c h w -> b (h w) c"))                   # b n c
        return x + rearrange(z, "b (h w) c -> b c h w", h=x.shape[2])
