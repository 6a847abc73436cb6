"""All published formats that are read and written. The first whose keys match a file reads it."""

import importlib
from collections.abc import Iterator

from triptych.weights.mapping.format import Format

# Formats of networks that contain a backbone come first: their keys include the backbone's.
PACKAGES = ("segmenter", "swin", "vit", "diffusion")


def all_formats() -> Iterator[Format]:
    """Yield all formats. Each package of tables is imported when its turn comes."""
    for package in PACKAGES:
        yield from importlib.import_module(f"triptych.weights.{package}").FORMATS
