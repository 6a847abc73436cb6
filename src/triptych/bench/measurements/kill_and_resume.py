"""Kill a run at random moments and resume it each time, and compare it with the same run left uninterrupted."""

import json
import os
import signal
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from triptych.training.checkpoints import Checkpoints
from triptych.training.configs.registry import run_from_json
from triptych.training.monitoring.throughput import MEASURED_FIELDS

MOMENTS = ("in a step", "in a checkpoint", "in a step", "in a checkpoint", "at the start")
POLL = 0.001  # seconds between checks of a run


class RunningProcess(Protocol):
    """The part of `subprocess.Popen` that is used."""

    @property
    def pid(self) -> int: ...
    def poll(self) -> int | None: ...
    def wait(self) -> int: ...


@dataclass(kw_only=True)
class Killed:
    """How often a run was killed."""

    kills: dict[str, int] = field(default_factory=lambda: dict.fromkeys(MOMENTS, 0))
    """Number of kills by moment. After one "in a checkpoint" a partly written one was on disk."""
    lost: int = 0
    """Number of logged steps that had to be run again."""


def kill_often(
    start: Callable[[], RunningProcess], run: Path, steps: int, kills: int, rng: np.random.Generator
) -> Killed:
    """Start a run of `steps` steps and kill it with SIGKILL, `kills` times, then let it run to its end.

    The kills are spread over the run: each comes a random number of steps after the last step that was logged before
    the previous kill. They alternate between a moment within a step, while a checkpoint is written, and during startup.

    Args:
        start: starts or resumes the run.
        run: folder of the run.
        steps: number of steps of the run.
        kills: number of times to kill it.
        rng: generator of the moments.

    Raises:
        RuntimeError: the run ended before it was killed that often, or failed.
    """
    killed, last, startup = Killed(), 0, 1.0
    for number in range(kills):
        moment = MOMENTS[number % len(MOMENTS)]
        began, process = time.monotonic(), start()
        if moment == "at the start":
            time.sleep(rng.uniform(0, startup))
        else:
            reach = max(1, (steps - last) // (kills - number + 1))
            target = last + int(rng.integers(1, reach + 1))
            _until(process, lambda target=target: step_of(run) >= target)
            startup = time.monotonic() - began
            if moment == "in a step":
                time.sleep(rng.exponential(0.02))
            else:
                _until(process, lambda: any((run / "checkpoints").glob(".step-*.part")))
                time.sleep(rng.exponential(0.002))
        os.kill(process.pid, signal.SIGKILL)
        if process.wait() != -signal.SIGKILL:
            raise RuntimeError(
                f"the run ended after {number} kills; it is too short for {kills}, or it failed"
            )
        partly_written = any((run / "checkpoints").glob(".step-*.part"))
        killed.kills[
            "in a checkpoint" if partly_written else moment if moment != "in a checkpoint" else "in a step"
        ] += 1
        newest = Checkpoints(run / "checkpoints", 1).newest()
        reached = step_of(run)
        killed.lost += reached - (newest[0].step if newest else 0)
        last = max(last, reached)
    if start().wait() != 0:
        raise RuntimeError(f"the run failed after {kills} kills")
    return killed


def _until(process: RunningProcess, condition: Callable[[], bool]) -> None:
    while not condition():
        if process.poll() is not None:
            return
        time.sleep(POLL)


def step_of(run: Path) -> int:
    """Return the last step in the log of a run; 0 if there is none."""
    try:
        with open(run / "log.jsonl", "rb") as file:
            file.seek(max(0, os.fstat(file.fileno()).st_size - 4096))
            lines = file.read().splitlines()
    except OSError:
        return 0
    for line in reversed(lines):
        try:
            return int(json.loads(line)["step"])
        except (ValueError, KeyError, TypeError):
            continue
    return 0


def apart(first: Path, second: Path) -> dict[str, Any]:
    """Compare two finished runs of the same config.

    Returns:
        "tensors": number of tensors compared (weights, EMA, optimizer states); "difference": largest difference between
        two values; "rows": number of log rows; "rows apart": number of those that differ; "facts": whether the
        checkpoints' facts (data position, best metrics, guard) are equal; "kept": whether the model files are equal.
    """
    (mine, my_facts), (theirs, their_facts) = final(first), final(second)
    rows = [comparable_log(path) for path in (first, second)]
    return {
        "tensors": len(mine),
        "difference": difference(mine, theirs),
        "rows": len(rows[0]),
        "rows apart": sum(a != b for a, b in zip(*rows, strict=False)) + abs(len(rows[0]) - len(rows[1])),
        "facts": my_facts == their_facts,
        "kept": (first / "model.safetensors").read_bytes() == (second / "model.safetensors").read_bytes(),
    }


def difference(mine: dict[str, Tensor], theirs: dict[str, Tensor]) -> float:
    """Return the largest absolute difference; infinity if names, shapes or types differ or only one value is not
    finite."""
    if {n: (t.shape, t.dtype) for n, t in mine.items()} != {n: (t.shape, t.dtype) for n, t in theirs.items()}:
        return float("inf")
    greatest = 0.0
    for name, tensor in mine.items():
        if not torch.equal(tensor, theirs[name]):
            gap = float((tensor.double() - theirs[name].double()).abs().max())
            greatest = max(greatest, gap if gap == gap else float("inf"))
    return greatest


def final(run: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Return the tensors and facts of a run's newest checkpoint."""
    newest = Checkpoints(run / "checkpoints", 1).newest()
    if newest is None:
        raise RuntimeError(f"{run} has no checkpoint")
    return newest[0].read(), newest[0].facts


def comparable_log(run: Path) -> list[dict[str, Any]]:
    """Return the rows of a run's log without the fields that depend on time."""
    rows = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    return [{k: v for k, v in row.items() if k not in MEASURED_FIELDS} for row in rows]


def again(config: Path, out: Path) -> None:
    """Start the run whose config is in a file, or resume it."""
    from triptych.training import run

    config_dict = json.loads(config.read_text())
    run(run_from_json(config_dict, config), out)


if __name__ == "__main__":
    again(Path(sys.argv[1]), Path(sys.argv[2]))
