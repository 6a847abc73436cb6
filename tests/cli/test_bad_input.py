"""Invalid input is reported in one line on stderr, with exit code 2 and without a traceback."""

import pytest
import torch

from triptych import device as hardware
from triptych.cli import main

# Command line, and text that the error must contain.
# {m} is a classifier, {s} a segmenter, {p} a folder of images, {o} invalid files, {t} an empty folder.
MISTAKES = [
    ("clasify x.png", "did you mean classify?"),
    ("xyz", "the commands are demo, list"),
    ("classify", "no image is given"),
    ("classify {t}/nowhere.png --model {m}", "nowhere.png does not exist"),
    ("classify {o}/empty.png --model {m}", "empty.png is empty"),
    ("classify {o}/text.png --model {m}", "text.png is damaged or not an image"),
    ("classify {o}/cut.jpg --model {m}", "cut.jpg is damaged"),
    ("classify {o}/bomb.png --model {m}", "bomb.png has 200 megapixels"),
    ("classify {o}/folder --model {m}", "folder contains no images"),
    ("classify {p}/0.png {o}/cut.jpg --model {m}", "cut.jpg is damaged"),
    ("classify {o}/cut.jpg {o}/empty.png --on-bad-image skip --model {m}", "none of the 2 images"),
    ("classify {p}/0.png --model {t}/none.safetensors", "none.safetensors"),
    ("classify {p}/0.png --model vit-emojis", "did you mean 'vit-emoji'"),
    ("classify {p}/0.png --model {o}/empty.png", "empty.png"),
    ("classify {p}/0.png --model {t}/cut.safetensors", "cut.safetensors"),
    ("classify {p}/0.png --model {t}/text.pth", "text.pth"),
    ("classify {p}/0.png --model {o}/folder", "folder"),
    ("classify {p}/0.png --model {m} --top 0", "top is 0"),
    ("classify {p}/0.png --model {m} --top many", "--top"),
    ("classify {p}/0.png --modl {m}", "did you mean --model?"),
    ("classify {p}/0.png --dtype fp8", "'fp8'"),
    ("classify {p}/0.png --batch-size 0 --model {m}", "batch_size 0"),
    ("classify {p}/0.png --model {s}", "is a segmenter, which classifies pixels; use SegmentationPipeline"),
    ("segment", "no image is given"),
    ("segment {p}/0.png --model {m} --out {t}/s", "is a classifier (ViT)"),
    ("segment {p}/0.png --model {t}/none.safetensors", "none.safetensors"),
    ("segment {t}/nowhere.png --model {s} --out {t}/s", "nowhere.png does not exist"),
    ("segment {o}/cut.jpg --model {s} --out {t}/s", "cut.jpg is damaged"),
    ("segment {o}/folder --model {s} --out {t}/s", "folder contains no images"),
    ("segment {o}/cut.jpg {o}/empty.png --on-bad-image skip --model {s} --out {t}/s", "none of the 2 images"),
    ("segment {p}/0.png --model {s} --out {t}/s --window 64", "window is '64', which must be WIDTHxHEIGHT"),
    ("segment {p}/0.png --model {s} --out {t}/s --window 2x2", "must be at least one patch"),
    ("segment {p}/0.png --model {s} --out {t}/s --window 16x16 --overlap 1", "overlap is 1.0"),
    ("segment {p}/0.png --model {s} --out {t}/s --scales 0 1", "scales is (0.0, 1.0)"),
    ("segment {p}/0.png --model {s} --out {t}/s --scales big", "--scales"),
    ("segment {p}/0.png --model {s} --out {t}/s --size 0", "size is 0"),
    ("segment {p}/0.png --model {s} --out {m}/below", "cannot write"),
    ("explain", "needs IMAGE"),
    ("explain {o}/text.png --model {m} --out {t}/e", "text.png is damaged or not an image"),
    ("explain {p}/0.png --model {m} --size 64", "WIDTHxHEIGHT"),
    ("explain {p}/0.png --model {m} --size 0x64", "WIDTHxHEIGHT"),
    ("explain {p}/0.png --model {m} --out {m}/below", "cannot write"),
    ("evaluate {m}", "no data was named"),
    ("evaluate {m} --data {o}/folder", "folder"),
    ("evaluate {m} --data {t}/nowhere", "nowhere"),
    ("evaluate {m} --data emoji", "does not know"),
    ("evaluate {m} --data emoji --flip", "ViT is not a segmenter"),
    ("evaluate {s} --data scenes --window 2x2", "must be at least one patch"),
    ("evaluate {s} --data scenes --scales 0", "scales is (0.0,)"),
    ("evaluate {s} --data scenes --ignore-index -1", "ignore_index is -1"),
    (
        "evaluate {s} --data emoji",
        "has no masks, and evaluation needs them: images/ and masks/, x.jpg and x_mask.png",
    ),
    ("evaluate", "needs MODEL-or-RUN"),
    ("list nothing-like-it", "no model matches 'nothing-like-it'"),
    ("info", "needs FILE"),
    ("info {t}/none.npz", "none.npz"),
    ("info {t}/cut.safetensors", "cut.safetensors"),
    ("info {o}/text.png", "text.png"),
    ("convert {m} {t}/out --format onxx", "'onxx'"),
    ("convert {m}", "needs DST, --format"),
    ("convert {t}/none.pth {t}/out --format hf", "none.pth"),
    ("plot {t}", "log.jsonl does not exist"),
    ("plot {o}/text.png", "no rows"),
    ("demo --classifier {m} --out {t}/x.png", "other classes than emoji"),
    ("demo --segmenter {m} --out {t}/x.png", "is a classifier (ViT)"),
]


@pytest.mark.parametrize(("typed", "named"), MISTAKES, ids=[typed for typed, _ in MISTAKES])
def test_one_line_and_exit_2(typed, named, model, parser, images, odd, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(hardware, "native_bf16", lambda device: None)
    monkeypatch.setattr(
        hardware, "_LOGGED", {(torch.float32, "cpu")}
    )  # the precision is logged by one run only
    (tmp_path / "cut.safetensors").write_bytes(model.read_bytes()[:-1000])
    (tmp_path / "text.pth").write_text("this is text, not a checkpoint")
    args = [word.format(m=model, s=parser, p=images, o=odd, t=tmp_path) for word in typed.split()]
    assert main(args) == 2
    lines = capsys.readouterr().err.strip().splitlines()
    # Each skipped image is reported in a line before.
    assert len(lines) == 1 + 2 * ("skip" in typed), lines
    assert lines[-1].startswith("triptych: ")
    assert named in lines[-1], lines[-1]


def test_a_damaged_image_is_skipped_and_reported(model, images, odd, capsys):
    args = [
        "classify",
        str(images),
        str(odd / "cut.jpg"),
        "--model",
        str(model),
        "--on-bad-image",
        "skip",
        "--json",
    ]
    assert main(args) == 0
    output = capsys.readouterr()
    assert len(output.out.splitlines()) == 5
    assert "cut.jpg is damaged" in output.err
    assert "1 of 6 images could not be read" in output.err


def test_one_pixel_is_an_image(model, odd, capsys):
    assert main(["classify", str(odd / "pixel.png"), "--model", str(model)]) == 0
    assert "pixel.png" in capsys.readouterr().out


def test_an_interrupt_is_130(monkeypatch, capsys):
    def interrupted(args):
        raise KeyboardInterrupt

    monkeypatch.setattr("triptych.cli._run", interrupted)
    assert main(["list"]) == 130
    assert capsys.readouterr().err == "triptych: interrupted\n"
