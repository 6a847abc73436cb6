"""Runs that are interrupted, and what they leave behind."""

import json
from pathlib import Path
from typing import Any

from torch import Tensor

from triptych.training.checkpoints import Checkpoints
from triptych.training.monitoring.signals import Interrupts
from triptych.training.monitoring.throughput import MEASURED_FIELDS


def interrupt_after(monkeypatch, steps: int) -> None:
    """Let the next run be interrupted after `steps` steps."""
    calls = []

    def received(self):
        calls.append(1)
        self.received = len(calls) > steps
        return self.received

    monkeypatch.setattr(Interrupts, "__call__", received)


def last_checkpoint(run: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Return tensors and facts of a run's newest checkpoint."""
    newest = Checkpoints(run / "checkpoints", keep=1).newest()
    assert newest is not None
    return newest[0].read(), newest[0].facts


def checkpoint_steps(run: Path) -> list[int]:
    """Return the steps of a run's checkpoints, the newest first."""
    return [int(path.name.removeprefix("step-")) for path in Checkpoints(run / "checkpoints", keep=1).paths()]


def log_rows(run: Path) -> list[dict[str, Any]]:
    """Return the rows of a run's log."""
    return [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]


def comparable_rows(run: Path) -> list[dict[str, Any]]:
    """Return the rows of a run's log without what a clock or a memory counter measured."""
    return [{k: v for k, v in row.items() if k not in MEASURED_FIELDS} for row in log_rows(run)]
