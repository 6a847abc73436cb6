"""Which of the evaluated networks a run keeps: the best by a held-out figure, and the newest."""

import dataclasses
import typing

import pytest
import torch
from tests.training.interrupted_runs import last_checkpoint

import triptych as tp
from triptych.training import loop, run
from triptych.training.configs.base import ClassifyConfig
from triptych.training.configs.first_stage import CompressConfig
from triptych.training.configs.second_stage import SecondStageConfig
from triptych.training.first_stage.task import Compress
from triptych.training.loop import StepPlan, overfitting_note
from triptych.training.run_folder import CHANGEABLE
from triptych.training.second_stage.task import Denoise


def run_with_metrics(config, folder, monkeypatch, top1):
    """Train one epoch for each top-1, which its evaluation then measures."""
    numbers = iter(top1)
    monkeypatch.setattr(loop, "_evaluate", lambda *_: {"top1": next(numbers), "loss": 1.0})
    return run(
        dataclasses.replace(config, loop=dataclasses.replace(config.loop, epochs=len(top1))), folder / "r"
    )


def test_the_best_and_the_newest_network_are_kept(config, tmp_path, monkeypatch):
    outcome = run_with_metrics(config, tmp_path, monkeypatch, [0.2, 0.9, 0.4, 0.7])
    assert outcome.best["top1"] == 0.9
    assert outcome.best["step"] == outcome.step // 2
    best, newest = tp.load(tmp_path / "r"), tp.load(tmp_path / "r" / "newest")
    assert (best.card.figures["top1"], newest.card.figures["top1"]) == (0.9, 0.7)
    tensors, _ = last_checkpoint(tmp_path / "r")
    for name, parameter in newest.named_parameters():
        assert torch.equal(parameter, tensors[f"ema.{name}"])
    assert not torch.equal(best.head.weight, newest.head.weight)


def test_there_is_no_second_network_while_the_newest_is_the_best(config, tmp_path, monkeypatch):
    run_with_metrics(config, tmp_path, monkeypatch, [0.5, 0.2, 0.9])
    assert tp.load(tmp_path / "r").card.figures["top1"] == 0.9
    assert not (tmp_path / "r" / "newest").exists()


def test_a_generator_is_ranked_by_its_held_out_loss():
    task = Denoise.__new__(Denoise)
    assert task.rank({"loss": 1.2}) > task.rank({"loss": 1.3, "step": 7})
    assert task.rank({"loss": 1.4}) < task.rank({"loss": 1.3, "step": 7})


@pytest.mark.parametrize("discriminator", [None, object()])
def test_an_autoencoder_is_ranked_by_what_its_losses_aim_at(discriminator):
    task = Compress.__new__(Compress)
    torch.nn.Module.__init__(task) if isinstance(task, torch.nn.Module) else None
    task.discriminator = discriminator
    good, sharp = (
        {"psnr": 30.0, "perceptual": 0.1, "frechet": 9.0},
        {"psnr": 28.0, "perceptual": 0.2, "frechet": 3.0},
    )
    assert (task.rank(sharp) > task.rank({**good, "step": 1})) == (discriminator is not None)
    for metrics in (good, sharp):
        del metrics["frechet"]
    assert task.rank(good) > task.rank({**sharp, "step": 1})
    plain = {"psnr": 30.0}
    assert (task.rank({"psnr": 28.0}) > task.rank({**plain, "step": 1})) == (discriminator is not None)


def test_a_held_out_loss_that_rises_is_reported():
    plan = StepPlan(1000, 10, 8, 1, 10)
    best = {"loss": 1.0, "step": 20}
    assert overfitting_note("loss", {"loss": 1.5}, best, 40, plan) is None  # may be chance
    assert overfitting_note("loss", {"loss": 1.01}, best, 50, plan) is None
    assert overfitting_note("top1", {"loss": 1.5}, best, 50, plan) is None  # another metric ranks
    note = overfitting_note("loss", {"loss": 1.5}, best, 50, plan)
    assert note is not None
    assert "risen by 50% since step 20" in note
    assert "newest/" in note
    assert overfitting_note("loss", {"loss": 1.5}, best, 60, plan) is None  # was said
    assert overfitting_note("loss", {"loss": 1.5}, best, 120, plan) is not None


def test_what_may_change_in_a_resumed_run_exists():
    for config in (ClassifyConfig, CompressConfig, SecondStageConfig):
        hints = typing.get_type_hints(config)
        for group, names in CHANGEABLE.items():
            fields = config if not group else hints.get(group)
            if group and fields is not None:
                known = {field.name for field in dataclasses.fields(fields)}
                assert set(names) <= known, (config, group)
    assert {"features"} == set(CHANGEABLE[""]) <= {field.name for field in dataclasses.fields(CompressConfig)}
