"""What a run says: JSON lines always, a progress line on a terminal, plain lines elsewhere, tensorboard if asked."""

import json
import os
import sys
import time
from pathlib import Path
from typing import Any

from triptych.atomic_write import write_text_atomically
from triptych.errors import UserError

Row = dict[str, Any]


class RunLog:
    """Rows of numbers into `folder`/log.jsonl and onto the screen.

    Args:
        folder: the run's folder.
        total: steps of the whole run.
        resumed: rows after this step belong to work that was lost and is done again; they are taken out.
        every: seconds between lines on the screen.
        evaluated: the same for rows of evaluations, where the run was cut off in one.
    """

    def __init__(
        self,
        folder: Path,
        total: int,
        resumed: int,
        every: float,
        tensorboard: bool = False,
        evaluated: int | None = None,
    ):
        self.path, self.total, self.every = folder / "log.jsonl", total, every
        self.board = _tensorboard(folder, resumed) if tensorboard else None
        self._drop_after(resumed, resumed if evaluated is None else evaluated)
        self.file = open(self.path, "a", encoding="utf-8")  # noqa: SIM115 - closed by close()
        self.progress, self.bar = _progress(total, resumed)
        self.said = time.monotonic()

    def _drop_after(self, step: int, evaluated: int) -> None:
        if not self.path.exists():
            return
        kept = []
        for line in self.path.read_text(encoding="utf-8").splitlines():
            try:
                row = json.loads(line)
                if row["step"] <= (evaluated if "eval" in row else step):
                    kept.append(line + "\n")
            except (ValueError, KeyError):
                continue  # the half line of a killed run
        write_text_atomically(self.path, "".join(kept))

    def write(self, rows: list[Row]) -> None:
        """Append rows; each has "step"."""
        try:
            self.file.writelines(json.dumps(row) + "\n" for row in rows)
            self.file.flush()
        except OSError as problem:
            raise UserError(
                f"cannot write {self.path}: {problem.strerror}; free space and go on"
            ) from problem
        if self.board is not None:
            for row in rows:
                for name, value in _scalars(row):
                    self.board.add_scalar(name, value, row["step"])

    def sync(self) -> None:
        """What was written outlasts the machine: before a checkpoint that counts on it."""
        os.fsync(self.file.fileno())

    def due(self) -> bool:
        """Whether the screen waits for a line."""
        return time.monotonic() - self.said >= self.every

    def show(self, step: int, words: str) -> None:
        """Move the bar, or print a line: `words` after the share done and the time left."""
        self.said = time.monotonic()
        if self.progress is not None:
            self.progress.update(self.bar, completed=step, words=words)
        else:
            print(f"step {step}/{self.total}  {words}", file=sys.stderr, flush=True)

    def message(self, words: str) -> None:
        """A line that stays."""
        if self.progress is not None:
            self.progress.console.print(words, highlight=False, markup=False, soft_wrap=True)
        else:
            print(words, file=sys.stderr, flush=True)

    def __enter__(self) -> "RunLog":
        return self

    def __exit__(self, *_problem: object) -> None:
        self.file.close()
        if self.progress is not None:
            self.progress.stop()
        if self.board is not None:
            self.board.close()


class NullLog:
    """Of a process that leaves the talking to the first."""

    def write(self, rows: list[Row]) -> None: ...
    def sync(self) -> None: ...
    def show(self, step: int, words: str) -> None: ...
    def say(self, words: str) -> None: ...

    def due(self) -> bool:
        return False

    def __enter__(self) -> "NullLog":
        return self

    def __exit__(self, *_problem: object) -> None: ...


def _progress(total: int, done: int) -> tuple[Any, Any]:
    if not sys.stderr.isatty():
        return None, None
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

    columns = (
        BarColumn(bar_width=24),
        TaskProgressColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[words]}"),
    )
    progress = Progress(*columns, console=Console(stderr=True))
    progress.start()
    return progress, progress.add_task("train", total=total, completed=done, words="")


def _tensorboard(folder: Path, resumed: int) -> Any:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as problem:
        raise UserError("tensorboard is not installed; pip install 'triptych[track]'") from problem
    return SummaryWriter(str(folder / "tensorboard"), purge_step=resumed + 1)


def _scalars(row: Row, prefix: str = "") -> list[tuple[str, float]]:
    found = []
    for name, value in row.items():
        if isinstance(value, dict):
            found += _scalars(value, f"{prefix}{name}/")
        elif isinstance(value, int | float) and name != "step":
            found.append((prefix + name, float(value)))
    return found
