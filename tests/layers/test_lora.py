"""Low-rank updates start at zero, only their factors are trained, and merging changes no output."""

import copy
import functools

import pytest
import torch
from torch import nn

from triptych.errors import ConfigError
from triptych.layers.attention import Attention
from triptych.layers.cross_attention import TransformerBlock
from triptych.layers.lora import LowRank, add_low_rank, merge_low_rank
from triptych.models.configs.text import TextConfig
from triptych.models.registry import create
from triptych.models.text import TextAttention


@pytest.fixture
def net():
    return nn.Sequential(Attention(8, 2), nn.LayerNorm(8), nn.Linear(8, 3), Attention(3, 1, bias="qv"))


X = torch.linspace(-1, 1, 40).view(1, 5, 8)


def train_a_little(net):
    """Take a few steps on the trainable parameters."""
    learning = torch.optim.SGD([p for p in net.parameters() if p.requires_grad], lr=0.5)
    for _ in range(3):
        learning.zero_grad()
        (net(X) - 1).square().mean().backward()
        learning.step()


def test_a_new_update_changes_no_output(net):
    before = net(X)
    add_low_rank(net, 2)
    assert torch.equal(net(X), before)


def test_only_the_factors_are_trained(net):
    frozen = {name: p.clone() for name, p in net.named_parameters()}
    add_low_rank(net, 2)
    learning = {name for name, p in net.named_parameters() if p.requires_grad}
    linears = [f"{i}.{linear}" for i in "03" for linear in ("qkv", "proj")]
    assert learning == {f"{name}.parametrizations.weight.0.{factor}" for name in linears for factor in "ab"}
    before = net(X)
    train_a_little(net)
    assert not torch.allclose(net(X), before)
    after = {
        name.replace("parametrizations.weight.original", "weight"): p for name, p in net.named_parameters()
    }
    for name, value in frozen.items():
        assert torch.equal(after[name], value), name


def test_the_update_has_the_rank(net):
    base = net[0].qkv.weight.detach().clone()
    add_low_rank(net, 2)
    train_a_little(net)
    update = net[0].qkv.weight.detach() - base
    lora = net[0].qkv.parametrizations.weight[0]
    torch.testing.assert_close(update, 2 * lora.b @ lora.a)
    assert torch.linalg.matrix_rank(update, tol=1e-5) == 2


def test_parts_of_a_product_have_updates_of_their_own():
    weight = torch.randn(6, 4)
    update = LowRank(weight, rank=1, scale=0.5, parts=3)
    assert torch.equal(update(weight), weight)
    nn.init.normal_(update.b)
    assert (update.a.shape, update.b.shape) == ((3, 4), (6, 1))
    for part, rows in enumerate((slice(0, 2), slice(2, 4), slice(4, 6))):
        delta = 0.5 * update.b[rows] @ update.a[part : part + 1]
        torch.testing.assert_close(update(weight)[rows] - weight[rows], delta)


def test_merging_changes_no_output_and_no_names(net):
    names = set(net.state_dict())
    add_low_rank(net, 2)
    train_a_little(net)
    before = net(X)
    merge_low_rank(net)
    assert set(net.state_dict()) == names
    torch.testing.assert_close(net(X), before)
    assert type(net[0].qkv) is nn.Linear


SWIN = {
    "embed_dim": 8,
    "depths": (2, 1),
    "num_heads": (2, 4),
    "window_size": 3,
    "image_size": 24,
    "num_classes": 3,
}
VIT = {"depth": 1, "embed_dim": 8, "num_heads": 2, "mlp_ratio": 1.0, "image_size": 32, "num_classes": 3}
IMAGES = torch.linspace(-1, 1, 2 * 3 * 32 * 32).view(2, 3, 32, 32)
TOKENS = torch.linspace(-1, 1, 2 * 5 * 8).view(2, 5, 8)
# Type of attention -> a network with it, its inputs, and its products.
CASES = {
    "vit": (lambda: create("vit-ti16", **VIT), (IMAGES,), {"encoder.0.attn": ("qkv", "proj")}),
    "pooling": (
        lambda: create("vit-ti16", **VIT, pool="attention", class_token=False),
        (IMAGES,),
        {"encoder.0.attn": ("qkv", "proj"), "pool": ("q", "kv", "proj")},
    ),
    **{
        name: (
            functools.partial(create, name, **SWIN),
            (IMAGES,),
            {f"stages.{i}.blocks.{j}.attn": ("qkv", "proj") for i, j in ((0, 0), (0, 1), (1, 0))},
        )
        for name in ("swin-t", "swinv2-t")
    },
    "prompt": (
        lambda: TransformerBlock(8, 8, 2),
        (TOKENS, TOKENS),
        {"attn": ("qkv", "proj"), "cross": ("q", "kv", "proj")},
    ),
    "text": (
        lambda: TextAttention(
            TextConfig(type="clip", vocab_size=9, depth=1, embed_dim=8, num_heads=2, mlp_ratio=1.0)
        ),
        (TOKENS, None),
        {"": ("qkv", "proj")},
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_every_type_of_attention_trains_and_merges(case):
    make, inputs, products = CASES[case]
    net = make().eval()
    for parameter in net.parameters():
        nn.init.normal_(parameter, std=0.3)
    names, start = set(net.state_dict()), net(*inputs).detach()
    add_low_rank(net, 2)
    torch.testing.assert_close(net(*inputs), start)
    learning = {name for name, p in net.named_parameters() if p.requires_grad}
    assert learning == {
        f"{attention}.{product}.parametrizations.weight.0.{factor}".lstrip(".")
        for attention, own in products.items()
        for product in own
        for factor in "ab"
    }
    factors = [p for p in net.parameters() if p.requires_grad]
    for _ in range(2):
        net.zero_grad()
        (net(*inputs) - 1).square().sum().backward()
        torch.optim.SGD(factors, lr=0.1).step()
    assert all(p.grad.ne(0).any() for p in factors)
    moved = net(*inputs).detach()
    assert not torch.allclose(moved, start)
    merge_low_rank(net)
    assert set(net.state_dict()) == names
    torch.testing.assert_close(net(*inputs), moved)


def test_a_network_without_attention_is_refused():
    with pytest.raises(ConfigError, match="ConvNet has no attention"):
        add_low_rank(create("convnet-unet", widths=(4, 8)), 2)


def test_merging_a_copy_leaves_the_original_unchanged():
    """Each evaluation of a run merges a copy of the network, whose training continues."""
    net = torch.nn.Sequential(torch.nn.Linear(4, 4))
    torch.nn.utils.parametrize.register_parametrization(net[0], "weight", LowRank(net[0].weight, 2))
    x = torch.randn(3, 4)
    for _ in range(2):
        merged = copy.deepcopy(net)
        merge_low_rank(merged)
        assert type(merged[0]) is torch.nn.Linear
        torch.testing.assert_close(merged(x), net(x))
