"""The transformer that lets a map look at a prompt (Rombach et al. 2022, Section 3.3 and Table 15)."""

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Float
from torch import Tensor, nn

from triptych.kernels.linear import linear, one_call
from triptych.layers.attention import Attention, attention
from triptych.layers.norm import GroupNorm
from triptych.layers.residual import Dropout


class ProjectedContext(NamedTuple):
    """What the cross-attentions of one network make of one prompt, the same at every step of sampling: the keys and the
    values of each, (B, heads, L, D), by its `place`."""

    keys: tuple[Tensor, ...]
    values: tuple[Tensor, ...]


Context = Float[Tensor, "b m width"] | ProjectedContext
"""A prompt as its tokens (B, L, C), or what `project` made of them."""


class CrossAttention(nn.Module):
    """Queries from the map; keys and values from the prompt, by one product.

    Args:
        dim: width of the map's tokens, and of all heads together.
        context_dim: width of the prompt's tokens.
        heads: must divide `dim`.
    """

    def __init__(self, dim: int, context_dim: int, heads: int):
        super().__init__()
        self.heads = heads
        self.q = nn.Linear(dim, dim, bias=False)
        self.kv = nn.Linear(context_dim, 2 * dim, bias=False)
        self.proj = nn.Linear(dim, dim)
        self.place = 0                                   # among the network's cross-attentions; set by the network
        self.tap: Callable[[Tensor], None] | None = None                                 # set by layers.capture

    def project(self, context: Float[Tensor, "b m width"]) -> tuple[Float[Tensor, "b h m d"], Float[Tensor, "b h m d"]]:
        """Keys and values of a prompt, each in one piece: at every step the kernel reads them a quarter faster so."""
        k, v = rearrange(self.kv(context), "b m (two h d) -> two b h m d", two=2, h=self.heads)
        return k.contiguous(), v.contiguous()

    def forward(self, x: Float[Tensor, "b n d"], context: Context) -> Float[Tensor, "b n d"]:
        if isinstance(context, ProjectedContext):
            k, v = context.keys[self.place], context.values[self.place]                  # b h m d
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
        if one_call(x, self.fc1.weight) and not self.training:
            rows = max(1, _SLAB // (self.fc2.in_features * x.element_size()))
            return self.in_slabs(x.flatten(0, 1), rows).view_as(x)
        value, gate = linear(x, self.fc1.weight, self.fc1.bias).chunk(2, dim=-1)         # b n hidden
        return linear(self.dropout(value * F.gelu(gate)), self.fc2.weight, self.fc2.bias)

    def in_slabs(self, x: Float[Tensor, "n d"], rows: int) -> Float[Tensor, "n d"]:
        """The same, so many tokens at a time that what is between stays in the cache and in memory already taken: at
        8,192 tokens of width 320 in fp32 three quarters of the time (Zen 3), a third of it spent on fresh pages."""
        (w_value, w_gate), (b_value, b_gate) = self.fc1.weight.chunk(2), self.fc1.bias.chunk(2)
        out = torch.empty_like(x)
        for x_i, out_i in zip(x.split(rows), out.split(rows), strict=True):
            gate = linear(x_i, w_gate, b_gate, gelu="none")                              # rows hidden
            hidden = linear(x_i, w_value, b_value, times=gate)
            out_i.copy_(linear(hidden, self.fc2.weight, self.fc2.bias))
        return out


_SLAB = 5 * 2**20  # bytes of what is between


class TransformerBlock(nn.Module):
    """Self-attention, cross-attention, GEGLU, each behind a LayerNorm and beside a skip.

    With `cross_only` the first attention looks at the prompt too.
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
    """A map as a sequence of its pixels, through transformer blocks that look at the prompt, beside a skip.

    The projections in and out are matrices here also where files store them as 1x1 convolutions.
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
    """Self-attention over the pixels of a map, beside a skip: the "AttentionBlock" of Dhariwal and Nichol 2021."""

    def __init__(self, channels: int, heads: int, groups: int = 32, eps: float = 1e-5):
        super().__init__()
        self.norm = GroupNorm(groups, channels, eps=eps)
        self.attn = Attention(channels, heads)

    def forward(self, x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b c h w"]:
        z = self.attn(rearrange(self.norm(x), "b c h w -> b (h w) c"))                   # b n c
        return x + rearrange(z, "b (h w) c -> b c h w", h=x.shape[2])
