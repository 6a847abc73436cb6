"""Rules that map the state dict of a published format to ours, and back.

A table is a list of rules. A rule relates keys of theirs to keys of ours and works in both directions; `{i}` stands for
every block, and `{a,b}` for alternatives that are taken in step on both sides:

    rename("encoder.layer.{i}.norm1.{weight,bias}", "encoder.{i}.norm1.{weight,bias}")
    convert(("{i}.q.weight", "{i}.k.weight", "{i}.v.weight"), "encoder.{i}.attn.qkv.weight", FUSE_QKV)
    drop("mask_token", "only masked pre-training uses it")

A key that ends in `[{i}]` is one slice of a tensor that is stacked over blocks. All rules are checked before any tensor
is read: every tensor of the file belongs to exactly one rule, every parameter is filled exactly once, and all shapes
agree. One error lists everything that fails; nothing is loaded partially.
"""

import itertools
import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from triptych.errors import CheckpointError
from triptych.weights.files.sanitize import printable

Shape = tuple[int, ...]
Shapes = Mapping[str, Shape]
Tensors = tuple[Tensor, ...]


# ---------------------------------------------------------------------------------------------- operations


@dataclass(frozen=True)
class Operation:
    """A conversion of tensors: `forward` from theirs to ours, `inverse` back."""

    forward: Callable[[Tensors], Tensors]
    inverse: Callable[[Tensors], Tensors]


IDENTITY = Operation(lambda t: t, lambda t: t)


def concatenate(parts: Tensors) -> Tensors:
    """Concatenate tensors along the first axis.

    Not `torch.cat`: on the meta device, where shapes are checked, it imports half of PyTorch's Python code.
    """
    if len({part.shape[1:] for part in parts}) > 1:
        raise ValueError("parts of different shapes")
    result = parts[0].new_empty((sum(len(part) for part in parts), *parts[0].shape[1:]))
    start = 0
    for part in parts:
        result[start : start + len(part)].copy_(part)
        start += len(part)
    return (result,)


FUSE_QKV = Operation(concatenate, lambda fused: fused[0].chunk(3))
"""Query, key and value, each (D, D) or (D,) <-> one (3D, D) or (3D,)."""

DROP_KEY_BIAS = Operation(
    lambda t: t[0].chunk(3)[::2],
    lambda parts: concatenate((parts[0], torch.zeros_like(parts[0]), parts[1])),
)
"""A fused (3D,) bias whose keys' third is unused <-> the biases of queries and values."""


def per_tensor(forward: Callable[[Tensor], Tensor], inverse: Callable[[Tensor], Tensor]) -> Operation:
    """Return an operation that is applied to each tensor of a rule separately."""
    return Operation(lambda ts: tuple(map(forward, ts)), lambda ts: tuple(map(inverse, ts)))


def compose(first: Operation, second: Operation) -> Operation:
    """Return the operation that applies `first`, then `second` (from theirs to ours)."""
    return Operation(lambda t: second.forward(first.forward(t)), lambda t: first.inverse(second.inverse(t)))


TRANSPOSE = per_tensor(lambda t: t.T, lambda t: t.T)
HWIO = per_tensor(lambda t: t.permute(3, 2, 0, 1), lambda t: t.permute(2, 3, 1, 0))
"""A convolution kernel as JAX stores it, (height, width, in, out) <-> (out, in, height, width)."""


# ---------------------------------------------------------------------------------------------------- rules


@dataclass(frozen=True)
class Rule:
    """Tensors of theirs <-> parameters of ours. Without `ours` the tensors are dropped, without `theirs` created."""

    theirs: tuple[str, ...]
    ours: tuple[str, ...]
    operation: Operation = IDENTITY
    reason: str = ""
    """Why tensors are dropped or created."""
    restore: Callable[[], Tensor] | None = None
    """Creates a dropped tensor for export, or a parameter of ours that the file lacks."""


def rename(theirs: str, ours: str) -> Rule:
    """Return the rule for a tensor that has another key."""
    return Rule((theirs,), (ours,))


def convert(theirs: str | tuple[str, ...], ours: str | tuple[str, ...], operation: Operation) -> Rule:
    """Return the rule for tensors of theirs that an operation turns into parameters of ours."""
    return Rule(_as_tuple(theirs), _as_tuple(ours), operation)


def drop(theirs: str, reason: str, restore: Callable[[], Tensor] | None = None) -> Rule:
    """Return the rule for tensors that our network does not use.

    Args:
        theirs: a key, which may be absent from the file; with `*` at its end every key that begins so.
        restore: creates the tensor when the format is exported; None leaves it out.
    """
    return Rule((theirs,), (), reason=reason, restore=restore)


def constant(ours: str, reason: str, value: Callable[[], Tensor]) -> Rule:
    """Return the rule for a parameter that is constant in their network and therefore absent from the file."""
    return Rule((), (ours,), reason=reason, restore=value)


def _as_tuple(keys: str | tuple[str, ...]) -> tuple[str, ...]:
    return (keys,) if isinstance(keys, str) else keys


def expand(rules: Iterable[Rule], depth: int) -> list[Rule]:
    """Return rules for single tensors: `{i}` for each of `depth` blocks, `{a,b}` for each alternative, in step."""
    return [single for rule in rules for single in _expand(rule, depth)]


def _expand(rule: Rule, depth: int) -> Iterable[Rule]:
    keys = rule.theirs + rule.ours
    layers = range(depth) if any("{i}" in key for key in keys) else [0]
    alternatives = max(
        (len(group.split(",")) for key in keys for group in re.findall(r"{([^{}]*,[^{}]*)}", key)),
        default=1,
    )
    for layer, choice in itertools.product(layers, range(alternatives)):

        def fill_in(key: str, layer: int = layer, choice: int = choice) -> str:
            key = key.replace("{i}", str(layer))
            return re.sub(r"{([^{}]*,[^{}]*)}", lambda match: match[1].split(",")[choice], key)

        theirs, ours = tuple(map(fill_in, rule.theirs)), tuple(map(fill_in, rule.ours))
        yield replace(rule, theirs=theirs, ours=ours)


def add_prefixes(rules: Iterable[Rule], theirs: str = "", ours: str = "") -> list[Rule]:
    """Return the rules of a network that is a part of a larger file, and of a larger network of ours."""
    return [
        replace(
            rule,
            theirs=tuple(theirs + key for key in rule.theirs),
            ours=tuple(ours + key for key in rule.ours),
        )
        for rule in rules
    ]


def split_slice(key: str) -> tuple[str, int | None]:
    """Split "blocks.kernel[3]" into ("blocks.kernel", 3). A key without an index gives (key, None)."""
    match = re.fullmatch(r"(.*)\[(\d+)\]", key)
    return (match[1], int(match[2])) if match else (key, None)


# ------------------------------------------------------------------------------------------------- checking


@dataclass
class _Mismatches:
    """Everything that is wrong with a set of rules, by category, for one error."""

    by_category: dict[str, list[str]] = field(default_factory=dict)

    def add(self, category: str, key: str) -> None:
        self.by_category.setdefault(category, []).append(printable(key))

    def raise_any(self, what: str, remedy: str, max_shown: int = 4) -> None:
        if not self.by_category:
            return
        parts = []
        for category, keys in self.by_category.items():
            more = f" and {len(keys) - max_shown} more" if len(keys) > max_shown else ""
            parts.append(f"{len(keys)} {category} ({', '.join(keys[:max_shown])}{more})")
        raise CheckpointError(f"{what}: {'; '.join(parts)}; {remedy}")


def plan_rules(rules: Sequence[Rule], theirs: Shapes, ours: Shapes, what: str) -> list[Rule]:
    """Return the rules to apply, after checking that file and network match exactly.

    Args:
        rules: expanded rules.
        theirs: shape of every tensor in the file.
        ours: shape of every parameter and saved buffer of the network.
        what: start of the error message, which names the file and the format.

    Raises:
        CheckpointError: lists all keys that no rule knows, that are claimed twice, missing, filled twice or unfilled,
            and all shapes that differ.
    """
    mismatches, claims, fills, steps = _Mismatches(), Counter[str](), Counter[str](), []
    for rule in rules:
        if not rule.ours:
            claims.update(_matching_keys(rule.theirs[0], theirs))
            continue
        absent = [key for key in rule.theirs if split_slice(key)[0] not in theirs]
        claims.update(key for key in rule.theirs if key not in absent)
        fills.update(rule.ours)
        for key in absent:
            mismatches.add("missing", key)
        if not absent:
            steps.append(rule)
            _check_shapes(rule, theirs, ours, mismatches)
    _check_claims(claims, theirs, mismatches)
    for key, count in fills.items():
        if key not in ours:
            mismatches.add("of no parameter", key)
        elif count > 1:
            mismatches.add("filled twice", key)
    for key in ours:
        if key not in fills:
            mismatches.add("parameters that nothing fills", key)
    mismatches.raise_any(what, "give a complete checkpoint, and the config that belongs to it")
    return steps


def _matching_keys(pattern: str, keys: Iterable[str]) -> list[str]:
    if pattern.endswith("*"):
        return [key for key in keys if key.startswith(pattern[:-1])]
    return [key for key in keys if key == pattern]


def _check_claims(claims: Counter[str], theirs: Shapes, mismatches: _Mismatches) -> None:
    slices = Counter(split_slice(key)[0] for key in claims if split_slice(key)[1] is not None)
    for key, count in claims.items():
        if count > 1:
            mismatches.add("claimed twice", key)
    for key, shape in theirs.items():
        if key in slices:
            if not shape or slices[key] != shape[0]:
                mismatches.add("of another depth", f"{key}: {list(shape)}, needs {slices[key]} slices")
        elif key not in claims:
            mismatches.add("that no rule knows", key)


def _check_shapes(rule: Rule, theirs: Shapes, ours: Shapes, mismatches: _Mismatches) -> None:
    if any(key not in ours for key in rule.ours):
        return
    if rule.restore is not None:
        inputs: Tensors = (rule.restore().to("meta"),)
    else:
        shapes = [
            theirs[key] if index is None else theirs[key][1:] for key, index in map(split_slice, rule.theirs)
        ]
        inputs = tuple(torch.empty(shape, device="meta") for shape in shapes)
    try:
        shapes = [tuple(t.shape) for t in rule.operation.forward(inputs)]
    except (RuntimeError, IndexError, ValueError):
        shapes = []
    needed = [tuple(ours[key]) for key in rule.ours]
    if shapes != needed:
        shown = " + ".join(str(list(t.shape)) for t in inputs)
        first = rule.theirs[0] if rule.theirs else rule.ours[0]
        mismatches.add("of another shape", f"{first}: {shown}, for {list(needed[0])}")


# --------------------------------------------------------------------------------------------------- export


def export_tensors(rules: Sequence[Rule], ours: Mapping[str, Tensor], what: str) -> dict[str, Tensor]:
    """Return a network's tensors under the keys of a format: the rules in reverse.

    Args:
        ours: the network's state dict.
        what: start of the error message.

    Raises:
        CheckpointError: the network has parameters that the format has no key for.
    """
    out: dict[str, Tensor] = {}
    slices: dict[str, dict[int, Tensor]] = {}
    used: set[str] = set()
    mismatches = _Mismatches()
    for rule in rules:
        if not rule.ours:
            if rule.restore is not None:
                out[rule.theirs[0]] = rule.restore()
            continue
        absent = [key for key in rule.ours if key not in ours]
        for key in absent:
            mismatches.add("parameters missing", key)
        used.update(rule.ours)
        if absent:
            continue
        if rule.restore is not None:
            tensor = ours[rule.ours[0]]
            if not torch.equal(tensor.detach().cpu(), rule.restore().to(tensor.dtype)):
                mismatches.add("that are constants there", rule.ours[0])
            continue
        tensors = rule.operation.inverse(tuple(ours[key] for key in rule.ours))
        for name, tensor in zip(rule.theirs, tensors, strict=True):
            key, index = split_slice(name)
            if index is None:
                out[key] = tensor
            else:
                slices.setdefault(key, {})[index] = tensor
    for key in ours:
        if key not in used:
            mismatches.add("parameters without a key there", key)
    mismatches.raise_any(what, "choose another format; triptych's own holds everything")
    out |= {key: torch.stack([parts[i] for i in range(len(parts))]) for key, parts in slices.items()}
    return {key: tensor.detach().contiguous() for key, tensor in out.items()}
