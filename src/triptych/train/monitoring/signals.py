"""What a run does on SIGINT (ctrl-C) and SIGTERM (slurm, systemd, docker, timeout): it saves, and ends."""

import contextlib
import signal
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

T = TypeVar("T")


class Interrupts:
    """Whether one came. A run asks between two steps; what takes longer than a step is `breakable`."""

    def __init__(self) -> None:
        self.received = self.aborted = False
        self._at_once = False

    def __call__(self) -> bool:
        return self.received

    def handle(self, number: int, _frame: Any = None) -> None:
        """A signal: the second SIGINT interrupts at once, as it does in every program."""
        if self.received and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.received = True
        if self._at_once:
            self._at_once = False  # a second one must not break what the first one's way out does
            raise _BrokenOff

    def abortable(self, work: Callable[[], T]) -> T | None:
        """What `work` gives; a signal breaks it off, or keeps it from beginning, and `broke` says so."""
        try:
            self._at_once = True
            if self.received:
                raise _BrokenOff
            result = work()
            self._at_once = False
            return result
        except _BrokenOff:
            self._at_once, self.aborted = False, True
            return None
        except BaseException:
            self._at_once = False
            raise


class _BrokenOff(BaseException):
    pass


@contextlib.contextmanager
def interrupts() -> Iterator[Interrupts]:
    """Listen to both signals inside the block, in the main thread; elsewhere they are the caller's business."""
    found = Interrupts()
    try:
        before = {number: signal.signal(number, found.handle) for number in (signal.SIGINT, signal.SIGTERM)}
    except ValueError:
        before = {}
    try:
        yield found
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
