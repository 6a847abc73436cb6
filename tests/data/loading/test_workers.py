"""Reading ahead in processes: `map`, in order, no further than is needed, and nothing left behind."""

import itertools
import multiprocessing
import os

import pytest

from triptych.data.loading.workers import prefetch_map


def squared(number):
    return number * number, os.getpid()


def fragile(number):
    if number == 5:
        raise KeyError("five")
    return number


@pytest.mark.parametrize(("count", "size"), [(0, 4), (3, 4), (4, 4), (23, 4), (6, 1)])
@pytest.mark.parametrize("workers", [0, 1, 2])
def test_it_is_map_in_order(count, size, workers):
    made = list(prefetch_map(squared, iter(range(count)), size, workers))
    assert [value for value, _ in made] == [n * n for n in range(count)]
    elsewhere = {process for _, process in made} - {os.getpid()}
    assert bool(elsewhere) == (workers > 0 and count >= size)  # for a few items no process is started
    assert not multiprocessing.active_children()


def test_it_asks_for_no_more_than_two_requests_a_worker():
    taken = itertools.count()
    made = prefetch_map(squared, taken, 3, 1)
    assert next(made)[0] == 0
    assert next(taken) <= 3 * (1 + 2)
    assert len(multiprocessing.active_children()) == 1
    made.close()
    assert not multiprocessing.active_children()


@pytest.mark.parametrize("workers", [0, 1])
def test_what_goes_wrong_comes_out_and_the_processes_end(workers):
    made = prefetch_map(fragile, range(9), 2, workers)
    with pytest.raises(KeyError, match="five"):
        list(made)
    assert not multiprocessing.active_children()

    def broken():
        yield from range(5)
        raise OSError("no more")

    with pytest.raises(OSError, match="no more"):
        list(prefetch_map(squared, broken(), 2, workers))
    assert not multiprocessing.active_children()
