"""Import libraries that import torchvision, where torchvision cannot be imported.

timm and torchmetrics import torchvision for parts that are not used here, and a torchvision that was built for another
torch fails at import, and they with it. Placeholders stand for it while such a library is imported, and no longer:
transformers, diffusers and others check what is installed, and must not find a torchvision that does nothing.

This module imports nothing else of the package.
"""

import contextlib
import importlib
import importlib.abc
import importlib.util
import sys
from collections.abc import Iterator
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any, NoReturn

_TORCHVISION = "torchvision"


def import_without_torchvision(package: str) -> ModuleType:
    """Import a package while placeholders stand for torchvision.

    Raises:
        Exception: what the package raises, for example because it uses torchvision as more than a name. Nothing of the
            package stays imported.
    """
    _forget(package)
    with _placeholders():
        try:
            return importlib.import_module(package)
        except Exception:
            _forget(package)
            raise


def first_line(problem: Exception) -> str:
    """Return the first line of an error message, without a period at its end."""
    lines = str(problem).strip().splitlines()
    return lines[0].rstrip(".") if lines else type(problem).__name__


class _Placeholder(type):
    """Metaclass of classes that can be imported, compared and subclassed, but not used."""

    def __getattr__(cls, name: str) -> "_Placeholder":
        placeholder = _placeholder(_name(cls), name)
        setattr(cls, name, placeholder)  # the same each time: members of an enumeration are keys
        return placeholder

    def __call__(cls, *_: object, **__: object) -> NoReturn:
        raise RuntimeError(
            f"{_name(cls)} is used, but torchvision cannot be imported: a placeholder stands for it"
        )


def _placeholder(owner: str, name: str) -> _Placeholder:
    # Special methods that Python looks up, such as `__iter__`, and versions, which are unknown.
    if name.startswith("_"):
        raise AttributeError(f"the placeholder of {owner} has no {name}")
    return _Placeholder(name, (), {"__module__": owner})


def _name(cls: type) -> str:
    return f"{cls.__module__}.{cls.__name__}"


class _Finder(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Finds any module of torchvision, which has any attribute."""

    def find_spec(self, fullname: str, path: object = None, target: object = None) -> ModuleSpec | None:
        if fullname.partition(".")[0] != _TORCHVISION:
            return None
        return importlib.util.spec_from_loader(fullname, self, is_package=True)

    def exec_module(self, module: ModuleType) -> None:
        def named(name: str) -> _Placeholder:
            placeholder = _placeholder(module.__name__, name)
            setattr(module, name, placeholder)
            return placeholder

        module.__dict__["__getattr__"] = named  # PEP 562


@contextlib.contextmanager
def _placeholders() -> Iterator[None]:
    finder, before = _Finder(), _forget(_TORCHVISION)
    sys.meta_path.insert(0, finder)
    try:
        yield
    finally:
        sys.meta_path.remove(finder)
        _forget(_TORCHVISION)
        sys.modules.update(before if _TORCHVISION in before else {})  # not what a failed import left


def _forget(package: str) -> dict[str, Any]:
    """Remove a package and its modules from those that are imported, and return them."""
    names = [name for name in sys.modules if name.partition(".")[0] == package]
    return {name: sys.modules.pop(name) for name in names}
