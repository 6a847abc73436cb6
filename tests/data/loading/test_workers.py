"""Worker processes: `prefetch_map` keeps the order, reads ahead little, ends its processes, and loses no Ctrl-C."""

import collections
import itertools
import multiprocessing
import os
import signal
import time

import pytest
import torch.utils.data

from triptych.data.loading.workers import HOLDS_LOCK, deferred_interrupt, prefetch_map


@pytest.fixture(autouse=True)
def sigint_raises():
    """Enable SIGINT, which a shell disables in background jobs."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def squared(number):
    return number * number, os.getpid()


def fragile(number):
    if number == 5:
        raise KeyError("five")
    return number


@pytest.mark.parametrize(("count", "size"), [(0, 4), (3, 4), (4, 4), (23, 4), (6, 1)])
@pytest.mark.parametrize("workers", [0, 1, 2])
def test_it_is_map_in_order(count, size, workers):
    results = list(prefetch_map(squared, iter(range(count)), size, workers))
    assert [value for value, _ in results] == [n * n for n in range(count)]
    elsewhere = {process for _, process in results} - {os.getpid()}
    assert bool(elsewhere) == (workers > 0 and count >= size)  # for a few items no process is started
    assert not multiprocessing.active_children()


def test_it_requests_at_most_two_batches_per_worker():
    items = itertools.count()
    results = prefetch_map(squared, items, 3, 1)
    assert next(results)[0] == 0
    assert next(items) <= 3 * (1 + 2)
    assert len(multiprocessing.active_children()) == 1
    results.close()
    assert not multiprocessing.active_children()


@pytest.mark.parametrize("workers", [0, 1])
def test_exceptions_are_raised_and_the_processes_end(workers):
    results = prefetch_map(fragile, range(9), 2, workers)
    with pytest.raises(KeyError, match="five"):
        list(results)
    assert not multiprocessing.active_children()

    def broken():
        yield from range(5)
        raise OSError("no more")

    with pytest.raises(OSError, match="no more"):
        list(prefetch_map(squared, broken(), 2, workers))
    assert not multiprocessing.active_children()


def stuck(number):
    if number == 8:
        time.sleep(1000)
    return number


@pytest.fixture(scope="module")
def interrupted_forks():
    """While its first item is true, a SIGINT arrives in each `os.fork`, in a callback whose exceptions are lost."""
    on = [False]
    os.register_at_fork(after_in_parent=lambda: os.kill(os.getpid(), signal.SIGINT) if on[0] else None)
    yield on
    on[0] = False


def test_an_interrupt_while_workers_start_is_not_lost(interrupted_forks):
    results = prefetch_map(fragile, range(4), 2, 1)
    interrupted_forks[0] = True
    try:
        with pytest.raises(KeyboardInterrupt):
            next(results)
    finally:
        interrupted_forks[0] = False
    for worker in multiprocessing.active_children():
        worker.join(30)
    assert not multiprocessing.active_children()


def test_an_interrupt_is_handled_at_the_end_of_the_block():
    steps = []

    def interrupted():
        with deferred_interrupt():
            os.kill(os.getpid(), signal.SIGINT)
            steps.append("the rest")

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert steps == ["the rest"]
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


class InterruptedBuffer(collections.deque):
    """Items of a queue. A SIGINT arrives when the first is appended, which the queue does under its lock."""

    count = 0

    def append(self, item):
        self.count += 1
        if self.count == 1:
            os.kill(os.getpid(), signal.SIGINT)
        super().append(item)


def test_an_interrupt_leaves_no_lock_of_a_queue_held():
    queue = multiprocessing.Queue()
    queue._buffer = InterruptedBuffer()
    steps = []

    def interrupted():
        with deferred_interrupt(HOLDS_LOCK):
            queue.put("item")
            steps.append("the rest")

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert steps == ["the rest"]
    assert queue.get(timeout=60) == "item"
    queue.close()
    queue.join_thread()


def test_elsewhere_an_interrupt_is_handled_at_once():
    steps = []

    def interrupted():
        with deferred_interrupt(HOLDS_LOCK):
            os.kill(os.getpid(), signal.SIGINT)
            steps.append("the rest")

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert steps == []


def test_workers_leave_an_interrupt_to_the_main_process():
    results = prefetch_map(fragile, range(4), 1, 1)
    assert next(results) == 0
    (worker,) = multiprocessing.active_children()
    os.kill(worker.pid, signal.SIGINT)
    assert list(results) == [1, 2, 3]


def test_a_stuck_worker_is_killed(monkeypatch):
    monkeypatch.setattr(torch.utils.data._utils, "MP_STATUS_CHECK_INTERVAL", 0.1)
    results = prefetch_map(stuck, range(12), 2, 1)
    assert next(results) == 0
    (worker,) = multiprocessing.active_children()
    results.close()
    worker.join(30)
    assert worker.exitcode is not None
