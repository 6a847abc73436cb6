"""x W^T + b, and GELU with it, in as few passes over memory as the processor has a call for."""

import contextlib
import functools
from collections.abc import Iterator
from typing import Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from triptych.kernels.dispatch import plain

Gelu = Literal["none", "tanh"]  # the forms of GELU, as `F.gelu` names them

_kept: list["Kept"] = []  # of the blocks of `keeping` that run

WORTH = 10**8  # multiply-accumulates from which the call gains more than it costs to make
WORTH_AMX = (
    10**6
)  # the same in bf16 where there is AMX: 0.95 of the time of a Swin-T of one picture, 0.85 of a ViT-Ti


def linear(
    x: Float[Tensor, "... i"],
    weight: Float[Tensor, "o i"],
    bias: Float[Tensor, "o"] | None = None,
    gelu: Gelu | None = None,
    times: Float[Tensor, "... o"] | None = None,
) -> Float[Tensor, "... o"]:
    """x W^T + b, through a form of GELU if one is given; or (x W^T + b) * times.

    With AVX-512 and without gradients a large one is one oneDNN call: its fp32 product is up to a fifth faster than
    the one that `F.linear` takes (measured on Zen 4), and what follows is done while a tile is still in the cache.
    Everywhere else, and where somebody traces, compiles, exports, counts, maps or derives forwards, it is what it says;
    with AVX2 alone the call would be the slower one (Zen 3: products by a tenth, with GELU by half), and so it is for
    an fp32 product that nothing follows where there is AMX, which is Intel's (1,576 rows: by a twentieth).
    """
    alone = one_call(x, weight)
    if alone and _pays(x, gelu is not None or times is not None) and x.numel() * weight.shape[0] >= _worth(x):
        for kept in _kept:
            weight = kept(weight)
        if times is not None:
            return torch.ops.mkldnn._linear_pointwise.binary(x, times, weight, bias, "mul")
        form = ("gelu", [], gelu) if gelu else ("none", [], "")
        return torch.ops.mkldnn._linear_pointwise(x, weight, bias, *form)
    x = F.linear(x, weight, bias)
    if times is not None:
        return x.mul_(times) if alone else x * times
    return F.gelu(x, approximate=gelu) if gelu else x


class Kept:
    """Weights of a network in oneDNN's own order, made when they are first asked for."""

    def __init__(self, net: nn.Module):
        self.net = net  # while it is held, no other weight has their place in memory
        plain = [p for p in net.parameters() if type(p) is nn.Parameter]  # quantised ones have no storage
        self.places = {parameter.untyped_storage().data_ptr() for parameter in plain}
        self.laid: dict[tuple[int, torch.Size], Tensor] = {}

    def __call__(self, weight: Tensor) -> Tensor:
        """The weight in that order; as it is where it is not of the network, or in fp32, which gains nothing."""
        if weight.dtype != torch.bfloat16 or weight.is_mkldnn:
            return weight
        if weight.untyped_storage().data_ptr() not in self.places:
            return weight
        key = (weight.data_ptr(), weight.shape)
        if key not in self.laid:
            self.laid[key] = torch.ops.mkldnn._reorder_linear_weight(weight.contiguous(), _ROWS)
        return self.laid[key]


_ROWS = 1024  # that the order is made for; it hardly matters


@contextlib.contextmanager
def keeping(net: nn.Module) -> Iterator[None]:
    """Put the weights of `net`'s linear layers into the processor's order once, not at every call, while the block
    runs; they must not change meanwhile.

    On x86 with instructions for bf16, in bf16 and without gradients; else nothing happens. Products of 197 rows with
    ViT-B's weights took 0.8 of the time on one core with AMX, of 1,576 rows 0.9. It costs their memory again.
    """
    kept = Kept(net)
    _kept.append(kept)
    try:
        yield
    finally:
        _kept.remove(kept)


def one_call(x: Tensor, weight: Tensor) -> bool:
    """Whether oneDNN's own call may stand in for the product: plain numbers on an x86 processor, and nobody who
    needs its derivative or its name."""
    return (
        plain()  # first: dynamo knows the answer, and would trace into the rest
        and x.device.type == "cpu"
        and x.dtype == weight.dtype
        and x.dtype in _native()
        and not torch.is_grad_enabled()
        and not torch.is_autocast_enabled("cpu")
        and type(x) is Tensor
        and type(weight) in (Tensor, nn.Parameter)
        and x.numel() > 0
    )


def _worth(x: Tensor) -> int:
    return WORTH_AMX if x.dtype == torch.bfloat16 and has_amx() else WORTH


def _pays(x: Tensor, followed: bool) -> bool:
    """Whether the call is the faster one for large products on this processor."""
    return _wide() and (followed or x.dtype != torch.float32 or not has_amx())


@functools.cache
def _wide() -> bool:
    """Whether the processor computes on 512 bits at a time."""
    return bool(getattr(torch.cpu, "get_capabilities", dict)().get("avx512_f"))


@functools.cache
def _native() -> frozenset[torch.dtype]:
    """Precisions whose products this processor has instructions for, where oneDNN is there to use them."""
    has = getattr(torch.cpu, "get_capabilities", dict)()
    there = torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")
    if not there or not has.get("avx2"):
        return frozenset()
    bf16 = has.get("avx512_bf16") or has.get("amx_bf16")
    return frozenset({torch.float32, torch.bfloat16} if bf16 else {torch.float32})


@functools.cache
def has_amx() -> bool:
    """Whether the processor multiplies tiles of bf16."""
    return bool(getattr(torch.cpu, "get_capabilities", dict)().get("amx_bf16"))
