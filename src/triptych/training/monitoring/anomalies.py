"""Detection of NaN or infinite values and of spikes of the loss."""

import json
import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors.torch import save as to_safetensors
from torch import Tensor

from triptych.atomic_write import write_atomically, write_text_atomically
from triptych.data.example import Batch
from triptych.distributed import SINGLE_PROCESS, ProcessGroup
from triptych.errors import TriptychError

WINDOW = 100  # losses that the next one is compared with
MIN_LOSSES = 30  # of them, before a loss is called a spike
SPIKE = 10.0  # robust standard deviations above the median
MAX_SKIPPED = 10  # steps in a row without a finite gradient before the run stops in any case
MAX_NAMES = 20  # names of gradients that are written


class AnomalyDetector:
    """Checks the values of each step once they have arrived. (The update itself only depends on `nonfinite_flag`.)

    Its state belongs to the checkpoint: whether a loss is a spike depends on those before it.

    Args:
        folder: the run's folder, where values that are not finite are documented.
        on_nonfinite: "stop" raises, "skip" skips the update.
        group: the processes of the run. All get the same values; each writes the examples that it has.
    """

    def __init__(
        self, folder: Path, on_nonfinite: Literal["stop", "skip"], group: ProcessGroup = SINGLE_PROCESS
    ):
        self.folder, self.on_nonfinite, self.group = folder, on_nonfinite, group
        self.losses: list[float] = []
        self.skipped = 0
        """Skipped steps in a row."""

    def state_dict(self) -> dict[str, Any]:
        return {"losses": self.losses, "skipped": self.skipped}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.losses, self.skipped = list(state["losses"]), state["skipped"]

    def is_finite(
        self, step: int, values: dict[str, float], gradients: Sequence[str], batches: Sequence[Batch]
    ) -> bool:
        """Return whether the step was updated, which is what `nonfinite_flag` decided from the same values.

        Args:
            values: the loss, its terms, and norms of gradients.
            gradients: names of the parameters whose gradients are not finite.
            batches: the batches of the step.

        Raises:
            TriptychError: a value is not finite and the run is to stop; names the value, its examples, and the file
                that documents it.
        """
        names = nonfinite_names(values)
        if not any(map(_decides, names)):
            self.skipped = 0
            return True
        self.skipped += 1
        path = self._write(step, {name: values[name] for name in names}, gradients, batches)
        first = f"{names[0]} is {values[names[0]]} at step {step}"
        if self.on_nonfinite == "skip" and self.skipped < MAX_SKIPPED:
            return False
        ids = [id_ for batch in batches for id_ in batch["id"]]
        more = f" (with {', '.join(names[1:4])})" if names[1:] else ""
        raise TriptychError(
            f"{first}{more}, on {', '.join(ids[:3])}{' ...' if ids[3:] else ''}; details are in {path}. "
            + (
                "Resume with --loop.on-nonfinite skip, or start again into another --out with a lower --optim.lr or "
                "--loop.precision fp32"
                if self.on_nonfinite == "stop"
                else f"The {MAX_SKIPPED - 1} steps before were not finite either: start again into another --out with "
                "a lower --optim.lr"
            )
        )

    def spike(self, loss: float) -> float | None:
        """Return how far `loss` is above the median of the losses before it, in robust standard deviations (1.4826
        times the median absolute deviation, as for a normal distribution); None if it is not a spike."""
        before, self.losses = self.losses, [*self.losses, loss][-WINDOW:]
        if len(before) < MIN_LOSSES:
            return None
        median = statistics.median(before)
        deviation = 1.4826 * statistics.median(abs(value - median) for value in before)
        height = (loss - median) / max(deviation, 1e-3 * abs(median), 1e-12)
        return height if height > SPIKE else None

    def _write(
        self, step: int, values: dict[str, float], gradients: Sequence[str], batches: Sequence[Batch]
    ) -> Path:
        """Write values, gradients and examples as JSON, and the tensors of the batches beside it."""
        suffix = f"-rank-{self.group.rank}" if self.group.size > 1 else ""
        path = self.folder / f"nonfinite-step-{step}{suffix}.json"
        report = {
            "step": step,
            "terms": {name: str(value) for name, value in values.items()},
            "gradients": list(gradients[:MAX_NAMES]),
            "num_gradients": len(gradients),
            "batches": [
                {"seed": list(batch.get("seed", ())), "ids": batch["id"], "rows": batch.get("row")}
                for batch in batches
            ],
        }
        tensors = {
            f"{part}.{name}": value.detach().cpu().contiguous()
            for part, batch in enumerate(batches)
            for name, value in batch.items()
            if isinstance(value, Tensor)
        }
        data = to_safetensors(tensors)
        write_atomically(path.with_suffix(".safetensors"), lambda file: file.write(data))
        write_text_atomically(path, json.dumps(report, indent=1) + "\n")
        return path


def nonfinite_flag(values: Mapping[str, Tensor]) -> Tensor:
    """Return 1 if the loss or the norm of a gradient is infinite or NaN, else 0: in fp32 on their device, where
    `optim.update` acts on it before the host knows."""
    deciding = [_scalar(value) for name, value in values.items() if _decides(name)]
    return (~torch.stack(deciding).isfinite().all()).float()


def _decides(name: str) -> bool:
    return name == "loss" or name.endswith("grad_norm")


class PendingMetrics:
    """The values of a step on their way from the device; only `read` and `wait` wait for them.

    Args:
        values: as `AnomalyDetector.is_finite` takes them.
        gradients: names of parameters, and the norms of their gradients.
    """

    def __init__(self, values: Mapping[str, Tensor], gradients: Sequence[tuple[str, Tensor]]):
        self.names, self.gradients = list(values), [name for name, _ in gradients]
        self.numbers = torch.stack([*map(_scalar, values.values()), *(norm for _, norm in gradients)])
        self.arrived: torch.cuda.Event | None = None
        if self.numbers.is_cuda:  # on other devices they are copied when they are read
            device = self.numbers.device
            self.numbers = self.numbers.to("cpu", non_blocking=True)  # into pinned memory
            self.arrived = torch.cuda.Event()
            self.arrived.record(torch.cuda.current_stream(device))

    def wait(self) -> None:
        """Wait until a GPU has computed them."""
        if self.arrived is not None:
            self.arrived.synchronize()

    def read(self) -> tuple[dict[str, float], list[str]]:
        """Return the values, and the names of the gradients that are not finite."""
        self.wait()
        numbers, count = self.numbers.tolist(), len(self.names)
        norms = zip(self.gradients, numbers[count:], strict=True)
        values = dict(zip(self.names, numbers[:count], strict=True))
        return values, [name for name, norm in norms if not math.isfinite(norm)]


def _scalar(value: Tensor) -> Tensor:
    return value.detach().float().reshape(())


def example_ids(batches: Iterable[Batch], group: ProcessGroup) -> list[str]:
    """Return the ids of all examples of a step, of all processes; every process calls this."""
    own = [id_ for batch in batches for id_ in batch["id"]]
    return [id_ for ids in group.all_gather(own) for id_ in ids]


def nonfinite_names(values: dict[str, float]) -> list[str]:
    """Return the names of the values that are infinite or NaN."""
    return [name for name, value in values.items() if not math.isfinite(value)]
