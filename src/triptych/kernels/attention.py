"""Attention in PyTorch's fused kernel or, where that is slow on a CPU, as product, softmax, product."""

import contextlib
import itertools

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from triptych.kernels import dispatch
from triptych.kernels.dispatch import forward_ad_active, has_amx, onednn_allowed

_MAX_EXPLICIT = 2**16  # logits of a head: 256 tokens
_BLOCK_LOGITS = 2**19  # logits a thread: a megabyte of bf16


def fastest_attention(
    q: Float[Tensor, "b heads n d"],
    k: Float[Tensor, "b heads m d"],
    v: Float[Tensor, "b heads m d"],
    bias: Float[Tensor, "#b #heads #n m"] | None = None,
    scale: float | None = None,
) -> Float[Tensor, "b heads n d"]:
    """Return softmax(q k^T * scale + bias) v, by whichever implementation is fastest here; `scale` is 1 / sqrt(d) if
    None. Its twin is `F.scaled_dot_product_attention`."""
    if prefers_blocked(q, k):
        return blocked_attention(q, k, v, bias, scale)
    if prefers_explicit(q, k, bias):
        return explicit_attention(q, k, v, bias, scale)
    # The fused kernels have no forward-mode derivative.
    with sdpa_kernel(SDPBackend.MATH) if forward_ad_active() else contextlib.nullcontext():
        x = F.scaled_dot_product_attention(q, k, v, attn_mask=bias, scale=scale)
    # Which kernel runs, and so the layout of its result, depends on gradients, and changes when an exported program is
    # decomposed: views of the result must not rely on it. `contiguous` would leave no copy in the graph.
    return x.clone(memory_format=torch.contiguous_format) if torch.compiler.is_exporting() else x


def prefers_explicit(q: Tensor, k: Tensor, bias: Tensor | None = None) -> bool:
    """Return whether `explicit_attention` is faster than the fused kernel: on CPU with gradients and few tokens, in
    bf16 or with a trainable bias, whose gradient no fused kernel gives."""
    return (
        not torch.compiler.is_compiling()
        and dispatch.ENABLED
        and not torch.jit.is_tracing()  # torch.jit.trace repeats the call without gradients, and compares the graphs
        and (q.dtype == k.dtype == torch.bfloat16 or (bias is not None and bias.requires_grad))
        and q.device.type == "cpu"
        and torch.is_grad_enabled()
        and (q.requires_grad or k.requires_grad)
        and q.shape[2] * k.shape[2] <= _MAX_EXPLICIT
    )


def explicit_attention(
    q: Float[Tensor, "b heads n d"],
    k: Float[Tensor, "b heads m d"],
    v: Float[Tensor, "b heads m d"],
    bias: Float[Tensor, "#b #heads #n m"] | None = None,
    scale: float | None = None,
) -> Float[Tensor, "b heads n d"]:
    """Return attention as product, softmax, product, with gradients.

    PyTorch's fused CPU kernel computes its gradient head by head, with more setup than computation: forward and
    backward of 768 heads of 16 tokens of width 32 took 89 ms with it and 9 ms this way; of 64 tokens 96 and 22 ms for
    384 heads; of 256 tokens 20 and 10 ms for 24 (bf16 with AMX, one core). In fp32 the two are equal, but for a
    trainable bias PyTorch does the same with more passes: a twentieth of a training step of Swin-T.
    """
    logits = q * (q.shape[-1] ** -0.5 if scale is None else scale) @ k.transpose(-2, -1)
    return torch.softmax(logits if bias is None else logits + bias.to(logits.dtype), dim=-1) @ v


def prefers_blocked(q: Tensor, k: Tensor) -> bool:
    """Return whether `blocked_attention` is faster than the fused kernel: in bf16 without gradients, on a CPU that
    multiplies bf16 but has no AMX."""
    return q.dtype == torch.bfloat16 and onednn_allowed(q, k) and not has_amx()


def blocked_attention(
    q: Float[Tensor, "b heads n d"],
    k: Float[Tensor, "b heads m d"],
    v: Float[Tensor, "b heads m d"],
    bias: Float[Tensor, "#b #heads #n m"] | None = None,
    scale: float | None = None,
) -> Float[Tensor, "b heads n d"]:
    """Return attention as product, softmax, product, over blocks of heads, or of a head's queries, whose logits fit in
    the cache. No gradient.

    For bf16 on CPUs without AMX, where the fused kernel is slow: two thirds of its time at 197 and at 577 tokens
    (measured on Zen 4; in fp32 the fused kernel is faster). Logits are rounded to bf16, as in every attention that is
    not fused. The product starts from the bias, so that no extra pass adds it.
    """
    b, heads, n, d = q.shape
    scale = float(d**-0.5 if scale is None else scale)
    budget = torch.get_num_threads() * _BLOCK_LOGITS
    rows = min(n, max(1, budget // k.shape[2]))                                          # queries at a time
    block = max(1, budget // (n * k.shape[2]))                                           # heads at a time
    images, parts = max(1, block // heads), (heads + block - 1) // block  # heads of several images, or some of one's
    part = (heads + parts - 1) // parts
    out, empty = q.new_empty(b, heads, n, v.shape[3]), q.new_empty(1)
    full_bias = None if bias is None else bias.expand(b, heads, n, k.shape[2])
    for i, j, r in itertools.product(range(0, b, images), range(0, heads, part), range(0, n, rows)):
        keys = slice(i, i + images), slice(j, j + part)
        queries = *keys, slice(r, r + rows)
        k_i, v_i = k[keys].flatten(0, 1), v[keys].flatten(0, 1)
        q_i, out_i = q[queries].flatten(0, 1), out[queries].flatten(0, 1)
        if full_bias is None:
            logits = torch.baddbmm(empty, q_i, k_i.transpose(1, 2), beta=0, alpha=scale)
        else:
            logits = full_bias[queries].clone(memory_format=torch.contiguous_format).flatten(0, 1)
            logits.baddbmm_(q_i, k_i.transpose(1, 2), alpha=scale)
        torch.bmm(logits.softmax(dim=-1), v_i, out=out_i)
    return out
