"""What a run watches for: numbers that are none, and losses that jump."""

import json
import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors.torch import save as to_safetensors
from torch import Tensor

from triptych import distributed
from triptych.atomic_write import write_atomically, write_text_atomically
from triptych.errors import UserError

Batch = dict[str, Any]

WINDOW = 100  # losses that the next is held against
LEAST = 30  # of them, before any is called a spike
SPIKE = 10.0  # robust deviations from the median
IN_A_ROW = 10  # steps without a finite gradient, after which skipping more teaches nothing
NAMED = 20  # names that are written of many


class AnomalyDetector:
    """Looks at each step's numbers, once they are there; the update waits for `skipped` alone.

    Its state belongs to the checkpoint: whether a loss is a spike depends on those before it.

    Args:
        folder: of the run; what was not finite is written there.
        on_nonfinite: "stop" raises, "skip" leaves the update out and goes on.
        rank: of this process among several, which are all told the same numbers; each writes of its own examples.
    """

    def __init__(self, folder: Path, on_nonfinite: Literal["stop", "skip"], rank: int | None = None):
        self.folder, self.on_nonfinite, self.rank = folder, on_nonfinite, rank
        self.losses: list[float] = []
        self.skipped = 0
        """Steps in a row without an update."""

    def state_dict(self) -> dict[str, Any]:
        return {"losses": self.losses, "skipped": self.skipped}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.losses, self.skipped = list(state["losses"]), state["skipped"]

    def finite(
        self, step: int, terms: dict[str, float], gradients: Sequence[str], batches: Sequence[Batch]
    ) -> bool:
        """Whether the step's update was made: what `skipped` made of the same numbers.

        Args:
            terms: the loss, what it was added up from, and norms of gradients.
            gradients: names of the parameters whose gradients are not finite.
            batches: that it was made of.

        Raises:
            UserError: something is not finite, and the run is to stop; it names what, where, and what was written.
        """
        wrong = nonfinite_names(terms)
        if not any(map(_decides, wrong)):
            self.skipped = 0
            return True
        self.skipped += 1
        path = self._write(step, {name: terms[name] for name in wrong}, gradients, batches)
        first = f"{wrong[0]} is {terms[wrong[0]]} at step {step}"
        if self.on_nonfinite == "skip" and self.skipped < IN_A_ROW:
            return False
        names = [name for batch in batches for name in batch["id"]]
        more = f" (with {', '.join(wrong[1:4])})" if wrong[1:] else ""
        raise UserError(
            f"{first}{more}, on {', '.join(names[:3])}{' ...' if names[3:] else ''}; all is in {path}. "
            + (
                "Go on with --loop.on-nonfinite skip, or start again into another --out with a lower --optim.lr or "
                "--loop.precision fp32"
                if self.on_nonfinite == "stop"
                else f"So were the {IN_A_ROW - 1} steps before: start again into another --out with a lower --optim.lr"
            )
        )

    def spike(self, loss: float) -> float | None:
        """How far `loss` lies above the median of those before it, in robust standard deviations (1.4826 times the
        median absolute deviation, that of a normal distribution); None where that is nothing to speak of."""
        before, self.losses = self.losses, [*self.losses, loss][-WINDOW:]
        if len(before) < LEAST:
            return None
        median = statistics.median(before)
        spread = 1.4826 * statistics.median(abs(value - median) for value in before)
        height = (loss - median) / max(spread, 1e-3 * abs(median), 1e-12)
        return height if height > SPIKE else None

    def _write(
        self, step: int, wrong: dict[str, float], gradients: Sequence[str], batches: Sequence[Batch]
    ) -> Path:
        """Which terms and gradients, of which examples; and the batches' tensors beside it."""
        of = "" if self.rank is None else f"-rank-{self.rank}"
        path = self.folder / f"nonfinite-step-{step}{of}.json"
        about = {
            "step": step,
            "terms": {name: str(value) for name, value in wrong.items()},
            "gradients": list(gradients[:NAMED]),
            "gradients_in_all": len(gradients),
            "batches": [
                {"seed": list(batch["seed"]), "ids": batch["id"], "rows": batch.get("row")}
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
        write_text_atomically(path, json.dumps(about, indent=1) + "\n")
        return path


def nonfinite_flag(terms: Mapping[str, Tensor]) -> Tensor:
    """1 if the loss or a norm of gradients is infinite or no number, else 0: in fp32 and on their device, where it can
    be acted on by `optim.update` before anybody here knows."""
    deciding = [_number(value) for name, value in terms.items() if _decides(name)]
    return (~torch.stack(deciding).isfinite().all()).float()


def _decides(name: str) -> bool:
    return name == "loss" or name.endswith("grad_norm")


class PendingMetrics:
    """A step's numbers on their way from the device: nobody waits for them before they are read.

    Args:
        terms: as `Guard.finite` takes them.
        gradients: names of parameters, and the norms of their gradients.
    """

    def __init__(self, terms: Mapping[str, Tensor], gradients: Sequence[tuple[str, Tensor]]):
        self.terms, self.gradients = list(terms), [name for name, _ in gradients]
        values = torch.stack([*map(_number, terms.values()), *(norm for _, norm in gradients)])
        self.values, self.come = values, None
        if values.is_cuda:  # elsewhere they are fetched when they are read
            self.values = values.to("cpu", non_blocking=True)  # which pins the memory that it copies to
            self.come = torch.cuda.Event()
            self.come.record(torch.cuda.current_stream(values.device))

    def wait(self) -> None:
        """Until a GPU has got as far as here."""
        if self.come is not None:
            self.come.synchronize()

    def read(self) -> tuple[dict[str, float], list[str]]:
        """The terms, and the names of gradients that are not finite."""
        self.wait()
        values, count = self.values.tolist(), len(self.terms)
        norms = zip(self.gradients, values[count:], strict=True)
        return dict(zip(self.terms, values[:count], strict=True)), [
            n for n, v in norms if not math.isfinite(v)
        ]


def _number(value: Tensor) -> Tensor:
    return value.detach().float().reshape(())


def example_ids(batches: Iterable[Batch]) -> list[str]:
    """Names of all examples of a step, of all processes, which all call this."""
    return [
        name
        for part in distributed.all_gather([n for batch in batches for n in batch["id"]])
        for name in part
    ]


def nonfinite_names(terms: dict[str, float]) -> list[str]:
    """Names of those that are infinite or no number."""
    return [name for name, value in terms.items() if not math.isfinite(value)]
