"""Public names that are imported when they are first used, so that importing a package stays cheap."""

import gc
import importlib
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any


def lazy_attributes(
    package: str, names: Mapping[str, str]
) -> tuple[Callable[[str], Any], Callable[[], list[str]]]:
    """Return `__getattr__` and `__dir__` (PEP 562) for a package.

    Args:
        package: the package's `__name__`.
        names: public name -> the module that defines it, or the subpackage of that name.
    """
    namespace = vars(sys.modules[package])

    def __getattr__(name: str) -> Any:
        if name not in names:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        with paused_gc():
            module = importlib.import_module(names[name])
            namespace[name] = module if names[name] == f"{package}.{name}" else getattr(module, name)
        return namespace[name]

    return __getattr__, lambda: sorted({*namespace, *names})


@contextmanager
def paused_gc() -> Iterator[None]:
    """Pause the garbage collector during an import.

    It would traverse the objects that PyTorch creates, and keeps, several times: an eighth of the time of importing
    torch, and a tenth of the time of importing what comes after it.
    """
    if not gc.isenabled():
        yield
        return
    gc.disable()
    try:
        yield
    finally:
        if not gc.get_freeze_count():  # objects that the application has frozen stay frozen
            gc.freeze()  # with unfreeze: moves everything to the oldest generation, which is rarely collected
            gc.unfreeze()
        gc.enable()
