import json
import os
import shutil
import signal
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch
from safetensors import safe_open
from tests.training.interrupted_runs import (
    checkpoint_steps,
    comparable_rows,
    interrupt_after,
    last_checkpoint,
    log_rows,
)

import triptych as tp
from triptych.errors import CheckpointError, TriptychError
from triptych.training import dry_run, evaluate, run
from triptych.training.configs.base import ClassifyConfig
from triptych.training.configs.registry import TASKS, run_from_json, run_to_json
from triptych.training.optim import lr_at
from triptych.training.run_folder import config_of, with_absolute_paths


def test_it_learns_and_leaves_a_run_that_loads(config, tmp_path):
    outcome = run(replace(config, loop=replace(config.loop, epochs=8)), tmp_path / "r")
    assert outcome.finished
    assert outcome.best["top1"] == 1.0
    net = tp.load(tmp_path / "r")
    assert net.card.classes == ("blue", "green", "red")
    assert net.card.figures["top1"] == 1.0
    assert net.card.preprocess.size == (16, 16)
    evaluated = [row["eval"] for row in log_rows(tmp_path / "r") if "eval" in row]
    assert outcome.best["loss"] == min(figures["loss"] for figures in evaluated if figures["top1"] == 1.0)
    losses = [row["loss"] for row in log_rows(tmp_path / "r") if "loss" in row]
    assert np.mean(losses[-5:]) < 0.6 * np.mean(losses[:3])


@pytest.mark.parametrize("cut", [1, 4, 7])
def test_a_run_cut_off_and_repeated_is_the_unbroken_run_bit_for_bit(config, tmp_path, monkeypatch, cut):
    run(config, tmp_path / "whole")
    with monkeypatch.context() as patch:
        interrupt_after(patch, cut)
        assert not run(config, tmp_path / "cut").finished
    assert run(config, tmp_path / "cut").finished
    (one, facts), (other, others) = last_checkpoint(tmp_path / "whole"), last_checkpoint(tmp_path / "cut")
    assert facts == others
    assert one.keys() == other.keys()
    assert [name for name in one if not torch.equal(one[name], other[name])] == []
    assert comparable_rows(tmp_path / "whole") == comparable_rows(tmp_path / "cut")


def test_rows_after_the_checkpoint_are_done_again_not_kept_twice(config, tmp_path):
    run(config, tmp_path)
    before = log_rows(tmp_path)
    with open(tmp_path / "log.jsonl", "a") as log:
        log.write(json.dumps({"step": 10_000, "loss": 1.0}) + "\n" + '{"step": 3')
    run(config, tmp_path)
    assert log_rows(tmp_path) == before


def test_another_config_is_refused_and_harmless_changes_are_not(short, tmp_path):
    run(short, tmp_path)
    with pytest.raises(
        TriptychError, match=r"has a run with optim.lr 0.003, and 0.0001 was requested; give the same command"
    ):
        run(replace(short, optim=replace(short.optim, lr=1e-4)), tmp_path)
    assert (
        json.loads((tmp_path / "config.json").read_text())["optim"]["lr"] == 3e-3
    )  # the refused one left no trace
    again = replace(short, loop=replace(short.loop, log_every=0.0), loading=replace(short.loading, workers=1))
    assert run(again, tmp_path).finished


def test_more_epochs_continue_a_finished_run_on_the_longer_schedule(config, short, tmp_path, capfd):
    assert run(short, tmp_path / "r").step == 4
    assert run(config, tmp_path / "r").step == 12
    message = capfd.readouterr().err
    assert "epochs raised from 1 to 3: step 5 to 12 follow the schedule of 3 epochs" in message
    rates = [row["lr"] for row in log_rows(tmp_path / "r") if "lr" in row]
    assert rates[:4] == [lr_at((i + 0.5) / 4, config.optim) for i in range(4)]
    assert rates[4:] == [lr_at((i + 0.5) / 12, config.optim) for i in range(4, 12)]
    assert f"the learning rate goes from {lr_at(4.5 / 4, config.optim):.2g} to {rates[4]:.2g}" in message
    assert json.loads((tmp_path / "r" / "config.json").read_text())["loop"]["epochs"] == 3
    assert run(config, tmp_path / "r").step == 12  # finished: nothing to do
    with pytest.raises(
        CheckpointError, match=r"has a run of 3 epochs, and 1 were requested; give at least 3 to .*--init"
    ):
        run(short, tmp_path / "r")


def test_an_extended_run_that_is_interrupted_is_the_uninterrupted_one_bit_for_bit(
    config, short, tmp_path, monkeypatch
):
    for name in ("whole", "cut"):
        run(short, tmp_path / name)
    run(config, tmp_path / "whole")
    with monkeypatch.context() as patch:
        interrupt_after(patch, 2)
        assert not run(config, tmp_path / "cut").finished
    assert run(config, tmp_path / "cut").finished
    (tensors, facts), (other_tensors, other_facts) = (last_checkpoint(tmp_path / n) for n in ("whole", "cut"))
    assert facts == other_facts
    assert [name for name in tensors if not torch.equal(tensors[name], other_tensors[name])] == []
    assert comparable_rows(tmp_path / "whole") == comparable_rows(tmp_path / "cut")


def test_a_folder_of_something_else_is_refused_and_left_alone(short, tmp_path):
    net = tp.create("vit-ti16", depth=1, image_size=32)
    tp.export(net, tmp_path / "hf", format="hf")
    before = {path.name: path.read_bytes() for path in (tmp_path / "hf").iterdir()}
    with pytest.raises(TriptychError, match="does not belong to a training run; give another --out"):
        run(short, tmp_path / "hf")
    assert before == {path.name: path.read_bytes() for path in (tmp_path / "hf").iterdir()}
    (tmp_path / "file").write_text("x")
    with pytest.raises(TriptychError, match="is a file, and a folder"):
        run(short, tmp_path / "file")


def test_config_json_names_version_and_task(short, tmp_path):
    run(short, tmp_path)
    path = tmp_path / "config.json"
    content = json.loads(path.read_text())
    assert content["triptych"] == {"version": 1, "task": "classification"}
    assert config_of(tmp_path) == short
    for tag in (None, {"version": 2, "task": "classification"}, {"version": 1, "task": "dreaming"}):
        other = {name: value for name, value in content.items() if name != "triptych"}
        path.write_text(json.dumps(other if tag is None else {"triptych": tag, **other}))
        for refused in (lambda: run(short, tmp_path), lambda: evaluate(tmp_path)):
            with pytest.raises(CheckpointError, match="was written by another version of triptych"):
                refused()


@pytest.mark.parametrize("task", TASKS)
def test_the_config_of_each_task_is_read_back(task):
    config = TASKS[task].config()
    content = json.loads(json.dumps(run_to_json(config)))
    assert content["triptych"]["task"] == task
    assert run_from_json(content, "config.json") == config


def test_a_run_without_readable_images_ends(short, tmp_path):
    for name in ("a", "b"):
        (tmp_path / "bad" / name).mkdir(parents=True)
        for i in range(12):
            (tmp_path / "bad" / name / f"{i}.png").write_bytes(b"not an image")
    broken = replace(short, data=str(tmp_path / "bad"))
    for call in (lambda: run(broken, tmp_path / "r"), lambda: dry_run(broken)):
        with pytest.raises(TriptychError, match=r"no training image could be read; the first: .*png"):
            call()


def test_a_checkpoint_in_half_precision_is_trained_in_full(short, tmp_path):
    run(short, tmp_path / "first")
    tp.save(tp.load(tmp_path / "first").half(), tmp_path / "half.safetensors")
    run(replace(short, init=str(tmp_path / "half.safetensors")), tmp_path / "second")
    assert {t.dtype for t in weights_of(tmp_path / "second").values()} == {torch.float32}


def test_both_heads_of_a_distilled_network_learn(short, tmp_path):
    args = (*short.model_args, "distill_token=true")
    run(replace(short, model_args=args), tmp_path / "first")
    probe = replace(short, init=str(tmp_path / "first"), train="head", head="linear")
    run(probe, tmp_path / "probe")
    after = weights_of(tmp_path / "probe")
    assert after["head.weight"].abs().sum() > 0
    assert after["head_distill.weight"].abs().sum() > 0


def test_a_run_s_own_data_under_another_name_is_still_its_own(short, tmp_path):
    run(short, tmp_path)
    assert evaluate(tmp_path, short.data + "/", workers=0).count == 8


def test_sigterm_to_the_whole_group_saves_and_ends(image_folder, tmp_path):
    """What slurm, systemd and timeout send: the workers get it too."""
    line = [
        *(
            sys.executable,
            "-m",
            "triptych",
            "train",
            "vit_emoji",
            "--data",
            str(image_folder),
            "--out",
            str(tmp_path / "r"),
        ),
        *(
            "--model-args",
            "depth=1",
            "--loading.workers",
            "1",
            "--loading.cache",
            "off",
            "--loading.batch-size",
            "4",
        ),
        *("--loop.epochs", "100000", "--loop.log-every", "0.2", "--loop.eval-every", "100000"),
    ]
    process = subprocess.Popen(line, stderr=subprocess.PIPE, text=True, start_new_session=True)
    assert process.stderr is not None
    for words in process.stderr:
        if words.startswith("step"):
            break
    os.killpg(process.pid, signal.SIGTERM)
    output = process.stderr.read()
    assert process.wait(60) == 130, output
    process.stderr.close()
    assert "the same command resumes" in output
    assert len(checkpoint_steps(tmp_path / "r")) == 1


def test_accumulation_of_two_halves_is_one_batch(config, tmp_path):
    """Same images, no randomness by batch: the gradient is the mean, so the weights agree."""
    quiet = replace(
        config,
        drop_path_rate=0.0,
        model_args=(*config.model_args, "dropout=0.0"),
        augment=replace(config.augment, mixup=0.0, erasing=0.0, brightness=0.0, crop_scale=(1.0, 1.0), flip=0.0,
                        crop_ratio=(1.0, 1.0)),
    )  # fmt: skip
    run(quiet, tmp_path / "whole")
    halves = replace(
        quiet, loading=replace(quiet.loading, batch_size=4), loop=replace(quiet.loop, accumulate=2)
    )
    run(halves, tmp_path / "halves")
    one, other = last_checkpoint(tmp_path / "whole")[0], last_checkpoint(tmp_path / "halves")[0]
    for name in one:
        if name.startswith("net."):
            torch.testing.assert_close(one[name], other[name], atol=2e-4, rtol=1e-3)


def weights_of(path):
    with safe_open(path / "model.safetensors", "pt") as file:
        return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118


def test_fine_tuning_replaces_the_head_and_resamples_positions(short, tmp_path):
    run(short, tmp_path / "first")
    second = replace(short, init=str(tmp_path / "first"), image_size=(24, 16), head="mlp")
    run(second, tmp_path / "second")
    net = tp.load(tmp_path / "second")
    assert net.config.image_size == (24, 16)
    assert net.config.head == "mlp"
    assert net.positions.shape[1] == 1 + 3 * 2


def test_linear_probe_moves_the_head_alone(short, tmp_path):
    """Not the running statistics of the stem's batch norms either."""
    stem = ("stem=conv", "stem_widths=[8]", "patch_size=4")
    run(replace(short, model_args=(*short.model_args, *stem)), tmp_path / "first")
    run(replace(short, init=str(tmp_path / "first"), train="head"), tmp_path / "probe")
    before, after = weights_of(tmp_path / "first"), weights_of(tmp_path / "probe")
    assert {name for name in before if not torch.equal(before[name], after[name])} == {
        "head.weight",
        "head.bias",
    }


def test_frozen_blocks_stay(short, tmp_path):
    run(short, tmp_path / "first")
    run(replace(short, init=str(tmp_path / "first"), frozen_blocks=1), tmp_path / "second")
    before, after = weights_of(tmp_path / "first"), weights_of(tmp_path / "second")
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    assert not any(name.startswith(("encoder.0.", "patch.", "positions", "class_token")) for name in moved)
    assert {"encoder.1.attn.qkv.weight", "norm.weight", "head.weight"} <= moved
    with pytest.raises(TriptychError, match="the network has 2 blocks"):
        run(replace(short, frozen_blocks=3), tmp_path / "third")


@pytest.mark.parametrize(
    ("model", "blocks"),
    [
        ({}, ["encoder.0", "encoder.1"]),
        (
            {
                "model": "swin-t",
                "model_args": ("embed_dim=12", "depths=[2,1]", "num_heads=[2,4]", "window_size=2"),
            },
            ["stages.0.blocks.0", "stages.0.blocks.1", "stages.1.blocks.0"],
        ),
    ],
    ids=["vit", "swin"],
)
def test_low_rank_updates_are_merged_into_an_ordinary_file(short, tmp_path, model, blocks):
    short = replace(short, **model)
    run(short, tmp_path / "first")
    tuned = replace(short, init=str(tmp_path / "first"), train="lora", lora_rank=2)
    run(tuned, tmp_path / "lora")
    before, after = weights_of(tmp_path / "first"), weights_of(tmp_path / "lora")
    assert before.keys() == after.keys()
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    attention = {f"{block}.attn.{part}.weight" for block in blocks for part in ("qkv", "proj")}
    assert moved == attention | {"head.weight", "head.bias"}
    for name in attention:
        assert torch.linalg.matrix_rank(after[name] - before[name], atol=1e-6) <= 2


def test_dry_run_counts_and_writes_nothing(config, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    report = dry_run(config)
    assert list(tmp_path.iterdir()) == []
    assert report["classes"] == 3
    assert report["steps"] == 3 * (report["images"]["train"] // 8)
    assert report["parameters"] == report["parameters_trained"] > 10_000
    assert report["seconds_per_step"] > 0
    assert report["peak_memory_bytes"] > 1e7
    assert report["config"]["model"] == "vit-ti16"
    assert report["flops_per_image"] == 2 * (
        3 * 64 * 24 * 4 + 2 * (5 * (4 * 24**2 + 2 * 24 * 48) + 2 * 25 * 24) + 24 * 3
    )


def test_evaluation_counts_every_image_once_whatever_the_batch(short, tmp_path):
    run(short, tmp_path)
    figures = [evaluate(tmp_path, batch_size=size, workers=0) for size in (1, 3, 64)]
    assert len({figure.top1 for figure in figures}) == 1
    assert figures[0].count == 8  # a run's own data: the fifth that it held back
    assert evaluate(tp.load(tmp_path), short.data, workers=0, dtype="fp32").count == 3 * 14


def test_evaluation_matches_classes_by_name(short, image_folder, tmp_path):
    """A folder with some of the classes, which therefore have other numbers there."""
    run(replace(short, loop=replace(short.loop, epochs=8)), tmp_path / "r")
    some = tmp_path / "some"
    some.mkdir()
    for name in ("green", "red"):
        (some / name).symlink_to(image_folder / name, target_is_directory=True)
    result = evaluate(tmp_path / "r", str(some), workers=0)
    assert result.top1 == 1.0
    assert result.per_class_count.tolist() == [0, 2, 3]  # without the images that it was trained on
    complete = evaluate(tmp_path / "r", str(some), include_trained=True, workers=0)
    assert complete.per_class_count.tolist() == [0, 14, 14]
    (some / "violet").symlink_to(image_folder / "blue", target_is_directory=True)
    with pytest.raises(TriptychError, match=r"does not know \(violet\)"):
        evaluate(tmp_path / "r", str(some), workers=0)


def test_users_mistakes(config, image_folder, tmp_path):
    one = tmp_path / "one"
    one.mkdir()
    (one / "red").symlink_to(image_folder / "red", target_is_directory=True)
    with pytest.raises(TriptychError, match="has one class, 'red', and two are needed"):
        run(replace(config, data=str(one)), tmp_path / "r")
    with pytest.raises(TriptychError, match="does not exist"):
        run(replace(config, data=str(tmp_path / "absent")), tmp_path / "r")
    with pytest.raises(TriptychError, match="near names"):
        run(replace(config, model="vit-x16"), tmp_path / "r")
    with pytest.raises(TriptychError, match="must be name=value"):
        run(replace(config, model_args=("depth",)), tmp_path / "r")
    with pytest.raises(TriptychError, match="which need weights; name them with init"):
        replace(config, train="head")
    with pytest.raises(TriptychError, match="no data was named"):
        evaluate(tp.create("vit-ti16"))


def test_a_run_is_resumed_from_another_folder_and_with_moved_data(short, image_folder, tmp_path, monkeypatch):
    """What a relative path means depends on where a command is started; a run depends on what it trained on."""
    shutil.copytree(image_folder, tmp_path / "here" / "photos")
    monkeypatch.chdir(tmp_path / "here")
    with monkeypatch.context() as patch:
        interrupt_after(patch, 2)
        assert not run(replace(short, data="photos"), "r").finished
    assert json.loads((tmp_path / "here" / "r" / "config.json").read_text())["data"] == str(
        tmp_path / "here" / "photos"
    )
    monkeypatch.chdir(tmp_path)
    with monkeypatch.context() as patch:
        interrupt_after(patch, 1)
        assert not run(replace(short, data="here/../here/photos/"), "here/r").finished
    (tmp_path / "here" / "photos").rename(tmp_path / "moved")
    assert run(replace(short, data="moved"), "here/r").finished
    assert evaluate("here/r", workers=0).to_json()["count"] > 0
    (tmp_path / "moved" / "red" / "new.png").write_bytes(b"another image")
    with pytest.raises(CheckpointError, match="1 is new"):
        run(replace(short, data="moved"), "here/r")


def test_names_of_shipped_networks_and_built_in_data_stay(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "styles").mkdir()
    (tmp_path / "net.safetensors").write_bytes(b"")
    config = ClassifyConfig(data="emoji:styles", init="vit-emoji", teacher="net.safetensors")
    resolved = with_absolute_paths(config)
    assert (resolved.data, resolved.init, resolved.teacher) == (
        f"emoji:{tmp_path / 'styles'}", "vit-emoji", str(tmp_path / "net.safetensors")
    )  # fmt: skip
    assert with_absolute_paths(ClassifyConfig()) == ClassifyConfig()
    assert with_absolute_paths(ClassifyConfig(data="owner/dataset")).data == "owner/dataset"
