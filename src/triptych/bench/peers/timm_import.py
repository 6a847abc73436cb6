"""timm without torchvision.

timm imports torchvision throughout, for pictures, data sets and one norm that it compares classes with, and often no
build of torchvision fits the torch that is there. Its networks' forward passes touch nothing of it. Where torchvision
cannot be imported, placeholders stand in for it while timm is imported, and no longer: transformers, diffusers and
others ask what is installed, and must not find a torchvision that can do nothing.

Nothing of ours is imported, as in `readers`.
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
    """timm, and why torchvision could not be imported and placeholders stood in for it; None if they did not.

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
        except Exception as problem:  # whatever comes of a class that is more than a name to timm
            _forget("timm")
            raise ImportError(f"{why}, and timm needs more of it than names: {_line(problem)}") from problem


class _Placeholder(type):
    """The class of classes that can be named, compared, asked for and derived from, but not used."""

    def __getattr__(cls, name: str) -> "_Placeholder":
        placeholder = _placeholder(_name(cls), name)
        setattr(cls, name, placeholder)  # the same each time: members of an enumeration are keys
        return placeholder

    def __call__(cls, *_: object, **__: object) -> NoReturn:
        raise RuntimeError(
            f"{_name(cls)} is used, but torchvision cannot be imported: a placeholder stands for it"
        )


def _placeholder(owner: str, name: str) -> _Placeholder:
    # Python's own questions, such as for `__iter__`, and versions that nobody can know.
    if name.startswith("_"):
        raise AttributeError(f"the placeholder of {owner} has no {name}")
    return _Placeholder(name, (), {"__module__": owner})


def _name(cls: type) -> str:
    return f"{cls.__module__}.{cls.__name__}"


class _Finder(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Finds every module of torchvision; each has every name."""

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
    """Placeholders for torchvision's modules within; those `before` afterwards."""
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
    """An error in one line, without the full stop that some end with."""
    lines = str(problem).strip().splitlines()
    return lines[0].rstrip(".") if lines else type(problem).__name__
