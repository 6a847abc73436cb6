"""x W^T + b, alone or followed by GELU or a product, in as few passes over memory as oneDNN has a call for."""

import contextlib
from collections.abc import Iterator
from typing import Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from triptych.kernels.dispatch import has_amx, has_avx512, onednn_allowed

Gelu = Literal["none", "tanh"]
"""Forms of GELU, as `F.gelu` names them."""

MIN_MACS = 10**8
"""Multiply-accumulates from which the direct call gains more than its overhead."""
MIN_MACS_AMX = 10**6
"""The same in bf16 with AMX: 0.95 of the time of a Swin-T of one image, 0.85 of a ViT-Ti."""
_PACKED_ROWS = 1024  # rows of x that packed weights are arranged for; the number hardly matters
_BLOCK_BYTES = 5 * 2**20  # intermediate values of a block of `blocked_geglu`

_packed: list["PackedWeights"] = []  # of the `packed_linears` blocks that run


def linear(
    x: Float[Tensor, "... i"],
    weight: Float[Tensor, "o i"],
    bias: Float[Tensor, "o"] | None = None,
    gelu: Gelu | None = None,
    times: Float[Tensor, "... o"] | None = None,
) -> Float[Tensor, "... o"]:
    """Return x W^T + b, through a form of GELU if `gelu` names one, or multiplied by `times`.

    With AVX-512 and without gradients a large product is one oneDNN call: its fp32 product is up to a fifth faster than
    that of `F.linear` (measured on Zen 4), and what follows is computed while a tile is still in the cache. With AVX2
    alone it would be slower (Zen 3: products by a tenth, with GELU by half), and so would a plain fp32 product on CPUs
    with AMX (1,576 rows: by a twentieth). There, and wherever `onednn_allowed` is false, this is `F.linear` and
    `F.gelu`.
    """
    allowed = onednn_allowed(x, weight)
    if allowed and _faster(x, gelu is not None or times is not None) and x.numel() * weight.shape[0] >= _min_macs(x):
        for packed in _packed:
            weight = packed(weight)
        return _onednn_linear(x, weight, bias, gelu, times)
    x = F.linear(x, weight, bias)
    if times is not None:
        return x.mul_(times) if allowed else x * times
    return F.gelu(x, approximate=gelu) if gelu else x


def _onednn_linear(x: Tensor, weight: Tensor, bias: Tensor | None, gelu: Gelu | None, times: Tensor | None) -> Tensor:
    if times is not None:
        return torch.ops.mkldnn._linear_pointwise.binary(x, times, weight, bias, "mul")
    activation = ("gelu", [], gelu) if gelu else ("none", [], "")
    return torch.ops.mkldnn._linear_pointwise(x, weight, bias, *activation)


def _min_macs(x: Tensor) -> int:
    return MIN_MACS_AMX if x.dtype == torch.bfloat16 and has_amx() else MIN_MACS


def _faster(x: Tensor, fused: bool) -> bool:
    """Return whether the direct call is faster for large products on this CPU; `fused`: GELU or a product follows."""
    return has_avx512() and (fused or x.dtype != torch.float32 or not has_amx())


def blocked_geglu(
    x: Float[Tensor, "n d"],
    fc1_weight: Float[Tensor, "two_h d"],
    fc1_bias: Float[Tensor, "two_h"],
    fc2_weight: Float[Tensor, "d h"],
    fc2_bias: Float[Tensor, "d"],
    rows: int | None = None,
) -> Float[Tensor, "n d"]:
    """Return fc2(value * gelu(gate)), where value and gate are the halves of fc1(x), for `rows` tokens at a time.

    By default as many as keep the intermediate values in the cache and in memory already allocated: at 8,192 tokens of
    width 320 in fp32 three quarters of the time (Zen 3), of which a third went into fresh pages. No gradient.
    """
    if rows is None:
        rows = max(1, _BLOCK_BYTES // (fc2_weight.shape[1] * x.element_size()))
    (w_value, w_gate), (b_value, b_gate) = fc1_weight.chunk(2), fc1_bias.chunk(2)
    out = torch.empty_like(x)
    for x_i, out_i in zip(x.split(rows), out.split(rows), strict=True):
        gate = linear(x_i, w_gate, b_gate, gelu="none")                                  # rows h
        hidden = linear(x_i, w_value, b_value, times=gate)                               # rows h
        out_i.copy_(linear(hidden, fc2_weight, fc2_bias))
    return out


class PackedWeights:
    """Weights of a network packed for oneDNN, each when it is first used."""

    def __init__(self, net: nn.Module):
        self.net = net  # held, so that no other weight takes their place in memory
        plain = [p for p in net.parameters() if type(p) is nn.Parameter]  # quantized ones have no storage
        self.pointers = {parameter.untyped_storage().data_ptr() for parameter in plain}
        self.packed: dict[tuple[int, torch.Size], Tensor] = {}

    def __call__(self, weight: Tensor) -> Tensor:
        """Return the packed weight; the weight itself if it is fp32, which gains nothing, or of another network."""
        if weight.dtype != torch.bfloat16 or weight.is_mkldnn:
            return weight
        if weight.untyped_storage().data_ptr() not in self.pointers:
            return weight
        key = (weight.data_ptr(), weight.shape)
        if key not in self.packed:
            self.packed[key] = torch.ops.mkldnn._reorder_linear_weight(weight.contiguous(), _PACKED_ROWS)
        return self.packed[key]


@contextlib.contextmanager
def packed_linears(net: nn.Module) -> Iterator[None]:
    """Pack the weights of `net`'s linear layers for oneDNN once instead of in every call, while the block runs.

    The weights must not change meanwhile. This has an effect in bf16 without gradients on x86 CPUs with bf16
    instructions. Products of 197 rows with ViT-B's weights took 0.8 of the time on one core with AMX, of 1,576 rows
    0.9. It needs as much memory again as the weights.
    """
    packed = PackedWeights(net)
    _packed.append(packed)
    try:
        yield
    finally:
        _packed.remove(packed)
