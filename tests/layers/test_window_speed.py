"""Window attention's fast paths, each beside its slow twin: gathers, which spare padding its products, beside roll and
partition; slabs beside the fused kernel; and who must not be given them."""

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.flop_counter import FlopCounterMode

from triptych.kernels.constant_cache import Kept
from triptych.layers import attention as attention_module
from triptych.layers import window as window_module
from triptych.layers.attention import in_slabs, slabs_pay
from triptych.layers.capture import capture
from triptych.layers.window import WindowAttention, attend, shift_mask

V1 = {"cosine": False, "bias": "qkv"}
V2 = {"cosine": True, "bias": "qv"}
BARE = {"cosine": False, "bias": "none"}
VERSIONS = pytest.mark.parametrize("form", [V1, V2], ids=["v1", "v2"])
CLOSE = {"atol": 1e-11, "rtol": 1e-11}


def make(window, form, dtype=torch.float64, heads=2):
    part = WindowAttention(3 * heads, heads, window, **form)
    for parameter in part.parameters():
        torch.nn.init.normal_(parameter, std=0.7)
    return part.eval().to(dtype)


@pytest.fixture
def slabs(monkeypatch):
    """Slabs of a few heads, in every precision."""
    monkeypatch.setattr(window_module, "slabs_pay", lambda q, k: True)
    monkeypatch.setattr(attention_module, "slabs_pay", lambda q, k: True)
    monkeypatch.setattr(attention_module, "_SLAB", 5 * 12 * 12)


def rolled(x, part, shifted):
    """The slow twin: pad, roll, partition, and back."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(window_module, "plain", lambda: False)
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
    part, x = make(window, form), torch.randn(batch, *size, 6, dtype=torch.float64)
    kept = x.clone()
    with torch.no_grad():
        torch.testing.assert_close(attend(x, part, shifted), rolled(x, part, shifted), **CLOSE)
        strided = x.permute(2, 0, 1, 3).contiguous().permute(1, 2, 0, 3)
        torch.testing.assert_close(attend(strided, part, shifted), rolled(x, part, shifted), **CLOSE)
    assert torch.equal(x, kept)  # padding was written into a copy


@torch.no_grad()
def test_padding_of_no_bias_is_nothing():
    part, x = make((3, 4), BARE), torch.randn(2, 7, 9, 6, dtype=torch.float64)
    torch.testing.assert_close(attend(x, part, True), rolled(x, part, True), **CLOSE)


@torch.no_grad()
def test_padding_costs_no_products(monkeypatch):
    part, x = make((3, 4), V1), torch.randn(2, 7, 9, 6, dtype=torch.float64)
    seen = []
    slow = window_module.linear
    monkeypatch.setattr(window_module, "linear", lambda x, *args: seen.append(x.shape) or slow(x, *args))
    attend(x, part, True)
    assert seen == [(2, 63, 6)] * 2


@torch.no_grad()
def test_hooks_are_called():
    part, x = make((3, 4), V1), torch.randn(2, 7, 9, 6, dtype=torch.float64)
    given = []
    part.register_forward_hook(lambda *call: given.append(call[-1].shape))
    attend(x, part, True)
    assert given == [(2, 63, 6)]


def test_who_is_given_gathers(monkeypatch):
    part, x = make((3, 3), V1), torch.randn(1, 7, 7, 6, dtype=torch.float64)
    calls, partition = [], window_module.partition
    monkeypatch.setattr(window_module, "partition", lambda *args: calls.append(1) or partition(*args))
    attend(x, part, True)  # somebody needs the derivative
    assert len(calls) == 1
    with torch.no_grad(), FlopCounterMode(display=False):  # somebody counts
        attend(x, part, True)
    assert len(calls) == 2
    with torch.no_grad():
        attend(x, part, True)
    assert len(calls) == 2


def test_what_is_kept_is_of_these_sizes(monkeypatch):
    part, x = make((3, 3), V1), torch.randn(1, 7, 8, 6, dtype=torch.float64)
    small = Kept(2**20)
    monkeypatch.setattr(window_module, "kept", small)
    with torch.no_grad():
        wanted = attend(x, part, True)
        assert [make.__name__ for make, _ in small.entries] == ["shift_mask", "order_of", "relative_index"]
        assert small.held == sum(t.nbytes for made in small.entries.values() for t in _parts(made))
        assert torch.equal(attend(x, part, True), wanted)
        attend(x[:, :5], part, True)
    assert len(small.entries) == 5


def _parts(made):
    return made if isinstance(made, tuple) else (made,)


def slow(q, k, v, bias, scale):
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
    slab=st.integers(1, 30),
)
def test_slabs_are_attention(b, heads, n, m, broadcast, scale, slab):
    q = torch.randn(b, n, heads, 4, dtype=torch.float64).transpose(1, 2)  # as a projection leaves them
    k, v = torch.randn(2, b, m, heads, 4, dtype=torch.float64).transpose(2, 3)
    bias = None
    if broadcast is not None:
        bias = torch.randn(
            *(1 if one else s for one, s in zip(broadcast, (b, heads, n), strict=True)), m
        ).double()
        bias = torch.where(torch.rand_like(bias) < 0.3, -math.inf, bias)
        bias[..., 0] = 0
    kept = None if bias is None else bias.clone()
    with pytest.MonkeyPatch.context() as patch, torch.no_grad():
        patch.setattr(attention_module, "_SLAB", max(1, slab * n * m // torch.get_num_threads()))
        found = in_slabs(q, k, v, bias, scale)
    torch.testing.assert_close(found, slow(q, k, v, bias, scale), **CLOSE)
    assert bias is None or torch.equal(bias, kept)  # other calls add the same one


@torch.no_grad()
def test_slabs_in_bf16():
    q, k, v = torch.randn(3, 2, 24, 49, 32).bfloat16()
    bias = torch.randn(1, 24, 49, 49).bfloat16()
    wanted = F.scaled_dot_product_attention(q, k, v, attn_mask=bias)
    torch.testing.assert_close(in_slabs(q, k, v, bias), wanted, atol=3e-2, rtol=2e-2)


@VERSIONS
@pytest.mark.parametrize("shifted", [False, True], ids=["w-msa", "sw-msa"])
@pytest.mark.parametrize("size", [(12, 8), (7, 9), (3, 4)])
@torch.no_grad()
def test_windows_in_slabs(size, shifted, form, request):
    part, x = make((3, 4), form), torch.randn(3, *size, 6, dtype=torch.float64)
    wanted = attend(x, part, shifted)
    request.getfixturevalue("slabs")
    torch.testing.assert_close(attend(x, part, shifted), wanted, **CLOSE)


@torch.no_grad()
def test_a_window_in_slabs_still_shows_its_weights(slabs):
    part, x = make((3, 4), V1, torch.float32), torch.randn(2, 7, 9, 6)
    plain = attend(x, part, True)
    with capture(part) as maps:
        torch.testing.assert_close(attend(x, part, True), plain, atol=1e-5, rtol=1e-5)
    (weights,) = maps.values()
    assert weights.shape == (2, 9, 2, 12, 12)
    apart = shift_mask(3, 3, (3, 4), (1, 2), x.device, x.dtype).isinf().expand(2, 9, 2, 12, 12)
    assert weights[apart].eq(0).all()


def test_slabs_are_for_bf16_without_gradients(monkeypatch):
    monkeypatch.setattr("triptych.kernels.linear._native", lambda: {torch.float32, torch.bfloat16})
    monkeypatch.setattr(attention_module, "has_amx", lambda: False)
    q = torch.randn(1, 2, 3, 4).bfloat16()
    assert not slabs_pay(q, q)
    with torch.no_grad():
        assert slabs_pay(q, q)
        assert not slabs_pay(q.float(), q.float())
        monkeypatch.setattr(attention_module, "has_amx", lambda: True)
        assert not slabs_pay(q, q)
