"""Where to run and in which precision, decided by what the machine has."""

import contextlib
import copy
import functools
import logging
import time
from collections.abc import Iterator
from typing import TypeVar

import torch
from torch import Tensor, nn

from triptych.errors import UserError

log = logging.getLogger(__name__)

N = TypeVar("N", bound=nn.Module)

_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
_SAID: set[tuple[torch.dtype, str]] = set()


def choose_device(device: str | torch.device | None = None) -> torch.device:
    """The given device, else CUDA, else Apple's MPS, else the processor.

    Raises:
        UserError: there is no such device here.
    """
    if device is None:
        mps = torch.backends.mps.is_available()
        return torch.device("cuda" if torch.cuda.is_available() else "mps" if mps else "cpu")
    try:
        torch.empty(0, device=device)
        return torch.device(device)
    except (RuntimeError, AssertionError) as problem:  # torch without CUDA raises AssertionError
        raise UserError(
            f"device {str(device)!r} is not available here; use 'cpu', or leave it out"
        ) from problem


def choose_dtype(dtype: str | torch.dtype | None, device: torch.device) -> torch.dtype:
    """The given precision ("fp32", "bf16", "fp16" or a torch dtype), else bf16 where the hardware multiplies
    it natively, else fp32.

    Raises:
        UserError: an unknown name.
    """
    if isinstance(dtype, torch.dtype):
        return dtype
    if dtype is not None:
        if dtype not in _DTYPES:
            raise UserError(f"dtype is {dtype!r}, which must be one of {', '.join(_DTYPES)}")
        return _DTYPES[dtype]
    return torch.bfloat16 if native_bf16(device) else torch.float32


def say_dtype(dtype: torch.dtype, device: torch.device) -> None:
    """Log once a process what is computed in. Called when the work begins, so that a mistake before it is one line."""
    if (dtype, device.type) in _SAID:
        return
    _SAID.add((dtype, device.type))
    name = next((name for name, known in _DTYPES.items() if known == dtype), str(dtype))
    native = native_bf16(device)
    log.info("%s on %s (%s)", name, device, f"native bf16: {native}" if native else "no native bf16")


def native_bf16(device: torch.device) -> str | None:
    """What multiplies bf16 natively on `device`, by name; None if nothing does and bf16 would be emulated."""
    if device.type == "cuda":
        return "CUDA" if torch.cuda.is_bf16_supported(including_emulation=False) else None
    if device.type != "cpu":
        return None
    has = getattr(torch.cpu, "get_capabilities", dict)()
    return next((name.upper() for name in ("amx_bf16", "avx512_bf16", "bf16") if has.get(name)), None)


def sent(tensor: Tensor, device: torch.device) -> Tensor:
    """A tensor of the processor's on `device`; on CUDA without waiting for what is queued there. A copy from memory
    that is not pinned has to wait, whatever it is asked for, once it is larger than the driver's own buffer."""
    if device.type == "cuda" and tensor.device.type == "cpu":
        tensor = tensor.pin_memory()
    # Not on MPS, which may read memory that has been freed by then.
    return tensor.to(device, non_blocking=device.type != "mps")


def placed(net: N, device: torch.device, dtype: torch.dtype, shared: bool = True) -> N:
    """`net` ready to run: in evaluation mode, on `device`, in `dtype`; the caller's own network stays as it
    is.

    Parameters already there are shared, not copied; others are converted one by one, so that no second copy
    in the old precision is ever held.

    Args:
        shared: somebody else holds the network; else it is changed itself, which is quicker.
    """
    if not shared:
        return net.to(device, dtype).eval()
    memo: dict[int, object] = {}
    for p in net.parameters():
        there = p.device == device and p.dtype == dtype
        memo[id(p)] = p if there else nn.Parameter(p.detach().to(device, dtype), requires_grad=False)
    return copy.deepcopy(net, memo).to(device, dtype).eval()


@functools.cache
def product_peak(device: torch.device, dtype: torch.dtype, seconds: float = 0.5) -> float:
    """FLOP/s of the fastest square matrix product found in about so many seconds: 2 n^3 operations in the least time.

    Measured once a process. What else runs on the machine meanwhile lowers it.
    """
    wait = (
        torch.cuda.synchronize
        if device.type == "cuda"
        else torch.mps.synchronize
        if device.type == "mps"
        else None
    )
    generator = torch.Generator(device).manual_seed(0)  # torch's own stream is left where it is
    if wait is not None:
        wait()  # for what is queued, which is not measured
    best, start = 0.0, time.perf_counter()
    for n in (512, 1024, 2048, 4096, 8192)[2 * (device.type == "cuda") :]:
        a, b = (torch.rand(n, n, device=device, generator=generator).to(dtype) for _ in range(2))
        out = torch.empty_like(a)
        for _ in range(5):
            before = time.perf_counter()
            torch.mm(a, b, out=out)
            if wait is not None:
                wait()
            now = time.perf_counter()
            best = max(best, 2 * n**3 / (now - before))
            if now - start > seconds / 4:  # the next side takes eight times as long as this one
                return best
    return best


@contextlib.contextmanager
def flushed_denormals() -> Iterator[None]:
    """Let the processor take numbers below 1e-38 as zero inside the block, as GPUs do.

    Training makes them (gradients of nearly certain classes, fading moments), and x86 computes with them up to a
    hundred times as slowly: the shipped ViT trained at 115 images/s with them and at 400 without, on 2 cores. Threads
    inherit the setting from the one that starts them, so it helps most before a program's first product.
    """
    torch.set_flush_denormal(True)
    try:
        yield
    finally:
        torch.set_flush_denormal(False)
