"""Choice of device and precision, transfers to a device, and the peak of its matrix products."""

import contextlib
import copy
import functools
import logging
import time
from collections.abc import Iterator
from typing import TypeVar

import torch
from torch import Tensor, nn

from triptych.errors import ConfigError, DeviceError

log = logging.getLogger(__name__)

N = TypeVar("N", bound=nn.Module)

_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
_LOGGED: set[tuple[torch.dtype, str]] = set()


def choose_device(device: str | torch.device | None = None) -> torch.device:
    """Return the requested device; by default CUDA, else Apple's MPS, else the CPU.

    Raises:
        DeviceError: the device is not available.
    """
    if device is None:
        mps = torch.backends.mps.is_available()
        return torch.device("cuda" if torch.cuda.is_available() else "mps" if mps else "cpu")
    try:
        torch.empty(0, device=device)
        return torch.device(device)
    except (RuntimeError, AssertionError) as problem:  # torch without CUDA raises AssertionError
        raise DeviceError(
            f"device {str(device)!r} is not available here; use 'cpu', or leave it out"
        ) from problem


def choose_dtype(dtype: str | torch.dtype | None, device: torch.device) -> torch.dtype:
    """Return the requested precision; by default bf16 if the hardware multiplies it natively, else fp32.

    Args:
        dtype: "fp32", "bf16", "fp16" or a torch dtype.

    Raises:
        ConfigError: an unknown name.
    """
    if isinstance(dtype, torch.dtype):
        return dtype
    if dtype is not None:
        if dtype not in _DTYPES:
            raise ConfigError(f"dtype is {dtype!r}, which must be one of {', '.join(_DTYPES)}")
        return _DTYPES[dtype]
    return torch.bfloat16 if native_bf16(device) else torch.float32


def log_dtype(dtype: torch.dtype, device: torch.device) -> None:
    """Log the precision, once a process. Called when computing starts, so that errors before it stand alone."""
    if (dtype, device.type) in _LOGGED:
        return
    _LOGGED.add((dtype, device.type))
    name = next((name for name, known in _DTYPES.items() if known == dtype), str(dtype))
    native = native_bf16(device)
    log.info("%s on %s (%s)", name, device, f"native bf16: {native}" if native else "no native bf16")


def native_bf16(device: torch.device) -> str | None:
    """Return the name of the unit that multiplies bf16 natively on `device`, or None if bf16 is emulated."""
    if device.type == "cuda":
        return "CUDA" if torch.cuda.is_bf16_supported(including_emulation=False) else None
    if device.type != "cpu":
        return None
    features = getattr(torch.cpu, "get_capabilities", dict)()
    return next((name.upper() for name in ("amx_bf16", "avx512_bf16", "bf16") if features.get(name)), None)


def copy_to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """Copy a CPU tensor to `device`, on CUDA without synchronization.

    The tensor is pinned first: a copy from pageable memory that is larger than the driver's buffer is synchronous even
    with `non_blocking`.
    """
    if device.type == "cuda" and tensor.device.type == "cpu":
        tensor = tensor.pin_memory()
    # MPS may read the memory after it has been freed.
    return tensor.to(device, non_blocking=device.type != "mps")


def place_network(net: N, device: torch.device, dtype: torch.dtype, shared: bool = True) -> N:
    """Return `net` in evaluation mode, on `device`, in `dtype`.

    Parameters that are already there are shared with `net`; others are converted one by one, so that no second copy in
    the old precision exists at any time.

    Args:
        shared: leave `net` itself unchanged, since others use it. Without it `net` is moved in place, which is faster.
    """
    if not shared:
        return net.to(device, dtype).eval()
    memo: dict[int, object] = {}
    for p in net.parameters():
        unchanged = p.device == device and p.dtype == dtype
        memo[id(p)] = p if unchanged else nn.Parameter(p.detach().to(device, dtype), requires_grad=False)
    return copy.deepcopy(net, memo).to(device, dtype).eval()


@functools.cache
def peak_matmul_flops(device: torch.device, dtype: torch.dtype, seconds: float = 0.5) -> float:
    """Return the FLOP/s of the fastest square matrix product (2 n^3 operations) measured within about `seconds`.

    Measured once a process. Other load on the machine lowers it.
    """
    synchronize = {"cuda": torch.cuda.synchronize, "mps": torch.mps.synchronize}.get(
        device.type, lambda: None
    )
    generator = torch.Generator(device).manual_seed(0)  # leaves torch's global RNG untouched
    synchronize()  # exclude queued work
    best, start = 0.0, time.perf_counter()
    for n in (512, 1024, 2048, 4096, 8192)[2 * (device.type == "cuda") :]:
        a, b = (torch.rand(n, n, device=device, generator=generator).to(dtype) for _ in range(2))
        out = torch.empty_like(a)
        for _ in range(5):
            before = time.perf_counter()
            torch.mm(a, b, out=out)
            synchronize()
            now = time.perf_counter()
            best = max(best, 2 * n**3 / (now - before))
            if now - start > seconds / 4:  # the next size takes eight times as long
                return best
    return best


@contextlib.contextmanager
def flush_denormals() -> Iterator[None]:
    """Flush denormals (below 1e-38) to zero on the CPU inside the block, as GPUs do.

    Training produces them (gradients of nearly certain classes, decaying moments), and x86 computes with them up to a
    hundred times as slowly: the shipped ViT trained at 115 images/s with them and at 400 without, on 2 cores. Threads
    inherit the setting from the thread that starts them, so enter the block before the program's first product.
    """
    torch.set_flush_denormal(True)
    try:
        yield
    finally:
        torch.set_flush_denormal(False)
