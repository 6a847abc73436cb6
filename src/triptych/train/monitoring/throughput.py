"""How fast a run goes, what for, and what it waits for."""

import contextlib
import resource
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch

STARVED = 0.3  # share of the time spent waiting for data that is worth a line

# What a row of the log has from a clock or an account: two runs that learn the same differ here alone.
MEASURED_FIELDS = ("images_per_second", "waiting", "saving", "mfu", "peak_memory")


class Throughput:
    """Counts from one report to the next; evaluations and pictures are left out of it.

    Args:
        flops: of one training image: 6 times the multiply-accumulates of a forward pass, as a backward pass costs two
            forward ones (Kaplan et al. 2020, Section 2.1). Frozen parts are counted as if they learnt, recomputation
            and whatever stands beside the model (augmentation, a discriminator, a perceptual network) is not.
            0 if unknown.
        peak: gives the FLOP/s of the fastest matrix product on this device; called once.
    """

    def __init__(self, device: torch.device, flops: float = 0.0, peak: Callable[[], float] | None = None):
        self.device, self.flops, self._peak = device, flops, peak
        self.peak = 0.0
        self.told = False
        self.restart()

    def restart(self) -> None:
        self.began, self.images, self.spent = time.monotonic(), 0, {"waiting": 0.0, "saving": 0.0}

    @contextlib.contextmanager
    def timed(self, on: str) -> Iterator[None]:
        """The block's time is spent on "waiting" or "saving"."""
        start = time.monotonic()
        yield
        self.spent[on] += time.monotonic() - start

    def report(self) -> dict[str, Any]:
        """Images/s, shares of the time, MFU, and bytes at the highest; then it begins anew."""
        if self.flops and self._peak is not None and not self.peak:
            with self.paused():
                self.peak = self._peak()
        elapsed = max(time.monotonic() - self.began, 1e-9)
        speed = self.images / elapsed
        found: dict[str, Any] = {
            "images_per_second": speed,
            **{name: spent / elapsed for name, spent in self.spent.items()},
            "peak_memory": peak_memory(self.device),
        }
        if self.peak:
            found["mfu"] = speed * self.flops / self.peak
        self.restart()
        return found

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """The block's time does not count."""
        start = time.monotonic()
        yield
        self.began += time.monotonic() - start

    def starvation_warning(self, found: dict[str, Any]) -> str | None:
        """A line, once, where the data does not keep up."""
        if self.told or found["waiting"] < STARVED:
            return None
        self.told = True
        return (
            f"waiting for data {found['waiting']:.0%} of the time: more --loading.workers, "
            "--loading.cache on, or smaller pictures on disk would help"
        )


def format_speed(found: dict[str, Any]) -> str:
    """A report for the progress line."""
    parts = [f"{found['images_per_second']:.0f} images/s"]
    if "mfu" in found:
        parts.append(f"MFU {found['mfu']:.0%}")
    parts += [f"{found['peak_memory'] / 1e9:.1f} GB", f"waiting {found['waiting']:.0%}"]
    if found["saving"] >= 0.005:
        parts.append(f"saving {found['saving']:.0%}")
    return "  ".join(parts)


def peak_memory(device: torch.device) -> int:
    """Bytes at the highest: the device's own account on CUDA, else the process's resident set."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
