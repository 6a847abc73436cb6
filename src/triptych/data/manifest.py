"""Which examples a run learns from, by name: so that a set that changed can be told by what changed."""

import gzip
import json
import zlib
from pathlib import Path
from typing import Any

from triptych.atomic_write import write_atomically

MOST = 1_000_000  # examples that are written one by one; of more there is their number
NAMED = 3

Manifest = dict[str, Any]


def manifest(dataset: Any) -> Manifest:
    """{"count": n, "examples": {name: a sum of its label, caption and size in bytes}}; none where a source has none.

    Args:
        dataset: a source, or what a loader asks for batches. Of a part of a source it is the whole source's.
    """
    source = _whole(dataset)
    told = getattr(source, "contents", None)
    examples = None
    if told is not None and len(source) <= MOST:
        examples = {name: zlib.crc32(repr(cells).encode()) for name, cells in told()}
    return {"count": len(source), "examples": examples}


def write(path: Path, found: Manifest) -> None:
    """Keep it, compressed."""
    data = gzip.compress(json.dumps(found).encode(), mtime=0)
    write_atomically(path, lambda file: file.write(data))


def changes(path: Path, now: Manifest) -> str:
    """In words, how `now` differs from what was written there: "2 are gone (a, b), 1 is new (c)"."""
    try:
        was = json.loads(gzip.decompress(path.read_bytes()))
        before, after = was["examples"], now["examples"]
    except (OSError, ValueError, KeyError, EOFError, zlib.error):
        return ""
    if before is None or after is None:
        return f"{was['count']:,} examples then, {now['count']:,} now" if was["count"] != now["count"] else ""
    found = {
        "gone": [name for name in before if name not in after],
        "new": [name for name in after if name not in before],
        "not as before": [name for name in after if name in before and after[name] != before[name]],
    }
    parts = [
        f"{len(names):,} {'is' if len(names) == 1 else 'are'} {how} "
        f"({', '.join(sorted(names)[:NAMED])}{' ...' if len(names) > NAMED else ''})"
        for how, names in found.items()
        if names
    ]
    return ", ".join(parts)


def _whole(dataset: Any) -> Any:
    """What lies under loaders' datasets, buckets and subsets."""
    while True:
        if isinstance(getattr(dataset, "parts", None), dict):
            dataset = next(iter(dataset.parts.values()))
        elif hasattr(dataset, "source"):
            dataset = dataset.source
        else:
            return dataset
