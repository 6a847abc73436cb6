"""A run that is killed at random moments and given again each time, beside the same run left alone."""

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

KINDS = ("in a step", "in a checkpoint", "in a step", "in a checkpoint", "at the start")
POLL = 0.001  # seconds between looks at a run


class RunningProcess(Protocol):
    """As `subprocess.Popen` is."""

    @property
    def pid(self) -> int: ...
    def poll(self) -> int | None: ...
    def wait(self) -> int: ...


@dataclass(kw_only=True)
class Killed:
    """What befell a run."""

    kills: dict[str, int] = field(default_factory=lambda: dict.fromkeys(KINDS, 0))
    """How many of each kind. "in a checkpoint": one lay half-written on the disk afterwards."""
    lost: int = 0
    """Steps that were made and made again, at least: those that the log had."""


def kill_often(
    start: Callable[[], RunningProcess], run: Path, steps: int, kills: int, rng: np.random.Generator
) -> Killed:
    """Start a run of `steps` steps, kill it with SIGKILL, start it again: `kills` times, and then to its end.

    The moments are spread over the whole run: each kill comes some random number of steps after what the log had at
    the one before. Some come within a step or whatever follows it, some as soon as a checkpoint is being written, some
    while the run is still finding out where it was.

    Raises:
        RuntimeError: the run ended before it was killed that often, or failed.
    """
    found, last, startup = Killed(), 0, 1.0
    for number in range(kills):
        moment = KINDS[number % len(KINDS)]
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
        half = any((run / "checkpoints").glob(".step-*.part"))
        found.kills[
            "in a checkpoint" if half else moment if moment != "in a checkpoint" else "in a step"
        ] += 1
        newest = Checkpoints(run / "checkpoints", 1).newest()
        reached = step_of(run)
        found.lost += reached - (newest[0].step if newest else 0)
        last = max(last, reached)
    if start().wait() != 0:
        raise RuntimeError(f"the run failed after {kills} kills")
    return found


def _until(process: RunningProcess, condition: Callable[[], bool]) -> None:
    while not condition():
        if process.poll() is not None:
            return
        time.sleep(POLL)


def step_of(run: Path) -> int:
    """The last step that a run's log has."""
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


def apart(one: Path, other: Path) -> dict[str, Any]:
    """How far two finished runs of one config are from each other: `tensors` compared (weights, average, optimizers)
    and the greatest `difference` of any two numbers in them; `rows` of the log, and how many `rows apart`; whether
    their `facts` (data position, best figures, guard) and the `kept` files are the same."""
    (mine, my_facts), (theirs, their_facts) = final(one), final(other)
    rows = [learnt(path) for path in (one, other)]
    return {
        "tensors": len(mine),
        "difference": difference(mine, theirs),
        "rows": len(rows[0]),
        "rows apart": sum(a != b for a, b in zip(*rows, strict=False)) + abs(len(rows[0]) - len(rows[1])),
        "facts": my_facts == their_facts,
        "kept": (one / "model.safetensors").read_bytes() == (other / "model.safetensors").read_bytes(),
    }


def difference(mine: dict[str, Tensor], theirs: dict[str, Tensor]) -> float:
    """The greatest difference of two numbers; infinite where names or shapes differ, or one alone is not finite."""
    if {n: (t.shape, t.dtype) for n, t in mine.items()} != {n: (t.shape, t.dtype) for n, t in theirs.items()}:
        return float("inf")
    greatest = 0.0
    for name, tensor in mine.items():
        if not torch.equal(tensor, theirs[name]):
            gap = float((tensor.double() - theirs[name].double()).abs().max())
            greatest = max(greatest, gap if gap == gap else float("inf"))
    return greatest


def final(run: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Tensors and facts of a run's newest checkpoint."""
    found = Checkpoints(run / "checkpoints", 1).newest()
    if found is None:
        raise RuntimeError(f"{run} has no checkpoint")
    return found[0].read(), found[0].facts


def learnt(run: Path) -> list[dict[str, Any]]:
    """A run's log without what a clock measured."""
    rows = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    return [{k: v for k, v in row.items() if k not in MEASURED_FIELDS} for row in rows]


def again(config: Path, out: Path) -> None:
    """Begin the run that a file describes, or go on with it."""
    from triptych.training import run

    config_dict = json.loads(config.read_text())
    run(run_from_json(config_dict, config), out)


if __name__ == "__main__":
    again(Path(sys.argv[1]), Path(sys.argv[2]))
