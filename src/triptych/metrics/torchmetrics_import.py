"""torchmetrics, also next to a torchvision that does not fit torch.

torchmetrics imports an installed torchvision for metrics that are not used here, and a torchvision built for another
torch fails at import, with it. Then placeholders stand in for torchvision while torchmetrics is imported, and no
longer. Metrics here import torchmetrics' names from this module.
"""

import importlib
import importlib.util
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

from triptych.errors import ConfigError

UNFIT = "torchvision"


class _Placeholders(MetaPathFinder, Loader):
    """Finds every module of torchvision, each of which has every name."""

    def find_spec(self, fullname: str, path: object = None, target: object = None) -> ModuleSpec | None:
        if fullname.partition(".")[0] != UNFIT:
            return None
        return importlib.util.spec_from_loader(fullname, self, is_package=True)

    def exec_module(self, module: ModuleType) -> None:
        def placeholder(name: str) -> type:
            if name.startswith("__"):
                raise AttributeError(name)
            return type(name, (), {"__module__": module.__name__})

        module.__dict__["__getattr__"] = placeholder  # PEP 562


def _forget(package: str) -> dict[str, Any]:
    """Remove a package and its modules from those that are imported, and return them."""
    names = [name for name in sys.modules if name.partition(".")[0] == package]
    return {name: sys.modules.pop(name) for name in names}


@contextmanager
def _placeholders() -> Iterator[None]:
    finder, before = _Placeholders(), _forget(UNFIT)
    sys.meta_path.insert(0, finder)
    try:
        yield
    finally:
        sys.meta_path.remove(finder)
        _forget(UNFIT)
        sys.modules.update(before)


def _import_torchmetrics() -> None:
    try:
        importlib.import_module("torchmetrics")
        return
    except Exception as problem:  # RuntimeError, OSError, ImportError: what a build for another torch raises
        first = problem
    _forget("torchmetrics")
    try:
        with _placeholders():
            importlib.import_module("torchmetrics")
    except Exception:
        line = (str(first).strip() or type(first).__name__).splitlines()[0]
        raise ConfigError(
            f"torchmetrics cannot be imported: {line}; install versions that fit each other"
        ) from first


_import_torchmetrics()

from torchmetrics import Metric as Metric  # noqa: E402
from torchmetrics.functional.image import (  # noqa: E402
    structural_similarity_index_measure as structural_similarity_index_measure,
)
from torchmetrics.utilities.data import dim_zero_cat as dim_zero_cat  # noqa: E402
