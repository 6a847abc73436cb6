"""`triptych train`: its flags, its help, its dry run, and what it says of mistakes."""

import dataclasses
import json
import re

import numpy as np
import pytest
from PIL import Image

from triptych.cli import main
from triptych.config import from_json, to_json
from triptych.recipes import RECIPES, recipe
from triptych.training.configs.base import ClassifyConfig


def flags(help_text: str) -> set[str]:
    return set(re.findall(r"--([a-z0-9_.-]+)", help_text))


def named(cls, prefix="") -> set[str]:
    flags = set()
    for field in dataclasses.fields(cls):
        flag = prefix + field.name.replace("_", "-")
        flags |= named(field.default_factory, flag + ".") if prefix == "" and field.name in (
            "loading", "augment", "optim", "loop", "loss"
        ) else {flag}  # fmt: skip
    return flags


def test_flags_are_the_fields_of_the_config(capsys):
    assert main(["train", "vit", "--help"]) == 0
    shown = flags(capsys.readouterr().out)
    assert named(ClassifyConfig) | {"out", "dry-run", "json", "help"} <= shown
    assert {flag for flag in shown if "." in flag} == {flag for flag in named(ClassifyConfig) if "." in flag}


def test_the_flags_people_type_stay(capsys):
    """Renaming one of these breaks scripts: do it knowingly, with a line in the changelog."""
    main(["train", "vit", "--help"])
    assert {
        "data", "out", "init", "model", "model-args", "image-size", "train", "frozen-blocks", "lora-rank", "head",
        "drop-path-rate", "loss.type", "eval-crop", "dry-run", "json", "loop.epochs", "loop.ema", "loop.precision",
        "loop.seed",
        "loop.device", "loop.compile", "loop.accumulate", "loop.eval-every", "loop.save-every", "loop.keep",
        "loop.tensorboard", "optim.lr", "optim.weight-decay", "optim.layer-decay", "optim.warmup", "optim.clip",
        "loading.batch-size", "loading.workers", "loading.on-bad-image", "loading.label-column", "augment.mixup",
        "augment.cutmix", "augment.rand-augment", "augment.erasing", "augment.label-smoothing", "augment.crop-scale",
    } <= flags(capsys.readouterr().out)  # fmt: skip


@pytest.mark.parametrize("name", RECIPES)
def test_recipes_are_complete_configs_with_a_command(name):
    config = recipe(name)()
    assert from_json(type(config), json.loads(json.dumps(to_json(config)))) == config
    assert f"triptych train {name} " in recipe(name).__doc__.replace(
        "train latent-diffusion", "train latent_diffusion"
    )


def test_a_refused_command_leaves_the_folder_to_the_corrected_one(tmp_path, capsys):
    """Also where only the first batch shows that it is wrong."""
    rng = np.random.default_rng(0)
    for i in range(6):
        for folder, shape in (("images", (32, 32, 3)), ("masks", (32, 32))):
            (tmp_path / "data" / folder).mkdir(parents=True, exist_ok=True)
            pixels = rng.integers(0, 2, shape, dtype=np.uint8)
            Image.fromarray(pixels).save(tmp_path / "data" / folder / f"{i}.png")
    line = [
        "train",
        "swin",
        "--data",
        str(tmp_path / "data"),
        "--out",
        str(tmp_path / "run"),
        "--loop.epochs",
        "1",
    ]
    line += ["--loading.workers", "0", "--loading.batch-size", "4", "--image-size", "16", "16"]
    for wrong in (["--augment.mixup", "0.2"], ["--head.type", "fpn"], ["--loading.mask-column", "nothing"]):
        assert main([*line, *wrong]) == 2
        assert not (tmp_path / "run").exists()
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "notes.txt").write_text("mine")
    assert main([*line, "--augment.mixup", "0.2"]) == 2
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["notes.txt"]
    capsys.readouterr()
    assert main(line) == 0
    assert main([*line, "--augment.mixup", "0.2"]) == 2  # a run that was made is not given up
    assert "has a run with augment.mixup 0.0" in capsys.readouterr().err
    assert (tmp_path / "run" / "config.json").exists()


def test_dry_run_in_words_and_in_json(short, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    line = ["train", "vit_emoji", "--data", short.data, "--dry-run", "--model-args", "depth=1"]
    line += ["--loading.workers", "0", "--loading.batch-size", "4"]
    assert main(line) == 0
    output = capsys.readouterr().out
    for word in ("parameters", "FLOPs", "memory", "time", '"betas"'):
        assert word in output
    assert main([*line, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["classes"] == 3
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["vitt"], "no recipe is called 'vitt'; near names: vit"),
        (["vit"], "--out is missing; add --out RUN"),
        (["vit", "--out", "r", "--data", "absent"], "absent"),
        (["vit", "--out", "r", "--optim.lr", "-1"], "lr is -1.0, which must be positive"),
        (["vit", "--out", "r", "--optim.lrr", "1"], "--optim.lr"),
        (["vit", "--out", "r", "--loop.device", "cuda:9"], "not available here"),
    ],
)
def test_mistakes_are_one_line_and_leave_nothing(words, expected, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(["train", *words]) == 2
    shown = capsys.readouterr().err.strip()
    assert expected in shown
    assert len(shown.splitlines()) == 1
    assert list(tmp_path.iterdir()) == []
