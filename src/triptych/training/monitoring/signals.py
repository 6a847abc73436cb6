"""SIGINT (ctrl-C) and SIGTERM (slurm, systemd, docker, timeout): the run saves a checkpoint and ends."""

import contextlib
import signal
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

T = TypeVar("T")


class Interrupts:
    """Whether a signal was received. A run asks between two steps; work that is longer than a step is `abortable`."""

    def __init__(self) -> None:
        self.received = self.aborted = False
        self._abort_now = False

    def __call__(self) -> bool:
        return self.received

    def handle(self, number: int, _frame: Any = None) -> None:
        """Handle a signal. The second SIGINT interrupts at once, as in every program."""
        if self.received and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.received = True
        if self._abort_now:
            self._abort_now = False  # a second signal must not abort what the first one's way out does
            raise _Abort

    def abortable(self, work: Callable[[], T]) -> T | None:
        """Return the result of `work`. A signal aborts it, or keeps it from starting: then return None and set
        `aborted`."""
        try:
            self._abort_now = True
            if self.received:
                raise _Abort
            result = work()
            self._abort_now = False
            return result
        except _Abort:
            self._abort_now, self.aborted = False, True
            return None
        except BaseException:
            self._abort_now = False
            raise


class _Abort(BaseException):
    pass


@contextlib.contextmanager
def interrupts() -> Iterator[Interrupts]:
    """Handle both signals inside of the block. Only the main thread can; in others the caller handles them."""
    state = Interrupts()
    try:
        before = {number: signal.signal(number, state.handle) for number in (signal.SIGINT, signal.SIGTERM)}
    except ValueError:
        before = {}
    try:
        yield state
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
