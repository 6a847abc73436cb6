"""Memory of a process as the operating system reports it, and the report that a child process sends to its parent."""

import json
import sys
from typing import Any, NamedTuple

import psutil

MEASUREMENT_PREFIX = "REPORT "


class Memory(NamedTuple):
    """Resident bytes of a process."""

    current: int
    peak: int


def memory() -> Memory:
    """Return the resident bytes of this process, and their peak since its start or since `reset_peak`.

    The peak is Linux's VmHWM, which psutil does not read; `ru_maxrss` of a child begins at the size of the process that
    forked it.
    """
    current = psutil.Process().memory_info().rss
    try:
        with open("/proc/self/status") as file:
            lines = dict(line.split(":", 1) for line in file)
        return Memory(current, max(current, int(lines["VmHWM"].split()[0]) * 1024))
    except OSError:
        pass
    if sys.platform == "win32":
        return Memory(current, psutil.Process().memory_info().peak_wset)
    import resource

    scale = 1 if sys.platform == "darwin" else 1024
    return Memory(current, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * scale)


def reset_peak() -> None:
    """Reset the peak to the current size, on systems that can (Linux)."""
    try:
        with open("/proc/self/clear_refs", "w") as file:
            file.write("5")
    except OSError:
        pass


def private_memory(pid: int) -> int:
    """Return the bytes that a process shares with no other process (unique set size); 0 if it has ended."""
    try:
        return psutil.Process(pid).memory_full_info().uss
    except psutil.Error:
        return 0


def report(**values: Any) -> None:
    """Send values as JSON to the parent process, which uses `triptych.bench.harness.subprocesses`."""
    print(MEASUREMENT_PREFIX + json.dumps(values), flush=True)
