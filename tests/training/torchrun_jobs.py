"""Runs by several processes: `torchrun tests/training/torchrun_jobs.py JOBS`, where JOBS is a pickled list of `Job`."""

import os
import pickle
import signal
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass
class Job:
    config: Any
    out: Path
    cut: int | None = None
    """Steps after which it is interrupted."""
    dies: int | None = None
    """Steps after which the last process is killed, the first time."""
    nan_steps: tuple[int, ...] = ()
    """Steps, from 0, at which the last process's loss is NaN."""


def main(jobs: list[Job]) -> None:
    import pytest
    import torch.distributed as dist
    from tests.training.nan_losses import make_losses_nan

    from triptych.training import run
    from triptych.training.distributed.process_group import destroy_process_groups, init_process_group
    from triptych.training.monitoring.signals import Interrupts

    init_process_group("gloo")  # once for all runs
    is_interrupted = Interrupts.__call__
    for job in jobs:
        steps: list[int] = []
        died = job.out.with_suffix(".died")

        def received(self: Interrupts, job: Job = job, steps: list[int] = steps, died: Path = died) -> bool:
            steps.append(1)
            if job.dies is not None and len(steps) > job.dies and dist.get_rank() == 1 and not died.exists():
                died.touch()
                os.kill(os.getpid(), signal.SIGKILL)
            return is_interrupted(self) or (
                job.cut is not None and len(steps) > job.cut and dist.get_rank() == 1
            )

        Interrupts.__call__ = received  # type: ignore[method-assign]
        with pytest.MonkeyPatch.context() as patch:
            make_losses_nan(patch, *(job.nan_steps if dist.get_rank() == 1 else ()))
            run(job.config, job.out)
    destroy_process_groups()


if __name__ == "__main__":
    sys.modules["tests.training.torchrun_jobs"] = sys.modules["__main__"]  # what the jobs were pickled as
    main(pickle.loads(Path(sys.argv[1]).read_bytes()))
