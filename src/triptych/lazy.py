"""Public names that are fetched when they are first used, so that importing a package imports nothing heavy."""

import importlib
import sys
from collections.abc import Callable, Mapping
from typing import Any


def public(package: str, names: Mapping[str, str]) -> tuple[Callable[[str], Any], Callable[[], list[str]]]:
    """`__getattr__` and `__dir__` (PEP 562) of a package.

    Args:
        names: public name -> the module that holds it.
    """
    known = vars(sys.modules[package])

    def __getattr__(name: str) -> Any:
        if name not in names:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        known[name] = getattr(importlib.import_module(names[name]), name)
        return known[name]

    return __getattr__, lambda: sorted({*known, *names})
