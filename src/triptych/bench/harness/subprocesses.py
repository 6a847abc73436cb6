"""Run programs in fresh processes: their seconds from start to exit, and what they report."""

import json
import os
import subprocess
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from triptych.bench import children
from triptych.bench.children.process_memory import MEASUREMENT_PREFIX

CHILDREN = Path(children.__file__).parent

# Hubs are offline, so that nothing is downloaded; progress bars are off.
QUIET = {
    "HF_HUB_OFFLINE": "1",
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "TRANSFORMERS_VERBOSITY": "error",
    "DIFFUSERS_VERBOSITY": "error",
    "PYTHONWARNINGS": "ignore",
    "PYTHONDONTWRITEBYTECODE": "",  # as of installed packages, the bytecode of a working tree is cached
}


@dataclass(frozen=True)
class FinishedProcess:
    """A program that has ended."""

    seconds: float
    """From start to exit, including the interpreter's own start."""
    reported: dict[str, Any]
    """What it passed to `triptych.bench.children.process_memory.report`."""


def run_child(name: str, *arguments: str | Path) -> FinishedProcess:
    """Run the program `name` of `triptych.bench.children` in a fresh interpreter.

    Raises:
        RuntimeError: it failed; with the last line that it printed.
    """
    return run([sys.executable, str(CHILDREN / f"{name}.py"), *map(str, arguments)])


def run_code(code: str, *arguments: str | Path) -> FinishedProcess:
    """Run a few lines of Python, such as an import, in a fresh interpreter.

    Raises:
        RuntimeError: as `run_child`.
    """
    return run([sys.executable, "-c", code, *map(str, arguments)])


def run(command: list[str], environment: Mapping[str, str] | None = None) -> FinishedProcess:
    """Run a command to its end, with additional environment variables.

    Raises:
        RuntimeError: as `run_child`.
    """
    start = time.perf_counter()
    process = subprocess.run(
        command,
        capture_output=True,
        text=True,
        env={**os.environ, **QUIET, **(environment or {})},
        check=False,
    )
    seconds = time.perf_counter() - start
    if process.returncode:
        printed = (process.stderr or process.stdout).strip().splitlines() or ["nothing printed"]
        raise RuntimeError(f"a measured program ended with {process.returncode}: {printed[-1]}")
    reports = (line for line in process.stdout.splitlines() if line.startswith(MEASUREMENT_PREFIX))
    return FinishedProcess(
        seconds, json.loads(next(reports, MEASUREMENT_PREFIX + "{}").removeprefix(MEASUREMENT_PREFIX))
    )
