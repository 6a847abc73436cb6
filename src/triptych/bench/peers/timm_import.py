"""Import timm, also where torchvision cannot be imported, see `triptych.torchvision_placeholders`.

The forward passes of timm's networks do not use torchvision.
"""

import functools
import importlib
import importlib.util
import sys
from typing import Any

from triptych.torchvision_placeholders import first_line, import_without_torchvision


@functools.cache
def timm() -> tuple[Any, str | None]:
    """Import timm; return it, and why torchvision could not be imported. The latter is None if no placeholders were
    needed.

    Raises:
        ImportError: timm is not installed, or cannot be imported with placeholders either.
    """
    if "timm" in sys.modules or importlib.util.find_spec("timm") is None:
        return importlib.import_module("timm"), None
    try:
        importlib.import_module("torchvision")
    except Exception as problem:  # a build for another torch fails in many ways: OSError, RuntimeError, ...
        why = first_line(problem)
    else:
        return importlib.import_module("timm"), None
    try:
        return import_without_torchvision("timm"), why
    except Exception as problem:  # timm uses a placeholder as more than a name
        raise ImportError(f"{why}, and timm needs more of it than names: {first_line(problem)}") from problem
