"""Graphs, run by onnxruntime, OpenVINO and torch.export, compute what the network computes; nothing wrong or incomplete
is left on the disk."""

import json
from dataclasses import replace

import numpy as np
import onnxruntime
import pytest
import torch

import triptych as tp
from triptych.errors import CheckpointError, ConfigError, StorageError
from triptych.weights.graphs import exporting, formats
from triptych.weights.graphs.parts import graphs_of

pytestmark = [
    pytest.mark.proves("Export", "ONNX", by="onnxruntime", reads=False, writes=True),
    pytest.mark.proves("Export", "OpenVINO", by="openvino", reads=False, writes=True),
    pytest.mark.proves("Export", "torch.export", by="torch", reads=False, writes=True),
]

CLASSES = ("a cat", "ein Hündchen", "狐")
SCRIPT = """
import sys
import triptych as tp
from triptych.weights.graphs import formats
from triptych.weights.graphs.exporting import export_graphs

folder = sys.argv[1]
net = tp.load(folder + "/vit.safetensors").bfloat16()  # the graph is fp32
for name in ("onnx", "pt2"):
    tp.export(net, f"{folder}/vit.{name}")
tp.export(net, folder + "/in-folder", "onnx")
formats.MAX_EMBEDDED = 0
export_graphs(net, folder + "/large.onnx", dynamic="batch")
"""


@pytest.fixture(scope="module")
def vit():
    torch.manual_seed(0)
    net = tp.create("vit-ti16", depth=1, embed_dim=16, num_heads=2, num_classes=3, image_size=32)
    for parameter in net.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    net.card = replace(net.card, classes=CLASSES)
    return net.bfloat16().float().eval().requires_grad_(False)


@pytest.fixture(scope="module")
def exported(vit, run_without_checks, tmp_path_factory):
    folder = tmp_path_factory.mktemp("exported")
    tp.save(vit, folder / "vit.safetensors")
    run_without_checks("-c", SCRIPT, folder)
    return folder


def onnx(path):
    return onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])


SHAPES = [(1, 3, 32, 32), (3, 3, 32, 32), (2, 3, 64, 48), (1, 3, 33, 50)]


@pytest.mark.parametrize("shape", SHAPES)
def test_onnx_at_any_size(vit, exported, shape):
    images = torch.randn(shape)
    (logits,) = onnx(exported / "vit.onnx").run(["logits"], {"images": images.numpy()})
    np.testing.assert_allclose(logits, vit(images).numpy(), atol=2e-5)


def test_the_axes_have_names(exported):
    (images,), (logits,) = (
        f(onnx(exported / "vit.onnx")) for f in (lambda s: s.get_inputs(), lambda s: s.get_outputs())
    )
    assert images.shape == ["batch", 3, "height", "width"]
    assert logits.shape == ["batch", 3]


def test_the_metadata_of_onnx(vit, exported):
    metadata = onnx(exported / "vit.onnx").get_modelmeta().custom_metadata_map
    assert json.loads(metadata["classes"]) == list(CLASSES)
    preprocess = json.loads(metadata["preprocess"])
    assert preprocess["size"] == [32, 32]
    assert preprocess["mean"] == list(vit.card.preprocess.mean)
    assert metadata["dynamic"] == "size"


def test_pt2(vit, exported):
    files = {"classes": "", "preprocess": ""}
    module = torch.export.load(exported / "vit.pt2", extra_files=files).module()
    assert json.loads(files["classes"]) == list(CLASSES)
    images = torch.randn(3, 3, 48, 80)
    torch.testing.assert_close(module(images), vit(images), atol=2e-5, rtol=1e-5)


def test_weights_in_a_second_file(vit, exported):
    images = torch.randn(4, 3, 32, 32)
    (logits,) = onnx(exported / "large.onnx").run(None, {"images": images.numpy()})
    np.testing.assert_allclose(logits, vit(images).numpy(), atol=2e-5)
    assert (exported / "large.onnx.data").stat().st_size > 10_000


def test_nothing_else_is_written(exported):
    names = {path.name for path in exported.iterdir()}
    assert names == {"vit.safetensors", "vit.onnx", "vit.pt2", "in-folder", "large.onnx", "large.onnx.data"}
    assert [path.name for path in (exported / "in-folder").iterdir()] == ["model.onnx"]


def fake(monkeypatch, outputs, failing=()):
    """Let PT2 files contain a line of text, and their runtime compute `outputs(net's outputs)`."""

    def write(program, graph, path, metadata):
        if metadata["dynamic"] in failing:
            raise RuntimeError("no open sizes\nand a page of advice")
        path.write_text(metadata["dynamic"])
        read.graph = graph

    def read(path):
        return lambda inputs: [outputs(read.graph.module(*inputs))]

    monkeypatch.setattr(exporting, "traced", lambda graph, axes: None)
    monkeypatch.setitem(formats.FORMATS, "pt2", replace(formats.FORMATS["pt2"], write=write, read=read))


def test_a_wrong_graph_is_not_written_and_the_earlier_file_stays(vit, tmp_path, monkeypatch):
    (tmp_path / "net.pt2").write_text("earlier")
    for wrong in (lambda x: x * 1.01, lambda x: x[:, :2], lambda x: x * float("nan")):
        fake(monkeypatch, wrong)
        with pytest.raises(
            CheckpointError, match=r"^model cannot be written as PT2: PT2 computes something else than the"
        ):
            tp.export(vit, tmp_path / "net.pt2")
        assert [(path.name, path.read_text()) for path in tmp_path.iterdir()] == [("net.pt2", "earlier")]


def test_what_cannot_stay_open_is_fixed_and_reported(vit, tmp_path, monkeypatch):
    fake(monkeypatch, lambda x: x, failing=("size",))
    (result,) = exporting.export_graphs(vit, tmp_path / "net.pt2")
    assert (result.dynamic, result.difference) == ("batch", 0.0)
    assert result.note == "height and width are fixed in net.pt2: no open sizes"
    assert (tmp_path / "net.pt2").read_text() == "batch"
    assert {shapes[0][2:] for shapes in result.shapes} == {(32, 32)}


def test_every_open_size_is_checked_at_two_sizes(vit, tmp_path, monkeypatch):
    fake(monkeypatch, lambda x: x)
    (result,) = exporting.export_graphs(vit, tmp_path / "net.pt2", size=(64, 96))
    assert result.shapes == [[(2, 3, 64, 96)], [(3, 3, 33, 49)]]
    (result,) = exporting.export_graphs(vit, tmp_path / "net.pt2", dynamic="none")
    assert result.shapes == [[(1, 3, 32, 32)]]


def test_weights_of_an_earlier_export_are_removed(vit, tmp_path, monkeypatch):
    fake(monkeypatch, lambda x: x)
    monkeypatch.setitem(formats.FORMATS, "pt2", replace(formats.FORMATS["pt2"], second=".data"))
    (tmp_path / "net.pt2.data").write_text("earlier")
    tp.export(vit, tmp_path / "net.pt2")
    assert [path.name for path in tmp_path.iterdir()] == ["net.pt2"]


def test_mistakes(vit, tmp_path, monkeypatch):
    with pytest.raises(ConfigError, match=r"net.h5 has no suffix of a graph; give .onnx, .pt2 or .xml"):
        tp.export(vit, tmp_path / "net.h5")
    with pytest.raises(ConfigError, match=r"OpenVINO is written to .xml or to a folder, not to net.onnx"):
        tp.export(vit, tmp_path / "net.onnx", "openvino")
    with pytest.raises(ConfigError, match=r"Linear has no graph to export"):
        tp.export(torch.nn.Linear(2, 2), tmp_path / "net.pt2")
    autoencoder = tp.create("kl-f8", base_channels=32)
    with pytest.raises(
        ConfigError, match=r"Autoencoder has 2 graphs \(encoder, decoder\), and net.onnx is one file; give a"
    ):
        tp.export(autoencoder, tmp_path / "net.onnx")
    with pytest.raises(ConfigError, match=r"size is 60 x 64, which must be multiples of 8; give 64 x 64"):
        exporting.export_graphs(autoencoder, tmp_path / "out", "onnx", size=(60, 64))
    with pytest.raises(ConfigError, match=r"dynamic is 'all', which must be one of size, batch, none"):
        exporting.export_graphs(vit, tmp_path / "net.onnx", dynamic="all")  # type: ignore[arg-type]
    fake(monkeypatch, lambda x: x)
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageError, match=r"file is a file, and a folder is needed"):
        tp.export(vit, tmp_path / "file", "pt2")
    monkeypatch.setattr(formats.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(
        ConfigError, match=r"OpenVINO needs openvino, onnx, onnxscript, which .*'triptych\[export\]'"
    ):
        tp.export(vit, tmp_path / "net.xml")
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


@pytest.mark.parametrize(
    ("name", "graphs"),
    [
        ("vit-ti16", {"model": ("images",)}),
        ("clip-l", {"text_encoder": ("token_ids",)}),
        ("ldm-celeba", {"network": ("x", "t"), "encoder": ("images",), "decoder": ("latents",)}),
        (
            "ldm-semantic",
            {
                "semantic_map": ("classes",),
                "network": ("x", "t"),
                "encoder": ("images",),
                "decoder": ("latents",),
            },
        ),
        ("dit-xl2-256", {"network": ("x", "t", "labels"), "encoder": ("images",), "decoder": ("latents",)}),
        (
            "sd1",
            {
                "text_encoder": ("token_ids",),
                "network": ("x", "t", "context"),
                "encoder": ("images",),
                "decoder": ("latents",),
            },
        ),
        (
            "sd-x4-upscaler",
            {
                "text_encoder": ("token_ids",),
                "network": ("x", "t", "context", "labels"),
                "encoder": ("images",),
                "decoder": ("latents",),
            },
        ),
    ],
)
def test_the_graphs_of_networks(name, graphs):
    from triptych.network import on_meta_device

    with on_meta_device():
        net = tp.create(name)
    assert {graph.name: tuple(graph.inputs) for graph in graphs_of(net)} == graphs


def test_the_verb(vit, tmp_path, monkeypatch, capsys):
    from triptych.cli import main

    fake(monkeypatch, lambda x: x, failing=("size",))
    tp.save(vit, tmp_path / "vit.safetensors")
    model, out = str(tmp_path / "vit.safetensors"), str(tmp_path / "net.pt2")
    assert main(["export", model, out, "--size", "48x32", "--json"]) == 0
    output = capsys.readouterr()
    (result,) = json.loads(output.out)
    assert (result["path"], result["format"], result["dynamic"]) == (out, "pt2", "batch")
    assert result["shapes"] == [[[2, 3, 32, 48]], [[3, 3, 32, 48]]]
    assert output.err == "height and width are fixed in net.pt2: no open sizes\n"
    assert main(["export", model, out, "--dynamic", "none"]) == 0
    assert "net.pt2: one size; largest difference from the network 0.0e+00" in capsys.readouterr().out
    assert main(["export", model, str(tmp_path / "net.h5")]) == 2
    assert "net.h5 has no suffix of a graph; give .onnx, .pt2 or .xml" in capsys.readouterr().err
