"""What the tests of checkpoints share: small networks with random weights everywhere, biases and norms too."""

import pytest
import torch
from torch import nn

from triptych.models.registry import build
from triptych.models.vit_config import ViTConfig


@pytest.fixture
def tiny():
    """Makes a small ViT from changes to a small config."""

    def make(**changes) -> nn.Module:
        torch.manual_seed(0)
        small = {"image_size": (32, 32), "patch_size": 8, "embed_dim": 64, "depth": 2, "num_heads": 1}
        config = ViTConfig(**{**small, "mlp_dim": 96, "num_classes": 5, **changes})
        return randomise(build(config))

    return make


@pytest.fixture
def scramble():
    """Gives every parameter of a network random numbers."""
    return randomise


def randomise(net: nn.Module) -> nn.Module:
    for parameter in net.parameters():
        nn.init.normal_(parameter, std=0.2)
    return net.eval()


@pytest.fixture
def same_state():
    """Asserts that two networks hold the same tensors under the same names, bit for bit."""

    def check(a: nn.Module, b: nn.Module) -> None:
        left, right = a.state_dict(), b.state_dict()
        assert list(left) == list(right)
        for name in left:
            assert left[name].dtype == right[name].dtype
            assert torch.equal(left[name], right[name]), name

    return check
