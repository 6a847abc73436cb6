"""A bar on stderr while a person waits."""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

Waiting = bool | Callable[[int, int], object]
"""A bar where stderr is a terminal, or none; or a function of what is done and of all there is to do."""


@contextmanager
def ticking(progress: Waiting, total: int, what: str) -> Iterator[Callable[[], None]]:
    """A function to call after each of `total` steps."""
    done = 0

    def count() -> None:
        nonlocal done
        done += 1
        if callable(progress):
            progress(done, total)

    if progress is not True or total < 1 or not sys.stderr.isatty():
        yield count
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task(what, total=total)
        yield lambda: bar.advance(task)
