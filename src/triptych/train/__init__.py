"""Training: one straight-line loop, the tasks it runs, and what it needs around it.

`triptych.train("vit", data="DIR", out="RUN")` trains by a recipe: this package can be called, see
`triptych.api.training.train`. `triptych.train.run` trains by a config, `dry_run` estimates the cost of that, and
`evaluate` evaluates its result; they import torch when they are first used.
"""

import importlib
import sys
import types
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from triptych.api.training import TrainResult
    from triptych.train.configs.registry import RunConfig
    from triptych.train.evaluate_run import evaluate as evaluate
    from triptych.train.runner import dry_run as dry_run
    from triptych.train.runner import run as run

_PUBLIC = {
    "run": "triptych.train.runner",
    "dry_run": "triptych.train.runner",
    "evaluate": "triptych.train.evaluate_run",
}


class _CallablePackage(types.ModuleType):
    """A package that is also the function of the same name."""

    def __call__(
        self, recipe: "str | RunConfig", *, out: str | Path, data: str | Path | None = None, **fields: Any
    ) -> "TrainResult":
        """See `triptych.api.training.train`."""
        api = importlib.import_module("triptych.api.training")
        return api.train(recipe, out=out, data=data, **fields)


def __getattr__(name: str) -> Any:
    if name not in _PUBLIC:
        raise AttributeError(f"module 'triptych.train' has no attribute {name!r}")
    return getattr(importlib.import_module(_PUBLIC[name]), name)


# Importing any module of this package sets `triptych.train` to the package, so the function cannot stand there.
sys.modules[__name__].__class__ = _CallablePackage
