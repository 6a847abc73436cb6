"""The harness on toy callables: order, rounds, spread, and the refusal of unequal outputs."""

import math

import pytest
import torch

from triptych.bench.harness.timing import Spread, UnequalError, check_equal, interleave, ratio, timed


@pytest.fixture
def shares(monkeypatch):
    """CPU shares of other programs in each round; the clock advances by a second each time it is read."""
    now, pending = iter(range(100)), []
    monkeypatch.setattr("triptych.bench.harness.timing.time.perf_counter", lambda: next(now))
    monkeypatch.setattr(
        "triptych.bench.harness.timing.CpuContention.share", lambda self: pending.pop(0) if pending else None
    )
    return pending


def test_sides_take_turns(shares):
    order = []
    sides = {name: (lambda name=name: order.append(name) or len(order)) for name in "AB"}
    result = interleave(sides, rounds=3, warmup=1)
    assert order == ["A", "B"] * 4
    assert result.measurements == {"A": [3, 5, 7], "B": [4, 6, 8]}


def test_rounds_continue_until_the_time_is_up(shares):
    assert len(interleave({"A": lambda: 0}, rounds=2, seconds=5, warmup=0).measurements["A"]) == 5


def test_disturbed_rounds_are_repeated(shares):
    shares += [0.5, 0.01, 0.9, 0.02]
    result = interleave({"A": iter("abcdef").__next__}, rounds=2, warmup=0, patience=50)
    assert (result.measurements, result.others) == ({"A": ["b", "d"]}, 0.02)


def test_after_the_time_limit_the_least_disturbed_rounds_count(shares):
    shares += [0.5, 0.3, 0.9, 0.4, 0.01]
    result = interleave({"A": iter("abcdef").__next__}, rounds=2, warmup=0, patience=4)
    assert (result.measurements, result.others) == ({"A": ["b", "d"]}, 0.4)


def test_timed_is_the_clock_around_the_work():
    clock = iter([10.0, 12.5])
    ran = []
    assert timed(lambda: ran.append(1), lambda: next(clock))() == 2.5
    assert ran == [1]


def test_spread():
    assert Spread.of([3.0, 1.0, 2.0, 10.0]) == Spread(2.5, 1.0, 10.0)
    assert Spread.of(iter([4.0])) == Spread(4.0, 4.0, 4.0)


def test_ratio_is_round_by_round():
    # The machine runs at half speed in the second round, which does not change the ratio.
    assert ratio([1.0, 2.0, 1.0], [2.0, 4.0, 2.0]) == Spread(0.5, 0.5, 0.5)
    with pytest.raises(ValueError):
        ratio([1.0], [1.0, 2.0])


def test_equal_outputs_pass_and_return_their_distance():
    x = torch.tensor([1.0, -2.0])
    assert check_equal({"ours": x, "theirs": x.clone()}, 0.0) == 0.0
    assert check_equal({"ours": x, "theirs": x * 1.01, "third": x}, 0.02) == pytest.approx(0.01, rel=0.02)
    assert check_equal({"ours": x}, 0.0) == 0.0


@pytest.mark.parametrize(
    "other", [torch.tensor([1.0, -2.2]), torch.tensor([1.0, math.nan]), torch.ones(3), torch.zeros(2)]
)
def test_unequal_outputs_are_refused(other):
    with pytest.raises(UnequalError, match="ours"):
        check_equal({"ours": torch.tensor([1.0, -2.0]), "theirs": other}, 0.05)
    if other.shape == (2,):
        with pytest.raises(UnequalError):
            check_equal({"theirs": other, "ours": torch.tensor([1.0, -2.0])}, 0.05)
