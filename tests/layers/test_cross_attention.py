"""The parts of the spatial transformer and the time embedding, each against its equation."""

import math

import pytest
import torch
import torch.nn.functional as F
from diffusers.models.embeddings import get_timestep_embedding

from triptych.layers.cross_attention import (
    GEGLU,
    CrossAttention,
    ProjectedContext,
    SpatialAttention,
    SpatialTransformer,
)
from triptych.layers.timestep import TimeEmbedding, sinusoids


def close(got, expected):
    torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_cross_attention_head_by_head():
    part = CrossAttention(12, 10, heads=3)
    x, context = torch.randn(2, 7, 12), torch.randn(2, 5, 10)
    q, k, v = x @ part.q.weight.T, *(context @ part.kv.weight.T).split(12, dim=-1)
    seen = []
    for head in (slice(0, 4), slice(4, 8), slice(8, 12)):
        logits = q[..., head] @ k[..., head].transpose(1, 2) / math.sqrt(4)
        seen.append(logits.softmax(-1) @ v[..., head])
    close(part(x, context), part.proj(torch.cat(seen, dim=-1)))
    keys, values = part.project(context)
    part.index = 1
    close(part(x, ProjectedContext((None, keys), (None, values))), part(x, context))


def test_geglu():
    part, x = GEGLU(6, 8).eval(), torch.randn(2, 5, 6)
    value, gate = part.fc1(x).chunk(2, dim=-1)
    expected = part.fc2(value * F.gelu(gate))
    close(part(x), expected)
    with torch.no_grad():
        close(part(x), expected)


@pytest.mark.parametrize("wanted", [torch.channels_last, torch.contiguous_format])
@torch.no_grad()
def test_a_transformer_takes_maps_laid_out_either_way(wanted):
    part = SpatialTransformer(16, 6, heads=2, depth=2, groups=4)
    x, context = torch.randn(2, 16, 3, 5), torch.randn(2, 4, 6)
    close(part(x.contiguous(memory_format=wanted), context), part(x, context))


@torch.no_grad()
def test_spatial_attention_of_pixels_in_any_order():
    """It has no positions: permuting the pixels permutes the output."""
    part, x = SpatialAttention(8, heads=2, groups=4), torch.randn(1, 8, 4, 4)
    order = torch.randperm(16)
    shuffled = x.flatten(2)[..., order].view_as(x)
    close(part(shuffled), part(x).flatten(2)[..., order].view_as(x))


@pytest.mark.parametrize("dim", [8, 9, 320])
@pytest.mark.parametrize("dtype", [torch.long, torch.float32, torch.float64])
def test_sinusoids(dim, dtype):
    t = torch.tensor([0, 1, 981, 999], dtype=dtype)
    assert torch.equal(
        sinusoids(t, dim), get_timestep_embedding(t, dim, flip_sin_to_cos=True, downscale_freq_shift=0)
    )
    assert sinusoids(t, dim).dtype == torch.float32


def test_neighboring_times_differ_in_halves():
    part = TimeEmbedding(32, 16).bfloat16()
    out = part(torch.tensor([998.0, 999.0]))
    assert out.dtype == torch.bfloat16
    assert not torch.equal(out[0], out[1])
