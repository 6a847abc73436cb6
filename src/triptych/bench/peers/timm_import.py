"""Import timm without torchvision.

timm imports torchvision in many places, for images, data sets and a norm that it checks types against, and often no
build of torchvision fits the installed torch. The forward passes of its networks do not use it. If torchvision cannot
be imported, placeholders replace it while timm is imported, and only then: transformers, diffusers and others check
what is installed, and must not find a torchvision that does nothing.

As in `readers`, nothing else of our package is imported.
"""

import contextlib
import functools
import importlib
import importlib.abc
import importlib.util
import sys
from collections.abc import Iterator
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any, NoReturn


@functools.cache
def timm() -> tuple[Any, str | None]:
    """Import timm; return it, and why torchvision could not be imported. The latter is None if no placeholders were
    needed.

    Raises:
        ImportError: timm is not installed, or cannot be imported with placeholders either.
    """
    if "timm" in sys.modules or importlib.util.find_spec("timm") is None:
        return importlib.import_module("timm"), None
    before = _modules("torchvision")
    try:
        importlib.import_module("torchvision")
    except Exception as problem:  # a build for another torch fails in many ways: OSError, RuntimeError, ...
        why = _line(problem)
    else:
        return importlib.import_module("timm"), None
    with _torchvision_stood_in(before):
        try:
            return importlib.import_module("timm"), why
        except Exception as problem:  # timm uses a placeholder as more than a name
            _forget("timm")
            raise ImportError(f"{why}, and timm needs more of it than names: {_line(problem)}") from problem


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
        if fullname.partition(".")[0] != "torchvision":
            return None
        return importlib.util.spec_from_loader(fullname, self, is_package=True)

    def exec_module(self, module: ModuleType) -> None:
        def named(name: str) -> _Placeholder:
            placeholder = _placeholder(module.__name__, name)
            setattr(module, name, placeholder)
            return placeholder

        module.__dict__["__getattr__"] = named  # PEP 562


@contextlib.contextmanager
def _torchvision_stood_in(before: dict[str, Any]) -> Iterator[None]:
    """Replace torchvision's modules with placeholders within the block, and restore `before` afterwards."""
    finder = _Finder()
    _forget("torchvision")
    sys.meta_path.insert(0, finder)
    try:
        yield
    finally:
        sys.meta_path.remove(finder)
        _forget("torchvision")
        sys.modules.update(before)


def _modules(package: str) -> dict[str, Any]:
    return {name: module for name, module in sys.modules.items() if name.partition(".")[0] == package}


def _forget(package: str) -> None:
    for name in _modules(package):
        del sys.modules[name]


def _line(problem: Exception) -> str:
    """Return the first line of an error message, without a period at its end."""
    lines = str(problem).strip().splitlines()
    return lines[0].rstrip(".") if lines else type(problem).__name__
