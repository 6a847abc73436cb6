"""A progress bar on stderr."""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

ProgressOption = bool | Callable[[int, int], object]
"""Whether to show a bar if stderr is a terminal; or a function that is called with the steps done and all steps."""


@contextmanager
def progress_bar(progress: ProgressOption, total: int, what: str) -> Iterator[Callable[[], None]]:
    """Yield a function to call after each of `total` steps."""
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
