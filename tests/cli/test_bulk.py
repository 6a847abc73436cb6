"""Folders of many images: the same results in the same order however they are read, in memory that does not grow."""

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

import triptych as tp
from triptych.bench.harness.subprocesses import run_code
from triptych.cli import main, segment
from triptych.model_card import Preprocess
from triptych.pipelines.image_input import images_below


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Eleven images in two folders, the sixth of which is cut short."""
    folder = tmp_path_factory.mktemp("folder")
    (folder / "below").mkdir()
    rng = np.random.default_rng(2)
    for i in range(11):
        pixels = rng.integers(
            0, 256, (int(rng.integers(20, 60)), int(rng.integers(20, 60)), 3), dtype=np.uint8
        )
        Image.fromarray(pixels).save(folder / ("below" if i % 3 == 0 else ".") / f"{i:02d}.png")
    damaged = list(images_below(folder))[5]
    damaged.write_bytes(damaged.read_bytes()[:200])
    return folder


def lines(capsys, *args):
    assert main([str(arg) for arg in args]) == 0
    said = capsys.readouterr()
    return [json.loads(line) for line in said.out.splitlines()], said.err


def test_workers_change_nothing_and_the_damaged_one_is_told(model, folder, capsys):
    args = ("classify", folder, "--model", model, "--json", "--batch-size", 3, "--on-bad-image", "skip")
    found, said = lines(capsys, *args, "--workers", 0)
    good = [str(path) for i, path in enumerate(images_below(folder)) if i != 5]
    assert [one["image"] for one in found] == good
    assert f"{list(images_below(folder))[5]} is damaged" in said
    assert "1 of 11 images could not be read" in said
    assert lines(capsys, *args, "--workers", 2)[0] == found
    pipe = tp.ClassificationPipeline(tp.load(model))
    for path, one in zip(good, found, strict=True):
        alone = pipe(path).to_json()
        assert [guess["index"] for guess in alone["top"]] == [guess["index"] for guess in one["top"]]
        for guess, other in zip(alone["top"], one["top"], strict=True):
            assert guess["probability"] == pytest.approx(
                other["probability"], abs=5e-3
            )  # bf16, batches of 1 and 3


def test_labels_are_those_of_one_by_one(parser, folder, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(segment, "SEVERAL", 5)  # of more images legends and overlays are not drawn
    args = ("segment", folder, "--model", parser, "--json", "--on-bad-image", "skip", "--dtype", "fp32")
    found, _ = lines(capsys, *args, "--out", tmp_path / "a", "--workers", 0)
    again, _ = lines(capsys, *args, "--out", tmp_path / "b", "--workers", 2, "--batch-size", 3)
    assert [one["image"] for one in found] == [one["image"] for one in again]
    assert [one["areas"] for one in found] == [one["areas"] for one in again]
    assert all([file.split(".", 1)[1] for file in one["files"]] == ["labels.png", "json"] for one in found)
    pipe = tp.SegmentationPipeline(tp.load(parser), dtype="fp32")
    for one, other in zip(found, again, strict=True):
        alone = pipe(one["image"]).labels
        for files in (one["files"], other["files"]):
            with Image.open(files[0]) as labels:
                assert (np.asarray(labels) == alone).mean() > 0.999


def test_a_stopped_run_of_masks_goes_on(parser, images, tmp_path, capsys):
    args = ("segment", images, "--model", parser, "--json", "--out", tmp_path, "--write", "labels", "json")
    found, _ = lines(capsys, *args)
    kept = {path: path.stat().st_mtime_ns for path in tmp_path.iterdir() if not path.name.startswith("3.")}
    assert len(kept) == 2 * 4
    (tmp_path / "3.json").unlink()
    again, said = lines(capsys, *args, "--skip-existing")
    assert again == [found[3]]
    assert "4 of 5 already exist" in said
    assert {path: path.stat().st_mtime_ns for path in kept} == kept
    assert lines(capsys, *args, "--skip-existing")[0] == []
    only, _ = lines(capsys, *args[:-2], "overlay", "--skip-existing")
    assert [one["files"] for one in only] == [[str(tmp_path / f"{i}.overlay.png")] for i in range(5)]


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs named pipes")
def test_an_interrupt_leaves_whole_lines(model, images, tmp_path):
    """The program cannot be done before the interrupt: reading the last image, a pipe, waits for somebody to write."""
    many, output = tmp_path / "many", tmp_path / "results.jsonl"
    many.mkdir()
    for i in range(400):
        os.link(images / f"{i % 5}.png", many / f"{i:04d}.png")
    os.mkfifo(many / "9999.png")
    command = [sys.executable, "-m", "triptych", "classify", str(many), "--model", str(model), "--json"]
    with open(output, "w") as file:
        process = subprocess.Popen(
            [*command, "--batch-size", "4", "--workers", "1"],
            stdout=file,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
            # A shell starts jobs in the background with SIGINT ignored, which they pass on, and then it stays ignored.
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
        )
    while process.poll() is None and not output.stat().st_size:
        time.sleep(0.01)
    os.killpg(process.pid, signal.SIGINT)  # as a terminal does: the workers get it, too
    try:
        _, errors = process.communicate(timeout=120)
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
    assert process.returncode == 130
    assert errors.endswith("triptych: interrupted\n")
    assert "Traceback" not in errors
    text = output.read_text()
    assert text.endswith("\n")
    rows = [json.loads(line) for line in text.splitlines()]
    assert 0 < len(rows) <= 400
    assert [row["image"] for row in rows] == [str(many / f"{i:04d}.png") for i in range(len(rows))]


MEMORY = """
import itertools
import sys
from triptych.bench.children.process_memory import memory, report
import triptych as tp

kind, model, image = sys.argv[1:]
pipe = getattr(tp, kind)(model, dtype="fp32", batch_size=4, workers=1)
peaks = []
for number, one in enumerate(pipe(itertools.repeat(image, 200))):
    if number in (39, 199):
        peaks.append(memory().peak)
report(peaks=peaks)
"""


@pytest.mark.parametrize("kind", ["ClassificationPipeline", "SegmentationPipeline"])
def test_memory_does_not_grow_with_the_pictures(kind, parser, tmp_path):
    """Held as they are decoded, 160 images would take 31 MB."""
    Image.fromarray(np.zeros((256, 256, 3), np.uint8)).save(tmp_path / "image.png")
    path = parser
    if kind == "ClassificationPipeline":
        torch.manual_seed(0)
        sizes = {"depth": 1, "embed_dim": 24, "num_heads": 3, "mlp_ratio": 1.0, "patch_size": 64}
        net = tp.create("vit-ti16", num_classes=4, image_size=256, **sizes)
        net.card = replace(net.card, preprocess=Preprocess(size=(256, 256), crop=1.0))
        path = tmp_path / "net.safetensors"
        tp.save(net, path)
    first, last = run_code(MEMORY, kind, path, tmp_path / "image.png").reported["peaks"]
    assert last - first < 12e6
