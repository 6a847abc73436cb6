"""Whether a call is just a call: what the layers' shortcuts ask before they leave PyTorch's ordinary path."""

import torch
from torch.autograd import forward_ad
from torch.utils._python_dispatch import _get_current_dispatch_mode


def plain() -> bool:
    """Whether nobody traces, compiles, exports, counts, maps or derives forwards, so that a call may be replaced by one
    that such tools do not know, and a tensor kept for the next one. Gradients of the usual kind are asked for with
    `torch.is_grad_enabled`, which says nothing of `torch.func` and of dual numbers: they ignore `no_grad`."""
    return (
        not torch.compiler.is_compiling()  # first: dynamo would trace into the rest
        and not torch.jit.is_tracing()
        and _get_current_dispatch_mode() is None
        and torch._C._functorch.peek_interpreter_stack() is None  # type: ignore[attr-defined]
        and not derives_forwards()
    )


def derives_forwards() -> bool:
    """Whether dual numbers may be about, as in `torch.func.jvp`, `jacfwd` and `hessian`."""
    return not torch.compiler.is_compiling() and forward_ad._current_level >= 0
