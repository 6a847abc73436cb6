"""Multi-head self-attention, and the one function through which every attention of the package goes."""

import contextlib
import itertools
from collections.abc import Callable
from typing import Literal

import torch
import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from triptych.kernels.dispatch import derives_forwards
from triptych.kernels.linear import has_amx, linear, one_call
from triptych.layers.residual import Dropout

Rotate = Callable[[Tensor], Tensor]  # turns queries and keys (B, heads, N, d) by their positions


def attention(
    q: Float[Tensor, "b heads n d"],
    k: Float[Tensor, "b heads m d"],
    v: Float[Tensor, "b heads m d"],
    tap: Callable[[Tensor], None] | None = None,
    bias: Float[Tensor, "#b #heads #n m"] | None = None,
    scale: float | None = None,
) -> Float[Tensor, "b heads n d"]:
    """softmax(q k^T / sqrt(d) + bias) v, Vaswani et al. 2017, Equation 1; with a bias Liu et al. 2021, Equation 4.

    The bias is added to the logits: relative positions, and -inf where nobody may look. `scale` stands for 1 / sqrt(d).

    Runs PyTorch's fused kernel, which never forms the (n, m) matrix; or `in_slabs` or `plain` where that is faster.
    While `capture(net)` is on, `tap` receives that matrix, so it is formed, in fp32.
    """
    if tap is None:
        if slabs_pay(q, k):
            return in_slabs(q, k, v, bias, scale)
        if plain_pays(q, k, bias):
            return plain(q, k, v, bias, scale)
        # The fused kernels have no derivative forwards.
        with sdpa_kernel(SDPBackend.MATH) if derives_forwards() else contextlib.nullcontext():
            return F.scaled_dot_product_attention(q, k, v, attn_mask=bias, scale=scale)
    logits = q.float() @ k.float().transpose(-2, -1) * (q.shape[-1] ** -0.5 if scale is None else scale)
    weights = torch.softmax(logits if bias is None else logits + bias.float(), dim=-1)
    tap(weights)
    return weights.to(v.dtype) @ v


def plain_pays(q: Tensor, k: Tensor, bias: Tensor | None = None) -> bool:
    """Whether `plain` is faster than what PyTorch takes: where a processor learns and tokens are few, in bf16 or with a
    bias that learns, of which no fused kernel gives the gradient."""
    return (
        not torch.compiler.is_compiling()
        and (q.dtype == k.dtype == torch.bfloat16 or (bias is not None and bias.requires_grad))
        and q.device.type == "cpu"
        and torch.is_grad_enabled()
        and (q.requires_grad or k.requires_grad)
        and q.shape[2] * k.shape[2] <= _FEW
    )


_FEW = 2**16  # logits of a head: 256 tokens


def plain(
    q: Float[Tensor, "b heads n d"],
    k: Float[Tensor, "b heads m d"],
    v: Float[Tensor, "b heads m d"],
    bias: Float[Tensor, "#b #heads #n m"] | None = None,
    scale: float | None = None,
) -> Float[Tensor, "b heads n d"]:
    """Attention as product, softmax, product, with a gradient.

    PyTorch's fused kernel for processors takes its gradient a head at a time, with more to set up than to compute:
    forward and backward of 768 heads of 16 tokens, 32 wide, were 89 ms with it and 9 ms so; of 64 tokens 96 and 22 ms
    for 384 heads; of 256 tokens 20 and 10 ms for 24 (bf16 with AMX, one core). In fp32 the two are alike, but where the
    bias learns PyTorch does the same with passes more: a twentieth of a step of Swin-T.
    """
    logits = q * (q.shape[-1] ** -0.5 if scale is None else scale) @ k.transpose(-2, -1)
    return torch.softmax(logits if bias is None else logits + bias.to(logits.dtype), dim=-1) @ v


def slabs_pay(q: Tensor, k: Tensor) -> bool:
    """Whether `in_slabs` is faster than the fused kernel: in bf16, on a processor with products for it but no AMX."""
    return q.dtype == torch.bfloat16 and one_call(q, k) and not has_amx()


def in_slabs(
    q: Float[Tensor, "b heads n d"],
    k: Float[Tensor, "b heads m d"],
    v: Float[Tensor, "b heads m d"],
    bias: Float[Tensor, "#b #heads #n m"] | None = None,
    scale: float | None = None,
) -> Float[Tensor, "b heads n d"]:
    """Attention as product, softmax, product, over as many heads, or queries of one, at a time as keep their weights
    in the cache.

    For bf16 on processors without AMX, where the fused kernel is slow: two thirds of its time at 197 and at 577
    tokens (measured on Zen 4; in fp32 the fused kernel is the faster one). The logits are rounded to bf16, as
    they are in every attention that is not fused. A bias is where the product starts from, so that no pass adds it.
    """
    b, heads, n, d = q.shape
    scale = float(d**-0.5 if scale is None else scale)
    budget = torch.get_num_threads() * _SLAB
    rows = min(n, max(1, budget // k.shape[2]))                                          # queries at a time
    slab = max(1, budget // (n * k.shape[2]))
    images, parts = max(1, slab // heads), (heads + slab - 1) // slab  # heads of several images, or some of one's
    part = (heads + parts - 1) // parts
    out, none = q.new_empty(b, heads, n, v.shape[3]), q.new_empty(1)
    whole = None if bias is None else bias.expand(b, heads, n, k.shape[2])
    for i, j, r in itertools.product(range(0, b, images), range(0, heads, part), range(0, n, rows)):
        at = slice(i, i + images), slice(j, j + part)
        here = *at, slice(r, r + rows)
        k_i, v_i, q_i, out_i = k[at].flatten(0, 1), v[at].flatten(0, 1), q[here].flatten(0, 1), out[here].flatten(0, 1)
        if whole is None:
            logits = torch.baddbmm(none, q_i, k_i.transpose(1, 2), beta=0, alpha=scale)
        else:
            logits = whole[here].clone(memory_format=torch.contiguous_format).flatten(0, 1)
            logits.baddbmm_(q_i, k_i.transpose(1, 2), alpha=scale)
        torch.bmm(logits.softmax(dim=-1), v_i, out=out_i)
    return out


_SLAB = 2**19  # logits a thread: a megabyte of bf16


class Attention(nn.Module):
    """Multi-head self-attention, MSA (ViT, Equations 5 to 8): one product makes q, k and v together.

    Args:
        dim: D, the width of a token.
        heads: number of heads; must divide `dim`.
        bias: which of q, k and v have a bias. "qv" is DINOv3's: a bias on keys shifts every logit of a
            query alike, so softmax does not see it.
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
        self.tap: Callable[[Tensor], None] | None = None  # set by layers.capture

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


class AttentionPool(nn.Module):
    """Multi-head attention pooling, MAP (Zhai et al. 2022, Section 3.1): a learned probe looks at every token.

    big_vision's `MAPHead`: attention, then a residual MLP on the pooled vector.
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
        self.tap: Callable[[Tensor], None] | None = None

    def fill(self) -> None:
        nn.init.trunc_normal_(self.probe, std=0.02)

    def forward(self, x: Float[Tensor, "b n d"]) -> Float[Tensor, "b d"]:
        q = rearrange(self.q(self.probe), "one n (h d) -> one h n d", h=self.heads)
        q = q.expand(x.shape[0], -1, -1, -1)                                             # b h 1 d
        k, v = rearrange(self.kv(x), "b n (two h d) -> two b h n d", two=2, h=self.heads)
        x = self.proj(rearrange(attention(q, k, v, self.tap), "b h n d -> b n (h d)"))   # b 1 D
        return (x + self.mlp(self.norm(x))).squeeze(1)
