"""Formulas of updates: from a layer's tensors in a file to the change of its weight, at scale 1.

A tensor has a role, such as "down" or "hada_w1_a"; `adapters.tensors` finds roles by name. Shapes are checked before
any tensor is read: a file of a few kilobytes may describe a product of terabytes.
"""

import math
from collections.abc import Callable, Mapping, Sequence, Set
from dataclasses import dataclass

import torch
from torch import Tensor

Shape = tuple[int, ...]
RoleShapes = Mapping[str, Shape]
RoleTensors = Mapping[str, Tensor]


@dataclass(frozen=True)
class Formula:
    """How one method changes a weight."""

    title: str
    needed: tuple[frozenset[str], ...]
    """Sets of roles, of each of which exactly one must be there in full."""
    optional: frozenset[str]
    shape: Callable[[RoleShapes, Shape], Shape | None]
    """(shapes by role, shape of the layer) -> shape of the change; None if the tensors do not fit each other."""
    delta: Callable[[RoleTensors, Tensor], Tensor]
    """(tensors by role, the layer's weight) -> the change, in the shape that `shape` returns."""
    rank: Callable[[RoleShapes], int | None] = lambda shapes: None
    """The number that alpha is divided by; None if alpha has no effect."""

    @property
    def roles(self) -> frozenset[str]:
        """Every role that the method knows."""
        return self.optional.union(*self.needed)

    def matches(self, roles: Set[str]) -> bool:
        """Return whether roles are those of this method, none missing and none left."""
        return any(choice <= roles <= choice | self.optional for choice in self.needed)


def fits(shape: Shape | None, layer: Shape) -> bool:
    """Return whether a change of a shape can be viewed as a layer's weight.

    Trailing ones are of 1x1 convolutions, which some store as matrices; a matrix may hold kernels as columns.
    """
    if shape is None or not shape or shape[0] != layer[0] or math.prod(shape) != math.prod(layer):
        return False
    return len(shape) == 2 or _without_ones(shape) == _without_ones(layer)


def normalized_like(weight: Tensor, magnitude: Tensor, by_input: bool) -> Tensor:
    """Return a weight rescaled to given norms: DoRA (Liu et al. 2024, Equation 5).

    Args:
        weight: W + change, (o, i, ...).
        magnitude: the norm of each output's weights, or of each input's.
        by_input: whether the norms are of inputs, as in the first files of LyCORIS.
    """
    axes = [k for k in range(weight.ndim) if k != int(by_input)]
    norms = torch.linalg.vector_norm(weight, dim=axes, keepdim=True)
    return weight * (magnitude.reshape(norms.shape) / norms.clamp(min=torch.finfo(weight.dtype).eps))


def _without_ones(shape: Shape) -> Shape:
    size = len(shape)
    while size > 2 and shape[size - 1] == 1:
        size -= 1
    return shape[:size]


# ------------------------------------------------------------------------------------------------ products


def _product_shape(left: Shape, right: Shape, core: Shape | None = None) -> Shape | None:
    """Return the shape of left @ right: (o, r) x (r, i, ...).

    With a core (r, s, ...) it is the Tucker product: left (o, r) and right (s, i) or, transposed, (r, o) and (s, i).
    """
    if len(left) not in (2, 4) or len(right) not in (2, 4) or not all((*left, *right, *(core or ()))):
        return None
    if any(size != 1 for size in left[2:]):
        return None
    if core is None:
        return (left[0], *right[1:]) if left[1] == right[0] else None
    if len(core) != 4 or any(size != 1 for size in right[2:]) or core[1] != right[0]:
        return None
    return (left[0], right[1], *core[2:]) if left[1] == core[0] else None


def _product(left: Tensor, right: Tensor, core: Tensor | None = None) -> Tensor:
    if core is not None:
        return torch.einsum("rskl,or,si->oikl", core, left.flatten(1), right.flatten(1))
    return (left.flatten(1) @ right.flatten(1)).view(left.shape[0], *right.shape[1:])


def _lora_shape(shapes: RoleShapes, layer: Shape) -> Shape | None:
    return _product_shape(shapes["up"], shapes["down"], shapes.get("mid"))


def _lora(tensors: RoleTensors, weight: Tensor) -> Tensor:
    """Hu et al. 2021, Equation 3; with a core LyCORIS' Tucker form for convolutions."""
    return _product(tensors["up"], tensors["down"], tensors.get("mid"))


def _hada_shape(shapes: RoleShapes, layer: Shape) -> Shape | None:
    factors = []
    for k in "12":
        left, core = shapes[f"hada_w{k}_a"], shapes.get(f"hada_t{k}")
        factors.append(
            _product_shape(left if core is None else left[1::-1], shapes[f"hada_w{k}_b"], core)
            if len(left) == 2
            else None
        )
    return factors[0] if factors[0] == factors[1] else None


def _loha(tensors: RoleTensors, weight: Tensor) -> Tensor:
    """The Hadamard product of two products (FedPara, Hyeon-Woo et al. 2022, Proposition 1; Tucker: Proposition 3)."""

    def factor(k: str) -> Tensor:
        left, core = tensors[f"hada_w{k}_a"], tensors.get(f"hada_t{k}")
        return _product(left if core is None else left.T, tensors[f"hada_w{k}_b"], core)

    return factor("1") * factor("2")


def _kron_shape(shapes: RoleShapes, layer: Shape) -> Shape | None:
    first, second = shapes.get("lokr_w1"), shapes.get("lokr_w2")
    if first is None:
        first = _product_shape(shapes["lokr_w1_a"], shapes["lokr_w1_b"])
    if second is None:
        left, core = shapes["lokr_w2_a"], shapes.get("lokr_t2")
        left = left if core is None else left[1::-1]
        second = _product_shape(left, shapes["lokr_w2_b"], core)
    if first is None or second is None or len(first) != 2 or len(second) not in (2, 4):
        return None
    return (first[0] * second[0], first[1] * second[1], *second[2:])


def _lokr(tensors: RoleTensors, weight: Tensor) -> Tensor:
    """The Kronecker product of two factors, either of which may be a product itself (Yeh et al. 2024, Section 3.2)."""
    first = tensors["lokr_w1"] if "lokr_w1" in tensors else tensors["lokr_w1_a"] @ tensors["lokr_w1_b"]
    if "lokr_w2" in tensors:
        second = tensors["lokr_w2"]
    else:
        left, core = tensors["lokr_w2_a"], tensors.get("lokr_t2")
        second = _product(left if core is None else left.T, tensors["lokr_w2_b"], core)
    return torch.kron(first.view(*first.shape, *[1] * (second.ndim - 2)), second.contiguous())


def _glora_order(first: Shape, layer: Shape) -> tuple[str, str]:
    """Return the numbers of the left and the right factors: LyCORIS swapped them in 2024."""
    return ("1", "2") if first[0] == layer[1] else ("2", "1")


def _glora_shape(shapes: RoleShapes, layer: Shape) -> Shape | None:
    if not shapes["a1"] or len(layer) < 2:
        return None
    left, right = _glora_order(shapes["a1"], layer)
    inputs = _product_shape(shapes[f"a{left}"], shapes[f"a{right}"])
    if inputs is None or inputs[:2] != (layer[1], layer[1]) or math.prod(inputs[2:]) != 1:
        return None
    return _product_shape(shapes[f"b{left}"], shapes[f"b{right}"], shapes.get("bm"))


def _glora(tensors: RoleTensors, weight: Tensor) -> Tensor:
    """W A + B, both of low rank (Chavan et al. 2023, Equation 5, its two matrix terms)."""
    left, right = _glora_order(tuple(tensors["a1"].shape), tuple(weight.shape))
    inner = _product(tensors[f"a{left}"], tensors[f"a{right}"]).flatten(1)
    added = _product(tensors[f"b{left}"], tensors[f"b{right}"], tensors.get("bm"))
    return torch.einsum("oi...,ij->oj...", weight, inner).reshape(added.shape) + added


# ------------------------------------------------------------------------------------- factors and differences


def _shape_of(role: str) -> Callable[[RoleShapes, Shape], Shape | None]:
    return lambda shapes, layer: shapes[role]


def _full(tensors: RoleTensors, weight: Tensor) -> Tensor:
    return tensors["diff"]


def _replaced(tensors: RoleTensors, weight: Tensor) -> Tensor:
    return tensors["saved"].reshape(weight.shape) - weight


def _ia3_shape(shapes: RoleShapes, layer: Shape) -> Shape | None:
    return layer if math.prod(shapes["factor"]) in layer[:2] else None


def _ia3(tensors: RoleTensors, weight: Tensor) -> Tensor:
    """LyCORIS' (IA)^3: W times 1 + a factor for each output, or for each input (Liu et al. 2022, Section 3.3)."""
    factor = tensors["factor"].reshape(-1)
    outputs = not bool(tensors["on_input"].reshape(-1)[0])
    return weight * factor.view(-1 if outputs else 1, 1 if outputs else -1, *[1] * (weight.ndim - 2))


def _peft_ia3_shape(shapes: RoleShapes, layer: Shape) -> Shape | None:
    return layer if len(layer) == 2 and shapes["ia3_l"] in ((layer[0], 1), (1, layer[1])) else None


def _peft_ia3(tensors: RoleTensors, weight: Tensor) -> Tensor:
    """PEFT's (IA)^3 for matrices: W times a factor of each output (o, 1) or of each input (1, i)."""
    return weight * (tensors["ia3_l"] - 1)


# --------------------------------------------------------------------------------------------------- table


def _rows(*roles: str) -> Callable[[RoleShapes], int | None]:
    """Return the rows of the first of these roles that is there."""
    return lambda shapes: next((max(shapes[role][:1], default=0) for role in roles if role in shapes), None)


def _choices(*choices: Sequence[str]) -> tuple[frozenset[str], ...]:
    return tuple(map(frozenset, choices))


def _glora_rank(shapes: RoleShapes) -> int:
    return min(shapes["a1"][:2], default=0)


_HADA = ("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b")
_W1, _W2 = ("lokr_w1_a", "lokr_w1_b"), ("lokr_w2_a", "lokr_w2_b")
_LOKR = (
    ("lokr_w1", "lokr_w2"),
    ("lokr_w1", *_W2),
    (*_W1, "lokr_w2"),
    (*_W1, *_W2),
    ("lokr_w1", *_W2, "lokr_t2"),
    (*_W1, *_W2, "lokr_t2"),
)
NO_ROLES: frozenset[str] = frozenset()

FORMULAS = (
    Formula("LoRA", _choices(("down", "up")), frozenset({"mid"}), _lora_shape, _lora, _rows("down")),
    Formula(
        "LoHa",
        _choices(_HADA, (*_HADA, "hada_t1", "hada_t2")),
        NO_ROLES,
        _hada_shape,
        _loha,
        _rows("hada_w1_b"),
    ),
    Formula("LoKr", _choices(*_LOKR), NO_ROLES, _kron_shape, _lokr, _rows("lokr_w2_b", "lokr_w1_b")),
    Formula(
        "GLoRA", _choices(("a1", "a2", "b1", "b2")), frozenset({"bm"}), _glora_shape, _glora, _glora_rank
    ),
    Formula("full", _choices(("diff",)), NO_ROLES, _shape_of("diff"), _full),
    Formula("(IA)^3", _choices(("factor", "on_input")), NO_ROLES, _ia3_shape, _ia3),
    Formula("(IA)^3", _choices(("ia3_l",)), NO_ROLES, _peft_ia3_shape, _peft_ia3),
    Formula("saved weight", _choices(("saved",)), NO_ROLES, _shape_of("saved"), _replaced),
)
LORA_FORMULA, FULL, SAVED = FORMULAS[0], FORMULAS[4], FORMULAS[-1]
