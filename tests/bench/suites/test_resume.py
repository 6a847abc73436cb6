"""Two kills of tiny runs, in forks of this process; `triptych bench resume` starts interpreters instead."""

import json
import os
from pathlib import Path

import numpy as np
import pytest
import torch

from triptych.bench.harness.timing import UnequalError
from triptych.bench.measurements import kill_and_resume
from triptych.bench.measurements.kill_and_resume import again, difference, step_of
from triptych.bench.suites import resume
from triptych.metrics.cost import count_parameters
from triptych.training.runner import prepare


class Forked:
    """A forked process that exits without cleaning up what it shares with this one; its workers notice its end."""

    def __init__(self, config: Path, out: Path):
        self.pid, self.code = os.fork(), None
        if self.pid == 0:
            os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
            code = 1
            try:
                again(config, out)
                code = 0
            finally:
                os._exit(code)

    def poll(self, options: int = os.WNOHANG) -> int | None:
        if self.code is None:
            pid, status = os.waitpid(self.pid, options)
            self.code = os.waitstatus_to_exitcode(status) if pid else None
        return self.code

    def wait(self) -> int | None:
        return self.poll(0)


FAST = ("ViT, classification", "autoencoder, with a GAN")


def test_all_runs_can_be_prepared(tmp_path):
    for config in resume.configs(resume.QUICK, tmp_path).values():
        assert len(prepare(config).train_loader) > 0


@pytest.mark.parametrize(
    "name",
    [
        *FAST,
        *(
            pytest.param(name, marks=pytest.mark.slow)
            for name in ("Swin, segmentation", "latent diffusion, on a cache", "latent diffusion, on images")
        ),
    ],
)
def test_a_run_that_is_killed_twice_ends_like_an_uninterrupted_one(tmp_path, name):
    config = resume.configs(resume.QUICK, tmp_path)[name]
    row = resume.survived(config, tmp_path, 2, np.random.default_rng(1), Forked)
    assert row["kills"] == 2
    assert row["difference"] == 0
    assert row["rows apart"] == 0
    assert row["rows"] > row["steps"] > 8
    assert row["tensors"] > 50


def test_a_difference_of_one_bit_is_detected(tmp_path):
    tensors = {"a": torch.ones(3), "b": torch.zeros(2)}
    assert difference(tensors, {"a": torch.ones(3), "b": torch.zeros(2)}) == 0
    assert difference(tensors, {"a": torch.tensor([1, 1, 1 + 2**-23]), "b": torch.zeros(2)}) == 2**-23
    assert difference(tensors, {"a": torch.tensor([1, 1, float("nan")]), "b": torch.zeros(2)}) == float("inf")
    assert difference(tensors, {"a": torch.ones(3)}) == float("inf")
    assert difference(tensors, {"a": torch.ones(3).double(), "b": torch.zeros(2)}) == float("inf")


def test_a_different_end_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(resume, "kill_often", lambda *_: kill_and_resume.Killed())
    monkeypatch.setattr(
        resume, "apart", lambda *_: {"difference": 0, "rows apart": 1, "facts": True, "kept": True}
    )

    class Done:
        pid = 0

        def __init__(self, config, out):
            out.mkdir()
            (out / "log.jsonl").write_text('{"step": 3}\n{"half')

        def wait(self):
            return 0

    config = resume.configs(resume.QUICK, tmp_path)["ViT, classification"]
    with pytest.raises(UnequalError, match="killed 2 times differs"):
        resume.survived(config, tmp_path, 2, np.random.default_rng(0), Done)
    assert step_of(tmp_path / "uninterrupted") == 3
    assert step_of(tmp_path / "nothing") == 0
    assert json.loads((tmp_path / "config.json").read_text())["model"] == "vit-ti16"


def test_the_cost_of_a_checkpoint_is_measured(tmp_path):
    (row,) = resume.saving(resume.QUICK, tmp_path).rows
    assert row["asynchronous"].low > 0
    assert row["waited for"].low > 0
    assert row["written"].low > 0
    parameters = count_parameters(resume.create("vit-ti16", **dict(resume.QUICK.changes)))
    assert row["megabytes"] == pytest.approx(
        4 * 4 * parameters / 1e6, rel=0.01
    )  # the rest are the optimizer's step counts
