"""Configs to JSON and back without a change, and errors that name the wrong field."""

import json
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from triptych.config import from_json, need_at_least, need_fraction, to_json
from triptych.errors import ConfigError, TriptychError
from triptych.model_card import ModelCard, Preprocess
from triptych.models.configs.vit import SIZES, ViTConfig


@dataclass(frozen=True, kw_only=True)
class Inner:
    rate: float
    names: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Outer:
    count: int
    flag: bool = False
    mode: Literal["fast", "slow"] = "fast"
    size: tuple[int, int] = (1, 2)
    limit: float | None = None
    inner: Inner = field(default_factory=lambda: Inner(rate=0.5))
    either: Inner | None = None
    table: dict[str, tuple[int, ...]] = field(default_factory=dict)
    anything: Any = None


SIDES = st.integers(1, 999)
NUMBERS = st.floats(allow_nan=False, allow_infinity=False)
INNERS = st.builds(Inner, rate=NUMBERS, names=st.lists(st.text()).map(tuple))
OUTERS = st.builds(
    Outer,
    count=st.integers(),
    flag=st.booleans(),
    mode=st.sampled_from(["fast", "slow"]),
    size=st.tuples(st.integers(), st.integers()),
    limit=st.none() | NUMBERS,
    inner=INNERS,
    either=st.none() | INNERS,
    table=st.dictionaries(st.text(), st.lists(st.integers()).map(tuple)),
    anything=st.none() | st.booleans() | st.integers() | st.text(),
)


def through_json(value):
    return from_json(type(value), json.loads(json.dumps(to_json(value))))


@given(OUTERS)
def test_round_trip(config):
    assert through_json(config) == config


# Cards are built in the test: beartype draws the items that it checks, and hypothesis wants no draws but its own.
@given(
    preprocess=st.fixed_dictionaries({"size": st.tuples(SIDES, SIDES), "crop": st.floats(0.01, 1)}),
    card=st.fixed_dictionaries(
        {
            "classes": st.none() | st.lists(st.text(), min_size=1).map(tuple),
            "groupings": st.dictionaries(st.text(), st.lists(st.text()).map(tuple), max_size=2),
            "figures": st.dictionaries(st.text(), NUMBERS, max_size=3),
        }
    ),
)
def test_cards_round_trip(preprocess, card):
    original = ModelCard(preprocess=Preprocess(**preprocess), **card)
    assert through_json(original) == original


@pytest.mark.parametrize("name", SIZES)
def test_every_size_round_trips(name):
    assert through_json(SIZES[name]) == SIZES[name]


def test_what_is_left_out_is_the_default():
    assert from_json(Outer, {"count": 3}) == Outer(count=3)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"cuont": 1}, "Outer has no field 'cuont'; did you mean 'count'?"),
        ({"xyzzy": 1}, "Outer has no field 'xyzzy'"),
        ({"inner": {"rate": 1.0, "nmaes": []}}, "Outer.inner has no field 'nmaes'; did you mean 'names'?"),
        ({"inner": {}}, "Outer.inner lacks the field 'rate'"),
        ({"inner": 3}, "Outer.inner is 3, which must be an object"),
        ({"count": "3"}, "Outer.count is '3', which must be int"),
        ({"count": 3.0}, "Outer.count is 3.0, which must be int"),
        ({"count": True}, "Outer.count is True, which must be int"),
        ({"flag": 1}, "Outer.flag is 1, which must be bool"),
        ({"mode": "quick"}, "Outer.mode is 'quick', which must be one of 'fast', 'slow'"),
        ({"mode": ["fast"]}, "Outer.mode is ['fast'], which must be one of"),
        ({"size": [1]}, "Outer.size has 1 values, which must be 2"),
        ({"size": "12"}, "Outer.size is '12', which must be a list"),
        ({"size": [1, "2"]}, "Outer.size[1] is '2', which must be int"),
        ({"limit": "none"}, "Outer.limit is 'none', which must be float"),
        ({"inner": {"rate": True}}, "Outer.inner.rate is True, which must be float"),
        ({"table": []}, "Outer.table is [], which must be an object"),
        ({"table": {"a": [None]}}, "Outer.table.a[0] is None, which must be int"),
        ({"either": {"rate": "x"}}, "Outer.either.rate is 'x', which must be float"),
    ],
)
def test_the_error_names_the_field(changes, message):
    with pytest.raises(ConfigError) as caught:
        from_json(Outer, {"count": 1} | changes)
    assert message in str(caught.value)


def test_a_missing_field_and_a_list_for_a_config():
    with pytest.raises(ConfigError, match="Outer lacks the field 'count'"):
        from_json(Outer, {})
    with pytest.raises(ConfigError, match="which must be an object"):
        from_json(Outer, [1])


def test_whole_numbers_may_stand_for_fractions():
    config = from_json(Outer, {"count": 1, "limit": 2, "inner": {"rate": 1}})
    assert isinstance(config.limit, float)
    assert isinstance(config.inner.rate, float)


def test_a_config_is_checked_on_its_way_in():
    data = to_json(SIZES["vit-b16"]) | {"num_heads": 7}
    with pytest.raises(TriptychError, match="no multiple of num_heads 7"):
        from_json(ViTConfig, data)


def test_what_json_cannot_hold_is_refused():
    with pytest.raises(TypeError, match="set"):
        to_json(replace(Outer(count=1), anything={1, 2}))


@dataclass(frozen=True, kw_only=True)
class Limits:
    rate: float | None = 0.5
    sides: tuple[int | tuple[int, int], ...] = (1, (2, 3))


def test_fields_are_held_to_ranges():
    need_at_least(Limits(), 0.5, "rate", "sides")
    need_at_least(Limits(rate=None, sides=()), 1, "rate", "sides")
    with pytest.raises(ConfigError, match=r"Limits.sides is \(1, \(2, 0\)\), which must be at least 1"):
        need_at_least(Limits(sides=(1, (2, 0))), 1, "sides")
    need_fraction(Limits(rate=1.0), "rate")
    need_fraction(Limits(rate=None), "rate", below_one=True)
    for rate in (-0.1, 1.1, float("nan")):
        with pytest.raises(ConfigError, match="from 0 to 1"):
            need_fraction(Limits(rate=rate), "rate")
    with pytest.raises(ConfigError, match=r"Limits.rate is 1.0, which must be from 0 to below 1"):
        need_fraction(Limits(rate=1.0), "rate", below_one=True)
