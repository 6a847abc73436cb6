"""A network with recomputed activations is the same network."""

import pytest
import torch

import triptych as tp
from triptych.training.distributed.activation_checkpointing import (
    CheckpointedBlock,
    checkpoint_activations,
    outer_blocks,
)

SMALL = {
    "vit-ti16": {"image_size": 16, "depth": 2, "embed_dim": 24, "num_heads": 2, "num_classes": 3},
    "swin-emoji": {"image_size": 32, "num_classes": 3},
    "kl-f8": {"image_size": 16},
}


@pytest.fixture(params=SMALL)
def pair(request):
    torch.manual_seed(0)
    plain = tp.create(request.param, **SMALL[request.param]).train()
    wrapped = tp.create(request.param, **SMALL[request.param]).train()
    wrapped.load_state_dict(plain.state_dict())
    checkpoint_activations(wrapped)
    return plain, wrapped


def test_names_stay(pair):
    plain, wrapped = pair
    assert all(isinstance(block, CheckpointedBlock) for block in outer_blocks(wrapped))
    assert list(wrapped.state_dict()) == list(plain.state_dict())
    for names in ("named_parameters", "named_buffers"):
        assert [n for n, _ in getattr(wrapped, names)()] == [n for n, _ in getattr(plain, names)()]
    assert {n for n, _ in wrapped.named_modules()} == {n for n, _ in plain.named_modules()}


def test_a_state_dict_loads(pair):
    plain, wrapped = pair
    with torch.no_grad():
        for parameter in plain.parameters():
            parameter.add_(1.0)
    wrapped.load_state_dict(plain.state_dict())
    for (name, one), (_, other) in zip(plain.named_parameters(), wrapped.named_parameters(), strict=True):
        assert torch.equal(one, other), name


def test_gradients_stay(pair):
    gradients = []
    for net in pair:
        torch.manual_seed(1)
        size = net.config.image_size
        images = torch.randn(2, 3, *size)
        torch.manual_seed(2)
        output = net.decode(net.encode(images)) if hasattr(net, "decode") else net(images)
        output.square().mean().backward()
        gradients.append({name: p.grad for name, p in net.named_parameters() if p.grad is not None})
    assert gradients[0].keys() == gradients[1].keys()
    assert all(torch.equal(gradients[0][name], gradients[1][name]) for name in gradients[0])


def test_evaluation_mode_reaches_the_block(pair):
    _, wrapped = pair
    wrapped.eval()
    assert not any(part.training for part in wrapped.modules())
