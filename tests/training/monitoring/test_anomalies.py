"""What a run says when its numbers go wrong, and what it leaves for whoever looks why."""

import json
import math
import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from tests.training.interrupted_runs import (
    checkpoint_steps,
    comparable_rows,
    interrupt_after,
    last_checkpoint,
    log_rows,
)

from triptych.errors import TriptychError
from triptych.training import run
from triptych.training.monitoring.anomalies import MIN_LOSSES, AnomalyDetector
from triptych.training.tasks.classification import Classify


def break_steps(monkeypatch, *steps):
    """Let the loss of these steps, counted from 0, be no number."""
    sound = Classify.loss

    def broken(self, model, batch):
        output = sound(self, model, batch)
        return output._replace(loss=output.loss * math.nan) if batch["seed"][1] in steps else output

    monkeypatch.setattr(Classify, "loss", broken)


def test_a_nan_loss_stops_the_run_and_documents_its_batch(config, tmp_path, monkeypatch):
    break_steps(monkeypatch, 4)
    often = replace(config, loop=replace(config.loop, save_every=0.0))
    with pytest.raises(
        TriptychError,
        match=r"loss is nan at step 5 \(with grad_norm\), on .*png .*; details are in .*nonfinite-step-5.json. "
        "Resume with",
    ):
        run(often, tmp_path)
    assert max(checkpoint_steps(tmp_path)) <= 4
    tensors, _ = last_checkpoint(tmp_path)
    assert all(tensor.isfinite().all() for tensor in tensors.values())
    about = json.loads((tmp_path / "nonfinite-step-5.json").read_text())
    assert about["terms"] == {"loss": "nan", "grad_norm": "nan"}
    assert len(about["gradients"]) == 20 < about["num_gradients"]
    assert "patch.proj.weight" in about["gradients"]
    (batch,) = about["batches"]
    assert batch["seed"] == [0, 4, 0]
    assert len(batch["ids"]) == len(batch["rows"]) == 8
    assert all(name.endswith(".png") for name in batch["ids"])
    saved = load_file(tmp_path / "nonfinite-step-5.safetensors")
    assert saved["0.image"].shape[0] == 8
    assert saved["0.label"].shape == (8,)
    assert log_rows(tmp_path)[-1]["step"] == 4


def test_a_step_that_is_skipped_learns_nothing_and_the_run_goes_on(config, tmp_path, monkeypatch):
    skipping = replace(config, loop=replace(config.loop, on_nonfinite="skip"))
    with monkeypatch.context() as patch:
        break_steps(patch, 4)
        assert run(skipping, tmp_path / "r").finished
        with patch.context() as inner:
            interrupt_after(inner, 5)
            run(skipping, tmp_path / "cut")
        run(skipping, tmp_path / "cut")
    rows = log_rows(tmp_path / "r")
    assert [row["step"] for row in rows if "skipped" in row] == [5]
    row = next(row for row in rows if "skipped" in row)
    assert row["skipped"] == ["loss", "grad_norm"]
    assert len(row["ids"]) == 8
    assert all(math.isfinite(row["loss"]) for row in rows if "loss" in row)
    tensors, _ = last_checkpoint(tmp_path / "r")
    assert tensors["optimizer.head.weight.step"] == max(row["step"] for row in rows) - 1
    assert all(tensor.isfinite().all() for tensor in tensors.values())
    other, _ = last_checkpoint(tmp_path / "cut")
    assert [name for name in tensors if not torch.equal(tensors[name], other[name])] == []
    assert comparable_rows(tmp_path / "r") == comparable_rows(tmp_path / "cut")


def test_a_run_that_only_skips_stops(config, tmp_path, monkeypatch):
    break_steps(monkeypatch, *range(2, 99))
    with pytest.raises(
        TriptychError, match=r"loss is nan at step 12 .* The 9 steps before were not finite either"
    ):
        run(replace(config, loop=replace(config.loop, on_nonfinite="skip")), tmp_path)


def test_skipping_may_be_asked_for_when_the_run_has_stopped(config, tmp_path, monkeypatch):
    break_steps(monkeypatch, 4)
    with pytest.raises(TriptychError, match="loss is nan at step 5"):
        run(config, tmp_path)
    assert run(replace(config, loop=replace(config.loop, on_nonfinite="skip")), tmp_path).finished


def test_a_spike_stands_out_of_the_spread_of_those_before_it(tmp_path):
    rng = np.random.default_rng(0)
    guard, other = AnomalyDetector(tmp_path, "stop"), AnomalyDetector(tmp_path, "stop")
    losses = 2.0 + 0.1 * rng.standard_normal(400)
    assert [guard.spike(loss) for loss in losses] == [None] * 400  # one in 10^23 of a normal distribution
    assert guard.spike(2.5) is None
    assert guard.spike(4.0) == pytest.approx(20, rel=0.35)
    other.load_state_dict(json.loads(json.dumps(guard.state_dict())))
    assert guard.spike(4.2) == other.spike(4.2) is not None
    assert guard.spike(0.0) is None  # lower is no alarm
    assert AnomalyDetector(tmp_path, "stop").spike(1e9) is None
    flat = AnomalyDetector(tmp_path, "stop")
    for _ in range(MIN_LOSSES):
        assert flat.spike(1.0) is None
    assert flat.spike(1.005) is None  # without any spread a thousandth of the loss is one deviation
    assert flat.spike(1.02) == pytest.approx(20, rel=1e-6)


def test_a_jump_of_the_loss_is_said_with_its_examples(config, tmp_path, monkeypatch, capsys):
    sound = Classify.loss

    def jumping(self, model, batch):
        output = sound(self, model, batch)
        return output._replace(loss=output.loss * (1000 if batch["seed"][1] == MIN_LOSSES + 2 else 1))

    monkeypatch.setattr(Classify, "loss", jumping)
    run(replace(config, loop=replace(config.loop, epochs=10)), tmp_path)
    row = next(row for row in log_rows(tmp_path) if "spike" in row)
    assert row["step"] == MIN_LOSSES + 3
    assert len(row["ids"]) == 8
    assert f"step {MIN_LOSSES + 3}: loss spike to" in capsys.readouterr().err


def test_changed_images_are_named(short, image_folder, tmp_path):
    copy = tmp_path / "images"
    shutil.copytree(image_folder, copy)
    config = replace(short, data=str(copy))
    run(config, tmp_path / "r")
    (copy / "red" / "3.png").unlink()
    (copy / "red" / "4.png").rename(copy / "blue" / "99.png")
    Image.new("RGB", (24, 24)).save(copy / "green" / "5.png")
    with pytest.raises(
        TriptychError,
        match=r"changed since the run in .* began: 2 are gone \(red/3.png, red/4.png\), 1 is new \(blue/99.png\), "
        r"1 is not as before \(green/5.png\); restore them",
    ):
        run(config, tmp_path / "r")


def test_the_log_says_how_fast_what_share_of_the_peak_and_how_much_memory(short, tmp_path, capsys):
    run(replace(short, loop=replace(short.loop, log_every=0.0)), tmp_path)
    rows = [row for row in log_rows(tmp_path) if "loss" in row]
    assert all(0 < row["mfu"] < 1 and row["images_per_second"] > 0 for row in rows)
    assert all(
        row["peak_memory"] > 1e7 and 0 <= row["waiting"] <= 1 and 0 <= row["saving"] <= 1 for row in rows
    )
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("step ")]
    assert "images/s  MFU " in lines[0]
    assert " GB  waiting " in lines[0]
