"""Training: one straight-line loop, the tasks it runs, and what it needs around it.

`run` trains and `evaluate` measures; both import torch when they are first called.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from triptych.train.evaluate import evaluate as evaluate
    from triptych.train.run import dry_run as dry_run
    from triptych.train.run import run as run

_PUBLIC = {
    "run": "triptych.train.run",
    "dry_run": "triptych.train.run",
    "evaluate": "triptych.train.evaluate",
}


def __getattr__(name: str) -> Any:
    if name not in _PUBLIC:
        raise AttributeError(f"module 'triptych.train' has no attribute {name!r}")
    import importlib

    value = getattr(importlib.import_module(_PUBLIC[name]), name)
    globals()[name] = value  # `run` is the function from here on, not the module of that name
    return value
