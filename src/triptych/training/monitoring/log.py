"""The log of a run: JSON lines in a file, a progress bar on a terminal or plain lines elsewhere, and TensorBoard."""

import json
import os
import sys
import time
from pathlib import Path
from typing import Any

from triptych.atomic_write import write_text_atomically
from triptych.errors import ConfigError, StorageError

Row = dict[str, Any]


class RunLog:
    """Writes rows of values into `folder`/log.jsonl, and lines onto the screen.

    Args:
        folder: the run's folder.
        total: number of steps of the run.
        resumed: the step that the run was resumed from. Rows of later steps are removed: these steps are repeated.
        interval: seconds between lines on the screen.
        tensorboard: also write TensorBoard events.
        evaluated: the same as `resumed` for rows of evaluations, which differs if an evaluation was interrupted.
    """

    def __init__(
        self,
        folder: Path,
        total: int,
        resumed: int,
        interval: float,
        tensorboard: bool = False,
        evaluated: int | None = None,
    ):
        self.path, self.total, self.interval = folder / "log.jsonl", total, interval
        self.board = _summary_writer(folder, resumed) if tensorboard else None
        self._drop_after(resumed, resumed if evaluated is None else evaluated)
        self.file = open(self.path, "a", encoding="utf-8")  # noqa: SIM115 - closed by close()
        self.progress, self.bar = _progress_bar(total, resumed)
        self.last_shown = time.monotonic()

    def _drop_after(self, step: int, evaluated: int) -> None:
        if not self.path.exists():
            return
        lines = []
        for line in self.path.read_text(encoding="utf-8").splitlines():
            try:
                row = json.loads(line)
                if row["step"] <= (evaluated if "eval" in row else step):
                    lines.append(line + "\n")
            except (ValueError, KeyError):
                continue  # the incomplete line of a killed run
        write_text_atomically(self.path, "".join(lines))

    def write(self, rows: list[Row]) -> None:
        """Append rows; each has a "step".

        Raises:
            StorageError: the file cannot be written.
        """
        try:
            self.file.writelines(json.dumps(row) + "\n" for row in rows)
            self.file.flush()
        except OSError as error:
            raise StorageError(
                f"cannot write {self.path}: {error.strerror}; free space and run the same command to resume"
            ) from error
        if self.board is not None:
            for row in rows:
                for name, value in _scalars(row):
                    self.board.add_scalar(name, value, row["step"])

    def sync(self) -> None:
        """Write the file through to the disk; called before a checkpoint that relies on it."""
        os.fsync(self.file.fileno())

    def due(self) -> bool:
        """Return whether it is time for a line on the screen."""
        return time.monotonic() - self.last_shown >= self.interval

    def show(self, step: int, text: str) -> None:
        """Move the progress bar to a step with a text beside it, or print both as a line."""
        self.last_shown = time.monotonic()
        if self.progress is not None:
            self.progress.update(self.bar, completed=step, text=text)
        else:
            print(f"step {step}/{self.total}  {text}", file=sys.stderr, flush=True)

    def message(self, text: str) -> None:
        """Print a line that stays on the screen."""
        if self.progress is not None:
            self.progress.console.print(text, highlight=False, markup=False, soft_wrap=True)
        else:
            print(text, file=sys.stderr, flush=True)

    def __enter__(self) -> "RunLog":
        return self

    def __exit__(self, *_error: object) -> None:
        self.file.close()
        if self.progress is not None:
            self.progress.stop()
        if self.board is not None:
            self.board.close()


class NullLog:
    """The log of all processes but the main one: it writes nothing."""

    def write(self, rows: list[Row]) -> None: ...
    def sync(self) -> None: ...
    def show(self, step: int, text: str) -> None: ...
    def message(self, text: str) -> None: ...

    def due(self) -> bool:
        return False

    def __enter__(self) -> "NullLog":
        return self

    def __exit__(self, *_error: object) -> None: ...


def _progress_bar(total: int, done: int) -> tuple[Any, Any]:
    if not sys.stderr.isatty():
        return None, None
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

    columns = (
        BarColumn(bar_width=24),
        TaskProgressColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[text]}"),
    )
    progress = Progress(*columns, console=Console(stderr=True))
    progress.start()
    return progress, progress.add_task("train", total=total, completed=done, text="")


def _summary_writer(folder: Path, resumed: int) -> Any:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise ConfigError("tensorboard is not installed; pip install 'triptych[track]'") from error
    return SummaryWriter(str(folder / "tensorboard"), purge_step=resumed + 1)


def _scalars(row: Row, prefix: str = "") -> list[tuple[str, float]]:
    scalars = []
    for name, value in row.items():
        if isinstance(value, dict):
            scalars += _scalars(value, f"{prefix}{name}/")
        elif isinstance(value, int | float) and name != "step":
            scalars.append((prefix + name, float(value)))
    return scalars
