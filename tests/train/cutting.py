"""Runs that are cut off, and what is left of them."""

import json
from pathlib import Path
from typing import Any

from torch import Tensor

from triptych.train.checkpoints import Checkpoints
from triptych.train.monitoring.signals import Interrupts
from triptych.train.monitoring.throughput import MEASURED_FIELDS


def cut_after(monkeypatch, steps: int) -> None:
    """Let the next run be interrupted once it has made `steps` steps."""
    asked = []

    def came(self):
        asked.append(1)
        self.received = len(asked) > steps
        return self.received

    monkeypatch.setattr(Interrupts, "__call__", came)


def final(run: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Tensors and facts of a run's newest checkpoint."""
    found = Checkpoints(run / "checkpoints", keep=1).newest()
    assert found is not None
    return found[0].read(), found[0].facts


def steps_kept(run: Path) -> list[int]:
    """The steps of a run's checkpoints, the newest first."""
    return [int(path.name.removeprefix("step-")) for path in Checkpoints(run / "checkpoints", keep=1).paths()]


def rows(run: Path) -> list[dict[str, Any]]:
    """A run's log."""
    return [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]


def learnt(row: dict[str, Any]) -> dict[str, Any]:
    """A row without what a clock measured."""
    return {k: v for k, v in row.items() if k not in MEASURED_FIELDS}
