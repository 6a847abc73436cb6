"""The CPU time that other programs use, which makes measurements slower."""

import os

import psutil


class CpuContention:
    """Fraction of this process's cores that other programs have used since the object was created."""

    def __init__(self) -> None:
        self.start = _other_time()

    def share(self) -> float | None:
        """Return the fraction, from 0 to 1; None if the operating system does not report it."""
        now = _other_time()
        if now is None or self.start is None or now[1] <= self.start[1]:
            return None
        return max(0.0, (now[0] - self.start[0]) / (now[1] - self.start[1]))

    def describe(self) -> str:
        """Describe the fraction, for the machine table of a report."""
        share = self.share()
        return "unknown" if share is None else f"{share:.0%} of the CPU, over the whole run"


def _other_time() -> tuple[float, float] | None:
    """Return the seconds that this process's cores have worked for other processes than it and its children, and the
    total seconds."""
    try:
        times = psutil.cpu_times(percpu=True)
        cores = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else range(len(times))
        # Time of virtual machines is part of user time.
        rows = [times[core]._asdict() for core in cores]
    except (OSError, psutil.Error, IndexError):
        return None
    total = sum(seconds for row in rows for name, seconds in row.items() if not name.startswith("guest"))
    idle = sum(row["idle"] + row.get("iowait", 0.0) for row in rows)
    own = psutil.Process().cpu_times()
    mine = own.user + own.system + own.children_user + own.children_system
    return total - idle - mine, total
