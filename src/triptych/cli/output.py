"""What verbs print: results on stdout, JSON where a program reads it, a progress bar on stderr where one
waits."""

import json
import math
import sys
from collections.abc import Iterable, Iterator, Mapping
from typing import Annotated, Any, TypeVar

import tyro

T = TypeVar("T")

SHIPPED_CLASSIFIER = "vit-emoji"  # of classify and explain, without --model
SHIPPED_SEGMENTER = "swin-scenes"  # of segment
SHIPPED_GENERATOR = "ldm-emoji"  # of generate

Workers = Annotated[
    int | None,
    tyro.conf.arg(metavar="INT", help_behavior_hint="(default: number of cores minus one, at most 8)"),
]


def print_json(value: Any, indent: int | None = None) -> None:
    """Strict JSON on stdout, in one piece, so that an interrupt leaves whole lines."""
    sys.stdout.write(json_text(value, indent) + "\n")
    sys.stdout.flush()


def json_text(value: Any, indent: int | None = None) -> str:
    """Strict JSON: what is not a number becomes null, arrays become lists."""
    try:
        return json.dumps(value, ensure_ascii=False, indent=indent, allow_nan=False)
    except (TypeError, ValueError):
        return json.dumps(plain(value), ensure_ascii=False, indent=indent)


def plain(value: Any) -> Any:
    """`value` in JSON's own types."""
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    if hasattr(value, "tolist"):  # numpy and torch
        return plain(value.tolist())
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value if isinstance(value, str | int | float | bool | None) else str(value)


def with_progress(items: Iterable[T], total: int | None, what: str) -> Iterator[T]:
    """The same items with a progress bar on stderr, if that is a terminal and stdout is not one already
    scrolling."""
    if not sys.stderr.isatty():
        yield from items
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        yield from bar.track(items, total=total, description=what)


def count(number: float) -> str:
    """86567656 -> "86.6 M": three digits and a decimal prefix."""
    for limit, prefix in ((1e12, " T"), (1e9, " G"), (1e6, " M"), (1e3, " k")):
        if number >= limit:
            return f"{number / limit:.{max(0, 2 - int(math.log10(number / limit)))}f}{prefix}"
    return f"{number:.0f}"


def percent(share: float) -> str:
    """0.341 -> "34.1%"; what would look like nothing, and is not, is "<0.1%"."""
    return "<0.1%" if 0 < share < 0.0005 else f"{share:.1%}"


def shortened(name: str, most: int = 32) -> str:
    """A name to read: of ImageNet's lists of synonyms the first, and no more than `most` letters."""
    if len(name) > most:
        name = name.split(",")[0]
    return name if len(name) <= most else name[: most - 1] + "…"


def table(title: str, columns: Mapping[str, str], rows: Iterable[Iterable[str]]) -> None:
    """A table on stdout. `columns` maps each heading to "left" or "right"."""
    from rich.box import SIMPLE_HEAD
    from rich.console import Console
    from rich.table import Table

    grid = Table(
        title=title or None, box=SIMPLE_HEAD, title_justify="left", title_style="bold", header_style="dim"
    )
    for heading, side in columns.items():
        grid.add_column(heading, justify="right" if side == "right" else "left", overflow="fold")
    for row in rows:
        grid.add_row(*row)
    # In a file or pipe a table is as wide as it needs; no terminal breaks its cells.
    Console(highlight=False, width=None if sys.stdout.isatty() else 1000).print(grid)


def facts(title: str, lines: Iterable[tuple[str, str]]) -> None:
    """Pairs of a short word and what is known of it, in two columns on stdout, under a title."""
    from rich.console import Console
    from rich.table import Table

    console, grid = Console(highlight=False), Table.grid(padding=(0, 2))
    grid.add_column(style="dim", justify="right", no_wrap=True)
    grid.add_column(overflow="fold")
    for word, known in lines:
        grid.add_row(word, known)
    console.print(title, style="bold", markup=False, soft_wrap=True)
    console.print(grid)
