"""Training: one straight-line loop, the tasks it runs, and what it needs around it.

`run` trains, `dry_run` estimates and `evaluate` measures; they import torch when they are first called.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from triptych.train.evaluate_run import evaluate as evaluate
    from triptych.train.runner import dry_run as dry_run
    from triptych.train.runner import run as run

_PUBLIC = {
    "run": "triptych.train.runner",
    "dry_run": "triptych.train.runner",
    "evaluate": "triptych.train.evaluate_run",
}


def __getattr__(name: str) -> Any:
    if name not in _PUBLIC:
        raise AttributeError(f"module 'triptych.train' has no attribute {name!r}")
    return getattr(importlib.import_module(_PUBLIC[name]), name)
