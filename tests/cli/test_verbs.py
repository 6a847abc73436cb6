"""What each verb prints and writes, called as the console script calls it."""

import json

import pytest
from PIL import Image

import triptych as tp
from triptych.cli import main


def said(capsys, *args):
    assert main([str(arg) for arg in args]) == 0
    return capsys.readouterr().out


def test_classify(model, pictures, capsys):
    lines = said(capsys, "classify", pictures / "0.png", "--model", model, "--top", 2).splitlines()
    assert lines[0] == str(pictures / "0.png")
    assert len(lines) == 3
    pipe = tp.ClassificationPipeline(tp.load(model))
    assert pipe(pictures / "0.png").name in lines[1]
    assert "%" in lines[1]


def test_classify_json_is_a_line_an_image(model, pictures, capsys):
    rows = [
        json.loads(line)
        for line in said(capsys, "classify", pictures, "--model", model, "--json").splitlines()
    ]
    assert [row["image"] for row in rows] == [str(pictures / f"{i}.png") for i in range(5)]
    assert [len(row["top"]) for row in rows] == [4] * 5
    assert set(rows[0]["top"][0]) == {"name", "index", "probability"}


def test_explain(model, pictures, tmp_path, capsys):
    args = ("explain", pictures / "0.png", "--model", model, "--out", tmp_path / "out", "--size", "48x32")
    found = json.loads(said(capsys, *args, "--json"))
    assert found["size"] == [32, 48]
    assert len(found["rollout"]) == 4
    names = {"rollout", "heads", "distances", "filters", "positions"}
    assert {path.name for path in (tmp_path / "out").iterdir()} == {f"{n}.png" for n in names} | {
        "explanation.json",
        "explanation.npz",
    }
    with Image.open(tmp_path / "out" / "heads.png") as image:
        assert image.width > 500
    assert "rollout.png" in said(capsys, *args)


def test_list(capsys):
    out = said(capsys, "list", "vit-b*")
    assert "vit-b16" in out
    assert "86.6 M" in out
    assert "17.6 G" in out
    rows = json.loads(said(capsys, "list", "--json"))
    assert [row["name"] for row in rows] == tp.list_models()
    assert {row["name"]: row["parameters"] for row in rows}["vit-b16"] == 86567656


def test_info(model, capsys):
    out = said(capsys, "info", model)
    assert "patches of 8, width 24, 2 blocks, 3 heads" in out
    assert "4: cat, dog, fox, owl" in out
    assert json.loads(said(capsys, "info", model, "--json"))["classes"]["names"] == [
        "cat",
        "dog",
        "fox",
        "owl",
    ]


@pytest.mark.parametrize("format", ["hf", "timm", "triptych"])
def test_convert_there_and_back(model, tmp_path, capsys, format):
    assert format in said(capsys, "convert", model, tmp_path / "there", "--format", format)
    back = said(
        capsys, "convert", tmp_path / "there", tmp_path / "back.safetensors", "--format", "triptych", "--json"
    )
    assert json.loads(back)["format"] == "triptych"
    ours, theirs = tp.load(model).state_dict(), tp.load(tmp_path / "back.safetensors").state_dict()
    assert ours.keys() == theirs.keys()
    assert all((ours[name] == theirs[name]).all() for name in ours)


def test_evaluate(model, labelled, tmp_path, capsys):
    args = ("evaluate", model, "--data", labelled, "--batch-size", 4, "--workers", 0)
    found = json.loads(said(capsys, *args, "--out", tmp_path, "--json"))
    assert found["count"] == 11
    pipe = tp.ClassificationPipeline(tp.load(model), dtype="fp32")
    files = [path for path in sorted(labelled.glob("val/*/*.png")) if path != labelled / "val/fox/3.png"]
    right = sum(pipe(path).name == path.parent.name for path in files)
    assert found["top1"] == pytest.approx(right / 11)
    assert found["top5"] == 1.0
    assert found["per_class"]["owl"] == {"right": None, "count": 0}
    assert found["per_class"]["fox"]["count"] == 3
    assert sum(pair["count"] for pair in found["most_confused"]) == 11 - right
    assert "3.png" in next(iter(found["left_out"]))
    assert json.loads((tmp_path / "metrics.json").read_text()) == found
    assert (tmp_path / "confusion.png").stat().st_size > 5000
    out = said(capsys, *args)
    assert f"{right / 11:.2%}" in out
    assert "confused most" in out


def test_plot(tmp_path, capsys):
    rows = [{"step": i, "images": 8 * i, "loss": 2 / (i + 1), "lr": 1e-3} for i in range(50)]
    (tmp_path / "log.jsonl").write_text("\n".join(map(json.dumps, rows)) + '\n{"step": 50, "lo')
    assert said(capsys, "plot", tmp_path) == f"{tmp_path / 'curves.png'}\n"
    assert (tmp_path / "curves.png").stat().st_size > 5000
    said(capsys, "plot", tmp_path / "log.jsonl", "--out", tmp_path / "new" / "x.png")
    assert (tmp_path / "new" / "x.png").exists()


def test_demo_on_a_network_of_the_built_in_names(tmp_path, capsys):
    from dataclasses import replace

    from triptych.card import Preprocess
    from triptych.data.emoji import emoji

    names = emoji("test").classes
    net = tp.create("vit-emoji", depth=1, embed_dim=24, num_heads=3, mlp_dim=24, num_classes=len(names))
    net.card = replace(net.card, classes=names, preprocess=Preprocess(size=(64, 64), crop=1.0))
    tp.save(net, tmp_path / "net.safetensors")
    out = tmp_path / "triptych.png"
    rows = json.loads(said(capsys, "demo", "--model", tmp_path / "net.safetensors", "--out", out, "--json"))
    assert len(rows) == 10
    assert len(rows[0]["top"]) == 5
    with Image.open(out) as image:
        assert image.width > 1500
