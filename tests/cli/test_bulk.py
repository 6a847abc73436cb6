"""Folders of many images: results do not depend on how they are read, and memory is constant."""

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
    """Eleven images in two folders, the sixth of which is truncated."""
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
    output = capsys.readouterr()
    return [json.loads(line) for line in output.out.splitlines()], output.err


def test_workers_change_nothing_and_a_damaged_image_is_reported(model, folder, capsys):
    args = ("classify", folder, "--model", model, "--json", "--batch-size", 3, "--on-bad-image", "skip")
    results, errors = lines(capsys, *args, "--workers", 0)
    good = [str(path) for i, path in enumerate(images_below(folder)) if i != 5]
    assert [result["image"] for result in results] == good
    assert f"{list(images_below(folder))[5]} is damaged" in errors
    assert "1 of 11 images could not be read" in errors
    assert lines(capsys, *args, "--workers", 2)[0] == results
    pipe = tp.ClassificationPipeline(tp.load(model))
    for path, result in zip(good, results, strict=True):
        single = pipe(path).to_json()
        assert [guess["index"] for guess in single["top"]] == [guess["index"] for guess in result["top"]]
        for guess, other in zip(single["top"], result["top"], strict=True):
            assert guess["probability"] == pytest.approx(
                other["probability"], abs=5e-3
            )  # bf16, batches of 1 and 3


def test_labels_equal_those_of_single_images(parser, folder, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(segment, "SEVERAL", 5)  # for more images no legends and overlays are drawn
    args = ("segment", folder, "--model", parser, "--json", "--on-bad-image", "skip", "--dtype", "fp32")
    results, _ = lines(capsys, *args, "--out", tmp_path / "a", "--workers", 0)
    again, _ = lines(capsys, *args, "--out", tmp_path / "b", "--workers", 2, "--batch-size", 3)
    assert [result["image"] for result in results] == [result["image"] for result in again]
    assert [result["areas"] for result in results] == [result["areas"] for result in again]
    endings = [[file.split(".", 1)[1] for file in result["files"]] for result in results]
    assert all(ending == ["labels.png", "json"] for ending in endings)
    pipe = tp.SegmentationPipeline(tp.load(parser), dtype="fp32")
    for result, other in zip(results, again, strict=True):
        expected = pipe(result["image"]).labels
        for files in (result["files"], other["files"]):
            with Image.open(files[0]) as labels:
                assert (np.asarray(labels) == expected).mean() > 0.999


def test_an_interrupted_command_resumes(parser, images, tmp_path, capsys):
    args = ("segment", images, "--model", parser, "--json", "--out", tmp_path, "--write", "labels", "json")
    results, _ = lines(capsys, *args)
    existing = {p: p.stat().st_mtime_ns for p in tmp_path.iterdir() if not p.name.startswith("3.")}
    assert len(existing) == 2 * 4
    (tmp_path / "3.json").unlink()
    again, errors = lines(capsys, *args, "--skip-existing")
    assert again == [results[3]]
    assert "4 of 5 already exist" in errors
    assert {path: path.stat().st_mtime_ns for path in existing} == existing
    assert lines(capsys, *args, "--skip-existing")[0] == []
    overlays, _ = lines(capsys, *args[:-2], "overlay", "--skip-existing")
    assert [result["files"] for result in overlays] == [
        [str(tmp_path / f"{i}.overlay.png")] for i in range(5)
    ]


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs named pipes")
def test_an_interrupt_leaves_complete_lines(model, images, tmp_path):
    """The program cannot finish before the interrupt, since reading the last image, a pipe, waits for a writer."""
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
            # A shell disables SIGINT in background jobs, which their child processes inherit.
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
        )
    while process.poll() is None and not output.stat().st_size:
        time.sleep(0.01)
    os.killpg(process.pid, signal.SIGINT)  # to the workers, too, as from a terminal
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

pipeline, model, image = sys.argv[1:]
pipe = getattr(tp, pipeline)(model, dtype="fp32", batch_size=4, workers=1)
peaks = []
for number, _ in enumerate(pipe(itertools.repeat(image, 500))):
    if number in (99, 499):
        peaks.append(memory().peak)
report(peaks=peaks)
"""


@pytest.mark.parametrize("pipeline", ["ClassificationPipeline", "SegmentationPipeline"])
def test_memory_does_not_grow_with_the_number_of_images(pipeline, parser, tmp_path):
    """400 decoded images would take 79 MB; the allocator's own growth varies by up to 16."""
    Image.fromarray(np.zeros((256, 256, 3), np.uint8)).save(tmp_path / "image.png")
    path = parser
    if pipeline == "ClassificationPipeline":
        torch.manual_seed(0)
        sizes = {"depth": 1, "embed_dim": 24, "num_heads": 3, "mlp_ratio": 1.0, "patch_size": 64}
        net = tp.create("vit-ti16", num_classes=4, image_size=256, **sizes)
        net.card = replace(net.card, preprocess=Preprocess(size=(256, 256), crop=1.0))
        path = tmp_path / "net.safetensors"
        tp.save(net, path)
    first, last = run_code(MEMORY, pipeline, path, tmp_path / "image.png").reported["peaks"]
    assert last - first < 30e6
