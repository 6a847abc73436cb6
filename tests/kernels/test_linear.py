"""Each fast path of the layers beside its slow twin, and who must not be given it."""

import copy

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.autograd import forward_ad
from torch.func import functional_call
from torch.utils.flop_counter import FlopCounterMode

from triptych.kernels import linear as linear_module
from triptych.kernels.linear import _native, _wide, keeping, linear, one_call
from triptych.layers.attention import Attention, attention, in_slabs
from triptych.layers.cross_attention import GEGLU
from triptych.layers.mlp import Mlp
from triptych.layers.window import WindowAttention

# Rounding alone: fp32 sums in another order, bf16 rounds its result once more or once less.
CLOSE = {torch.float32: {"atol": 1e-5, "rtol": 1e-5}, torch.bfloat16: {"atol": 3e-2, "rtol": 2e-2}}


@pytest.fixture(scope="module", autouse=True)
def whatever_the_size():
    """Small products, too, take the fast path."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("triptych.kernels.linear.WORTH", 0)
        patch.setattr("triptych.kernels.linear.WORTH_AMX", 0)
        yield


def slow(x, weight, bias, gelu):
    x = F.linear(x, weight, bias)
    return x if gelu is None else F.gelu(x, approximate=gelu)


@settings(max_examples=30)
@given(
    shape=st.lists(st.integers(1, 7), min_size=0, max_size=3),
    i=st.integers(1, 40),
    o=st.integers(1, 40),
    biased=st.booleans(),
    gelu=st.sampled_from([None, "none", "tanh"]),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
)
def test_linear_is_product_and_gelu(shape, i, o, biased, gelu, dtype):
    x, weight = torch.randn(*shape, i, dtype=dtype), (torch.randn(o, i) / i**0.5).to(dtype)
    bias = torch.randn(o, dtype=dtype) if biased else None
    with torch.no_grad():
        found = linear(x, weight, bias, gelu)
    assert found.dtype == dtype
    torch.testing.assert_close(found, slow(x, weight, bias, gelu), **CLOSE[dtype])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("grad", [False, True])
def test_linear_times_another(dtype, grad):
    x, weight, bias, times = (torch.randn(*s, dtype=dtype) for s in ((3, 4, 20), (6, 20), (6,), (3, 4, 6)))
    expected, before = F.linear(x.float(), weight.float(), bias.float()) * times.float(), times.clone()
    with torch.set_grad_enabled(grad):
        found = linear(x, weight, bias, times=times)
    near = CLOSE[dtype] if dtype == torch.float32 else {"atol": 0.2, "rtol": 2e-2}
    torch.testing.assert_close(found.float(), expected, **near)
    assert torch.equal(times, before)


def test_linear_of_a_view():
    whole, weight = torch.randn(3, 8, 20), torch.randn(6, 20)[:, 2:12]
    for x in (whole[:, ::2, 5:15], whole[..., :10].transpose(0, 1), whole[:1, :, :10].expand(4, -1, -1)):
        with torch.inference_mode():
            torch.testing.assert_close(linear(x, weight), F.linear(x, weight), atol=1e-5, rtol=1e-5)
    assert linear(whole[:0, :, :10], weight).shape == (0, 8, 6)


@torch.no_grad()
def test_who_gets_the_one_call():
    x, weight = torch.randn(2, 5, 8), nn.Parameter(torch.randn(4, 8))
    assert one_call(x, weight) == (torch.float32 in _native())
    assert not one_call(x.double(), weight.double())
    assert not one_call(x.bfloat16(), weight)
    assert not one_call(x.to("meta"), weight.to("meta"))
    with torch.enable_grad():
        assert not one_call(x, weight)
    with torch.autocast("cpu", torch.bfloat16):
        assert linear(x, weight).dtype == torch.bfloat16
    with FlopCounterMode(display=False) as counter:
        linear(x, weight)
    assert counter.get_total_flops() == 2 * 2 * 5 * 8 * 4


# Transforms that ignore `no_grad`: each takes a function of one token and a token.
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


# Of PyTorch's own code, when it first derives forwards.
OLD_CODE = pytest.mark.filterwarnings("ignore:.*torch.jit.script")


@OLD_CODE
@pytest.mark.parametrize("mode", [torch.no_grad, torch.enable_grad])
@pytest.mark.parametrize("transform", TRANSFORMS.values(), ids=TRANSFORMS)
def test_transforms_reach_through(transform, mode):
    x, weight, bias = torch.randn(6), torch.randn(5, 6), torch.randn(5)
    with mode():
        found = transform(lambda x: linear(x, weight, bias, gelu="none"), x)
        wanted = transform(lambda x: slow(x, weight, bias, "none"), x)
        again = linear(x, weight, bias)  # nothing stays switched off
    torch.testing.assert_close(found, wanted, atol=1e-5, rtol=1e-5)
    assert all(part.ne(0).any() for part in (found if isinstance(found, tuple) else (found,)))
    torch.testing.assert_close(again, F.linear(x, weight, bias), atol=1e-5, rtol=1e-5)


@OLD_CODE
@pytest.mark.parametrize("part", [Attention(24, 3), WindowAttention(24, 3, (3, 3)), GEGLU(24, 40), Mlp(24, 40)],
                         ids=lambda part: type(part).__name__)  # fmt: skip
@torch.no_grad()
def test_a_weights_derivative_reaches_through(part):
    """Forwards, beside the quotient of differences."""
    part = copy.deepcopy(part).double().eval()
    for parameter in part.parameters():
        nn.init.normal_(parameter, std=0.5)
    weights, x = dict(part.named_parameters()), torch.randn(2, 9, 24, dtype=torch.float64)
    x = x[:, None] if isinstance(part, WindowAttention) else x
    part.float()(x.float())  # what it keeps of the plain call must not be used
    part.double()(x)
    towards = {name: torch.randn_like(value) for name, value in weights.items()}
    at = lambda weights: functional_call(part, weights, (x,))  # noqa: E731
    _, found = torch.func.jvp(at, (weights,), (towards,))
    sides = ({name: weights[name] + h * towards[name] for name in weights} for h in (1e-6, -1e-6))
    more, less = map(at, sides)
    torch.testing.assert_close(found, (more - less) / 2e-6, atol=1e-5, rtol=1e-5)
    with forward_ad.dual_level():
        turned = at({name: forward_ad.make_dual(weights[name], towards[name]) for name in weights})
        torch.testing.assert_close(forward_ad.unpack_dual(turned).tangent, found, atol=1e-9, rtol=1e-9)


def test_gradients_pass_as_ever():
    x, weight = torch.randn(3, 6), torch.randn(5, 6, requires_grad=True)
    found, expected = (
        torch.autograd.grad(made.sum(), weight)[0]
        for made in (linear(x, weight, gelu="tanh"), F.gelu(F.linear(x, weight), approximate="tanh"))
    )
    assert torch.equal(found, expected)


def test_export_names_no_private_call():
    with torch.no_grad():
        program = torch.export.export(Attention(6, 2).eval(), (torch.randn(1, 3, 6),))
    assert "mkldnn" not in str(program.graph)


@settings(max_examples=15)
@given(b=st.integers(1, 3), heads=st.integers(1, 3), n=st.integers(1, 70), m=st.integers(1, 70))
def test_slabs_are_attention(b, heads, n, m):
    q, k, v = torch.randn(b, heads, n, 8), torch.randn(b, heads, m, 8), torch.randn(b, heads, m, 8)
    torch.testing.assert_close(
        in_slabs(q, k, v), F.scaled_dot_product_attention(q, k, v), atol=1e-5, rtol=1e-5
    )


def test_several_slabs(monkeypatch):
    monkeypatch.setattr("triptych.layers.attention._SLAB", 50)
    q, k, v = torch.randn(3, 3, 2, 4, 7, 8)[:, 0]
    torch.testing.assert_close(
        in_slabs(q, k, v), F.scaled_dot_product_attention(q, k, v), atol=1e-5, rtol=1e-5
    )


@pytest.mark.parametrize("sharpness", [1.0, 6.0])
def test_bf16_attention_is_as_near_to_the_truth_as_bf16_allows(sharpness):
    """Slabs round the logits too: within three times the fused kernel's distance, also where softmax is sharp."""
    torch.manual_seed(0)
    q, k, v = torch.randn(3, 2, 3, 197, 64)
    q = (q * sharpness).bfloat16()
    k, v = k.bfloat16(), v.bfloat16()
    truth = F.scaled_dot_product_attention(q.double(), k.double(), v.double())
    fused = F.scaled_dot_product_attention(q, k, v)
    with torch.no_grad():
        chosen = attention(q, k, v)
    distance = [(found.double() - truth).norm() / truth.norm() for found in (chosen, fused)]
    assert distance[0] < max(3 * distance[1], 0.02)


def test_attention_module_on_both_paths():
    part = Attention(24, 3).eval()
    x = torch.randn(2, 9, 24)
    slow = part(x)
    with torch.no_grad():
        fast = part(x)
        rounded = copy.deepcopy(part).bfloat16()(x.bfloat16())
    torch.testing.assert_close(fast, slow.detach(), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(rounded.float(), slow.detach(), atol=2e-2, rtol=5e-2)


def test_weights_that_are_kept_are_the_same_weights():
    """Whole ones and views; those of another network, and of fp32, are left alone."""
    net, other = nn.Linear(24, 36).bfloat16(), nn.Linear(24, 36).bfloat16()
    x = torch.randn(5, 24).bfloat16()
    single = nn.Linear(24, 36)
    upper = net.weight.detach()[:12]
    with torch.inference_mode(), keeping(net), keeping(single):
        found = [linear(x, net.weight, net.bias, "none") for _ in range(2)]
        torch.testing.assert_close(found[0], slow(x, net.weight, net.bias, "none"), **CLOSE[torch.bfloat16])
        assert torch.equal(*found)
        torch.testing.assert_close(linear(x, upper), F.linear(x, upper), **CLOSE[torch.bfloat16])
        torch.testing.assert_close(
            linear(x, other.weight), F.linear(x, other.weight), **CLOSE[torch.bfloat16]
        )
        linear(x.float(), single.weight)
        fast = torch.bfloat16 in _native() and _wide()
        assert [len(kept.laid) for kept in linear_module._kept] == [2 * fast, 0]
    assert linear_module._kept == []
    with torch.no_grad():
        net.weight.zero_()
        assert not linear(x, net.weight).any()
