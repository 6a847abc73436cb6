"""torch.compile without a break and torch.export with open sizes, in a process without the shape checks: they cannot be
traced, and users do not have them."""

import subprocess
import sys

import pytest

BEGIN = """
import torch
from torch.export import Dim, export
from triptych.models.registry import build
from triptych.models.configs.dit import DiTConfig
from triptych.models.configs.unet import UNetConfig

torch.manual_seed(0)
net = build({config}).eval().requires_grad_(False)
for parameter in net.parameters():
    torch.nn.init.normal_(parameter, std=0.1)

def given(b, h, w, l):
    return torch.randn(b, 4, h, w), torch.rand(b) * 999, torch.randn(b, l, 12)

def close(found, expected):
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)
"""

NETS = {
    "unet": "UNetConfig(base_channels=16, channel_multipliers=(1, 2), num_res_blocks=1, attention_downsample_factors=(1,), num_heads=2, context_dim=12, norm_groups=8)",  # noqa: E501
    "dit": "DiTConfig(latent_size=(8, 8), patch_size=2, embed_dim=24, depth=2, num_heads=2, "
    "mlp_ratio=40 / 24, context_dim=12)",
}

COMPILE = """
compiled = torch.compile(net, fullgraph=True, backend="aot_eager")  # fullgraph: a break is an error
for h, w in ((8, 8), (9, 13)):
    x, t, context = given(2, h, w, 5)
    close(compiled(x, t, context), net(x, t, context))
    close(compiled(x, t, net.project_context(context)), net(x, t, context))
"""

EXPORT = """
sizes = {0: Dim("b"), 2: 2 * Dim("h"), 3: 2 * Dim("w")}, {0: Dim("b")}, {0: Dim("b"), 1: Dim("l")}
exported = export(net, given(2, 16, 24, 5), dynamic_shapes=sizes).module()
for many in ((1, 8, 8, 77), (3, 32, 20, 7)):
    x, t, context = given(*many)
    close(exported(x, t, context), net(x, t, context))
"""


@pytest.mark.slow
@pytest.mark.parametrize("net", NETS)
@pytest.mark.parametrize("script", [COMPILE, EXPORT], ids=["compile", "export"])
def test_tracing(script, net):
    begin = BEGIN.replace("{config}", NETS[net])
    done = subprocess.run([sys.executable, "-c", begin + script], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
