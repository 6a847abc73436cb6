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
net = create("vit-ti16", depth=2, embed_dim=32, num_heads=2, mlp_ratio=48 / 32, num_classes=3,
             image_size=(64, 96), **CHANGES)
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

SWIN = """
import torch
from triptych.models.registry import create

def make(version=1, depths=(2,), window=(3, 4), **changes):
    torch.manual_seed(0)
    stages = len(depths)
    changes = {"patch_size": 2, "qkv_bias": "qv" if version == 2 else "qkv", **changes}
    net = create(
        "swin-t", version=version, embed_dim=8, depths=depths, num_heads=(2,) * stages, num_classes=3,
        window_size=((window,) * stages), **changes,
    )
    for name, parameter in net.named_parameters():
        torch.nn.init.normal_(parameter, mean=float("norm" in name), std=0.2)
    return net.eval().requires_grad_(False)

def agree(other, net, *shapes, **close):
    for shape in shapes:
        images = torch.randn(shape)
        torch.testing.assert_close(other(images), net(images), **(close or {"atol": 1e-5, "rtol": 1e-5}))
"""

SWIN_EXPORT = """
from torch.export import Dim, export

net, example, OPEN = make(), torch.randn(2, 3, 24, 36), Dim.AUTO
agree(export(net, (example,), dynamic_shapes=({0: OPEN},)).module(), net, (2, 3, 24, 36), (5, 3, 24, 36))
exported = export(net, (example,), dynamic_shapes=({0: OPEN, 2: OPEN, 3: OPEN},)).module()
# Of one window, of part of one, of odd sides, of whole windows.
agree(exported, net, (2, 3, 24, 36), (3, 3, 6, 8), (1, 3, 5, 40), (2, 3, 31, 45), (2, 3, 48, 16))
"""

SWIN_EXPORT_DEEP = """
from torch.export import Dim, export

net = make(VERSION, depths=(2, 2, 2, 2), window=(7, 7), patch_size=4)
example = torch.randn(2, 3, 224, 224) if VERSION == 1 else torch.randn(1, 3, 256, 320)
sizes = {2: Dim.AUTO, 3: Dim.AUTO}
agree(export(net, (example,)).module(), net, example.shape)
exported = export(net, (example,), dynamic_shapes=({0: Dim.AUTO, **sizes} if VERSION == 1 else sizes,)).module()
batch = example.shape[0]
agree(exported, net, (batch, 3, 448, 384), (batch, 3, 64, 64), (batch, 3, 40, 61), (batch, 3, 224, 224))
"""

SWIN_COMPILE = """
for version in VERSIONS:
    net = make(version)
    agree(torch.compile(net, fullgraph=True, backend=BACKEND), net, (2, 3, 24, 36), (2, 3, 24, 36))
"""

SWIN_COMPILE_SIZES = """
net = make(VERSION, depths=(2, 1)).requires_grad_(True)
compiled = torch.compile(net, fullgraph=True, backend=BACKEND)
for shape in ((2, 3, 24, 36), (3, 3, 31, 45)):  # the second one leaves the sides open
    images = torch.randn(shape)
    with torch.no_grad():
        agree(compiled, net, shape, atol=1e-4, rtol=1e-4)
    found, wanted = (torch.autograd.grad(f(images).square().sum(), list(net.parameters())) for f in (compiled, net))
    for a, b in zip(found, wanted):
        torch.testing.assert_close(a, b, atol=1e-3, rtol=1e-3)
"""

SWIN_TRACE = """
import warnings

warnings.simplefilter("ignore")  # of a trace being for one height and width only
for version in (1, 2):
    net = make(version, depths=(2, 1))
    for learning in (True, False):
        with torch.set_grad_enabled(learning):
            agree(torch.jit.trace(net, torch.randn(2, 3, 31, 45)), net, (2, 3, 31, 45), (5, 3, 31, 45))
"""

SWIN_TRACE_MORE = """
import io
import warnings
import onnxruntime
from triptych.heads.config import HeadConfig, SegmenterConfig
from triptych.heads.segmenter import Segmenter

warnings.simplefilter("ignore")  # of a trace being for one height and width only
net = make(VERSION, depths=(2, 1))
file = io.BytesIO()
example, names = torch.randn(2, 3, 31, 45), {"input_names": ["x"], "dynamic_axes": {"x": {0: "b"}}}
torch.onnx.export(net, (example,), file, dynamo=False, **names)
session = onnxruntime.InferenceSession(file.getvalue(), providers=["CPUExecutionProvider"])
agree(lambda x: torch.from_numpy(session.run(None, {"x": x.numpy()})[0]), net, (3, 3, 31, 45))
net.prepare_maps()
for kind in ("fpn", "unet", "upernet"):
    head = HeadConfig(type=kind, num_classes=3, channels=16)
    dense = Segmenter(SegmenterConfig(backbone=net.config, head=head), net).eval()
    agree(torch.jit.trace(dense, torch.randn(2, 3, 31, 45)), dense, (2, 3, 31, 45), (1, 3, 31, 45))
"""

SWIN_ONNX = """
import warnings
import onnxruntime
from torch.export import Dim

warnings.simplefilter("ignore")
OPEN = Dim.AUTO
for dims, shapes in (
    (None, [(2, 3, 24, 36)]),
    ({0: OPEN}, [(2, 3, 24, 36), (5, 3, 24, 36)]),
    ({0: OPEN, 2: OPEN, 3: OPEN}, [(2, 3, 24, 36), (3, 3, 31, 45), (1, 3, 18, 26)]),
):
    net = make(VERSION, depths=(2, 1))
    program = torch.export.export(net, (torch.randn(2, 3, 24, 36),), dynamic_shapes=dims and (dims,))
    model = torch.onnx.export(program, dynamo=True, verbose=False).model_proto.SerializeToString()
    session = onnxruntime.InferenceSession(model, providers=["CPUExecutionProvider"])
    name = session.get_inputs()[0].name
    agree(lambda x: torch.from_numpy(session.run(None, {name: x.numpy()})[0]), net, *shapes)
"""


def run(script, backend="aot_eager", **changes):
    run_after(BEGIN, script, CHANGES=changes, BACKEND=backend)


def run_after(begin, script, **names):
    assignments = "\n".join(f"{name} = {value!r}" for name, value in names.items())
    program = "\n".join([assignments, textwrap.dedent(begin), textwrap.dedent(script)])
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]


def test_trace_of_swin():
    run_after(SWIN, SWIN_TRACE)


@pytest.mark.slow
@pytest.mark.parametrize("version", [1, 2])
def test_trace_by_the_old_onnx_exporter_and_under_dense_heads(version):
    run_after(SWIN, SWIN_TRACE_MORE, VERSION=version)


def test_export_with_open_batch_height_and_width():
    run(EXPORT)


@pytest.mark.slow
@pytest.mark.parametrize(
    "changes",
    [
        {"position": "rotary", "num_registers": 4},
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


def test_export_of_swin():
    """The batch left open, then everything."""
    run_after(SWIN, SWIN_EXPORT)


def test_compile_of_swin_has_no_break():
    run_after(SWIN, SWIN_COMPILE, BACKEND="eager", VERSIONS=[1])


@pytest.mark.slow
@pytest.mark.parametrize("version", [1, 2])
def test_export_of_four_stages(version):
    run_after(SWIN, SWIN_EXPORT_DEEP, VERSION=version)


@pytest.mark.slow
@pytest.mark.parametrize("version", [1, 2])
def test_compile_of_swin_at_other_sizes_and_backwards(version):
    run_after(SWIN, SWIN_COMPILE_SIZES, VERSION=version, BACKEND="aot_eager")


@pytest.mark.slow
def test_compile_of_swin_to_machine_code():
    run_after(SWIN, SWIN_COMPILE, BACKEND="inductor", VERSIONS=[1, 2])


@pytest.mark.slow
@pytest.mark.parametrize("version", [1, 2])
def test_onnx_of_swin(version):
    """In onnxruntime, at the size of the example, with an open batch, with everything open."""
    run_after(SWIN, SWIN_ONNX, VERSION=version)
