"""Processes that read and decode ahead of a network: how they begin, are asked for work, and end."""

import atexit
import itertools
import os
import signal
import weakref
from collections.abc import Callable, Iterable, Iterator
from typing import Any, TypeVar

import torch
from torch.utils.data import DataLoader, Dataset

from triptych.kernels.loader_workers import has_workers, shut_down

A = TypeVar("A")
B = TypeVar("B")

MAX_DEFAULT_WORKERS = 8  # processes by default: beyond, small pictures come faster than anything looks at them


def available_cores() -> int:
    """Those that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def default_workers() -> int:
    """How many processes read ahead where nobody says: one a core but the one that the network is fed from."""
    return min(available_cores() - 1, MAX_DEFAULT_WORKERS)


def prefetch_map(function: Callable[[A], B], items: Iterable[A], size: int, workers: int) -> Iterator[B]:
    """`map` in order, with what comes next made meanwhile by processes: two requests of each, and no more.

    Args:
        function: runs in the processes; picklable, as are items and results, where those are not forked.
        items: of any number; taken `size` at a time, as they are needed.
        size: items of a request. With fewer items than one no process is started.
        workers: processes, at most one a core; 0 calls the function in between.
    """
    items, workers = iter(items), min(workers, available_cores())
    first = list(itertools.islice(items, size))
    if workers == 0 or len(first) < size:
        yield from map(function, itertools.chain(first, items))
        return
    requests = itertools.chain([first], iter(lambda: list(itertools.islice(items, size)), []))
    fetched: Any = iter(DataLoader(_Calls(function), batch_sampler=_Once(requests), **loader_options(workers)))  # type: ignore[arg-type]
    shut_down_at_exit(fetched)
    try:
        for made in fetched:
            yield from made
    finally:
        shut_down(fetched)


def loader_options(workers: int, requests: int = 2) -> dict[str, Any]:
    """What torch's loader is told, so that its processes send what they made as it is, leave the global random stream
    alone and are ended by us."""
    return {
        "num_workers": workers,
        "prefetch_factor": requests if workers else None,
        "collate_fn": _as_it_is,
        "worker_init_fn": _outlive_sigterm,
        "generator": torch.Generator(),  # else the workers' seed is drawn from the global stream
    }


def shut_down_at_exit(iterator: Any) -> None:
    """At the interpreter's end, of a loader that is still there: it would send SIGTERM and wait for ever."""
    if has_workers(iterator):
        atexit.register(_end, weakref.ref(iterator))


class _Calls(Dataset):
    """Asked for items, gives the function of each. Runs in the processes."""

    def __init__(self, function: Callable[[Any], Any]):
        self.function = function

    def __getitems__(self, items: list[Any]) -> list[Any]:
        return list(map(self.function, items))


class _Once:
    """Requests that are there once, made as they are asked for."""

    def __init__(self, requests: Iterator[list[Any]]):
        self.requests = requests

    def __iter__(self) -> Iterator[list[Any]]:
        return self.requests


def _as_it_is(made: Any) -> Any:
    return made


def _outlive_sigterm(_worker: int) -> None:
    """A SIGTERM to the whole group (slurm, systemd, timeout) is the main process's to answer: it saves, then ends the
    workers. Torch's own handler would end them at once and break the step."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)


def _end(iterator: "weakref.ref[Any]") -> None:
    found = iterator()
    if found is not None:
        shut_down(found)
