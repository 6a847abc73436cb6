"""Device, precision and progress bar of an evaluation."""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any, TypeVar

import torch

from triptych.data.example import Batch
from triptych.data.loading.loader import Loader
from triptych.device import choose_device, choose_dtype, log_dtype, place_network
from triptych.errors import DataError
from triptych.network import Network
from triptych.torch_compile import compile_blocks

Progress = Callable[[Iterable[Any], int, str], Iterable[Any]]
"""Wraps an iterable, given its length and a description such as "evaluating"; for a progress bar."""
N = TypeVar("N", bound=Network)


@dataclass(frozen=True)
class Runtime:
    """Device, precision and progress bar of an evaluation."""

    device: torch.device
    dtype: torch.dtype
    """Data type of matrix products; weights stay in fp32."""
    compile: bool = False
    """Compile the network's blocks with `torch.compile`."""
    progress: Progress | None = None

    @classmethod
    def choose(
        cls,
        device: str | None = None,
        dtype: str | None = None,
        compile: bool = False,
        progress: Progress | None = None,
    ) -> "Runtime":
        """Choose device and precision; None is the fastest available (`choose_device`, `choose_dtype`)."""
        chosen = choose_device(device)
        return cls(chosen, choose_dtype(dtype, chosen), compile, progress)

    def place(self, net: N) -> N:
        """Log the precision; return the network in fp32 on the device, compiled if requested."""
        log_dtype(self.dtype, self.device)
        net = place_network(net, self.device, torch.float32)
        if self.compile:
            compile_blocks(net)
        return net

    def autocast(self) -> torch.autocast:
        """Return the context in which forward passes run."""
        return torch.autocast(self.device.type, dtype=self.dtype, enabled=self.dtype != torch.float32)

    def batches(self, loader: Loader, num_images: int) -> Iterator[Batch]:
        """Yield the batches of a loader.

        Raises:
            DataError: none of the `num_images` images could be read; gives the reason for the first.
        """
        any_read = False
        for batch in self.progress(loader, len(loader), "evaluating") if self.progress else loader:
            any_read = True
            yield batch
        if not any_read:
            first = next(iter(loader.bad.values()))
            raise DataError(f"none of the {num_images} images could be evaluated; the first: {first}")
