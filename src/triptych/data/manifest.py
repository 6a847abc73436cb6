"""List of the examples that a run trains on, so that a later run can report how the data has changed, and an evaluation
which of its images were trained on."""

import gzip
import json
import zlib
from pathlib import Path
from typing import NotRequired, TypedDict

import numpy as np

from triptych.atomic_write import write_atomically
from triptych.data.source import Source, full_source

MAX_LISTED = 1_000_000  # examples; for larger sources only their number is stored
MAX_NAMED = 3  # examples named in a message


class Manifest(TypedDict):
    """The examples of a source."""

    count: int
    """Number of examples."""
    examples: dict[str, int] | None
    """CRC-32 of label, caption and size in bytes of each example, by name; None if the source cannot list them."""
    trained: NotRequired[list[int] | None]
    """`Source.image_digests` of the examples that were trained on, which may be a part of `examples`."""


def list_examples(source: Source) -> Manifest:
    """Return the manifest of a source, without `trained`; for a part of a source (`Subset`) that of the full source."""
    source = full_source(source)
    contents = source.contents() if len(source) <= MAX_LISTED else None
    examples = None
    if contents is not None:
        examples = {name: zlib.crc32(repr(cells).encode()) for name, cells in contents}
    return {"count": len(source), "examples": examples}


def write(path: Path, source: Source) -> None:
    """Write the manifest of a source that is trained on, as compressed JSON."""
    manifest = list_examples(source)
    manifest["trained"] = source.image_digests()
    data = gzip.compress(json.dumps(manifest).encode(), mtime=0)
    write_atomically(path, lambda file: file.write(data))


def are_trained_on(path: Path, source: Source) -> np.ndarray | None:
    """Return for each example of a source whether its image is among those that were trained on, under any name.

    Args:
        path: the file of a manifest.

    Returns:
        bool (n,); None if the file or the source has no digests of images.
    """
    try:
        trained = json.loads(gzip.decompress(path.read_bytes())).get("trained")
    except (OSError, ValueError, AttributeError, EOFError, zlib.error):
        return None
    digests = source.image_digests() if trained else None
    return None if digests is None else np.isin(np.array(digests, np.uint64), np.array(trained, np.uint64))


def describe_changes(path: Path, current: Manifest) -> str:
    """Describe how `current` differs from the manifest in a file: "2 are gone (a, b), 1 is new (c)".

    Returns:
        The description; "" if nothing changed or the file cannot be read.
    """
    try:
        previous = json.loads(gzip.decompress(path.read_bytes()))
        before, after = previous["examples"], current["examples"]
    except (OSError, ValueError, KeyError, EOFError, zlib.error):
        return ""
    if before is None or after is None:
        counts = previous["count"], current["count"]
        return f"{counts[0]:,} examples then, {counts[1]:,} now" if counts[0] != counts[1] else ""
    changes = {
        "gone": [name for name in before if name not in after],
        "new": [name for name in after if name not in before],
        "not as before": [name for name in after if name in before and after[name] != before[name]],
    }
    parts = [
        f"{len(names):,} {'is' if len(names) == 1 else 'are'} {change} "
        f"({', '.join(sorted(names)[:MAX_NAMED])}{' ...' if len(names) > MAX_NAMED else ''})"
        for change, names in changes.items()
        if names
    ]
    return ", ".join(parts)
