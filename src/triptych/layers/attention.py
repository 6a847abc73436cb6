"""Multi-head self-attention, and the function that computes all attention of the package."""

from collections.abc import Callable
from typing import Literal

import torch
from einops import rearrange
from jaxtyping import Float
from torch import Tensor, nn

from triptych.kernels.attention import fastest_attention
from triptych.kernels.linear import linear
from triptych.layers.residual import Dropout

Rotate = Callable[[Tensor], Tensor]
"""Rotates queries and keys (B, heads, N, d) by their positions."""
Tap = Callable[[Tensor], None]
"""Receives attention probabilities (B, heads, N, M)."""


def attention(
    q: Float[Tensor, "b heads n d"],
    k: Float[Tensor, "b heads m d"],
    v: Float[Tensor, "b heads m d"],
    tap: Tap | None = None,
    bias: Float[Tensor, "#b #heads #n m"] | None = None,
    scale: float | None = None,
) -> Float[Tensor, "b heads n d"]:
    """Return softmax(q k^T / sqrt(d) + bias) v (Vaswani et al. 2017, Equation 1; Liu et al. 2021, Equation 4).

    Args:
        tap: receives the probabilities, as `capture` sets it; they are then computed explicitly, in fp32. Without it
            PyTorch's fused kernel runs, which never forms the (n, m) matrix, or whatever is faster.
        bias: added to the logits: relative positions, and -inf where a query must not see a key.
        scale: in place of 1 / sqrt(d).
    """
    if tap is None:
        return fastest_attention(q, k, v, bias, scale)
    logits = q.float() @ k.float().transpose(-2, -1) * (q.shape[-1] ** -0.5 if scale is None else scale)
    weights = torch.softmax(logits if bias is None else logits + bias.float(), dim=-1)
    tap(weights)
    return weights.to(v.dtype) @ v


class AttentionModule(nn.Module):
    """Base of every attention module: `layers.capture` sets its `tap`, `layers.lora` adapts its `projections`."""

    def __init__(self) -> None:
        super().__init__()
        self.tap: Tap | None = None

    def projections(self) -> dict[str, nn.Linear]:
        """Return its linear layers by name: those of queries, keys and values, and the output's."""
        return {name: part for name, part in self.named_children() if isinstance(part, nn.Linear)}


class Attention(AttentionModule):
    """Multi-head self-attention, MSA (ViT, Equations 5 to 8); one product computes q, k and v.

    Args:
        dim: D, channels of a token.
        heads: number of heads; must divide `dim`.
        bias: which of q, k and v have a bias. "qv" is DINOv3's: a bias on keys shifts all logits of a query by the
            same number, which softmax ignores.
        qk_norm: LayerNorm over each head's queries and keys (Dehghani et al. 2023, Section 2).
    """

    def __init__(
        self,
        dim: int,
        heads: int,
        bias: Literal["qkv", "qv", "none"] = "qkv",
        qk_norm: bool = False,
        eps: float = 1e-6,
        dropout: float = 0.0,
    ):
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(dim, 3 * dim, bias=bias == "qkv")
        if bias == "qv":
            self.q_bias = nn.Parameter(torch.zeros(dim))
            self.v_bias = nn.Parameter(torch.zeros(dim))
        self.split_bias = bias == "qv"
        self.q_norm = nn.LayerNorm(dim // heads, eps=eps) if qk_norm else nn.Identity()
        self.k_norm = nn.LayerNorm(dim // heads, eps=eps) if qk_norm else nn.Identity()
        self.proj = nn.Linear(dim, dim)
        self.dropout = Dropout(dropout)

    def fill(self) -> None:
        if self.split_bias:
            nn.init.zeros_(self.q_bias)
            nn.init.zeros_(self.v_bias)

    def forward(self, x: Float[Tensor, "b n d"], rotate: Rotate | None = None) -> Float[Tensor, "b n d"]:
        bias = self.qkv.bias
        if self.split_bias:
            bias = torch.cat([self.q_bias, torch.zeros_like(self.q_bias), self.v_bias])
        qkv = linear(x, self.qkv.weight, bias)                                           # b n 3D
        q, k, v = rearrange(qkv, "b n (three h d) -> three b h n d", three=3, h=self.heads)
        q, k = self.q_norm(q), self.k_norm(k)                                            # b h n d
        if rotate is not None:
            q, k = rotate(q), rotate(k)
        x = rearrange(attention(q, k, v, self.tap), "b h n d -> b n (h d)")              # b n D
        return self.dropout(linear(x, self.proj.weight, self.proj.bias))


class AttentionPool(AttentionModule):
    """Multi-head attention pooling, MAP (Zhai et al. 2022, Section 3.1): a trained probe attends to all tokens, then a
    residual MLP follows on the pooled vector, as in big_vision's `MAPHead`.
    """

    def __init__(self, dim: int, heads: int, mlp: nn.Module, eps: float = 1e-6):
        super().__init__()
        self.heads = heads
        self.probe = nn.Parameter(torch.zeros(1, 1, dim))
        self.q = nn.Linear(dim, dim)
        self.kv = nn.Linear(dim, 2 * dim)
        self.proj = nn.Linear(dim, dim)
        self.norm = nn.LayerNorm(dim, eps=eps)
        self.mlp = mlp

    def fill(self) -> None:
        nn.init.trunc_normal_(self.probe, std=0.02)

    def forward(self, x: Float[Tensor, "b n d"]) -> Float[Tensor, "b d"]:
        q = rearrange(self.q(self.probe), "one n (h d) -> one h n d", h=self.heads)
        q = q.expand(x.shape[0], -1, -1, -1)                                             # b h 1 d
        k, v = rearrange(self.kv(x), "b n (two h d) -> two b h n d", two=2, h=self.heads)
        x = self.proj(rearrange(attention(q, k, v, self.tap), "b h n d -> b n (h d)"))   # b 1 D
        return (x + self.mlp(self.norm(x))).squeeze(1)
