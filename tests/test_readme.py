"""The README's commands run as they are, with small images for DIR and IMAGE and temporary folders for the rest."""

import json
import re
import shlex
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import triptych as tp
from triptych.cli import main

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
MARK = "<!-- run by tests/test_readme.py -->\n"
ASSETS = ROOT / "src" / "triptych" / "assets"


def blocks(language: str) -> list[str]:
    return re.findall(re.escape(MARK) + rf"```{language}\n(.*?)```", README, flags=re.DOTALL)


@pytest.fixture
def arguments(tmp_path) -> dict[str, str]:
    """Values of the words in capitals: tiny data sets, and folders to write into."""
    folder = tmp_path / "images"
    rng = np.random.default_rng(0)
    for name, color in {"blue": (30, 40, 200), "red": (200, 30, 30)}.items():
        (folder / name).mkdir(parents=True)
        for i in range(6):
            noisy = np.clip(np.array(color) + rng.normal(0, 20, (40, 40, 3)), 0, 255).astype(np.uint8)
            Image.fromarray(noisy).save(folder / name / f"{i}.png")
    pairs = tmp_path / "pairs"
    for name in ("images", "masks"):
        (pairs / name).mkdir(parents=True)
    for i in range(8):
        mask = np.zeros((40, 40), np.uint8)
        mask[10:30, i : i + 20] = 1
        pixels = np.where(mask[..., None] > 0, (230, 200, 40), (20, 40, 90)).astype(np.uint8)
        Image.fromarray(pixels).save(pairs / "images" / f"{i}.png")
        Image.fromarray(mask).save(pairs / "masks" / f"{i}.png")
    captioned = tmp_path / "captioned"
    captioned.mkdir()
    for i in range(40):
        color = (200, 30, 30) if i % 2 else (30, 40, 200)
        noisy = np.clip(np.array(color) + rng.normal(0, 20, (64, 64, 3)), 0, 255).astype(np.uint8)
        Image.fromarray(noisy).save(captioned / f"{i}.png")
        (captioned / f"{i}.txt").write_text("a red square" if i % 2 else "a blue square")
    checkpoint = tmp_path / "vit.safetensors"
    tp.save(tp.create("vit-ti16", depth=1, num_classes=3), checkpoint)
    outputs = ("RUN", "EXPLAINED", "EXPORTED", "SEGMENTER", "SEGMENTED", "A", "B", "GENERATED")
    paths = {name: str(tmp_path / name.lower()) for name in outputs}
    paths |= {"PAIRS": str(pairs), "CAPTIONED": str(captioned), "DIR": str(folder)}
    return paths | {"IMAGE": str(folder / "red" / "0.png"), "CHECKPOINT": str(checkpoint)}


def test_python():
    (block,) = blocks("python")
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", block], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "strawberry" in done.stdout.splitlines()[0]


@pytest.mark.parametrize("block", blocks(""))
def test_commands(block, arguments, monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    for line in block.splitlines():
        words = [arguments.get(word, word) for word in shlex.split(line)]
        assert words[0] == "triptych"
        if words[1] == "train":
            words += ["--loop.epochs", "4", "--loading.workers", "0"]
        if words[2] == "latent-diffusion":
            words += ["--model", "unet-emoji", "--samples.num-images", "1", "--samples.num-steps", "2"]
        if words[1] == "generate":
            words += ["--num-steps", "2"]
        assert main(words[1:]) == 0, (line, capsys.readouterr().err)
        assert capsys.readouterr().out.strip(), line


def test_it_is_short():
    assert len(README.splitlines()) <= 150


def test_the_results_are_those_of_the_cards():
    figures = {
        "vit-emoji": json.loads((ASSETS / "vit_emoji.json").read_text())["card"]["figures"],
        "swin-scenes": json.loads((ASSETS / "swin_scenes.json").read_text())["card"]["figures"],
        "ldm-emoji": json.loads((ASSETS / "ldm_emoji" / "card.json").read_text())["card"]["figures"],
    }
    names = {
        "vit-emoji": ("top1", "floor_top1"),
        "swin-scenes": ("miou", "unet_miou"),
        "ldm-emoji": ("subgroup", "subgroup_real"),
    }
    rows = re.findall(r"^\| `([\w-]+)` \| \d+ M \| [^|]+ \| ([\d.]+) \| ([\d.]+) \(", README, re.MULTILINE)
    assert [name for name, *_ in rows] == list(names)
    for name, *values in rows:
        assert values == [f"{figures[name][key]:.3f}" for key in names[name]]


def test_the_make_targets_it_names_exist():
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    for target in re.findall(r"`?make ([a-z-]+)`?$|`make ([a-z-]+)`", README, re.MULTILINE):
        assert re.search(rf"^{''.join(target)}:", makefile, flags=re.MULTILINE), target


def test_the_files_it_names_exist():
    for path in re.findall(r"`((?:src|docs|tests|tools|examples)(?:/[\w/.-]+)?)`", README) + re.findall(
        r"\]\(((?!https?:)[^)#]+)\)", README
    ):
        assert (ROOT / path).exists(), path
