"""Worker processes that read and decode ahead: their number, their start, their requests and their end."""

import atexit
import contextlib
import itertools
import multiprocessing.queues
import os
import signal
import threading
import weakref
from collections.abc import Callable, Collection, Iterable, Iterator
from types import CodeType, FrameType
from typing import Any, TypeVar

import torch
from torch.utils.data import DataLoader, Dataset

from triptych.kernels.loader_workers import has_workers, shut_down

A = TypeVar("A")
B = TypeVar("B")

MAX_DEFAULT_WORKERS = 8  # beyond that, small images arrive faster than a network consumes them


def available_cores() -> int:
    """Number of CPU cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def default_workers() -> int:
    """Default number of worker processes: one per core, except the core that runs the network."""
    return min(available_cores() - 1, MAX_DEFAULT_WORKERS)


def prefetch_map(function: Callable[[A], B], items: Iterable[A], size: int, workers: int) -> Iterator[B]:
    """As `map`, but computed ahead by worker processes, in order, with at most two requests per worker.

    Args:
        function: called in the workers; function, items and results must be picklable unless workers are forked.
        items: any number of them; `size` at a time are consumed, on demand.
        size: number of items in a request. If there are fewer items, no worker is started.
        workers: number of processes, at most one per core; 0 calls the function in this process.
    """
    items, workers = iter(items), min(workers, available_cores())
    first = list(itertools.islice(items, size))
    if workers == 0 or len(first) < size:
        yield from map(function, itertools.chain(first, items))
        return
    requests = itertools.chain([first], iter(lambda: list(itertools.islice(items, size)), []))
    loader = DataLoader(_MappedDataset(function), batch_sampler=_OneShot(requests), **loader_options(workers))  # type: ignore[arg-type]
    results: Any = None
    try:
        with deferred_interrupt():
            results = iter(loader)
        shut_down_at_exit(results)
        while True:
            with deferred_interrupt(HOLDS_LOCK):
                batch = next(results, None)
            if batch is None:
                return
            yield from batch
    finally:
        with deferred_interrupt(HOLDS_LOCK):
            shut_down(results)


def loader_options(workers: int, requests: int = 2) -> dict[str, Any]:
    """Arguments of torch's `DataLoader` for workers that return batches unchanged, leave the global RNG alone, and
    leave signals to the main process.

    Args:
        workers: number of processes.
        requests: number of requests that each works on ahead.
    """
    return {
        "num_workers": workers,
        "prefetch_factor": requests if workers else None,
        "collate_fn": _identity,
        "worker_init_fn": _ignore_signals,
        "generator": torch.Generator(),  # otherwise the seed of the workers is drawn from the global RNG
    }


# Functions that hold a lock of a queue. Interrupted, they may keep it, and the end of the workers would wait forever.
HOLDS_LOCK = (multiprocessing.queues.Queue.put.__code__, multiprocessing.queues.Queue.close.__code__)


@contextlib.contextmanager
def deferred_interrupt(within: Collection[CodeType] = ()) -> Iterator[None]:
    """Handle a SIGINT (Ctrl-C) that arrives within the block at its end. Start workers in it.

    A `KeyboardInterrupt` that is raised in a callback of `os.fork` (`logging` and `threading` register some) is printed
    and discarded, so that the program would carry on. And a worker that has not disabled SIGINT yet would die of it.

    Args:
        within: defer the signal only while one of these functions runs; otherwise handle it at once.
    """
    if threading.current_thread() is not threading.main_thread():  # only the main thread handles signals
        yield
        return
    arrived: list[tuple[int, Any]] = []
    previous = signal.getsignal(signal.SIGINT)
    if not callable(previous):  # ignored, or the operating system's
        yield
        return

    def handle(number: int, frame: FrameType | None) -> None:
        if within and not any(caller.f_code in within for caller in _stack(frame)):
            previous(number, frame)
        else:
            arrived.append((number, frame))

    signal.signal(signal.SIGINT, handle)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, previous)
    for number, frame in arrived[:1]:
        previous(number, frame)


def _stack(frame: FrameType | None) -> Iterator[FrameType]:
    """A frame and its callers."""
    while frame is not None:
        yield frame
        frame = frame.f_back


def shut_down_at_exit(iterator: Any) -> None:
    """End the workers of a loader's iterator when the interpreter exits, if it still exists then: multiprocessing would
    send SIGTERM and wait forever."""
    if has_workers(iterator):
        atexit.register(_shut_down_if_alive, weakref.ref(iterator))


class _MappedDataset(Dataset):
    """Applies a function to the items of a request. Runs in the workers."""

    def __init__(self, function: Callable[[Any], Any]):
        self.function = function

    def __getitems__(self, items: list[Any]) -> list[Any]:
        return list(map(self.function, items))


class _OneShot:
    """Requests of a single pass, created as they are consumed."""

    def __init__(self, requests: Iterator[list[Any]]):
        self.requests = requests

    def __iter__(self) -> Iterator[list[Any]]:
        return self.requests


def _identity(batch: Any) -> Any:
    return batch


def _ignore_signals(_worker: int) -> None:
    """Leave SIGINT and SIGTERM to the main process, which ends the workers. Both often reach the whole process group (a
    terminal's Ctrl-C; Slurm, systemd, `timeout`), and a worker that died of them would break the current step."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)


def _shut_down_if_alive(reference: "weakref.ref[Any]") -> None:
    iterator = reference()
    if iterator is not None:
        shut_down(iterator)
