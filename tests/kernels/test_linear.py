"""When a linear layer must not take its fast path: under transforms, autocast, counters and export."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.autograd import forward_ad
from torch.func import functional_call
from torch.utils.flop_counter import FlopCounterMode

from triptych.kernels.dispatch import native_dtypes, onednn_allowed
from triptych.kernels.linear import linear
from triptych.layers.attention import Attention
from triptych.layers.cross_attention import GEGLU
from triptych.layers.mlp import Mlp
from triptych.layers.window import WindowAttention


@pytest.fixture(scope="module", autouse=True)
def any_size():
    """Small products take the fast path as well."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("triptych.kernels.linear.MIN_MACS", 0)
        patch.setattr("triptych.kernels.linear.MIN_MACS_AMX", 0)
        yield


def public_linear(x, weight, bias, gelu):
    x = F.linear(x, weight, bias)
    return x if gelu is None else F.gelu(x, approximate=gelu)


@torch.no_grad()
def test_when_onednn_is_allowed():
    x, weight = torch.randn(2, 5, 8), nn.Parameter(torch.randn(4, 8))
    assert onednn_allowed(x, weight) == (torch.float32 in native_dtypes())
    assert not onednn_allowed(x.double(), weight.double())
    assert not onednn_allowed(x.bfloat16(), weight)
    assert not onednn_allowed(x.to("meta"), weight.to("meta"))
    with torch.enable_grad():
        assert not onednn_allowed(x, weight)
    with torch.autocast("cpu", torch.bfloat16):
        assert linear(x, weight).dtype == torch.bfloat16
    with FlopCounterMode(display=False) as counter:
        linear(x, weight)
    assert counter.get_total_flops() == 2 * 2 * 5 * 8 * 4


# Transforms that ignore `no_grad`, as functions of (function of a token, token).
TRANSFORMS = {
    "jvp": lambda f, x: torch.func.jvp(f, (x,), (x.cos(),)),
    "vmap": lambda f, x: torch.func.vmap(f)(torch.stack([x, 2 * x])),
    "grad": lambda f, x: torch.func.grad(lambda x: f(x).square().sum())(x),
    "jacfwd": lambda f, x: torch.func.jacfwd(f)(x),
    "jacrev": lambda f, x: torch.func.jacrev(f)(x),
    "hessian": lambda f, x: torch.func.hessian(lambda x: f(x).square().sum())(x),
    "dual numbers": lambda f, x: dual(f, x),
}


def dual(f, x):
    with forward_ad.dual_level():
        return tuple(forward_ad.unpack_dual(f(forward_ad.make_dual(x, x.cos()))))


# Raised by PyTorch's own code at its first forward-mode derivative.
OLD_CODE = pytest.mark.filterwarnings("ignore:.*torch.jit.script")


@OLD_CODE
@pytest.mark.parametrize("mode", [torch.no_grad, torch.enable_grad])
@pytest.mark.parametrize("transform", TRANSFORMS.values(), ids=TRANSFORMS)
def test_transforms_reach_through(transform, mode):
    x, weight, bias = torch.randn(6), torch.randn(5, 6), torch.randn(5)
    with mode():
        result = transform(lambda x: linear(x, weight, bias, gelu="none"), x)
        expected = transform(lambda x: public_linear(x, weight, bias, "none"), x)
        again = linear(x, weight, bias)
    torch.testing.assert_close(result, expected, atol=1e-5, rtol=1e-5)
    assert all(part.ne(0).any() for part in (result if isinstance(result, tuple) else (result,)))
    torch.testing.assert_close(again, F.linear(x, weight, bias), atol=1e-5, rtol=1e-5)


@OLD_CODE
@pytest.mark.parametrize("part", [Attention(24, 3), WindowAttention(24, 3, (3, 3)), GEGLU(24, 40), Mlp(24, 40)],
                         ids=lambda part: type(part).__name__)  # fmt: skip
@torch.no_grad()
def test_a_weights_derivative_reaches_through(part):
    """Forward-mode derivative against a finite difference."""
    part = copy.deepcopy(part).double().eval()
    for parameter in part.parameters():
        nn.init.normal_(parameter, std=0.5)
    weights, x = dict(part.named_parameters()), torch.randn(2, 9, 24, dtype=torch.float64)
    x = x[:, None] if isinstance(part, WindowAttention) else x
    part.float()(x.float())  # what this call caches must not be used
    part.double()(x)
    tangents = {name: torch.randn_like(value) for name, value in weights.items()}
    at = lambda weights: functional_call(part, weights, (x,))  # noqa: E731
    _, tangent = torch.func.jvp(at, (weights,), (tangents,))
    sides = ({name: weights[name] + h * tangents[name] for name in weights} for h in (1e-6, -1e-6))
    more, less = map(at, sides)
    torch.testing.assert_close(tangent, (more - less) / 2e-6, atol=1e-5, rtol=1e-5)
    with forward_ad.dual_level():
        output = at({name: forward_ad.make_dual(weights[name], tangents[name]) for name in weights})
        torch.testing.assert_close(forward_ad.unpack_dual(output).tangent, tangent, atol=1e-9, rtol=1e-9)


def test_export_names_no_private_call():
    with torch.no_grad():
        program = torch.export.export(Attention(6, 2).eval(), (torch.randn(1, 3, 6),))
    assert "mkldnn" not in str(program.graph)
