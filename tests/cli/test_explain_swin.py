"""`triptych explain` on a Swin and on a segmenter: files, and one-line errors for invalid points."""

import json
from dataclasses import replace

import pytest
import torch

import triptych as tp
from triptych.cli import main
from triptych.heads.config import HeadConfig, SegmenterConfig
from triptych.heads.segmenter import Segmenter
from triptych.model_card import Preprocess
from triptych.plots import style

FILES = {"point.png", "rollout.png", "pyramid.png", "filters.png", "explanation.json", "explanation.npz"}


@pytest.fixture(autouse=True)
def coarse(monkeypatch):
    monkeypatch.setattr(style, "DPI", 50)


@pytest.fixture(scope="module")
def swins(tmp_path_factory):
    """A classifier and a segmenter of 32 x 32 pixels on disk."""
    torch.manual_seed(0)
    sizes = {"embed_dim": 8, "depths": (2, 2), "num_heads": (2, 4), "window_size": 4, "image_size": (32, 32)}
    folder = tmp_path_factory.mktemp("swins")
    net = tp.create("swin-t", num_classes=4, **sizes)
    net.card = replace(net.card, preprocess=Preprocess(size=(32, 32), crop=0.5))
    tp.save(net, folder / "classifier.safetensors")
    backbone = tp.create("swin-t", num_classes=0, map_norms=True, **sizes)
    parser = Segmenter(
        SegmenterConfig(backbone=backbone.config, head=HeadConfig(type="fpn", num_classes=2, channels=8)),
        backbone,
    )
    parser.card = replace(
        parser.card, preprocess=Preprocess(size=(32, 32), crop=1.0, mode="squash"), classes=("sky", "sea")
    )
    tp.save(parser, folder / "segmenter.safetensors")
    return folder


@pytest.mark.parametrize("task", ["classifier", "segmenter"])
def test_explain(task, swins, images, tmp_path, capsys):
    typed = (
        f"explain {images}/0.png --model {swins}/{task}.safetensors --out {tmp_path}/o --point 20 18 --json"
    )
    assert main(typed.split()) == 0
    result = json.loads(capsys.readouterr().out)
    assert {path.name for path in (tmp_path / "o").iterdir()} == FILES
    assert {path.rpartition("/")[2] for path in result["files"]} == FILES
    assert len(result["rollout"]) == 8
    assert result["window_px"] == [[16, 16], [16, 16], [32, 32], [32, 32]]
    if task == "segmenter":
        assert {row["name"] for row in result["top"]} == {"sky", "sea"}
        assert result["point"] == [20 * 32 / 50, 18 * 32 / 40]


@pytest.mark.parametrize(
    ("task", "point", "named"),
    [
        ("segmenter", "50 3", "x = 50, y = 3 is outside the image of 50 x 40 pixels"),
        (
            "classifier",
            "3 3",
            "x = 3, y = 3 is cropped away: the network's input has x from 15 to 35 and y from 10 to 30",
        ),
        ("segmenter", "3 y", "--point"),
        ("segmenter", "3", "--point"),
    ],
)
def test_invalid_points(task, point, named, swins, images, tmp_path, capsys):
    typed = f"explain {images}/0.png --model {swins}/{task}.safetensors --out {tmp_path}/o --point {point}"
    assert main(typed.split()) == 2
    message = capsys.readouterr().err
    assert message.startswith("triptych: ")
    assert message.count("\n") == 1
    assert named in message
    assert not (tmp_path / "o").exists()


def test_a_point_in_a_vit(model, images, tmp_path, capsys):
    typed = f"explain {images}/0.png --model {model} --out {tmp_path}/o --point 20 18 --json"
    assert main(typed.split()) == 0
    assert json.loads(capsys.readouterr().out)["readout"].startswith("patch at x = ")
