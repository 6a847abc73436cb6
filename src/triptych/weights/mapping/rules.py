"""The engine behind every table of names: which tensor of a published file is which parameter of ours.

A table is a list of rules. A rule ties names of theirs to names of ours and knows both directions; `{i}`
stands for every block, `{a,b}` for alternatives taken in step on both sides:

    same("encoder.layer.{i}.norm1.{weight,bias}", "encoder.{i}.norm1.{weight,bias}")
    rule(("{i}.q.weight", "{i}.k.weight", "{i}.v.weight"), "encoder.{i}.attn.qkv.weight", CONCATENATE)
    drop("mask_token", "only masked pre-training reads it")

A name that ends in `[{i}]` is one slab of a tensor stacked over blocks. Before a byte is read the whole plan
is checked: every tensor of the file is claimed by exactly one rule, every parameter is filled exactly once,
all shapes agree. What fails is listed in one error; there is no partial load.
"""

import itertools
import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from triptych.errors import UserError
from triptych.weights.files.sanitize import printable

Shape = tuple[int, ...]
Shapes = Mapping[str, Shape]
Tensors = tuple[Tensor, ...]


@dataclass(frozen=True)
class Operation:
    """What happens to tensors on their way: `forward` from theirs to ours, `inverse` back."""

    forward: Callable[[Tensors], Tensors]
    inverse: Callable[[Tensors], Tensors]


SAME = Operation(lambda t: t, lambda t: t)


def joined(parts: Tensors) -> Tensors:
    """Tensors one after the other on the first axis, as one.

    Not `torch.cat`: on the meta device, where shapes are checked, that imports half of PyTorch's Python.
    """
    if len({part.shape[1:] for part in parts}) > 1:
        raise ValueError("parts of different shapes")
    whole = parts[0].new_empty((sum(len(part) for part in parts), *parts[0].shape[1:]))
    start = 0
    for part in parts:
        whole[start : start + len(part)].copy_(part)
        start += len(part)
    return (whole,)


CONCATENATE = Operation(joined, lambda whole: whole[0].chunk(3))
"""Query, key and value, each (D, D) or (D,), are one (3D, D) or (3D,)."""

WITHOUT_KEYS = Operation(
    lambda t: t[0].chunk(3)[::2],
    lambda parts: joined((parts[0], torch.zeros_like(parts[0]), parts[1])),
)
"""A whole (3D,) bias whose middle third counts for nothing <-> the biases of queries and values."""


def each(forward: Callable[[Tensor], Tensor], inverse: Callable[[Tensor], Tensor]) -> Operation:
    """An operation on every tensor of a rule by itself."""
    return Operation(lambda ts: tuple(map(forward, ts)), lambda ts: tuple(map(inverse, ts)))


def then(first: Operation, second: Operation) -> Operation:
    """Two operations in a row, from theirs to ours."""
    return Operation(lambda t: second.forward(first.forward(t)), lambda t: first.inverse(second.inverse(t)))


TRANSPOSE = each(lambda t: t.T, lambda t: t.T)
HWIO = each(lambda t: t.permute(3, 2, 0, 1), lambda t: t.permute(2, 3, 1, 0))
"""A convolution's kernel as JAX stores it, (height, width, in, out)."""


@dataclass(frozen=True)
class Rule:
    """Tensors of theirs <-> parameters of ours. No `ours`: theirs are dropped; no `theirs`: ours are made."""

    theirs: tuple[str, ...]
    ours: tuple[str, ...]
    operation: Operation = SAME
    reason: str = ""
    """Why tensors are dropped or made."""
    restore: Callable[[], Tensor] | None = None
    """Makes a dropped tensor again on the way back, or one of ours that the file lacks."""


def same(theirs: str, ours: str) -> Rule:
    """The same tensor under another name."""
    return Rule((theirs,), (ours,))


def rule(theirs: str | tuple[str, ...], ours: str | tuple[str, ...], operation: Operation) -> Rule:
    """Tensors of theirs that become parameters of ours by an operation that inverts."""
    return Rule(_names(theirs), _names(ours), operation)


def drop(theirs: str, reason: str, restore: Callable[[], Tensor] | None = None) -> Rule:
    """Tensors that our network has no use for; `restore` makes them again when the format is written."""
    return Rule((theirs,), (), reason=reason, restore=restore)


def make(ours: str, reason: str, value: Callable[[], Tensor]) -> Rule:
    """A parameter that the file lacks because it is a constant there; writing the format leaves it out."""
    return Rule((), (ours,), reason=reason, restore=value)


def _names(names: str | tuple[str, ...]) -> tuple[str, ...]:
    return (names,) if isinstance(names, str) else names


def expand(rules: Iterable[Rule], depth: int) -> list[Rule]:
    """Rules for single tensors: `{i}` for each of `depth` blocks, `{a,b}` for each alternative, in step."""
    return [one for rule in rules for one in _expand(rule, depth)]


def _expand(rule: Rule, depth: int) -> Iterable[Rule]:
    names = rule.theirs + rule.ours
    layers = range(depth) if any("{i}" in name for name in names) else [0]
    ways = max(
        (len(group.split(",")) for name in names for group in re.findall(r"{([^{}]*,[^{}]*)}", name)),
        default=1,
    )
    for layer, way in itertools.product(layers, range(ways)):

        def one(name: str, layer: int = layer, way: int = way) -> str:
            name = name.replace("{i}", str(layer))
            return re.sub(r"{([^{}]*,[^{}]*)}", lambda match: match[1].split(",")[way], name)

        yield Rule(
            tuple(map(one, rule.theirs)),
            tuple(map(one, rule.ours)),
            rule.operation,
            rule.reason,
            rule.restore,
        )


def within(rules: Iterable[Rule], part: str) -> list[Rule]:
    """The same rules where ours is a part of a larger network, whose name stands in front of its parameters'."""
    return [replace(rule, ours=tuple(part + name for name in rule.ours)) for rule in rules]


def slab(name: str) -> tuple[str, int | None]:
    """`blocks.kernel[3]` is ("blocks.kernel", 3), a plain name is itself and None."""
    match = re.fullmatch(r"(.*)\[(\d+)\]", name)
    return (match[1], int(match[2])) if match else (name, None)


@dataclass
class _Offenders:
    """Everything wrong with a plan, by kind, so that one error says it all."""

    found: dict[str, list[str]] = field(default_factory=dict)

    def add(self, kind: str, name: str) -> None:
        self.found.setdefault(kind, []).append(printable(name))

    def raise_any(self, what: str, remedy: str, shown: int = 4) -> None:
        if not self.found:
            return
        parts = []
        for kind, names in self.found.items():
            more = f" and {len(names) - shown} more" if len(names) > shown else ""
            parts.append(f"{len(names)} {kind} ({', '.join(names[:shown])}{more})")
        raise UserError(f"{what}: {'; '.join(parts)}; {remedy}")


def plan(rules: Sequence[Rule], theirs: Shapes, ours: Shapes, what: str) -> list[Rule]:
    """The rules to carry out, after checking that file and network fit each other exactly.

    Args:
        rules: expanded rules. A `drop` may name a tensor that is not there, and end in `*` for any ending.
        theirs: shape of every tensor in the file.
        ours: shape of every parameter and saved buffer of the network.
        what: the beginning of the error, naming the file and the format.

    Raises:
        UserError: all names that are unclaimed, claimed twice, missing, filled twice or unfilled, and all
            shapes that disagree.
    """
    wrong, claims, fills, steps = _Offenders(), Counter[str](), Counter[str](), []
    for one in rules:
        if not one.ours:
            claims.update(_matching(one.theirs[0], theirs))
            continue
        absent = [name for name in one.theirs if slab(name)[0] not in theirs]
        claims.update(name for name in one.theirs if name not in absent)
        fills.update(one.ours)
        for name in absent:
            wrong.add("missing", name)
        if not absent:
            steps.append(one)
            _check_shapes(one, theirs, ours, wrong)
    _check_claims(claims, theirs, wrong)
    for name, count in fills.items():
        if name not in ours:
            wrong.add("of no parameter", name)
        elif count > 1:
            wrong.add("filled twice", name)
    for name in ours:
        if name not in fills:
            wrong.add("parameters that nothing fills", name)
    wrong.raise_any(what, "give a whole checkpoint, and the config that belongs to it")
    return steps


def _matching(pattern: str, names: Iterable[str]) -> list[str]:
    if pattern.endswith("*"):
        return [name for name in names if name.startswith(pattern[:-1])]
    return [name for name in names if name == pattern]


def _check_claims(claims: Counter[str], theirs: Shapes, wrong: _Offenders) -> None:
    pieces = Counter(slab(name)[0] for name in claims if slab(name)[1] is not None)
    for name, count in claims.items():
        if count > 1:
            wrong.add("claimed twice", name)
    for name, shape in theirs.items():
        if name in pieces:
            if not shape or pieces[name] != shape[0]:
                wrong.add("of another depth", f"{name}: {list(shape)}, needs {pieces[name]} slabs")
        elif name not in claims:
            wrong.add("that no rule knows", name)


def _check_shapes(one: Rule, theirs: Shapes, ours: Shapes, wrong: _Offenders) -> None:
    if any(name not in ours for name in one.ours):
        return
    if one.restore is not None:
        given: Tensors = (one.restore().to("meta"),)
    else:
        shapes = [theirs[key] if piece is None else theirs[key][1:] for key, piece in map(slab, one.theirs)]
        given = tuple(torch.empty(shape, device="meta") for shape in shapes)
    try:
        made = one.operation.forward(given)
        got = [tuple(t.shape) for t in made]
    except (RuntimeError, IndexError, ValueError):
        got = []
    needed = [tuple(ours[name]) for name in one.ours]
    if got != needed:
        shown = " + ".join(str(list(t.shape)) for t in given)
        wrong.add(
            "of another shape",
            f"{one.theirs[0] if one.theirs else one.ours[0]}: {shown}, for {list(needed[0])}",
        )


def to_theirs(rules: Sequence[Rule], ours: Mapping[str, Tensor], what: str) -> dict[str, Tensor]:
    """A network's tensors under a format's names: the rules carried out backwards.

    Raises:
        UserError: the network has parameters that the format has no place for.
    """
    out: dict[str, Tensor] = {}
    slabs: dict[str, dict[int, Tensor]] = {}
    used: set[str] = set()
    wrong = _Offenders()
    for one in rules:
        if not one.ours:
            if one.restore is not None:
                out[one.theirs[0]] = one.restore()
            continue
        absent = [name for name in one.ours if name not in ours]
        for name in absent:
            wrong.add("parameters missing", name)
        used.update(one.ours)
        if absent:
            continue
        if one.restore is not None:
            if not torch.equal(ours[one.ours[0]].detach().cpu(), one.restore().to(ours[one.ours[0]].dtype)):
                wrong.add("that are constants there", one.ours[0])
            continue
        for name, tensor in zip(
            one.theirs, one.operation.inverse(tuple(ours[n] for n in one.ours)), strict=True
        ):
            key, piece = slab(name)
            if piece is None:
                out[key] = tensor
            else:
                slabs.setdefault(key, {})[piece] = tensor
    for name in ours:
        if name not in used:
            wrong.add("parameters without a place there", name)
    wrong.raise_any(what, "choose another format; triptych's own holds everything")
    out |= {key: torch.stack([parts[i] for i in range(len(parts))]) for key, parts in slabs.items()}
    return {name: tensor.detach().contiguous() for name, tensor in out.items()}
