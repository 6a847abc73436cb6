"""Networks built without initializing their weights."""

import subprocess
import sys

import torch
from torch import nn

from triptych.network import on_meta_device

BUILD = """
import sys
from triptych.models.latent_diffusion import LatentDiffusion
from triptych.models.configs.latent_diffusion import SIZES
from triptych.network import on_meta_device
with on_meta_device():
    net = LatentDiffusion(SIZES["ldm-cin256"])
assert all(parameter.is_meta for parameter in net.parameters())
print("torch._dynamo" in sys.modules)
"""


def test_a_blank_network_has_the_shapes_of_a_filled_one():
    def build():
        return nn.Sequential(nn.Linear(3, 4), nn.Embedding(5, 3), nn.Conv2d(2, 4, 3))

    with on_meta_device():
        net = build()
    assert {n: p.shape for n, p in net.named_parameters()} == {
        n: p.shape for n, p in build().named_parameters()
    }
    assert all(parameter.is_meta for parameter in net.parameters())
    assert torch.equal(nn.init.ones_(torch.zeros(3)), torch.ones(3))  # later tensors are initialized again


def test_building_one_leaves_the_compiler_out():
    """Filling embeddings with normal numbers on the meta device would import it, two seconds of work."""
    done = subprocess.run([sys.executable, "-c", BUILD], capture_output=True, text=True, check=False)
    assert done.stdout == "False\n", done.stderr
