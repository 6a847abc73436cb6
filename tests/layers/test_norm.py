import pytest
import torch

from triptych.layers.norm import GroupNorm


def maps(shape, dtype, order=torch.channels_last, seed=0):
    drawn = torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * 2 + 1
    return drawn.to(dtype).contiguous(memory_format=order)


def norm_of(channels, cls=GroupNorm, dtype=torch.float32):
    norm = cls(8, channels, dtype=dtype)
    with torch.no_grad():
        for i, parameter in enumerate(norm.parameters()):
            parameter.copy_(maps((1, channels, 1, 1), dtype, seed=i).flatten())
    return norm


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


@pytest.mark.parametrize("transform", [lambda f: f, torch.func.grad], ids=["vmap", "vmap of grad"])
def test_maps_that_are_traced_go_through_pytorch(transform):
    """Function transforms need a rule for every operation."""
    norm, x = norm_of(16), maps((3, 32, 4, 4), torch.bfloat16).view(3, 2, 16, 4, 4)
    result = torch.func.vmap(transform(lambda x: norm(x).float().pow(3).sum()))(x)
    assert len(result) == 3
