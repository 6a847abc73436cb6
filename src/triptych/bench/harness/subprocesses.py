"""Work in processes of its own: seconds from start to exit, and memory by the operating system's account."""

import json
import os
import subprocess
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

# What a measured program may call. VmHWM is the peak of this program alone: `ru_maxrss` of a child starts at
# the size of the process that forked it.
PRELUDE = """
import json, os, sys, time

def memory():
    "Bytes resident now, and at the most so far."
    try:
        with open("/proc/self/status") as file:
            lines = dict(line.split(":", 1) for line in file)
        return tuple(int(lines[name].split()[0]) * 1024 for name in ("VmRSS", "VmHWM"))
    except OSError:
        import resource
        most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
        return most, most

def forget_peak():
    "Begin the most anew, where the system can."
    try:
        with open("/proc/self/clear_refs", "w") as file:
            file.write("5")
    except OSError:
        pass

def own(pid):
    "Bytes that a process shares with none."
    try:
        with open(f"/proc/{pid}/smaps_rollup") as file:
            parts = dict(line.split(":") for line in file if ":" in line and line.startswith("Private"))
    except OSError:
        return 0
    return sum(int(part.split()[0]) * 1024 for part in parts.values())

def say(**known):
    print("SAID " + json.dumps(known), flush=True)
"""

# Nothing is fetched, nothing is drawn: hubs are off, progress bars too.
QUIET = {
    "HF_HUB_OFFLINE": "1",
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "TRANSFORMERS_VERBOSITY": "error",
    "DIFFUSERS_VERBOSITY": "error",
    "PYTHONWARNINGS": "ignore",
    "PYTHONDONTWRITEBYTECODE": "",  # installed packages are compiled; ours in a working tree is once this is off
}


@dataclass(frozen=True)
class Process:
    """What a program took, and what it said."""

    seconds: float
    """From start to exit, the interpreter's own included."""
    said: dict[str, Any]


def python(code: str, *arguments: str | Path) -> Process:
    """Run a program in a fresh interpreter; it may use `memory()`, and `say(name=value)` once.

    Raises:
        RuntimeError: it failed; with the last line that it printed.
    """
    return run([sys.executable, "-c", PRELUDE + code, *map(str, arguments)])


def run(command: list[str], environment: Mapping[str, str] | None = None) -> Process:
    """Run a command to its end, with more in its environment.

    Raises:
        RuntimeError: it failed; with the last line that it printed.
    """
    start = time.perf_counter()
    done = subprocess.run(
        command,
        capture_output=True,
        text=True,
        env={**os.environ, **QUIET, **(environment or {})},
        check=False,
    )
    seconds = time.perf_counter() - start
    if done.returncode:
        printed = (done.stderr or done.stdout).strip().splitlines() or ["nothing printed"]
        raise RuntimeError(f"a measured program ended with {done.returncode}: {printed[-1]}")
    said = next((line for line in done.stdout.splitlines() if line.startswith("SAID ")), "SAID {}")
    return Process(seconds, json.loads(said.removeprefix("SAID ")))
