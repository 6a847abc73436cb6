"""Every fast path of `triptych.kernels` against its twin in public PyTorch: values, gradients, and the switch."""

import copy
import math
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any
from unittest.mock import patch

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from triptych.kernels import attention as attention_module
from triptych.kernels import conv as conv_module
from triptych.kernels import dispatch, foreach
from triptych.kernels import linear as linear_module
from triptych.kernels.attention import (
    blocked_attention,
    explicit_attention,
    fastest_attention,
    prefers_blocked,
    prefers_explicit,
)
from triptych.kernels.constant_cache import ConstantCache
from triptych.kernels.conv import conv2d, preferred_format, upsample_conv2d
from triptych.kernels.dispatch import has_amx, has_avx512, native_dtypes
from triptych.kernels.group_norm import group_norm
from triptych.kernels.linear import blocked_geglu, linear, packed_linears
from triptych.kernels.permute import permuted
from triptych.layers import window as window_module
from triptych.layers.attention import Attention, attention
from triptych.layers.cross_attention import GEGLU
from triptych.layers.norm import GroupNorm
from triptych.layers.resnet import Conv, Upsample, packed, seamless
from triptych.layers.window import WindowAttention, attend

# Rounding errors only: fp32 sums in another order, bf16 rounds its result once more or once less.
CLOSE = {torch.float32: {"atol": 1e-5, "rtol": 1e-5}, torch.bfloat16: {"atol": 3e-2, "rtol": 2e-2}}
EXACT = {"atol": 1e-11, "rtol": 1e-11}
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
V1 = {"cosine": False, "bias": "qkv"}
V2 = {"cosine": True, "bias": "qv"}
VERSIONS = pytest.mark.parametrize("form", [V1, V2], ids=["v1", "v2"])


@pytest.fixture(scope="module", autouse=True)
def any_size():
    """Small products take the fast path as well."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(linear_module, "MIN_MACS", 0)
        patch.setattr(linear_module, "MIN_MACS_AMX", 0)
        yield


def drawn(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0, **options: Any) -> torch.Tensor:
    """Return random numbers for a seed."""
    return (
        torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype).requires_grad_(**options)
    )


# The switch


@dataclass(frozen=True)
class FastPath:
    """A call that takes a fast path, and where that path is.

    Args:
        call: gives a tensor, or several.
        owner, name: of the function that only the fast path calls.
        supported: whether this CPU takes it.
        grad: whether gradients are recorded.
    """

    call: Callable[[], Any]
    owner: Any
    name: str
    supported: Callable[[], bool] = lambda: True
    grad: bool = False


def native(dtype: torch.dtype) -> Callable[[], bool]:
    return lambda: dtype in native_dtypes()


def channels_last(*shape: int, **options: Any) -> torch.Tensor:
    x = drawn(*shape, requires_grad=False, dtype=torch.bfloat16, **options)
    return x.contiguous(memory_format=torch.channels_last).requires_grad_()


def window_gradients() -> tuple[torch.Tensor, ...]:
    torch.manual_seed(0)
    part, x = make_windows((3, 3), V1), drawn(1, 6, 6, 6, dtype=torch.float64)
    y = attend(x, part, True)
    return y, *torch.autograd.grad(y.sum(), [x, part.qkv.weight])


def cached_constant() -> torch.Tensor:
    cache = ConstantCache(1000)
    cache(torch.ones, 3)
    return cache(torch.ones, 3)


def averaged() -> list[torch.Tensor]:
    inputs, ends = [drawn(3, requires_grad=False)], [drawn(3, seed=1, requires_grad=False)]
    foreach.lerp_(inputs, ends, torch.tensor(0.25))
    return inputs


def packed_conv(x: torch.Tensor) -> torch.Tensor:
    return conv2d(x, drawn(48, 32, 3, 3, dtype=x.dtype), None, 1, 1, packed={})


def upsampled() -> torch.Tensor:
    torch.manual_seed(0)
    return Upsample(4, 6)(drawn(2, 4, 17, 18))


def normed() -> tuple[torch.Tensor, ...]:
    x = channels_last(2, 16, 8, 8)
    weight, bias = drawn(16, seed=1), drawn(16, seed=2)
    y = group_norm(x, 4, weight, bias, 1e-5)
    return y, *torch.autograd.grad(y.float().square().sum(), [x, weight, bias])


def few_tokens() -> tuple[torch.Tensor, ...]:
    q, k, v = (
        drawn(2, 3, 5, 8, dtype=torch.bfloat16, seed=i, requires_grad=False).requires_grad_()
        for i in range(3)
    )
    y = fastest_attention(q, k, v)
    return y, *torch.autograd.grad(y.float().sum(), [q, k, v])


HALF = torch.bfloat16
SINGLE = torch.float32
PATHS = {
    "linear": FastPath(
        lambda: linear(drawn(5, 8), drawn(6, 8, seed=1), drawn(6, seed=2), "none"),
        linear_module, "_onednn_linear", lambda: SINGLE in native_dtypes() and has_avx512(),
    ),
    "packed linear": FastPath(
        lambda: linear(drawn(5, 8, dtype=HALF), drawn(6, 8, dtype=HALF, seed=1), None, "none"),
        linear_module, "_onednn_linear", lambda: HALF in native_dtypes() and has_avx512(),
    ),
    "geglu": FastPath(
        lambda: seeded(GEGLU, 8, 12).eval()(drawn(2, 5, 8)),
        linear_module, "_onednn_linear", lambda: SINGLE in native_dtypes() and has_avx512(),
    ),
    "blocked attention": FastPath(
        lambda: fastest_attention(*(drawn(1, 2, 7, 8, dtype=HALF, seed=i) for i in range(3))),
        attention_module, "blocked_attention", lambda: HALF in native_dtypes() and not has_amx(),
    ),
    "explicit attention": FastPath(few_tokens, attention_module, "explicit_attention", grad=True),
    "packed convolution": FastPath(
        lambda: packed_conv(drawn(2, 32, 5, 6)), torch.Tensor, "to_mkldnn", native(SINGLE)
    ),
    "upsampling": FastPath(upsampled, conv_module, "summed_weights", native(SINGLE)),
    "group norm": FastPath(normed, torch, "native_group_norm", grad=True),
    "windows": FastPath(window_gradients, window_module, "permuted", grad=True),
    "constants": FastPath(cached_constant, ConstantCache, "_store"),
    "norms": FastPath(lambda: foreach.norms([drawn(3), drawn(2, 2)]), torch, "_foreach_norm"),
    "average": FastPath(averaged, torch, "_foreach_lerp_"),
}  # fmt: skip


def seeded(module: Callable[..., nn.Module], *sizes: int) -> nn.Module:
    torch.manual_seed(0)
    return module(*sizes)


def flat(result: Any) -> list[torch.Tensor]:
    return [result] if isinstance(result, torch.Tensor) else list(result)


@pytest.mark.parametrize("path", PATHS.values(), ids=PATHS)
def test_the_switch_takes_the_twin(path, monkeypatch):
    with torch.set_grad_enabled(path.grad), patch.object(path.owner, path.name, side_effect=FastPathTaken):
        if path.supported():
            with pytest.raises(FastPathTaken):
                path.call()
        monkeypatch.setattr(dispatch, "ENABLED", False)
        twin = flat(path.call())
    monkeypatch.setattr(dispatch, "ENABLED", True)
    with torch.set_grad_enabled(path.grad):
        fast = flat(path.call())
    for mine, right in zip(fast, twin, strict=True):
        torch.testing.assert_close(mine.float(), right.float(), atol=3e-2, rtol=2e-2)


class FastPathTaken(Exception):
    """The fast path was taken."""


@pytest.mark.parametrize(("value", "enabled"), [("0", False), ("1", True), (None, True)])
def test_the_switch_is_read_from_the_environment(value, enabled):
    environment = {name: old for name, old in os.environ.items() if name != "TRIPTYCH_KERNELS"}
    environment |= {} if value is None else {"TRIPTYCH_KERNELS": value}
    code = "from triptych.kernels import dispatch; print(dispatch.ENABLED, dispatch.fast_path_allowed())"
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True
    )
    assert done.stdout.split() == [str(enabled)] * 2


# Linear layers


def public_linear(x, weight, bias, gelu):
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
        result = linear(x, weight, bias, gelu)
    assert result.dtype == dtype
    torch.testing.assert_close(result, public_linear(x, weight, bias, gelu), **CLOSE[dtype])


@DTYPES
@pytest.mark.parametrize("grad", [False, True])
def test_linear_times_another(dtype, grad):
    x, weight, bias, times = (torch.randn(*s, dtype=dtype) for s in ((3, 4, 20), (6, 20), (6,), (3, 4, 6)))
    expected, before = F.linear(x.float(), weight.float(), bias.float()) * times.float(), times.clone()
    with torch.set_grad_enabled(grad):
        result = linear(x, weight, bias, times=times)
    near = CLOSE[dtype] if dtype == torch.float32 else {"atol": 0.2, "rtol": 2e-2}
    torch.testing.assert_close(result.float(), expected, **near)
    assert torch.equal(times, before)


def test_linear_of_a_view():
    full, weight = torch.randn(3, 8, 20), torch.randn(6, 20)[:, 2:12]
    for x in (full[:, ::2, 5:15], full[..., :10].transpose(0, 1), full[:1, :, :10].expand(4, -1, -1)):
        with torch.inference_mode():
            torch.testing.assert_close(linear(x, weight), F.linear(x, weight), atol=1e-5, rtol=1e-5)
    assert linear(full[:0, :, :10], weight).shape == (0, 8, 6)


def test_gradients_of_linear():
    x, weight = torch.randn(3, 6), torch.randn(5, 6, requires_grad=True)
    grad, expected = (
        torch.autograd.grad(y.sum(), weight)[0]
        for y in (linear(x, weight, gelu="tanh"), F.gelu(F.linear(x, weight), approximate="tanh"))
    )
    assert torch.equal(grad, expected)


@torch.no_grad()
def test_geglu_in_blocks():
    part, x = GEGLU(6, 8).eval(), torch.randn(10, 6)
    value, gate = part.fc1(x).chunk(2, dim=-1)
    expected = part.fc2(value * F.gelu(gate))
    for rows in (1, 3, 10, 11, None):
        result = blocked_geglu(x, part.fc1.weight, part.fc1.bias, part.fc2.weight, part.fc2.bias, rows)
        torch.testing.assert_close(result, expected, atol=1e-5, rtol=1e-5)


def test_packed_weights_are_the_same_weights():
    """Full tensors and views are packed; those of another network, and of fp32, stay as they are."""
    net, other = nn.Linear(24, 36).bfloat16(), nn.Linear(24, 36).bfloat16()
    x = torch.randn(5, 24).bfloat16()
    single = nn.Linear(24, 36)
    upper = net.weight.detach()[:12]
    with torch.inference_mode(), packed_linears(net), packed_linears(single):
        results = [linear(x, net.weight, net.bias, "none") for _ in range(2)]
        torch.testing.assert_close(
            results[0], public_linear(x, net.weight, net.bias, "none"), **CLOSE[torch.bfloat16]
        )
        assert torch.equal(*results)
        torch.testing.assert_close(linear(x, upper), F.linear(x, upper), **CLOSE[torch.bfloat16])
        torch.testing.assert_close(
            linear(x, other.weight), F.linear(x, other.weight), **CLOSE[torch.bfloat16]
        )
        linear(x.float(), single.weight)
        fast = torch.bfloat16 in native_dtypes() and has_avx512()
        assert [len(weights.packed) for weights in linear_module._packed] == [2 * fast, 0]
    assert linear_module._packed == []
    with torch.no_grad():
        net.weight.zero_()
        assert not linear(x, net.weight).any()


# Attention


@settings(max_examples=15)
@given(b=st.integers(1, 3), heads=st.integers(1, 3), n=st.integers(1, 70), m=st.integers(1, 70))
def test_blocks_are_attention(b, heads, n, m):
    q, k, v = torch.randn(b, heads, n, 8), torch.randn(b, heads, m, 8), torch.randn(b, heads, m, 8)
    torch.testing.assert_close(
        blocked_attention(q, k, v), F.scaled_dot_product_attention(q, k, v), atol=1e-5, rtol=1e-5
    )


def public_attention(q, k, v, bias, scale):
    logits = q @ k.transpose(-2, -1) * (q.shape[-1] ** -0.5 if scale is None else scale)
    return (logits if bias is None else logits + bias).softmax(-1) @ v


@settings(max_examples=60)
@given(
    b=st.integers(1, 4),
    heads=st.integers(1, 7),
    n=st.integers(1, 6),
    m=st.integers(1, 6),
    broadcast=st.one_of(st.none(), st.tuples(*[st.booleans()] * 3)),
    scale=st.sampled_from([None, 1.0, 0.3]),
    block=st.integers(1, 30),
)
def test_blocks_with_a_bias(b, heads, n, m, broadcast, scale, block):
    q = torch.randn(b, n, heads, 4, dtype=torch.float64).transpose(1, 2)  # strides as after a projection
    k, v = torch.randn(2, b, m, heads, 4, dtype=torch.float64).transpose(2, 3)
    bias = None
    if broadcast is not None:
        sizes = [1 if shared else size for shared, size in zip(broadcast, (b, heads, n), strict=True)]
        bias = torch.randn(*sizes, m).double()
        bias = torch.where(torch.rand_like(bias) < 0.3, -math.inf, bias)
        bias[..., 0] = 0
    before = None if bias is None else bias.clone()
    with pytest.MonkeyPatch.context() as patch, torch.no_grad():
        patch.setattr(attention_module, "_BLOCK_LOGITS", max(1, block * n * m // torch.get_num_threads()))
        result = blocked_attention(q, k, v, bias, scale)
    torch.testing.assert_close(result, public_attention(q, k, v, bias, scale), **EXACT)
    assert bias is None or torch.equal(bias, before)  # other calls add the same bias


@pytest.mark.parametrize("budget", [1, 7, 50, 71, 200, 10_000])
@pytest.mark.parametrize("biased", [False, True])
def test_blocks_of_queries(budget, biased, monkeypatch):
    monkeypatch.setattr(attention_module, "_BLOCK_LOGITS", budget)
    q, k, v = torch.randn(2, 3, 10, 4), torch.randn(2, 3, 7, 4), torch.randn(2, 3, 7, 4)
    bias = torch.randn(1, 3, 10, 7) if biased else None
    expected = F.scaled_dot_product_attention(q, k, v, attn_mask=bias)
    torch.testing.assert_close(blocked_attention(q, k, v, bias), expected, atol=1e-5, rtol=1e-5)


def test_several_blocks(monkeypatch):
    monkeypatch.setattr(attention_module, "_BLOCK_LOGITS", 50)
    q, k, v = torch.randn(3, 3, 2, 4, 7, 8)[:, 0]
    torch.testing.assert_close(
        blocked_attention(q, k, v), F.scaled_dot_product_attention(q, k, v), atol=1e-5, rtol=1e-5
    )


@torch.no_grad()
def test_blocks_in_bf16():
    q, k, v = torch.randn(3, 2, 24, 49, 32).bfloat16()
    bias = torch.randn(1, 24, 49, 49).bfloat16()
    expected = F.scaled_dot_product_attention(q, k, v, attn_mask=bias)
    torch.testing.assert_close(blocked_attention(q, k, v, bias), expected, atol=3e-2, rtol=2e-2)


@pytest.mark.parametrize("sharpness", [1.0, 6.0])
def test_bf16_attention_is_as_near_to_the_truth_as_bf16_allows(sharpness):
    """Blocks round the logits too: within three times the fused kernel's distance, also where softmax is sharp."""
    torch.manual_seed(0)
    q, k, v = torch.randn(3, 2, 3, 197, 64)
    q = (q * sharpness).bfloat16()
    k, v = k.bfloat16(), v.bfloat16()
    truth = F.scaled_dot_product_attention(q.double(), k.double(), v.double())
    fused = F.scaled_dot_product_attention(q, k, v)
    with torch.no_grad():
        chosen = attention(q, k, v)
    distance = [(result.double() - truth).norm() / truth.norm() for result in (chosen, fused)]
    assert distance[0] < max(3 * distance[1], 0.02)


def test_attention_module_on_both_paths():
    part = Attention(24, 3).eval()
    x = torch.randn(2, 9, 24)
    expected = part(x)
    with torch.no_grad():
        fast = part(x)
        rounded = copy.deepcopy(part).bfloat16()(x.bfloat16())
    torch.testing.assert_close(fast, expected.detach(), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(rounded.float(), expected.detach(), atol=2e-2, rtol=5e-2)


def test_blocks_are_for_bf16_without_gradients(monkeypatch):
    monkeypatch.setattr(dispatch, "native_dtypes", lambda: {torch.float32, torch.bfloat16})
    monkeypatch.setattr(attention_module, "has_amx", lambda: False)
    q = torch.randn(1, 2, 3, 4).bfloat16()
    assert not prefers_blocked(q, q)
    with torch.no_grad():
        assert prefers_blocked(q, q)
        assert not prefers_blocked(q.float(), q.float())
        monkeypatch.setattr(attention_module, "has_amx", lambda: True)
        assert not prefers_blocked(q, q)


@pytest.mark.parametrize("biased", [False, True])
def test_few_tokens_train_in_bf16_as_in_fp32(biased, monkeypatch):
    q, k, v = (torch.randn(2, 3, n, 8).bfloat16().requires_grad_() for n in (5, 4, 4))
    bias = torch.randn(1, 3, 5, 4) if biased else None
    calls = []
    monkeypatch.setattr(
        attention_module, "explicit_attention", lambda *args: calls.append(1) or explicit_attention(*args)
    )
    out = attention(q, k, v, bias=bias, scale=0.3)
    assert calls
    exact = [x.detach().float().requires_grad_() for x in (q, k, v)]
    expected = F.scaled_dot_product_attention(*exact, attn_mask=bias, scale=0.3)
    torch.testing.assert_close(out.float(), expected, atol=0.03, rtol=0.03)
    dy = torch.randn_like(expected)
    grads = torch.autograd.grad(out, (q, k, v), dy.bfloat16())
    for mine, right in zip(grads, torch.autograd.grad(expected, exact, dy), strict=True):
        torch.testing.assert_close(mine.float(), right, atol=0.05, rtol=0.05)


def test_many_tokens_and_no_gradients_keep_the_fused_kernel():
    q = torch.zeros(1, 1, 300, 8, dtype=torch.bfloat16, requires_grad=True)
    assert not prefers_explicit(q, q)
    assert prefers_explicit(q[:, :, :256], q[:, :, :256])
    assert not prefers_explicit(q.float(), q.float())
    with torch.no_grad():
        assert not prefers_explicit(q[:, :, :16], q[:, :, :16])


# Windows: gathers against roll and partition


def make_windows(window, form, dtype=torch.float64, heads=2):
    part = WindowAttention(3 * heads, heads, window, **form)
    for parameter in part.parameters():
        nn.init.normal_(parameter, std=0.7)
    return part.eval().to(dtype)


def rolled(x, part, shifted):
    """The twin: pad, roll, partition, and back."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(window_module, "fast_path_allowed", lambda: False)
        return attend(x, part, shifted)


@VERSIONS
@settings(max_examples=40)
@given(
    size=st.tuples(st.integers(1, 13), st.integers(1, 13)),
    window=st.tuples(st.integers(1, 5), st.integers(1, 5)),
    shifted=st.booleans(),
    batch=st.integers(1, 3),
)
def test_gathers_are_pad_roll_and_partition(size, window, shifted, batch, form):
    part, x = make_windows(window, form), torch.randn(batch, *size, 6, dtype=torch.float64)
    before = x.clone()
    with torch.no_grad():
        torch.testing.assert_close(attend(x, part, shifted), rolled(x, part, shifted), **EXACT)
        strided = x.permute(2, 0, 1, 3).contiguous().permute(1, 2, 0, 3)
        torch.testing.assert_close(attend(strided, part, shifted), rolled(x, part, shifted), **EXACT)
    assert torch.equal(x, before)  # padding was written into a copy


@torch.no_grad()
def test_padding_without_a_bias_is_zero():
    part = make_windows((3, 4), {"cosine": False, "bias": "none"})
    x = torch.randn(2, 7, 9, 6, dtype=torch.float64)
    torch.testing.assert_close(attend(x, part, True), rolled(x, part, True), **EXACT)


@VERSIONS
@pytest.mark.parametrize("shifted", [False, True], ids=["w-msa", "sw-msa"])
@pytest.mark.parametrize("size", [(14, 21), (13, 9)], ids=["full windows", "padded"])
def test_gradients_through_gathers_are_those_through_rolls(size, shifted, form):
    part = make_windows((7, 7), form)
    x = torch.randn(2, *size, 6, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(2, *size, 6, dtype=torch.float64)

    def gradients(function):
        y = function(x, part, shifted)
        return y, *torch.autograd.grad((y * weight).sum(), [x, *part.parameters()])

    for mine, right in zip(gradients(attend), gradients(rolled), strict=True):
        torch.testing.assert_close(mine, right, atol=1e-10, rtol=1e-10)


def test_second_gradients_through_gathers():
    """A gradient penalty needs second derivatives."""
    part = make_windows((7, 7), V1)
    x = torch.randn(1, 14, 14, 6, dtype=torch.float64, requires_grad=True)

    def penalty(function):
        (dx,) = torch.autograd.grad(function(x, part, True).pow(3).sum(), x, create_graph=True)
        return torch.autograd.grad(dx.square().sum(), x)[0]

    torch.testing.assert_close(penalty(attend), penalty(rolled), atol=1e-10, rtol=1e-10)


def test_a_permutation_is_a_gather():
    order = torch.randperm(7)
    x = torch.randn(2, 7, 3, dtype=torch.float64, requires_grad=True)
    assert torch.equal(permuted(x, order, order.argsort()), x.index_select(1, order))
    assert torch.autograd.gradcheck(lambda x: permuted(x, order, order.argsort()), x)


# Group norm


def maps(shape, dtype, order=torch.channels_last, seed=0):
    x = torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * 2 + 1
    return x.to(dtype).contiguous(memory_format=order)


def norm_of(channels, layer=GroupNorm, dtype=torch.float32):
    norm = layer(8, channels, dtype=dtype)
    with torch.no_grad():
        for i, parameter in enumerate(norm.parameters()):
            parameter.copy_(maps((1, channels, 1, 1), dtype, seed=i).flatten())
    return norm


def norm_gradients(norm, x, dy):
    x = x.detach().requires_grad_()
    return torch.autograd.grad(norm(x), [x, norm.weight, norm.bias], dy)


@pytest.mark.parametrize("shape", [(2, 16, 8, 8), (3, 32, 5, 7), (1, 64, 16, 16), (5, 32, 64, 64)], ids=str)
def test_gradients_of_group_norm_are_those_of_the_definition(shape):
    norm, exact = norm_of(shape[1]), norm_of(shape[1], nn.GroupNorm, torch.float64)
    exact.load_state_dict(norm.state_dict())
    x, dy = maps(shape, torch.bfloat16), maps(shape, torch.bfloat16, seed=2)
    y = norm(x.requires_grad_())
    assert type(y.grad_fn).__name__ == "_ChannelsLastGroupNormBackward"
    assert torch.equal(y, F.group_norm(x, 8, norm.weight, norm.bias))
    grads = norm_gradients(norm, x, dy)
    dx, *weights = norm_gradients(exact, x.double(), dy.double())
    assert (grads[0].double() - dx).norm() < 3e-3 * dx.norm()
    for mine, right in zip(grads[1:], weights, strict=True):
        assert (mine.double() - right).norm() < 1e-5 * right.norm()
    # The layer before sums the gradient over pixels, so no error may be the same in all of them.
    mine, right = (d.double().sum((0, 2, 3)) for d in (grads[0], dx))
    assert (mine - right).norm() < 1e-2 * right.norm()
    assert grads[0].is_contiguous(memory_format=torch.channels_last)


def test_second_gradients_of_group_norm():
    """A gradient penalty needs second derivatives."""

    def penalty(norm):
        x = maps((2, 16, 8, 8), torch.bfloat16).requires_grad_()
        (dx,) = torch.autograd.grad(norm(x).float().pow(3).sum(), x, create_graph=True)
        return torch.autograd.grad(dx.float().square().sum(), [x, norm.weight])

    for mine, right in zip(penalty(norm_of(16)), penalty(norm_of(16, nn.GroupNorm)), strict=True):
        assert (mine - right).float().norm() < 2e-2 * right.float().norm()


# Convolutions


@torch.no_grad()
@DTYPES
@pytest.mark.parametrize("stride", [1, 2])
def test_packed_convolutions_are_the_same_convolutions(dtype, stride):
    conv, x = Conv(32, 48, stride).to(dtype), torch.randn(2, 32, 5, 6).to(dtype)
    expected = conv(x)
    with packed(conv):
        for images in (x, x.contiguous(memory_format=torch.channels_last), x):
            torch.testing.assert_close(conv(images), expected, atol=1e-2, rtol=1e-2)
            torch.testing.assert_close(conv(images[:1]), expected[:1], atol=1e-2, rtol=1e-2)
        assert len(conv.packed) == (dtype in native_dtypes())  # one for every batch
    assert conv.packed is None


@pytest.mark.parametrize("wrap", [(False, False), (True, True), (True, False), (False, True)])
def test_upsampling_in_fewer_products(wrap):
    up, x = Upsample(4, 6), torch.randn(2, 4, 17, 18)
    with seamless(up, *wrap):
        expected = up(x)
        assert expected.requires_grad
        with (
            torch.no_grad(),
            patch.object(conv_module, "summed_weights", wraps=conv_module.summed_weights) as fast,
        ):
            torch.testing.assert_close(up(x), expected, atol=1e-5, rtol=1e-5)
            up(x[..., :8, :8])
            up(x, (33, 36))
            assert fast.call_count == (torch.float32 in native_dtypes())  # not for small maps and odd sizes
        weight, bias = up.conv.weight, up.conv.bias
        torch.testing.assert_close(upsample_conv2d(x, weight, bias, wrap), expected, atol=1e-5, rtol=1e-5)


@torch.no_grad()
@DTYPES
def test_upsampling_with_packed_sums(dtype):
    """Repeated calls, in both memory formats and for another batch, use the sums of the first call."""
    up, x = Upsample(16, 24).to(dtype), torch.randn(2, 16, 4, 6).to(dtype)
    enlarged = F.interpolate(x.float(), scale_factor=2)
    expected = F.conv2d(enlarged, up.conv.weight.float(), up.conv.bias.float(), padding=1)
    near = {"atol": 1e-5, "rtol": 1e-5} if dtype == torch.float32 else {"atol": 2e-2, "rtol": 2e-2}
    with packed(up), patch.object(conv_module, "summed_weights", wraps=conv_module.summed_weights) as sums:
        for images in (x, x.contiguous(memory_format=torch.channels_last), x):
            out = up(images)
            assert out.is_contiguous() == images.is_contiguous()
            torch.testing.assert_close(out.float(), expected, **near)
        torch.testing.assert_close(up(x[:1]).float(), expected[:1], **near)
        with seamless(up):
            torch.testing.assert_close(up(x), upsample_conv2d(x, up.conv.weight, up.conv.bias, (True, True)))
        assert sums.call_count <= 2  # the second is the call in the line above
        assert bool(up.conv.packed) == (dtype in native_dtypes())
    assert up.conv.packed is None


def test_channels_last_where_that_is_faster():
    x, weight = torch.randn(2, 3, 4, 5).bfloat16(), torch.zeros(1).bfloat16()
    with torch.no_grad():
        result = preferred_format(x, weight)
        assert torch.equal(result, x)
        assert result.is_contiguous() == (not has_amx())
        assert preferred_format(x.float(), weight.float()).is_contiguous()
    assert preferred_format(x, weight).is_contiguous()  # training keeps the format


# Lists of tensors


@DTYPES
def test_lists_of_tensors(dtype):
    tensors, ends = ([torch.randn(n, 3).to(dtype) for n in (1, 4, 2)] for _ in range(2))
    for norm, tensor in zip(foreach.norms(tensors), tensors, strict=True):
        torch.testing.assert_close(norm, torch.linalg.vector_norm(tensor))
    expected = [torch.lerp(x, end, 0.3) for x, end in zip(tensors, ends, strict=True)]
    foreach.lerp_(tensors, ends, torch.tensor(0.3, dtype=dtype))
    for mine, right in zip(tensors, expected, strict=True):
        torch.testing.assert_close(mine, right, **CLOSE[dtype])
