"""The suite with its quick plan, whose measurements are meaningless but must exist."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from triptych.bench.harness.forward import DTYPES
from triptych.bench.harness.subprocesses import FinishedProcess, run_code
from triptych.bench.harness.timing import UnequalError
from triptych.bench.measurements import train_loop
from triptych.bench.measurements.train_step import training_step
from triptych.bench.peers import readers
from triptych.bench.suites import train
from triptych.cli import main
from triptych.training.loop import Outcome
from triptych.training.monitoring import step_reporter
from triptych.weights import load

PEAKS = {"fp32": 1e12, "bf16": 1e12}


@pytest.fixture(scope="module")
def diffusion(tmp_path_factory):
    return train.diffusion_tasks(train.QUICK, tmp_path_factory.mktemp("diffusion"), ("diffusers",))


@pytest.fixture(scope="module")
def classifiers(tmp_path_factory):
    return train.classifier_tasks(train.QUICK, tmp_path_factory.mktemp("classifiers"), ("transformers",))


@pytest.mark.parametrize("peer", ["diffusers", "transformers"])
def test_steps_compared_with_another_library(peer, request):
    tasks = request.getfixturevalue("diffusion" if peer == "diffusers" else "classifiers")
    table = train.table_of("", tasks, (peer, "timm"))
    table.rows = train.steps(tasks, train.QUICK, PEAKS)
    assert [(row["network"], row["mode"], row["dtype"]) for row in table.rows] == [
        (task.name, "eager", label) for task in tasks for label in DTYPES
    ]
    for row in table.rows:
        assert row["ours"].low > 0
        assert row[f"ratio to {peer}"].median > 0
        assert 0 < row["utilization"] < 1
        assert 0 < row["apart"] <= train.TOLERANCES[row["dtype"]]
        assert {column.key for column in table.columns} == set(row)


def test_ours_is_measured_without_another_library(diffusion):
    alone = [replace(task, available=()) for task in diffusion[:1]]
    assert "diffusers" not in {column.key for column in train.table_of("", alone, ("diffusers",)).columns}
    assert [row["apart"] for row in train.steps(alone, train.QUICK, PEAKS)] == [None, None]


def test_random_numbers_of_a_reader_do_not_change_inputs(classifiers, monkeypatch):
    """timm initializes a network at random before it loads weights."""
    task = classifiers[0]

    def drawing(folder, dtype):
        torch.randn(7)
        return load(task.folder / "model.safetensors").float()

    monkeypatch.setattr(readers, "timm_network", drawing)
    ours, theirs = (
        training_step(task.what, who, task.folder, task.size, torch.float32)() for who in ("ours", "timm")
    )
    assert torch.equal(ours, theirs)


def test_a_wrong_gradient_shows(diffusion):
    """Even if the first loss is correct."""
    task = diffusion[0]
    right, wrong = (
        training_step(task.what, "ours", task.folder, task.size, torch.bfloat16) for _ in range(2)
    )
    loss = wrong.loss

    def steeper():
        value = loss()
        return value.detach() + 1.2 * (value - value.detach())

    wrong.loss = steeper
    firsts = {str(i): step()[None] for i, step in enumerate((right, wrong))}
    assert firsts["0"][0, 0] == firsts["1"][0, 0]
    with pytest.raises(UnequalError):
        train.alike(firsts, train.TOLERANCES["bf16"])


def test_losses_and_norms_are_compared_separately():
    loss_apart = {"a": torch.tensor([[0.1, 100.0]]), "b": torch.tensor([[0.2, 100.0]])}
    assert train.alike(loss_apart, 0.6) == pytest.approx(0.5)
    with pytest.raises(UnequalError):
        train.alike(loss_apart, 0.4)


def test_memory_of_both_sides(monkeypatch, diffusion):
    calls = []

    def run_child(program, what, who, folder, dtype, threads, *size):
        assert program == "train_step"
        calls.append((what, who, size))
        first = 1.0 if who == "ours" else 1.2
        return FinishedProcess(
            1.0,
            {"before": 1e9, "peak": 2e9 if who == "ours" else 3e9, "losses": [[first, 2.0], [1.0, 2.0]]},
        )

    monkeypatch.setattr(train, "run_child", run_child)
    with pytest.raises(UnequalError):
        train.memory(diffusion[1:], 1)
    monkeypatch.setattr(train, "TOLERANCES", {"bf16": 0.5})
    calls.clear()
    table = train.memory([*diffusion, replace(diffusion[0], available=())], 2)
    assert calls[:4] == [("unet", who, ("2", "77", "32")) for who in ("ours", "diffusers")] * 2
    assert [row["peer"] for row in table.rows] == ["diffusers", "diffusers", None]
    row = table.rows[0]
    assert (row["ratio"].median, row["grown ratio"].median) == (pytest.approx(2 / 3), 0.5)
    assert {column.key for column in table.columns} == set(row)


def test_what_the_loop_adds_and_the_cache_saves(diffusion, monkeypatch):
    monkeypatch.setattr(step_reporter, "SPEED_STEPS", 4)
    monkeypatch.setattr(train_loop, "SPEED_STEPS", 4)
    model = diffusion[0].folder / "model.safetensors"
    table = train_loop.training_loops(train.QUICK.loops, model)
    assert len(table.rows) == 3
    for row in table.rows:
        assert row["ours"].low > 0
        assert row["ratio"].median > 0
        assert 0 <= row["waiting"].median < 1
        assert {column.key for column in table.columns} == set(row)
    table = train_loop.latents_and_images(train.QUICK.loops, model)
    assert [row["what"] for row in table.rows] == ["cached as latents", "trained on", "generated"]
    for row in table.rows[:2]:
        assert row["ratio"].median == pytest.approx(row["other"].median / row["ours"].median)
    assert table.rows[2]["ours"].low > 0


def test_seconds_of_a_run_are_those_of_its_log(monkeypatch):
    """The first steps, which open the data, do not count; rows without a speed are between two reports."""

    def trained(config, out):
        out.mkdir()
        speeds = [{}, {"images_per_second": 1.0, "waiting": 0.9}, {}]
        speeds += [{"images_per_second": 8.0, "waiting": 0.1}, {"images_per_second": 4.0, "waiting": 0.3}]
        (out / "log.jsonl").write_text("".join(json.dumps(row) + "\n" for row in speeds))
        return Outcome(150, config.loop.seed == 0, {})

    monkeypatch.setattr(train_loop, "train", trained)
    config = train_loop.classification(replace(train.QUICK.loops, batch=8), Path("data"))
    waited = []
    assert train_loop.seconds_per_step(config, waited) == pytest.approx(1.5)
    assert waited == [pytest.approx(0.2)]
    with pytest.raises(KeyboardInterrupt):
        train_loop.seconds_per_step(replace(config, loop=replace(config.loop, seed=1)))


@pytest.mark.slow
def test_the_whole_command(tmp_path, capsys):
    assert main(["bench", "train", "--quick", "--out", str(tmp_path), "--json"]) == 0
    printed = json.loads(capsys.readouterr().out)
    assert json.loads((tmp_path / "benchmarks.json").read_text())["train"] == printed
    assert [table["title"] for table in printed["tables"]][1:] == [
        "A step of latent diffusion",
        "A step of a classifier",
        "Memory of a step",
        "The whole loop",
        "Latents and images",
    ]
    assert "| UNet" in (tmp_path / "benchmarks.md").read_text()


COMPILED = """
import sys
from pathlib import Path
from triptych.bench.children.process_memory import report
from triptych.bench.suites import train
tasks = train.classifier_tasks(train.QUICK, Path(sys.argv[1]), ("transformers",))[:1]
rows = train.steps(tasks, train.QUICK, {"fp32": 1e12, "bf16": 1e12}, compiled=True)
report(rows=[(row["mode"], row["dtype"], row["apart"]) for row in rows])
"""
UNET = """
import sys
from pathlib import Path
import torch
from triptych.bench.children.process_memory import report
from triptych.bench.suites import train
from triptych.bench.measurements.train_step import training_step
from triptych.torch_compile import compile_blocks
task = train.diffusion_tasks(train.QUICK, Path(sys.argv[1]), ())[0]
eager, compiled = (training_step(task.what, "ours", task.folder, task.size, torch.bfloat16) for _ in range(2))
compile_blocks(compiled.net)
report(steps=[[step().tolist() for _ in range(2)] for step in (eager, compiled)])
"""


@pytest.mark.slow
def test_compiled(tmp_path):
    """In a process without runtime shape checks, which cannot be traced."""
    ((mode, dtype, apart),) = run_code(COMPILED, tmp_path).reported["rows"]
    assert (mode, dtype) == ("compiled", "bf16")
    assert apart < 5e-2


@pytest.mark.slow
def test_blocks_of_a_unet_are_compiled_for_several_sizes_and_train_as_before(tmp_path):
    eager, compiled = run_code(UNET, tmp_path).reported["steps"]
    assert np.allclose(eager, compiled, rtol=1e-2)
