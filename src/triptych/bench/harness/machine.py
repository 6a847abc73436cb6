"""Description of the machine that runs a benchmark, and its peak throughput."""

import os
import platform
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path

import torch

from triptych.bench.harness.timing import interleave, timed
from triptych.version import __version__

# Sides of the matrices whose products are timed. Some libraries are fastest with large ones, others with ones that fit
# in the cache.
SIDES = (1024, 2048, 4096)
COPIED = 2**28  # bytes of the copy that is timed: many times the size of a cache


def describe() -> dict[str, str]:
    """Return CPU, cores, instruction sets, memory, operating system and library versions."""
    return {
        "CPU": _cpu_name(),
        "cores": f"{len(_cores())} ({torch.get_num_threads()} threads used)",
        "capabilities": ", ".join(capabilities()) or "none known",
        "memory": f"{_memory() / 2**30:.0f} GiB",
        "system": f"{platform.system()} {platform.release()}, Python {platform.python_version()}",
        "versions": ", ".join(
            f"{name} {version}"
            for name, version in (
                ("triptych", __version__),
                *(
                    (name, version_of(name))
                    for name in ("torch", "transformers", "timm", "diffusers", "safetensors")
                ),
            )
            if version
        ),
    }


def version_of(package: str) -> str | None:
    """Return the version of a distribution; None if it is not installed."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def capabilities() -> list[str]:
    """Return the instruction sets for matrix products that torch detects."""
    has = getattr(torch.cpu, "get_capabilities", dict)()
    wanted = (
        "avx2",
        "avx512",
        "avx512_vnni",
        "avx512_bf16",
        "amx_bf16",
        "amx_tile",
        "neon",
        "sve",
        "sme",
        "bf16",
    )
    return [name for name in wanted if has.get(name)]


def product_peak(
    dtype: torch.dtype, sides: Sequence[int] = SIDES, rounds: int = 7, patience: float = 0.0
) -> float:
    """Return the FLOP/s of the fastest square matrix product: 2 n^3 operations in the shortest time."""
    best = 0.0
    for n in sides:
        a, b = (torch.randn(n, n).to(dtype) for _ in range(2))
        out = torch.empty(n, n, dtype=dtype)
        times = interleave(
            {"product": timed(lambda a=a, b=b, out=out: torch.mm(a, b, out=out))}, rounds, patience=patience
        )
        best = max(best, 2 * n**3 / min(times.measurements["product"]))
    return best


def copy_peak(size: int = COPIED, rounds: int = 7, patience: float = 0.0) -> float:
    """Return the bytes/s of the fastest copy. Each byte is read and written, and counted twice."""
    source, target = torch.ones(size // 4), torch.empty(size // 4)
    times = interleave({"copy": timed(lambda: target.copy_(source))}, rounds, patience=patience)
    return 2 * size / min(times.measurements["copy"])


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    names = (line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.machine())


def _cores() -> set[int]:
    if hasattr(os, "sched_getaffinity"):
        return os.sched_getaffinity(0)
    return set(range(os.cpu_count() or 1))


def _memory() -> int:
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (ValueError, OSError, AttributeError):
        return 0
