import pytest
import torch
import torch.nn.functional as F
from torch import nn

from triptych.layers.norm import GroupNorm


def maps(shape, dtype, order=torch.channels_last, seed=0):
    drawn = torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * 2 + 1
    return drawn.to(dtype).contiguous(memory_format=order)


def gradients(norm, x, dy, **options):
    x = x.detach().requires_grad_()
    return torch.autograd.grad(norm(x), [x, norm.weight, norm.bias], dy, **options)


def norm_of(channels, kind=GroupNorm, dtype=torch.float32):
    norm = kind(8, channels, dtype=dtype)
    with torch.no_grad():
        for i, parameter in enumerate(norm.parameters()):
            parameter.copy_(maps((1, channels, 1, 1), dtype, seed=i).flatten())
    return norm


@pytest.mark.parametrize("shape", [(2, 16, 8, 8), (3, 32, 5, 7), (1, 64, 16, 16), (5, 32, 64, 64)], ids=str)
def test_gradients_are_those_of_the_definition(shape):
    norm, exact = norm_of(shape[1]), norm_of(shape[1], nn.GroupNorm, torch.float64)
    exact.load_state_dict(norm.state_dict())
    x, dy = maps(shape, torch.bfloat16), maps(shape, torch.bfloat16, seed=2)
    y = norm(x.requires_grad_())
    assert type(y.grad_fn).__name__ == "_ByPixelBackward"
    assert torch.equal(y, F.group_norm(x, 8, norm.weight, norm.bias))
    found = gradients(norm, x, dy)
    dx, *weights = gradients(exact, x.double(), dy.double())
    assert (found[0].double() - dx).norm() < 3e-3 * dx.norm()
    for mine, right in zip(found[1:], weights, strict=True):
        assert (mine.double() - right).norm() < 1e-5 * right.norm()
    # What stands before sums it over pixels: no error may be the same in all of them.
    mine, right = (d.double().sum((0, 2, 3)) for d in (found[0], dx))
    assert (mine - right).norm() < 1e-2 * right.norm()
    assert found[0].is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize(
    ("dtype", "order", "weights"),
    [
        (torch.float32, torch.channels_last, torch.float32),
        (torch.bfloat16, torch.contiguous_format, torch.float32),
        (torch.bfloat16, torch.channels_last, torch.bfloat16),
    ],
    ids=str,
)
def test_other_maps_go_through_pytorch(dtype, order, weights):
    x = maps((2, 16, 8, 8), dtype, order).requires_grad_()
    assert type(norm_of(16, dtype=weights)(x).grad_fn).__name__ == "NativeGroupNormBackward0"


def test_frozen_weights_get_no_gradient_and_the_map_does():
    norm = norm_of(16).requires_grad_(False)
    x = maps((2, 16, 8, 8), torch.bfloat16).requires_grad_()
    norm(x).float().square().sum().backward()
    assert norm.weight.grad is None
    assert x.grad.abs().sum() > 0


def test_the_gradient_is_derived_in_its_turn():
    """As a penalty on gradients does."""

    def penalty(norm):
        x = maps((2, 16, 8, 8), torch.bfloat16).requires_grad_()
        (dx,) = torch.autograd.grad(norm(x).float().pow(3).sum(), x, create_graph=True)
        return torch.autograd.grad(dx.float().square().sum(), [x, norm.weight])

    for mine, right in zip(penalty(norm_of(16)), penalty(norm_of(16, nn.GroupNorm)), strict=True):
        assert (mine - right).float().norm() < 2e-2 * right.float().norm()


@pytest.mark.parametrize("asked", [lambda f: f, torch.func.grad], ids=["vmap", "vmap of grad"])
def test_maps_that_are_traced_go_through_pytorch(asked):
    """Where a rule for it is asked of every operation."""
    norm, x = norm_of(16), maps((3, 32, 4, 4), torch.bfloat16).view(3, 2, 16, 4, 4)
    found = torch.func.vmap(asked(lambda x: norm(x).float().pow(3).sum()))(x)
    assert len(found) == 3
