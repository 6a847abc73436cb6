"""Attention against loops over heads and queries, the fused kernel against the explicit softmax, and its capture."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from jaxtyping import TypeCheckError

from triptych.layers.attention import Attention, AttentionPool, attention
from triptych.layers.capture import capture
from triptych.layers.mlp import Mlp


def slow_attention(q, k, v):
    """Return attention weights and output, one query at a time."""
    out = torch.zeros(*q.shape[:-1], v.shape[-1])
    for b in range(q.shape[0]):
        for h in range(q.shape[1]):
            for n in range(q.shape[2]):
                scores = torch.stack([q[b, h, n] @ key for key in k[b, h]]) / q.shape[-1] ** 0.5
                paid = scores.exp() / scores.exp().sum()
                out[b, h, n] = sum(p * value for p, value in zip(paid, v[b, h], strict=True))
    return out


def slow_attention_module(part, x):
    """Equations 5 to 8 of the ViT paper, head by head."""
    dim, heads = x.shape[-1], part.heads
    d = dim // heads
    W_q, W_k, W_v = part.qkv.weight.split(dim)
    zeros = torch.zeros(dim)
    if part.split_bias:
        b_q, b_k, b_v = part.q_bias, zeros, part.v_bias
    else:
        b_q, b_k, b_v = part.qkv.bias.split(dim) if part.qkv.bias is not None else (zeros, zeros, zeros)
    heard = []
    for h in range(heads):
        own = slice(h * d, (h + 1) * d)
        q = part.q_norm(x @ W_q[own].T + b_q[own])
        k = part.k_norm(x @ W_k[own].T + b_k[own])
        v = x @ W_v[own].T + b_v[own]
        heard.append(slow_attention(q[:, None], k[:, None], v[:, None])[:, 0])
    return torch.cat(heard, dim=-1) @ part.proj.weight.T + part.proj.bias


def scrambled(part):
    for parameter in part.parameters():
        torch.nn.init.normal_(parameter, std=0.4)
    return part.eval()


@settings(max_examples=12)
@given(n=st.integers(1, 6), m=st.integers(1, 6), heads=st.integers(1, 3), d=st.sampled_from([1, 4, 8]))
def test_fused_explicit_and_slow_attention_agree(n, m, heads, d):
    q, k, v = torch.randn(2, heads, n, d), torch.randn(2, heads, m, d), torch.randn(2, heads, m, d)
    seen = []
    fused, explicit = attention(q, k, v), attention(q, k, v, seen.append)
    torch.testing.assert_close(fused, slow_attention(q, k, v), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(explicit, fused, atol=1e-5, rtol=1e-5)
    assert seen[0].shape == (2, heads, n, m)
    torch.testing.assert_close(seen[0].sum(-1), torch.ones(2, heads, n))


def test_shapes_are_checked_under_pytest():
    with pytest.raises(TypeCheckError):
        attention(torch.zeros(1, 1, 2, 4), torch.zeros(1, 1, 3, 5), torch.zeros(1, 1, 3, 5))
    with pytest.raises(TypeCheckError):
        Attention(8, 2)(torch.zeros(3, 8))


def test_large_scores_do_not_overflow():
    q = torch.full((1, 1, 2, 4), 300.0)
    assert attention(q, q, torch.ones_like(q), lambda _: None).eq(1).all()


def test_half_precision_maps_are_made_in_fp32():
    q = torch.randn(1, 2, 5, 8, dtype=torch.bfloat16)
    seen = []
    out = attention(q, q, q, seen.append)
    assert seen[0].dtype == torch.float32
    assert out.dtype == torch.bfloat16
    torch.testing.assert_close(seen[0].sum(-1), torch.ones(1, 2, 5))


@pytest.mark.parametrize("bias", ["qkv", "qv", "none"])
@pytest.mark.parametrize("qk_norm", [False, True])
def test_self_attention_is_the_papers(bias, qk_norm):
    part = scrambled(Attention(12, 3, bias=bias, qk_norm=qk_norm))
    x = torch.randn(2, 5, 12)
    torch.testing.assert_close(part(x), slow_attention_module(part, x), atol=1e-5, rtol=1e-5)


def test_a_bias_on_keys_changes_nothing():
    # So DINOv3 has no key bias, and a weight table may drop it.
    part = scrambled(Attention(8, 2))
    x = torch.randn(1, 6, 8)
    before = part(x)
    part.qkv.bias.data[8:16] += 5.0
    torch.testing.assert_close(part(x), before, atol=1e-5, rtol=1e-5)


def test_tokens_have_no_order():
    part = scrambled(Attention(8, 2))
    x, order = torch.randn(1, 7, 8), torch.randperm(7)
    torch.testing.assert_close(part(x[:, order]), part(x)[:, order], atol=1e-5, rtol=1e-5)


def test_rotation_turns_queries_and_keys_alone():
    part = scrambled(Attention(8, 2))
    x = torch.randn(1, 4, 8)
    # Rotating every query and key by the same orthogonal matrix leaves all scores unchanged.
    turn = torch.linalg.qr(torch.randn(4, 4)).Q
    torch.testing.assert_close(part(x, lambda t: t @ turn), part(x), atol=1e-5, rtol=1e-5)
    assert not torch.allclose(part(x, lambda t: 2 * t), part(x))


def test_attention_pool_is_a_probe_then_a_residual_mlp():
    pool = scrambled(AttentionPool(12, 3, Mlp(12, 20)))
    x = torch.randn(2, 5, 12)
    W_k, W_v = pool.kv.weight.split(12)
    b_k, b_v = pool.kv.bias.split(12)
    heard = []
    for h in range(3):
        own = slice(4 * h, 4 * h + 4)
        q = (pool.probe[0] @ pool.q.weight[own].T + pool.q.bias[own]).expand(2, 1, 1, 4)
        k, v = x @ W_k[own].T + b_k[own], x @ W_v[own].T + b_v[own]
        heard.append(slow_attention(q, k[:, None], v[:, None])[:, 0])
    y = torch.cat(heard, dim=-1)[:, 0] @ pool.proj.weight.T + pool.proj.bias
    y = y + pool.mlp(pool.norm(y))
    torch.testing.assert_close(pool(x), y, atol=1e-5, rtol=1e-5)


def pair():
    return scrambled(torch.nn.Sequential(Attention(8, 2), AttentionPool(8, 4, Mlp(8, 8))))


def test_capture_collects_every_attention_by_name():
    net, x = pair(), torch.randn(3, 6, 8)
    plain = net(x)
    with capture(net) as maps:
        with_maps = net(x)
    assert {name: tuple(weights.shape) for name, weights in maps.items()} == {
        "0": (3, 2, 6, 6),
        "1": (3, 4, 1, 6),
    }
    for weights in maps.values():
        torch.testing.assert_close(weights.sum(-1), torch.ones(weights.shape[:-1]))
        assert weights.min() >= 0
        assert not weights.requires_grad
    torch.testing.assert_close(with_maps, plain, atol=1e-5, rtol=1e-5)


def test_the_fused_kernel_comes_back_after_capture(monkeypatch):
    net, x, fused = pair(), torch.randn(1, 3, 8), []
    kernel = F.scaled_dot_product_attention
    monkeypatch.setattr(
        F,
        "scaled_dot_product_attention",
        lambda *args, **options: fused.append(1) or kernel(*args, **options),
    )
    net(x)
    assert len(fused) == 2
    with capture(net) as maps:
        net(x)
    assert len(fused) == 2
    with pytest.raises(ZeroDivisionError), capture(net):
        raise ZeroDivisionError
    net(x)
    assert len(fused) == 4
    assert len(maps) == 2
    assert all(part.tap is None for part in net)


def test_gradients_flow_while_capturing():
    net, x = pair(), torch.randn(1, 3, 8)
    wanted = torch.autograd.grad(net(x).sum(), net[0].qkv.weight)[0]
    with capture(net):
        got = torch.autograd.grad(net(x).sum(), net[0].qkv.weight)[0]
    torch.testing.assert_close(got, wanted, atol=1e-4, rtol=1e-4)
