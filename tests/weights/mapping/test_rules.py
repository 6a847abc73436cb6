"""The engine: expansion, exactness, one error for everything."""

import pytest
import torch

from triptych.errors import CheckpointError
from triptych.weights.mapping.rules import (
    FUSE_QKV,
    HWIO,
    IDENTITY,
    TRANSPOSE,
    compose,
    constant,
    convert,
    drop,
    expand,
    export_tensors,
    per_tensor,
    plan_rules,
    rename,
    split_slice,
)


def test_braces_and_blocks_expand_in_step():
    rules = expand([rename("b{i}/{scale,bias}", "blocks.{i}.norm.{weight,bias}")], depth=2)
    assert [(r.theirs, r.ours) for r in rules] == [
        (("b0/scale",), ("blocks.0.norm.weight",)),
        (("b0/bias",), ("blocks.0.norm.bias",)),
        (("b1/scale",), ("blocks.1.norm.weight",)),
        (("b1/bias",), ("blocks.1.norm.bias",)),
    ]


@pytest.mark.parametrize(
    ("operation", "shapes"),
    [
        (IDENTITY, [(3, 4)]),
        (TRANSPOSE, [(3, 4)]),
        (HWIO, [(2, 2, 3, 5)]),
        (FUSE_QKV, [(4, 4), (4, 4), (4, 4)]),
        (compose(TRANSPOSE, FUSE_QKV), [(3, 4), (3, 4), (3, 4)]),
        (per_tensor(lambda t: t + 1, lambda t: t - 1), [(2,)]),
    ],
)
def test_operations_invert(operation, shapes):
    tensors = tuple(torch.randint(0, 100, shape).float() for shape in shapes)
    back = operation.inverse(operation.forward(tensors))
    assert all(torch.equal(a, b) for a, b in zip(tensors, back, strict=True))


def test_everything_wrong_is_in_one_error():
    rules = [rename("a", "x"), rename("b", "y"), rename("b", "z"), rename("gone", "v"), rename("d", "x")]
    theirs = {"a": (2, 3), "b": (4,), "d": (2, 2), "stranger": (1,)}
    ours = {"x": (2, 2), "y": (4,), "z": (4,), "v": (1,), "lonely": (7,)}
    with pytest.raises(CheckpointError) as caught:
        plan_rules(rules, theirs, ours, "file.pth is no good")
    message = str(caught.value)
    assert message.startswith("file.pth is no good: ")
    assert "\n" not in message
    for part in (
        "1 missing (gone)",
        "1 claimed twice (b)",
        "1 that no rule knows (stranger)",
        "1 filled twice (x)",
        "1 parameters that nothing fills (lonely)",
        "a: [2, 3], for [2, 2]",
    ):
        assert part in message


def test_long_lists_are_counted_and_cut():
    with pytest.raises(CheckpointError, match=r"9 that no rule knows \(k0, k1, k2, k3 and 5 more\)"):
        plan_rules([], {f"k{i}": (1,) for i in range(9)}, {}, "x")


def test_a_drop_claims_what_is_there_and_restores_on_the_way_back():
    rules = [rename("a", "x"), drop("mask", "unused", lambda: torch.zeros(1, 3)), drop("rope.*", "computed")]
    assert len(plan_rules(rules, {"a": (2,), "rope.periods": (4,)}, {"x": (2,)}, "")) == 1
    back = export_tensors(rules, {"x": torch.ones(2)}, "")
    assert set(back) == {"a", "mask"}
    assert back["mask"].shape == (1, 3)


def test_a_made_constant_must_still_be_that_constant_to_be_left_out():
    rules = [constant("bias", "they have none", lambda: torch.zeros(2))]
    assert plan_rules(rules, {}, {"bias": (2,)}, "") == rules
    assert export_tensors(rules, {"bias": torch.zeros(2)}, "") == {}
    with pytest.raises(CheckpointError, match="1 that are constants there \\(bias\\)"):
        export_tensors(rules, {"bias": torch.ones(2)}, "cannot write")


def test_slabs_must_cover_the_stack():
    rules = expand([rename("stack[{i}]", "blocks.{i}.w")], depth=3)
    ours = {f"blocks.{i}.w": (2,) for i in range(3)}
    assert len(plan_rules(rules, {"stack": (3, 2)}, ours, "")) == 3
    with pytest.raises(CheckpointError, match="of another depth"):
        plan_rules(rules, {"stack": (4, 2)}, ours, "")
    back = export_tensors(rules, {f"blocks.{i}.w": torch.full((2,), float(i)) for i in range(3)}, "")
    assert torch.equal(back["stack"], torch.tensor([[0.0, 0], [1, 1], [2, 2]]))
    assert split_slice("a[12]") == ("a", 12)
    assert split_slice("a.b") == ("a.b", None)


def test_a_parameter_without_a_place_is_an_error():
    with pytest.raises(CheckpointError, match="1 parameters without a key there \\(extra\\)"):
        export_tensors([rename("a", "x")], {"x": torch.ones(1), "extra": torch.ones(1)}, "format")


def test_three_to_one_and_back():
    q, k, v = (torch.randn(4, 4) for _ in range(3))
    rules = [convert(("q", "k", "v"), "qkv", FUSE_QKV)]
    back = export_tensors(rules, {"qkv": torch.cat([q, k, v])}, "")
    assert torch.equal(back["k"], k)
    assert all(t.is_contiguous() for t in back.values())
