"""Low-rank updates: the start is the base, only the factors learn, merging changes no output."""

import pytest
import torch
from torch import nn

from triptych.layers.attention import Attention
from triptych.layers.low_rank import add_low_rank, merge_low_rank


@pytest.fixture
def net():
    return nn.Sequential(Attention(8, 2), nn.LayerNorm(8), nn.Linear(8, 3), Attention(3, 1, bias="qv"))


X = torch.linspace(-1, 1, 40).view(1, 5, 8)


def train_a_little(net):
    """A few steps on whatever learns."""
    learning = torch.optim.SGD([p for p in net.parameters() if p.requires_grad], lr=0.5)
    for _ in range(3):
        learning.zero_grad()
        (net(X) - 1).square().mean().backward()
        learning.step()


def test_the_start_is_the_base(net):
    before = net(X)
    add_low_rank(net, 2)
    assert torch.equal(net(X), before)


def test_only_the_factors_learn(net):
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


def test_merging_changes_no_output_and_no_names(net):
    names = set(net.state_dict())
    add_low_rank(net, 2)
    train_a_little(net)
    before = net(X)
    merge_low_rank(net)
    assert set(net.state_dict()) == names
    torch.testing.assert_close(net(X), before)
    assert type(net[0].qkv) is nn.Linear
