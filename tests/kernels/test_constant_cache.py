"""The cache of constants: equal to a new result, bounded in bytes, least recently used entries dropped first."""

import threading

import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils.flop_counter import FlopCounterMode

from triptych.kernels.constant_cache import ConstantCache


def numbers(count, start=0):
    return torch.arange(start, start + count, dtype=torch.uint8)


@given(requested=st.lists(st.integers(0, 40), max_size=60), limit=st.integers(0, 120))
def test_results_are_correct_and_stay_within_the_limit(requested, limit):
    cache, latest = ConstantCache(limit), []
    for count in requested:
        assert torch.equal(cache(numbers, count), numbers(count))
        if count <= limit // 4:
            latest = [n for n in latest if n != count] + [count]
            while sum(latest) > limit:
                del latest[0]
        assert [key[0] for _, key in cache.entries] == latest
        assert cache.size == sum(latest) <= limit


def test_a_second_call_returns_the_first_result():
    cache = ConstantCache(100)
    assert cache(numbers, 5) is cache(numbers, 5)
    assert cache(numbers, 5, 1) is not cache(numbers, 5)
    pair = cache(lambda n: (numbers(n), numbers(n)), 4)
    assert cache.size == 5 + 5 + sum(t.nbytes for t in pair)


def test_nothing_is_cached_while_operations_are_intercepted():
    cache = ConstantCache(100)
    with FlopCounterMode(display=False):
        cache(numbers, 5)
    torch.func.vmap(lambda x: x + cache(numbers, 5).sum())(torch.ones(2))
    assert not cache.entries


def test_tensors_of_inference_mode_can_be_used_in_training():
    cache = ConstantCache(100)
    with torch.inference_mode():
        cache(torch.ones, 3)
    x = torch.ones(3, requires_grad=True)
    (x * cache(torch.ones, 3)).sum().backward()
    assert x.grad.eq(1).all()


def test_the_default_device_does_not_matter():
    cache = ConstantCache(100)
    with torch.device("meta"):
        cache(numbers, 5)
    assert torch.equal(cache(numbers, 5), numbers(5))


def test_threads_share_the_cache():
    cache, wrong = ConstantCache(60), []

    def ask(first):
        for i in range(300):
            count = (first + i) % 15
            if not torch.equal(cache(numbers, count), numbers(count)):
                wrong.append(count)

    threads = [threading.Thread(target=ask, args=(i,)) for i in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
    assert cache.size == sum(t.nbytes for t in cache.entries.values()) <= 60
