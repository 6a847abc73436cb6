"""Who else is working on this machine: their work is measured as ours."""

import os

try:
    import resource
except ImportError:  # Windows
    resource = None

STAT = "/proc/stat"  # ticks of each processor since the start, by what it did


class Others:
    """What share of the processors that this program may run on other programs took since this was made: their work is
    measured as ours."""

    def __init__(self) -> None:
        self.start = _busy()

    def share(self) -> float | None:
        """From 0 to 1; None where the system does not tell."""
        now = _busy()
        if now is None or self.start is None or now[1] <= self.start[1]:
            return None
        return max(0.0, (now[0] - self.start[0]) / (now[1] - self.start[1]))

    def said(self) -> str:
        """The share in words, for a report of the machine."""
        share = self.share()
        return "unknown" if share is None else f"{share:.0%} of the processors, over the whole run"


def _busy() -> tuple[float, float] | None:
    """Seconds that the processors have worked for others than this program and its children, and seconds that they have
    been there."""
    if resource is None:
        return None
    cores = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else range(os.cpu_count() or 1)
    wanted = {f"cpu{core}" for core in cores}
    try:
        with open(STAT) as file:
            rows = [line.split() for line in file if line.startswith("cpu")]
        ticks = [
            sum(map(int, column)) for column in zip(*(r[1:9] for r in rows if r[0] in wanted), strict=True)
        ]
        idle = ticks[3] + ticks[4]  # idle, and waiting for a disk
    except (OSError, ValueError, IndexError):
        return None
    hertz = os.sysconf("SC_CLK_TCK")
    own = sum(
        u.ru_utime + u.ru_stime
        for u in map(resource.getrusage, (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    )
    return (sum(ticks) - idle) / hertz - own, sum(ticks) / hertz
