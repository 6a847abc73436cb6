"""Every published format that is read and written; the first that recognises a file reads it."""

import importlib
from collections.abc import Iterator

from triptych.weights.mapping.format import Format

# Those with a backbone inside come first: the backbone's own names are among theirs.
PACKAGES = ("segmenter", "swin", "vit", "diffusion")


def all_formats() -> Iterator[Format]:
    """All formats; a package's tables are imported when it is its turn."""
    for package in PACKAGES:
        yield from importlib.import_module(f"triptych.weights.{package}").FORMATS
