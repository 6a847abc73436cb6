"""Window attention's fast paths against their slow twins: gathers, which skip products of padding, against roll and
partition; slabs against the fused kernel; and the cases in which the slow path is required."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from triptych.kernels import attention as attention_module
from triptych.kernels.constant_cache import ConstantCache
from triptych.layers import window as window_module
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
    monkeypatch.setattr(window_module, "prefers_blocked", lambda q, k: True)
    monkeypatch.setattr(attention_module, "prefers_blocked", lambda q, k: True)
    monkeypatch.setattr(attention_module, "_BLOCK_LOGITS", 5 * 12 * 12)


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
    shapes = []
    part.register_forward_hook(lambda *call: shapes.append(call[-1].shape))
    attend(x, part, True)
    assert shapes == [(2, 63, 6)]


def test_when_gathers_are_used(monkeypatch):
    part, x = make((3, 3), V1), torch.randn(1, 7, 7, 6, dtype=torch.float64)
    calls, partition = [], window_module.partition
    monkeypatch.setattr(window_module, "partition", lambda *args: calls.append(1) or partition(*args))
    attend(x, part, True)  # a gradient is needed
    assert len(calls) == 1
    with torch.no_grad(), FlopCounterMode(display=False):  # operations are counted
        attend(x, part, True)
    assert len(calls) == 2
    with torch.no_grad():
        attend(x, part, True)
    assert len(calls) == 2


def test_what_is_cached(monkeypatch):
    part, x = make((3, 3), V1), torch.randn(1, 7, 8, 6, dtype=torch.float64)
    small = ConstantCache(2**20)
    monkeypatch.setattr(window_module, "cached", small)
    with torch.no_grad():
        wanted = attend(x, part, True)
        assert [make.__name__ for make, _ in small.entries] == [
            "shift_mask",
            "window_order",
            "relative_index",
        ]
        assert small.size == sum(t.nbytes for value in small.entries.values() for t in _parts(value))
        assert torch.equal(attend(x, part, True), wanted)
        attend(x[:, :5], part, True)
    assert len(small.entries) == 5


def _parts(value):
    return value if isinstance(value, tuple) else (value,)


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
