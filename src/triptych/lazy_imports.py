"""Public names that are fetched when they are first used, so that importing a package imports nothing heavy."""

import gc
import importlib
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
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
        with uncollected():
            known[name] = getattr(importlib.import_module(names[name]), name)
        return known[name]

    return __getattr__, lambda: sorted({*known, *names})


@contextmanager
def uncollected() -> Iterator[None]:
    """Leave the garbage collector out of what is imported within. What PyTorch alone makes, and keeps, it would look
    through several times over: an eighth of the time of importing it, and a tenth more of what is imported after it.
    """
    if not gc.isenabled():
        yield
        return
    gc.disable()
    try:
        yield
    finally:
        if not gc.get_freeze_count():  # somebody else's frozen objects are not to thaw
            gc.freeze()  # together these make everything old, so that only a full collection looks at it
            gc.unfreeze()
        gc.enable()
