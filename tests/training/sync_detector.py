"""Detect what would synchronize with a device in a training step, on a machine without one."""

import contextlib
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from triptych.data.augment import batch as augment
from triptych.layers import window
from triptych.training import loop
from triptych.training.monitoring import anomalies
from triptych.training.monitoring.throughput import Throughput

# Operations whose result, or its shape, the host has to know. `_linalg_check_errors` asks whether a matrix is singular.
ASKING = {
    "_local_scalar_dense", "nonzero", "nonzero_numpy", "nonzero_static", "masked_select", "equal", "is_nonzero",
    "bincount", "histc", "unique_dim", "_unique", "_unique2", "unique_consecutive", "_linalg_check_errors",
}  # fmt: skip
INDEXING = {"index", "index_put", "index_put_", "_index_put_impl_", "_unsafe_index"}
COPYING = {"_to_copy", "copy_"}


class SyncDetector(TorchDispatchMode):
    """Records what would synchronize, while `on`, as if the tensors of `device` were on a GPU: operations whose result
    the host needs, and, unless `device` is the CPU, copies from and to the CPU that are not `non_blocking`."""

    def __init__(self, device: str):
        super().__init__()
        self.device, self.on = device, False
        self.events: list[str] = []
        self.seen = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = func._schema.name.removeprefix("aten::")
        if self.on and any(isinstance(arg, Tensor) and arg.device.type == self.device for arg in args):
            self.seen += 1
            if name in ASKING or (name == "repeat_interleave" and func._overloadname == "Tensor"):
                self.note(name)
            if name in INDEXING and any(
                i is not None and i.dtype in (torch.bool, torch.uint8) for i in args[1]
            ):
                self.note(f"{name} by booleans")
        out = func(*args, **kwargs)
        if self.on and name in COPYING:
            target, source = (args[0], args[1]) if name == "copy_" else (out, args[0])
            non_blocking = args[2] if name == "copy_" and len(args) > 2 else kwargs.get("non_blocking", False)
            if (target.device.type == "cpu") != (source.device.type == "cpu") and not non_blocking:
                self.note(f"{name} from {source.device} to {target.device}")
        return out

    def note(self, what: str) -> None:
        self.events.append(what)

    @contextlib.contextmanager
    def off(self) -> Any:
        before, self.on = self.on, False
        try:
            yield
        finally:
            self.on = before


def watch_calls(patch: pytest.MonkeyPatch, waits: SyncDetector) -> None:
    """Also record calls that reach no operation if a tensor is on the CPU, and tensors that are created from numbers on
    another device, which copies them there."""
    for name in ("tolist", "numpy", "cpu", "__array__"):
        patch.setattr(Tensor, name, _asking(waits, name, getattr(Tensor, name)))
    for owner, name in ((torch, "tensor"), (torch, "as_tensor"), (Tensor, "new_tensor")):
        patch.setattr(owner, name, _making(waits, name, getattr(owner, name)))


def _asking(waits: SyncDetector, name: str, real: Any) -> Any:
    def call(self: Tensor, *args: Any) -> Any:
        if waits.on and self.device.type == waits.device:
            waits.note(f"Tensor.{name}")
        return real(self, *args)

    return call


def _making(waits: SyncDetector, name: str, real: Any) -> Any:
    def create(*args: Any, **kwargs: Any) -> Any:
        tensor = real(*args, **kwargs)
        if waits.on and tensor.device.type != "cpu":
            waits.note(f"{name} on {tensor.device}")
        return tensor

    return create


def suspend(patch: pytest.MonkeyPatch, waits: SyncDetector, owner: Any, name: str) -> None:
    """Record nothing inside of a function that works on the CPU only."""
    real = getattr(owner, name)

    def apart(*args: Any, **kwargs: Any) -> Any:
        with waits.off():
            return real(*args, **kwargs)

    patch.setattr(owner, name, apart)


def watch_steps(patch: pytest.MonkeyPatch, waits: SyncDetector) -> list[int]:
    """Record from the moment a step has its batch until its record is created; return the list of steps done."""
    sent, step, spending, read = (
        loop.to_device,
        loop.StepRecord,
        Throughput.timed,
        anomalies.PendingMetrics.read,
    )
    steps: list[int] = []
    newest: list[anomalies.PendingMetrics] = []

    def begun(*args: Any) -> Any:
        batch = sent(*args)
        waits.on = True
        return batch

    def left(row: Any, *args: Any, **kwargs: Any) -> Any:
        waits.on = False
        steps.append(row["step"])
        return step(row, *args, **kwargs)

    @contextlib.contextmanager
    def spent(self: Throughput, on: str) -> Any:
        with waits.off() if on == "waiting" and waits.on else contextlib.nullcontext(), spending(self, on):
            yield

    class Numbers(anomalies.PendingMetrics):
        def __init__(self, *args: Any):
            super().__init__(*args)
            newest[:] = [self]

        def read(self) -> Any:
            assert not waits.on or newest != [self], "read before the next step was queued"
            with waits.off():
                return read(self)

    patch.setattr(loop, "to_device", begun)
    patch.setattr(loop, "StepRecord", left)
    patch.setattr(loop, "PendingMetrics", Numbers)
    patch.setattr(Throughput, "timed", spent)
    suspend(patch, waits, augment, "draw_augmentation")  # by numpy, of what stays on the CPU
    suspend(patch, waits, window, "window_order")  # used for maps on the CPU only
    return steps
