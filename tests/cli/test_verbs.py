"""Output and files of each command, called as by the console script."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import triptych as tp
from triptych.cli import main
from triptych.cli.model_summary import describe
from triptych.cli.output import count
from triptych.cli.segment import destinations
from triptych.metrics.cost import count_macs, count_parameters
from triptych.models.configs.convnet import ConvNetConfig
from triptych.models.registry import build, config_for
from triptych.plots import style
from triptych.weights import hub


@pytest.fixture(autouse=True)
def coarse(monkeypatch):
    """Draw a third of the pixels, since the tests check only that figures are written."""
    monkeypatch.setattr(style, "DPI", 60)


def output_of(capsys, *args):
    assert main([str(arg) for arg in args]) == 0
    return capsys.readouterr().out


def test_classify(model, images, capsys):
    lines = output_of(capsys, "classify", images / "0.png", "--model", model, "--top", 2).splitlines()
    assert lines[0] == str(images / "0.png")
    assert len(lines) == 3
    pipe = tp.ClassificationPipeline(tp.load(model))
    assert pipe(images / "0.png").name in lines[1]
    assert "%" in lines[1]


def test_classify_json_is_a_line_an_image(model, images, capsys):
    rows = [
        json.loads(line)
        for line in output_of(capsys, "classify", images, "--model", model, "--json").splitlines()
    ]
    assert [row["image"] for row in rows] == [str(images / f"{i}.png") for i in range(5)]
    assert [len(row["top"]) for row in rows] == [4] * 5
    assert set(rows[0]["top"][0]) == {"name", "index", "probability"}


def test_explain(model, images, tmp_path, capsys):
    args = ("explain", images / "0.png", "--model", model, "--out", tmp_path / "out", "--size", "48x32")
    result = json.loads(output_of(capsys, *args, "--json"))
    assert result["size"] == [32, 48]
    assert len(result["rollout"]) == 4
    names = {"rollout", "heads", "distances", "filters", "positions"}
    assert {path.name for path in (tmp_path / "out").iterdir()} == {f"{n}.png" for n in names} | {
        "explanation.json",
        "explanation.npz",
    }
    with Image.open(tmp_path / "out" / "heads.png") as image:
        assert image.width > 200
    assert "rollout.png" in output_of(capsys, *args)


def test_segment(parser, images, tmp_path, capsys):
    out = tmp_path / "out"
    lines = output_of(capsys, "segment", images / "0.png", "--model", parser, "--out", out).splitlines()
    pipe = tp.SegmentationPipeline(tp.load(parser))
    result = pipe(images / "0.png")
    assert lines[0].startswith(f"{images / '0.png'}: {result.areas[0].name} ")
    assert lines[1] == f"{out}: 0.overlay.png, 0.labels.png, 0.legend.png, 0.json"
    assert sorted(path.name for path in out.iterdir()) == [
        "0.json",
        "0.labels.png",
        "0.legend.png",
        "0.overlay.png",
    ]
    with Image.open(out / "0.labels.png") as labels:
        assert labels.mode == "P"
        assert labels.size == (50, 40)
        assert (np.asarray(labels) == result.labels).all()
    with Image.open(out / "0.overlay.png") as overlay:
        assert overlay.size == (50, 40)
    with Image.open(out / "0.legend.png") as legend:
        assert legend.width > 300
    assert json.loads((out / "0.json").read_text()) == result.to_json()


def test_segment_json_is_a_line_an_image(parser, images, tmp_path, capsys):
    args = ("--window", "24x16", "--overlap", 0.25, "--scales", 0.5, 1, "--flip", "--json", "--size", 30)
    out = output_of(capsys, "segment", images, "--model", parser, "--out", tmp_path, *args)
    rows = [json.loads(line) for line in out.splitlines()]
    assert [row["image"] for row in rows] == [str(images / f"{i}.png") for i in range(5)]
    pipe = tp.SegmentationPipeline(tp.load(parser))
    same = pipe(images / "2.png", window=(16, 24), overlap=0.25, scales=(0.5, 1.0), flip=True, size=30)
    assert rows[2] == same.to_json() | {"files": rows[2]["files"]}
    assert all(Path(file).is_file() for row in rows for file in row["files"])
    assert sum(area["share"] for area in rows[0]["areas"]) == pytest.approx(1)


def test_results_of_different_files_have_different_names(parser, images, tmp_path, capsys):
    """Subfolders are kept, and so are files of the same name with different suffixes or in different folders."""
    folder = tmp_path / "in"
    (folder / "below").mkdir(parents=True)
    with Image.open(images / "0.png") as image:
        for name in ("a.png", "a.bmp", "b.png", "below/a.png"):
            image.save(folder / name)
    typed = (folder, folder / "b.png", images / "0.png", folder / "below" / "a.png")
    out = output_of(capsys, "segment", *typed, images, "--model", parser, "--out", tmp_path / "out")
    assert len(out.splitlines()) == 4 + 5 + 1
    written = {str(path.relative_to(tmp_path / "out")) for path in (tmp_path / "out").rglob("*.json")}
    assert written == {"a.png.json", "a.bmp.json", "b.json", "below/a.json", *(f"{i}.json" for i in range(5))}
    assert destinations((str(folder / "below"), str(folder))) == {
        folder / "below" / "a.png": Path("a.png"),
        folder / "a.bmp": Path("a.bmp"),
        folder / "a.png": Path("a.png-2"),
        folder / "b.png": Path("b"),
    }


@pytest.mark.skipif("swin-scenes" not in hub.SHIPPED, reason="asset missing: swin_scenes.safetensors")
def test_segment_with_the_shipped_segmenter(tmp_path, capsys):
    from triptych.data.builtin.scenes import scenes

    source = scenes("test")
    accuracies = []
    for i in range(4):
        Image.fromarray(np.asarray(source[i].image)).save(tmp_path / f"{i}.png")
    output_of(capsys, "segment", tmp_path, "--out", tmp_path / "out")
    for i in range(4):
        with Image.open(tmp_path / "out" / f"{i}.labels.png") as labels:
            accuracies.append((np.asarray(labels) == source[i].mask).mean())
    assert np.mean(accuracies) > 0.6  # it is 0.77 over 500 scenes


def test_list(capsys):
    out = output_of(capsys, "list", "vit-b*")
    assert "vit-b16" in out
    assert "86.6 M" in out
    assert "17.6 G" in out
    rows = json.loads(output_of(capsys, "list", "--json"))
    assert [row["name"] for row in rows] == tp.list_models()
    weights = {row["name"]: row["parameters"] for row in rows}
    assert weights["vit-b16"] == 86567656
    assert weights["swin-t"] == 28288354
    assert weights["kl-f8"] == 83653863
    assert all(row["parameters"] > 0 for row in rows)
    out = output_of(capsys, "list", "swin*")
    assert "widths 96-192-384-768, 2-2-6-2 blocks" in out
    assert "28.3 M" in out
    assert "4.49 G" in out


def test_list_agrees_with_the_networks():
    for config in (
        ConvNetConfig(widths=(8, 12, 24), image_size=(20, 17)),
        ConvNetConfig(widths=(4,), in_channels=1),
    ):
        known = describe(config)
        with torch.device("meta"):
            net = build(config)
        assert known.parameters == count_parameters(net)
        assert known.macs == count_macs(net, (1, config.in_channels, *config.image_size))


def test_every_network_is_described():
    for name in tp.list_models():
        known = describe(config_for(name))
        assert known.form, name
        assert known.parameters, name


def test_info(model, capsys):
    out = output_of(capsys, "info", model)
    assert "patches of 8, width 24, 2 blocks, 3 heads" in out
    assert "4: cat, dog, fox, owl" in out
    assert json.loads(output_of(capsys, "info", model, "--json"))["classes"]["names"] == [
        "cat",
        "dog",
        "fox",
        "owl",
    ]


def test_info_of_a_segmenter(parser, capsys):
    out = " ".join(output_of(capsys, "info", parser).split())
    assert "FPN of width 8 on swin: patches of 4, widths 8-16, 1-2 blocks, 1-2 heads" in out
    assert "7: background, " in out
    net = tp.load(parser)
    assert f"{count_parameters(net):,}" in out
    assert f"{count(count_macs(net, (1, 3, 32, 32)))} per image of 32x32" in out


@pytest.mark.parametrize("format", ["hf", "timm", "triptych"])
def test_convert_there_and_back(model, tmp_path, capsys, format):
    assert format in output_of(capsys, "convert", model, tmp_path / "there", "--format", format)
    back = output_of(
        capsys, "convert", tmp_path / "there", tmp_path / "back.safetensors", "--format", "triptych", "--json"
    )
    assert json.loads(back)["format"] == "triptych"
    ours, theirs = tp.load(model).state_dict(), tp.load(tmp_path / "back.safetensors").state_dict()
    assert ours.keys() == theirs.keys()
    assert all((ours[name] == theirs[name]).all() for name in ours)


def test_evaluate(model, labeled, tmp_path, capsys):
    args = ("evaluate", model, "--data", labeled, "--batch-size", 4, "--workers", 0)
    metrics = json.loads(output_of(capsys, *args, "--out", tmp_path, "--json"))
    assert metrics["count"] == 11
    pipe = tp.ClassificationPipeline(tp.load(model), dtype="fp32")
    files = [path for path in sorted(labeled.glob("val/*/*.png")) if path != labeled / "val/fox/3.png"]
    correct = sum(pipe(path).name == path.parent.name for path in files)
    assert metrics["top1"] == pytest.approx(correct / 11)
    assert metrics["top5"] == 1.0
    assert metrics["per_class"]["owl"] == {"accuracy": None, "count": 0}
    assert metrics["per_class"]["fox"]["count"] == 3
    assert sum(pair["count"] for pair in metrics["most_confused"]) == 11 - correct
    assert "3.png" in next(iter(metrics["skipped"]))
    assert json.loads((tmp_path / "metrics.json").read_text()) == metrics
    assert (tmp_path / "confusion.png").stat().st_size > 3000
    out = output_of(capsys, *args)
    assert f"{correct / 11:.2%}" in out
    assert "most confused" in out


@pytest.mark.parametrize("data", ["scenes", "folder"])
def test_evaluate_a_segmenter(parser, masked, tmp_path, capsys, data, monkeypatch):
    if data == "scenes":
        monkeypatch.setattr("triptych.data.builtin.scenes.DEFAULT_COUNTS", {"train": 4, "test": 4})
    args = ("evaluate", parser, "--data", "scenes" if data == "scenes" else masked, "--workers", 0)
    metrics = json.loads(output_of(capsys, *args, "--out", tmp_path, "--json"))
    assert metrics["task"] == "segmentation"
    size = 128 * 128 if data == "scenes" else 40 * 48  # of the masks, not of the network's input
    assert metrics["count"] == 4 * size
    assert 0 <= metrics["miou"] <= metrics["pixel_accuracy"] <= 1
    counts = {name: scores["count"] for name, scores in metrics["per_class"].items()}
    assert sum(counts.values()) == metrics["count"]
    assert counts["background"] > 0
    ious = [scores["iou"] for scores in metrics["per_class"].values() if scores["iou"] is not None]
    assert metrics["miou"] == pytest.approx(sum(ious) / len(ious))
    wrong = sum(pair["count"] for pair in metrics["most_confused"])
    assert metrics["pixel_accuracy"] == pytest.approx(1 - wrong / metrics["count"])
    assert json.loads((tmp_path / "metrics.json").read_text()) == metrics
    assert (tmp_path / "confusion.png").stat().st_size > 3000
    out = output_of(capsys, *args)
    for words in (f"{metrics['miou']:.2%}", "mIoU", "pixel accuracy", "background", "most confused"):
        assert words in out
    if data == "folder":
        without = json.loads(
            output_of(capsys, *args, "--ignore-index", 0, "--window", "24x16", "--flip", "--json")
        )
        assert without["count"] == metrics["count"] - counts["background"]


def test_plot(tmp_path, capsys):
    rows = [{"step": i, "images": 8 * i, "loss": 2 / (i + 1), "lr": 1e-3} for i in range(50)]
    (tmp_path / "log.jsonl").write_text("\n".join(map(json.dumps, rows)) + '\n{"step": 50, "lo')
    assert output_of(capsys, "plot", tmp_path) == f"{tmp_path / 'curves.png'}\n"
    assert (tmp_path / "curves.png").stat().st_size > 3000
    output_of(capsys, "plot", tmp_path / "log.jsonl", "--out", tmp_path / "new" / "x.png")
    assert (tmp_path / "new" / "x.png").exists()


def test_demo_on_a_network_of_the_built_in_names(parser, tmp_path, capsys):
    from dataclasses import replace

    from triptych.data.builtin.emoji import emoji
    from triptych.model_card import Preprocess

    names = emoji("test").classes
    net = tp.create("vit-emoji", depth=1, embed_dim=24, num_heads=3, mlp_ratio=1.0, num_classes=len(names))
    net.card = replace(net.card, classes=names, preprocess=Preprocess(size=(64, 64), crop=1.0))
    tp.save(net, tmp_path / "net.safetensors")
    out = tmp_path / "triptych.png"
    args = (
        "demo",
        "--classifier",
        tmp_path / "net.safetensors",
        "--segmenter",
        parser,
        "--generator",
        "",
        "--out",
        out,
    )
    result = json.loads(output_of(capsys, *args, "--json"))
    assert len(result["see"]) == 10
    assert len(result["see"][0]["top"]) == 5
    assert len(result["parse"]) == 2
    assert 0 <= result["parse"][0]["miou"] <= 1
    with Image.open(out) as image:
        assert image.width > 500
