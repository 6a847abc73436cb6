"""The parts of a block besides attention: MLPs, layer scale, drop path."""

import math

import pytest
import torch

from triptych.layers.mlp import Mlp, SwiGLU
from triptych.layers.residual import DropPath, LayerScale


@pytest.mark.parametrize("form", ["none", "tanh"])
def test_mlp_is_gelu_between_two_products(form):
    mlp, x = Mlp(4, 6, form), torch.randn(2, 3, 4)
    hidden = x @ mlp.fc1.weight.T + mlp.fc1.bias
    if form == "none":
        active = hidden * 0.5 * (1 + torch.erf(hidden / math.sqrt(2)))
    else:
        active = 0.5 * hidden * (1 + torch.tanh(math.sqrt(2 / math.pi) * (hidden + 0.044715 * hidden**3)))
    torch.testing.assert_close(mlp(x), active @ mlp.fc2.weight.T + mlp.fc2.bias)


def test_the_two_forms_of_gelu_differ():
    torch.manual_seed(1)
    exact, x = Mlp(8, 8), torch.randn(4, 8) * 3
    tanh = Mlp(8, 8, "tanh")
    tanh.load_state_dict(exact.state_dict())
    assert 1e-6 < (exact(x) - tanh(x)).abs().max() < 1e-2


def test_swiglu_is_a_gated_product():
    mlp, x = SwiGLU(4, 6), torch.randn(2, 3, 4)
    gate = x @ mlp.gate.weight.T + mlp.gate.bias
    up = x @ mlp.up.weight.T + mlp.up.bias
    wanted = (gate * torch.sigmoid(gate) * up) @ mlp.down.weight.T + mlp.down.bias
    torch.testing.assert_close(mlp(x), wanted)


@pytest.mark.parametrize("make", [lambda: Mlp(4, 6, dropout=0.5), lambda: SwiGLU(4, 6, dropout=0.5)])
def test_dropout_is_for_training(make):
    mlp, x = make(), torch.randn(50, 4)
    assert not torch.equal(mlp(x), mlp(x))
    mlp.eval()
    assert torch.equal(mlp(x), mlp(x))


def test_layer_scale_is_one_gain_a_channel():
    scale = LayerScale(3, 1e-5)
    assert torch.equal(scale.gamma.data, torch.full((3,), 1e-5))
    scale.gamma.data = torch.tensor([1.0, 2.0, -1.0])
    assert torch.equal(scale(torch.ones(1, 2, 3)), torch.tensor([[[1.0, 2.0, -1.0]] * 2]))


def test_drop_path_keeps_the_mean():
    drop = DropPath(0.3)
    out = drop(torch.ones(20_000, 1, 1))
    # The mean of 20,000 draws has a standard deviation of sqrt(0.3 / 0.7 / 20,000) = 0.0046: four of them.
    assert abs(out.mean().item() - 1) < 0.019
    assert abs(out.eq(0).float().mean().item() - 0.3) < 0.013


def test_drop_path_drops_whole_samples():
    out = DropPath(0.5)(torch.ones(64, 5, 7))
    factors = out.flatten(1)
    assert set(factors.unique().tolist()) == {0.0, 2.0}
    assert torch.equal(factors, factors[:, :1].expand_as(factors))


@pytest.mark.parametrize("shape", [(6,), (6, 2), (6, 2, 3), (6, 2, 3, 4)])
def test_drop_path_takes_any_shape_and_dtype(shape):
    out = DropPath(0.5)(torch.ones(shape, dtype=torch.bfloat16))
    assert out.shape == shape
    assert out.dtype == torch.bfloat16


def test_drop_path_is_off_in_eval_and_at_rate_0():
    x = torch.randn(4, 3)
    assert DropPath(0.9).eval()(x) is x
    assert DropPath(0.0)(x) is x
    assert "0.900" in repr(DropPath(0.9))
