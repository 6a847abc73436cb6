"""Fine-tune a Stable Diffusion from a folder, and generate with the result, on the command line."""

import json

import numpy as np
import pytest
import torch
from PIL import Image
from tests.training.second_stage.test_finetune import SD, filled

import triptych as tp
from triptych.cli import main

TRAINING = """--loading.batch-size 4 --loading.workers 0 --loop.epochs 1 --loop.precision fp32 --loop.device cpu
    --loop.eval-every 1 --optim.lr 0.01 --samples.num-images 1 --samples.num-steps 2"""


@pytest.fixture(scope="module")
def sd(tmp_path_factory):
    """Folder of a tiny Stable Diffusion in diffusers' layout."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("sd") / "tiny"
    tp.export(filled(SD), folder, "diffusers")
    return folder


@pytest.fixture(scope="module")
def toys(tmp_path_factory):
    """Folder of six images with captions."""
    folder = tmp_path_factory.mktemp("toys")
    rng = np.random.default_rng(0)
    for i in range(6):
        Image.fromarray(rng.integers(0, 256, (16, 16, 3), dtype=np.uint8)).save(folder / f"{i}.png")
        (folder / f"{i}.txt").write_text("a toy")
    return folder


def generate(sd, tmp_path, name, prompt, *more):
    out = tmp_path / f"{name}.png"
    typed = ["generate", prompt, "--model", str(sd), "--num-steps", "2", "--dtype", "fp32", "--out", str(out)]
    assert main([*typed, *map(str, more)]) == 0
    with Image.open(out) as image:
        return np.asarray(image), image.info


def test_a_lora_is_trained_described_and_used(sd, toys, tmp_path, capsys):
    out = tmp_path / "style"
    command = f"train sd_lora --data {toys} --init {sd} --out {out} --lora.rank 2 --text.train on {TRAINING}"
    assert main(command.split()) == 0
    written = {path.name for path in out.iterdir()}
    assert {"lora.safetensors", "config.json", "log.jsonl", "latents", "samples"} <= written
    assert "model.safetensors" not in written
    assert main(command.split()) == 0  # the same command: the run is finished
    bare, _ = generate(sd, tmp_path, "bare", "a toy")
    worn, info = generate(sd, tmp_path, "worn", "a toy", "--lora", out)
    assert not np.array_equal(bare, worn)
    assert json.loads(info["triptych"])["loras"] == {str(out / "lora.safetensors"): 1.0}
    by_file, _ = generate(sd, tmp_path, "file", "a toy", "--lora", out / "lora.safetensors")
    assert np.array_equal(worn, by_file)
    less, info = generate(sd, tmp_path, "less", "a toy", "--lora", f"{out}:0.5")
    assert json.loads(info["triptych"])["loras"] == {str(out / "lora.safetensors"): 0.5}
    assert not np.array_equal(less, worn)
    capsys.readouterr()
    assert main(["info", str(out / "lora.safetensors")]) == 0
    description = " ".join(capsys.readouterr().out.split())
    assert "LoRA, low-rank updates of another model" in description
    assert "rank 2 alpha 16 changes 32 layers of the UNet, 4 layers of the text encoder" in description
    assert main(["info", str(out), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["adapter"]["metadata"]["ss_network_dim"] == "2"
    assert main(["generate", "a toy", "--model", str(out), "--out", str(tmp_path / "none.png")]) == 2
    assert "looks like a LoRA, which changes another model" in capsys.readouterr().err


def test_an_embedding_is_trained_and_used(sd, toys, tmp_path, capsys):
    out = tmp_path / "toy"
    command = (
        f"train sd_words --data {toys} --init {sd} --out {out} --word.name <toy> --word.like toy {TRAINING}"
    )
    assert main(command.split()) == 0
    assert "model.safetensors" not in {path.name for path in out.iterdir()}
    by_run, info = generate(sd, tmp_path, "run", "a <toy>", "--embedding", out)
    assert json.loads(info["triptych"])["embeddings"] == {"<toy>": str(out / "word.safetensors")}
    by_file, _ = generate(sd, tmp_path, "file", "a <toy>", "--embedding", out / "word.safetensors")
    renamed, _ = generate(sd, tmp_path, "renamed", "a <it>", "--embedding", f"{out}:<it>")
    assert np.array_equal(by_run, by_file)
    assert np.array_equal(by_run, renamed)
    assert not np.array_equal(by_run, generate(sd, tmp_path, "bare", "a toy")[0])


def test_a_fully_fine_tuned_model_is_a_model(sd, toys, tmp_path, capsys):
    out = tmp_path / "all"
    assert main(f"train sd_full --data {toys} --init {sd} --out {out} {TRAINING}".split()) == 0
    image, _ = generate(out, tmp_path, "all", "a toy")
    assert image.shape == (16, 16, 3)
    assert not np.array_equal(image, generate(sd, tmp_path, "bare", "a toy")[0])
    assert main(["convert", str(out), str(tmp_path / "all.safetensors"), "--format", "compvis"]) == 0
    assert np.array_equal(generate(tmp_path / "all.safetensors", tmp_path, "again", "a toy")[0], image)


@pytest.mark.parametrize(
    ("recipe", "more", "words"),
    [
        ("sd_lora", "--lora.rank 0", "rank"),
        ("sd_words", "--word.name toy --word.like cat", "'toy' is in the vocabulary already"),
        ("sd_words", "", "add --word.name '<toy>'"),
    ],
)
def test_mistakes_are_one_line(sd, toys, tmp_path, capsys, recipe, more, words):
    command = f"train {recipe} --data {toys} --init {sd} --out {tmp_path / 'r'} {more} {TRAINING}"
    assert main(command.split()) == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1
    assert words in lines[0]
    assert not (tmp_path / "r").exists()
