"""Merged tokens and a cached deep half: no change at zero strength, exact where nothing is lost, fully undone."""

from dataclasses import replace

import pytest
import torch
from torch import nn

from triptych.errors import ConfigError
from triptych.layers.attention import Attention
from triptych.models.configs.dit import DiTConfig
from triptych.models.configs.unet import UNetConfig
from triptych.models.dit import DiT
from triptych.models.unet import UNet
from triptych.models.unet_acceleration import (
    MAX_MERGED,
    MergingAttention,
    deep_cached,
    merge,
    merged_tokens,
    random_destinations,
)

TEXT = UNetConfig(
    base_channels=16,
    channel_multipliers=(1, 2),
    num_res_blocks=2,
    attention_downsample_factors=(1, 2),
    num_heads=2,
    context_dim=12,
    norm_groups=8,
)
CONFIGS = {
    "text": TEXT,
    "plain": replace(TEXT, context_dim=0, attention_downsample_factors=(2,), num_res_blocks=1, in_channels=4),
    "one level": replace(
        TEXT, channel_multipliers=(1,), attention_downsample_factors=(1,), num_res_blocks=1, num_classes=3
    ),
}


def make(config: UNetConfig) -> UNet:
    torch.manual_seed(0)
    net = UNet(config).eval().requires_grad_(False)
    for parameter in net.parameters():
        if parameter.ndim > 1:
            nn.init.normal_(parameter, std=parameter[0].numel() ** -0.5)
    return net


def make_inputs(config: UNetConfig, batch: int = 2, size: tuple[int, int] = (8, 6)) -> tuple:
    torch.manual_seed(batch)
    context = torch.randn(batch, 5, 12) if config.context_dim else None
    labels = torch.arange(batch) % 3 if config.num_classes else None
    return torch.randn(batch, 4, *size), torch.full((batch,), 501.0), context, labels


@pytest.fixture(params=CONFIGS)
def net(request):
    return make(CONFIGS[request.param])


@pytest.mark.parametrize(
    "around", [lambda net: merged_tokens(net, 0.5), lambda net: deep_cached(net, 3)], ids=["merge", "cache"]
)
def test_undone_to_the_bit(net, around):
    inputs = make_inputs(net.config)
    later = 2 * inputs[0], *inputs[1:]
    before, parts = net(*later), {name: set(vars(part)) for name, part in net.named_modules()}
    with around(net):
        net(*inputs)
        inside = net(*later)
    with pytest.raises(ZeroDivisionError), around(net):
        raise ZeroDivisionError
    assert not torch.equal(inside, before)
    assert torch.equal(net(*later), before)
    assert {name: set(vars(part)) for name, part in net.named_modules()} == parts
    assert not any(part._forward_hooks or part._forward_pre_hooks for part in net.modules())


def test_nothing_at_zero_strength(net):
    inputs = make_inputs(net.config)
    before = net(*inputs)
    with merged_tokens(net, 0.0), deep_cached(net, 1):
        assert torch.equal(net(*inputs), before)
        assert torch.equal(net(*inputs), before)


def test_alike_tokens_merge_without_loss():
    """In a map that is constant in each 2 x 2 cells, three quarters of the tokens are redundant."""
    torch.manual_seed(0)
    attn, draw = Attention(12, 3), torch.Generator().manual_seed(1)
    cells = torch.randn(2, 12, 3, 5)
    x = cells.repeat_interleave(2, 2).repeat_interleave(2, 3).flatten(2).transpose(1, 2)
    merged = MergingAttention(attn, MAX_MERGED, draw)
    merged.size = (6, 10)
    torch.testing.assert_close(merged(x), attn(x))


@pytest.mark.parametrize("size", [(4, 6), (5, 7), (2, 3)])
@pytest.mark.parametrize("ratio", [0.1, 0.5, 0.75])
def test_merge_is_its_slow_twin(size, ratio):
    torch.manual_seed(0)
    n = size[0] * size[1]
    x = torch.randn(2, n, 8)
    less, where = merge(x, size, ratio, torch.Generator().manual_seed(3))
    into = random_destinations(size, torch.Generator().manual_seed(3)).tolist()
    assert len(into) == (size[0] // 2) * (size[1] // 2)
    assert {(i // size[1] // 2, i % size[1] // 2) for i in into} == {
        (r, c) for r in range(size[0] // 2) for c in range(size[1] // 2)
    }
    gone = min(int(ratio * n), n - len(into))
    assert less.shape == (2, n - gone, 8)
    for b in range(2):
        alike = {}
        for i in set(range(n)) - set(into):
            alike[i] = max((torch.cosine_similarity(x[b, i], x[b, j], dim=0).item(), j) for j in into)
        away = sorted(alike, key=lambda i: -alike[i][0])[:gone]
        groups = {i: [i] for i in range(n) if i not in away}
        for i in away:
            groups[alike[i][1]].append(i)
        for members in groups.values():
            rows = {int(where[b * n + i]) for i in members}
            assert len(rows) == 1
            merged = less.flatten(0, 1)[rows.pop()]
            torch.testing.assert_close(merged, x[b, members].mean(0))


def test_a_map_without_whole_cells_stays(net):
    inputs = make_inputs(net.config, size=(1, 3))
    with merged_tokens(net, 0.5):
        inside = net(*inputs)
    assert torch.equal(inside, net(*inputs))


def test_the_cache_is_exact_where_the_deep_part_would_not_change(net):
    inputs = make_inputs(net.config)
    runs = []
    net.middle.register_forward_pre_hook(lambda *_: runs.append(1))
    expected = net(*inputs)
    runs.clear()
    with deep_cached(net, 3):
        for _ in range(7):
            torch.testing.assert_close(net(*inputs), expected, atol=1e-6, rtol=1e-5)
    assert len(runs) == 3  # of calls 0, 3 and 6


def test_the_cache_is_of_one_shape(net):
    one, two = make_inputs(net.config, 1), make_inputs(net.config, 2)
    expected = [net(*one), net(*two)]
    with deep_cached(net, 4):
        results = [net(*one), net(*two)]
    assert all(torch.equal(a, b) for a, b in zip(results, expected, strict=True))


def test_options_that_do_not_fit_are_reported():
    dit = DiT(
        DiTConfig(latent_size=(8, 8), patch_size=2, embed_dim=24, depth=1, num_heads=2, mlp_ratio=40 / 24)
    )
    bare = make(replace(TEXT, attention_downsample_factors=()))
    cross = make(replace(TEXT, cross_only_downsample_factors=(1, 2)))
    for words, context in {
        "ratio|merge_tokens is 0.8": merged_tokens(bare, 0.8),
        "needs a UNet, and this denoiser is a DiT": merged_tokens(dit, 0.5),
        "deep_cache needs a UNet": deep_cached(dit, 2),
        "deep_cache is 0": deep_cached(bare, 0),
        "self-attention in its middle only": merged_tokens(bare, 0.5),
        "this UNet has self-attention": merged_tokens(cross, 0.5),
    }.items():
        with pytest.raises(ConfigError, match=words), context:
            pass
