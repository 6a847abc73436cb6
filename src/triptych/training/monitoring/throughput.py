"""Speed of a run: images per second, model FLOPs utilization, memory, and time spent waiting."""

import contextlib
import resource
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch

STARVED = 0.3  # fraction of the time spent waiting for data that is reported

# Fields of a log row that are measured by a clock or a memory counter: only these differ between two equal runs.
MEASURED_FIELDS = ("images_per_second", "waiting", "saving", "mfu", "peak_memory")


class Throughput:
    """Counts images and time from one report to the next; evaluations are excluded.

    Args:
        device: the device of the run.
        flops: FLOPs of one training image: 6 times the multiply-accumulates of a forward pass, since a backward pass
            costs two forward passes (Kaplan et al. 2020, Section 2.1). Frozen parts count as if they were trained;
            recomputed activations, augmentation, a discriminator and a perceptual network do not count. 0 if unknown.
        peak: returns the FLOP/s of the fastest matrix product on this device; called once.
    """

    def __init__(self, device: torch.device, flops: float = 0.0, peak: Callable[[], float] | None = None):
        self.device, self.flops, self._measure_peak = device, flops, peak
        self.peak = 0.0
        self.warned = False
        self.restart()

    def restart(self) -> None:
        """Set all counts to zero."""
        self.start, self.images, self.seconds = time.monotonic(), 0, {"waiting": 0.0, "saving": 0.0}

    @contextlib.contextmanager
    def timed(self, activity: str) -> Iterator[None]:
        """Count the time of the block as "waiting" or "saving"."""
        start = time.monotonic()
        yield
        self.seconds[activity] += time.monotonic() - start

    def report(self) -> dict[str, Any]:
        """Return images per second, the fraction of time of each activity, peak memory in bytes and MFU; and restart.

        MFU, model FLOPs utilization, is there if `flops` and `peak` are.
        """
        if self.flops and self._measure_peak is not None and not self.peak:
            with self.paused():
                self.peak = self._measure_peak()
        elapsed = max(time.monotonic() - self.start, 1e-9)
        speed = self.images / elapsed
        report: dict[str, Any] = {
            "images_per_second": speed,
            **{activity: seconds / elapsed for activity, seconds in self.seconds.items()},
            "peak_memory": peak_memory(self.device),
        }
        if self.peak:
            report["mfu"] = speed * self.flops / self.peak
        self.restart()
        return report

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Exclude the time of the block."""
        start = time.monotonic()
        yield
        self.start += time.monotonic() - start

    def starvation_warning(self, report: dict[str, Any]) -> str | None:
        """Return a warning, once, if the data loader is too slow."""
        if self.warned or report["waiting"] < STARVED:
            return None
        self.warned = True
        return (
            f"waiting for data {report['waiting']:.0%} of the time: use more --loading.workers, --loading.cache on, "
            "or smaller images on disk"
        )


def format_speed(report: dict[str, Any]) -> str:
    """Return a report as text for the progress line."""
    parts = [f"{report['images_per_second']:.0f} images/s"]
    if "mfu" in report:
        parts.append(f"MFU {report['mfu']:.0%}")
    parts += [f"{report['peak_memory'] / 1e9:.1f} GB", f"waiting {report['waiting']:.0%}"]
    if report["saving"] >= 0.005:
        parts.append(f"saving {report['saving']:.0%}")
    return "  ".join(parts)


def peak_memory(device: torch.device) -> int:
    """Return the peak memory in bytes: allocated by PyTorch on CUDA, else the resident set of the process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
