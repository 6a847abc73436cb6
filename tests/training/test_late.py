"""A step whose values are read after the next one was queued equals a step that was waited for."""

import json
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file
from tests.training.distributed.test_parallelize import configs, data  # noqa: F401 - fixtures
from tests.training.interrupted_runs import (
    checkpoint_steps,
    comparable_rows,
    interrupt_after,
    last_checkpoint,
    log_rows,
)
from tests.training.nan_losses import make_losses_nan

from triptych.errors import TriptychError
from triptych.training import adversary, loop, run
from triptych.training.configs.first_stage import CodebookConfig, DiscriminatorConfig
from triptych.training.ema import Ema
from triptych.training.monitoring.anomalies import PendingMetrics
from triptych.training.monitoring.step_reporter import StepReporter
from triptych.training.tasks.classification import Classify

RUNS = ("vit", "swin", "kl", "vq")


@pytest.fixture
def runs(configs):  # noqa: F811
    """Runs with batch norms, accumulation over two batches, a discriminator, a codebook that a forward pass changes;
    all with a moving average of the weights, and skipping steps that are not finite."""
    vq = replace(
        configs["vq"],
        codebook=CodebookConfig(update="ema", revive_below=0.9, decay=0.7),
        discriminator=DiscriminatorConfig(channels=4, layers=1, start=0.3, adaptive=False),
    )
    changed = {**configs, "kl": replace(configs["kl"], features=None), "vq": vq}
    return {
        name: replace(changed[name], loop=replace(changed[name].loop, on_nonfinite="skip", epochs=3))
        for name in RUNS
    }


def wait(monkeypatch):
    """Let every step be waited for: what is not finite is seen before anything is updated, and then nothing is."""

    def update(optimizer, skipped):
        if not skipped:
            optimizer.found_inf = None
            optimizer.step()

    def average(self, net, step, skipped):
        if skipped:
            return
        share = 1 - min(self.decay, (1 + step) / (10 + step))
        with torch.no_grad():
            for mine, its in zip(self.net.parameters(), net.parameters(), strict=True):
                mine.lerp_(its, share)
            for mine, its in zip(self.net.buffers(), net.buffers(), strict=True):
                mine.copy_(its)

    class AtOnce(StepReporter):
        def __setattr__(self, name, value):
            super().__setattr__(name, value)
            if name == "pending" and value is not None:
                self.flush()

    for module in (loop, adversary):
        monkeypatch.setattr(module, "update", update)
    monkeypatch.setattr(Ema, "update", average)
    monkeypatch.setattr(loop, "StepReporter", AtOnce)


def same(one, other):
    (tensors, facts), (others, other_facts) = last_checkpoint(one), last_checkpoint(other)
    assert facts == other_facts
    assert tensors.keys() == others.keys()
    assert [name for name in tensors if not torch.equal(tensors[name], others[name])] == []
    assert comparable_rows(one) == comparable_rows(other)


@pytest.mark.parametrize("name", RUNS)
def test_steps_reported_late_equal_steps_that_were_waited_for(runs, tmp_path, monkeypatch, name):
    make_losses_nan(monkeypatch, 1, 3, 4)
    with monkeypatch.context() as patch:
        wait(patch)
        run(runs[name], tmp_path / "waited")
    run(runs[name], tmp_path / "late")
    same(tmp_path / "waited", tmp_path / "late")
    reported = [row for row in log_rows(tmp_path / "late") if "eval" not in row]
    assert [row["step"] for row in reported if "skipped" in row] == [2, 4, 5]
    for number in (2, 4, 5):
        one, other = (tmp_path / run / f"nonfinite-step-{number}.json" for run in ("waited", "late"))
        assert one.read_text() == other.read_text()
        assert one.with_suffix(".safetensors").read_bytes() == other.with_suffix(".safetensors").read_bytes()


def test_a_run_cut_off_after_a_step_that_was_left_out_goes_on_alike(runs, tmp_path, monkeypatch):
    """The last step is settled before the checkpoint is made: the count of steps left out in a row is in it."""
    make_losses_nan(monkeypatch, 1, 3, 4)
    run(runs["vit"], tmp_path / "whole")
    with monkeypatch.context() as patch:
        interrupt_after(patch, 5)
        run(runs["vit"], tmp_path / "cut")
    assert last_checkpoint(tmp_path / "cut")[1]["anomalies"]["skipped"] == 2
    assert log_rows(tmp_path / "cut")[-1]["step"] == 5
    run(runs["vit"], tmp_path / "cut")
    same(tmp_path / "whole", tmp_path / "cut")


@pytest.fixture
def stopping(configs):  # noqa: F811
    vit = configs["vit"]
    return replace(vit, loop=replace(vit.loop, save_every=0.0))


def one_gradient(monkeypatch, step, then=lambda: None):
    """Let the gradient of one parameter, and nothing else, be no number at this step; and at the next one do this."""
    sound = Classify.loss

    def broken(self, model, batch):
        output = sound(self, model, batch)
        if batch["seed"][1] == step:
            zero = (model.norm.bias - model.norm.bias.detach()).abs().sqrt().sum()  # of slope 0 / 0 at 0
            output = output._replace(loss=output.loss + zero)
        if batch["seed"][1] == step + 1:
            then()
        return output

    monkeypatch.setattr(Classify, "loss", broken)


@pytest.mark.parametrize("log_every", [0.0, 1e9])
def test_a_run_stops_at_the_right_step_and_names_the_gradient(stopping, tmp_path, monkeypatch, log_every):
    """Whether the step was settled at once, for the screen, or late; and what is saved does not depend on it."""
    loop_of = replace(stopping.loop, log_every=log_every)
    one_gradient(monkeypatch, 4)
    with pytest.raises(TriptychError, match=r"grad_norm is nan at step 5, on .*png"):
        run(replace(stopping, loop=loop_of), tmp_path)
    about = json.loads((tmp_path / "nonfinite-step-5.json").read_text())
    assert about["terms"] == {"grad_norm": "nan"}
    assert about["gradients"] == ["norm.bias"]
    assert about["num_gradients"] == 1
    assert about["batches"][0]["seed"] == [0, 4, 0]
    tensors_written = load_file(tmp_path / "nonfinite-step-5.safetensors")
    assert tensors_written["0.image"].shape[0] == len(about["batches"][0]["ids"])
    assert log_rows(tmp_path)[-1]["step"] == 4
    assert max(checkpoint_steps(tmp_path)) <= 4
    tensors, facts = last_checkpoint(tmp_path)
    assert all(tensor.isfinite().all() for tensor in tensors.values())
    assert facts["anomalies"]["skipped"] == 0
    assert not list(tmp_path.glob("nonfinite-step-6*"))


def test_of_two_bad_steps_the_first_stops_the_run(stopping, tmp_path, monkeypatch):
    make_losses_nan(monkeypatch, 4, 5)
    with pytest.raises(TriptychError, match="loss is nan at step 5 "):
        run(stopping, tmp_path)


def test_a_failure_in_the_next_step_hides_no_bad_one(stopping, tmp_path, monkeypatch):
    def fail():
        raise ValueError("the next step")

    one_gradient(monkeypatch, 4, fail)
    with pytest.raises(TriptychError, match="grad_norm is nan at step 5"):
        run(stopping, tmp_path)


def test_a_failure_loses_no_row(stopping, tmp_path, monkeypatch):
    def fail():
        raise ValueError("the next step")

    one_gradient(monkeypatch, 4, fail)
    with pytest.raises(ValueError, match="the next step"):
        run(replace(stopping, loop=replace(stopping.loop, on_nonfinite="skip")), tmp_path)
    assert log_rows(tmp_path)[-1]["skipped"] == ["grad_norm"]


def test_numbers_are_read_when_the_next_step_has_been_queued(stopping, tmp_path, monkeypatch):
    """After its backward pass and before its update: in that order."""
    order = []
    read, update = PendingMetrics.read, loop.update

    def noted(what, real):
        def call(*args):
            order.append(what)
            return real(*args)

        return call

    class Recorded(PendingMetrics):
        def __init__(self, *args):
            order.append("queued")
            super().__init__(*args)

    monkeypatch.setattr(loop, "PendingMetrics", Recorded)
    monkeypatch.setattr(PendingMetrics, "read", noted("read", read))
    monkeypatch.setattr(loop, "update", noted("update", update))
    quiet = replace(stopping.loop, save_every=1e9, epochs=1)
    run(replace(stopping, loop=quiet), tmp_path)
    steps = order.count("queued")
    assert steps >= 3
    middle = ["queued", "read", "update"] * (steps - 1)
    assert order == ["queued", "update", *middle, "read"]
