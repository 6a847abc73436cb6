"""What is kept between calls: equal to what is made anew, bounded in bytes, the longest unused first to go."""

import threading

import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils.flop_counter import FlopCounterMode

from triptych.kernels.constant_cache import Kept


def numbers(count, start=0):
    return torch.arange(start, start + count, dtype=torch.uint8)


@given(asked=st.lists(st.integers(0, 40), max_size=60), limit=st.integers(0, 120))
def test_it_answers_as_its_functions_and_stays_within_its_limit(asked, limit):
    kept, latest = Kept(limit), []
    for count in asked:
        assert torch.equal(kept(numbers, count), numbers(count))
        if count <= limit // 4:
            latest = [n for n in latest if n != count] + [count]
            while sum(latest) > limit:
                del latest[0]
        assert [key[0] for _, key in kept.entries] == latest
        assert kept.held == sum(latest) <= limit


def test_a_second_call_is_the_first_ones():
    kept = Kept(100)
    assert kept(numbers, 5) is kept(numbers, 5)
    assert kept(numbers, 5, 1) is not kept(numbers, 5)
    pair = kept(lambda n: (numbers(n), numbers(n)), 4)
    assert kept.held == 5 + 5 + sum(t.nbytes for t in pair)


def test_nothing_is_kept_of_a_call_that_is_watched():
    kept = Kept(100)
    with FlopCounterMode(display=False):
        kept(numbers, 5)
    torch.func.vmap(lambda x: x + kept(numbers, 5).sum())(torch.ones(2))
    assert not kept.entries


def test_what_inference_mode_made_can_be_learnt_with():
    kept = Kept(100)
    with torch.inference_mode():
        kept(torch.ones, 3)
    x = torch.ones(3, requires_grad=True)
    (x * kept(torch.ones, 3)).sum().backward()
    assert x.grad.eq(1).all()


def test_the_default_device_has_no_part_in_it():
    kept = Kept(100)
    with torch.device("meta"):
        kept(numbers, 5)
    assert torch.equal(kept(numbers, 5), numbers(5))


def test_threads_share_it():
    kept, wrong = Kept(60), []

    def ask(first):
        for i in range(300):
            count = (first + i) % 15
            if not torch.equal(kept(numbers, count), numbers(count)):
                wrong.append(count)

    threads = [threading.Thread(target=ask, args=(i,)) for i in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
    assert kept.held == sum(t.nbytes for t in kept.entries.values()) <= 60
