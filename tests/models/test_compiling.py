"""torch.export with open sizes and torch.compile without a break, in a process without the shape checks: they cannot
be traced, and users do not have them."""

import subprocess
import sys
import textwrap

import pytest

BEGIN = """
import torch
from triptych.models.registry import create

torch.manual_seed(0)
net = create("vit-ti16", depth=2, embed_dim=32, num_heads=2, mlp_dim=48, num_classes=3, image_size=(64, 96), **CHANGES)
net = net.eval().requires_grad_(False)
for parameter in net.parameters():
    torch.nn.init.normal_(parameter, std=0.2)
"""

EXPORT = """
from torch.export import Dim, export

example = torch.randn(2, 3, 64, 96)  # the table's own size: the worst example, at which nothing needs resampling
program = export(net, (example,), dynamic_shapes=({0: Dim("batch"), 2: 16 * Dim("rows"), 3: 16 * Dim("columns")},))
exported = program.module()
for shape in ((2, 3, 64, 96), (3, 3, 128, 48), (1, 3, 32, 160)):
    images = torch.randn(shape)
    torch.testing.assert_close(exported(images), net(images), atol=1e-5, rtol=1e-5)
"""

COMPILE = """
compiled = torch.compile(net, fullgraph=True, backend=BACKEND)  # fullgraph: a break is an error
for shape in ((2, 3, 64, 96), (3, 3, 128, 48)):
    images = torch.randn(shape)
    torch.testing.assert_close(compiled(images), net(images), atol=1e-4, rtol=1e-4)
"""


def run(script, backend="aot_eager", **changes):
    whole = (
        f"CHANGES = {changes!r}\nBACKEND = {backend!r}\n{textwrap.dedent(BEGIN)}\n{textwrap.dedent(script)}"
    )
    done = subprocess.run([sys.executable, "-c", whole], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]


def test_export_with_open_batch_height_and_width():
    run(EXPORT)


@pytest.mark.slow
@pytest.mark.parametrize(
    "changes",
    [
        {"position": "rotary", "registers": 4},
        {"position": "sincos"},
        {"stem": "conv", "stem_widths": (8, 16), "patch_size": 4},
    ],
    ids=["rotary", "sincos", "conv stem"],
)
def test_export_of_other_forms(changes):
    run(EXPORT, **changes)


def test_compile_has_no_break():
    run(COMPILE)


@pytest.mark.slow
def test_compile_to_machine_code():
    run(COMPILE, backend="inductor")
