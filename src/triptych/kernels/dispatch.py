"""When a fast path may replace an ordinary PyTorch call: the switch for all, tracing, and the CPU's features."""

import functools
import os

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.utils._python_dispatch import _get_current_dispatch_mode

ENABLED = os.environ.get("TRIPTYCH_KERNELS", "1") != "0"
"""False if the environment had `TRIPTYCH_KERNELS=0` at import: then public PyTorch computes everything."""


def fast_path_allowed() -> bool:
    """Return whether this is a plain eager call, so that it may be replaced by one that tracers and function transforms
    do not know, and a constant tensor may be cached for the next call.

    False while compiling, exporting or tracing, under a dispatch mode (such as a FLOP counter), under `torch.func`, and
    under forward-mode differentiation. `torch.is_grad_enabled` covers ordinary gradients only: `torch.func` and dual
    numbers ignore `no_grad`, so callers check both.
    """
    return (
        not torch.compiler.is_compiling()  # first, so that dynamo does not trace the rest
        and ENABLED
        and not torch.jit.is_tracing()
        and _get_current_dispatch_mode() is None
        and torch._C._functorch.peek_interpreter_stack() is None  # type: ignore[attr-defined]
        and not forward_ad_active()
    )


def forward_ad_active() -> bool:
    """Return whether dual numbers may exist, as in `torch.func.jvp`, `jacfwd` and `hessian`."""
    return not torch.compiler.is_compiling() and forward_ad._current_level >= 0


def onednn_allowed(x: Tensor, weight: Tensor) -> bool:
    """Return whether oneDNN may be called directly for a product of these two: ordinary CPU tensors of one dtype that
    this CPU multiplies natively, in an eager call without gradients or autocast."""
    return (
        fast_path_allowed()  # first, so that dynamo does not trace the rest
        and x.device.type == "cpu"
        and x.dtype == weight.dtype
        and x.dtype in native_dtypes()
        and not torch.is_grad_enabled()
        and not torch.is_autocast_enabled("cpu")
        and type(x) is Tensor
        and type(weight) in (Tensor, nn.Parameter)
        and x.numel() > 0
    )


def _capabilities() -> dict[str, bool]:
    return getattr(torch.cpu, "get_capabilities", dict)()


@functools.cache
def native_dtypes() -> frozenset[torch.dtype]:
    """Return the dtypes that this CPU has multiply instructions for, if oneDNN is available to use them."""
    features = _capabilities()
    available = torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")
    if not available or not features.get("avx2"):
        return frozenset()
    bf16 = features.get("avx512_bf16") or features.get("amx_bf16")
    return frozenset({torch.float32, torch.bfloat16} if bf16 else {torch.float32})


@functools.cache
def has_avx512() -> bool:
    """Return whether the CPU has 512-bit vectors (AVX-512)."""
    return bool(_capabilities().get("avx512_f"))


@functools.cache
def has_amx() -> bool:
    """Return whether the CPU multiplies bf16 matrices in tiles (Intel AMX)."""
    return bool(_capabilities().get("amx_bf16"))
