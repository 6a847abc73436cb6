"""Training: one straight-line loop, the tasks it runs, and what it needs around it.

`run` trains by a config, `dry_run` estimates the cost of that, and `evaluate` evaluates its result; they import torch
when they are first used. `triptych.train` is the short way: a recipe with some fields changed.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from triptych.training.evaluate_run import evaluate as evaluate
    from triptych.training.runner import dry_run as dry_run
    from triptych.training.runner import run as run

_PUBLIC = {
    "run": "triptych.training.runner",
    "dry_run": "triptych.training.runner",
    "evaluate": "triptych.training.evaluate_run",
}


def __getattr__(name: str) -> Any:
    if name not in _PUBLIC:
        raise AttributeError(f"module 'triptych.training' has no attribute {name!r}")
    return getattr(importlib.import_module(_PUBLIC[name]), name)
