"""From a folder of images with captions to generated images, on the command line."""

import json

import numpy as np
import pytest
from PIL import Image

from triptych.cli import main

COLORS = {"red": (230, 30, 30), "green": (30, 190, 40), "blue": (40, 50, 230), "yellow": (240, 220, 40)}
TRAINING = """--loading.batch-size 8 --loading.workers 0 --loop.epochs 2 --loop.precision fp32 --loop.device cpu
    --samples.num-images 2 --samples.num-steps 2"""
SMALL = """--model unet-emoji --model-args base_channels=16 channel_multipliers=[1,2] num_res_blocks=1
    attention_downsample_factors=[2] norm_groups=4 head_dim=8
    --text.embed-dim 16 --text.depth 1 --text.head-dim 8"""


@pytest.fixture(scope="module")
def squares(tmp_path_factory):
    """Folder of six squares of each of four colors, 16 x 16 pixels, with a metadata.jsonl."""
    folder = tmp_path_factory.mktemp("squares")
    rng = np.random.default_rng(0)
    rows = []
    for name, color in COLORS.items():
        for i in range(6):
            pixels = np.clip(np.array(color) + rng.normal(0, 5, (16, 16, 3)), 0, 255).astype(np.uint8)
            Image.fromarray(pixels).save(folder / f"{name}{i}.png")
            rows.append({"file_name": f"{name}{i}.png", "text": f"a {name} square"})
    (folder / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return folder


@pytest.fixture(scope="module")
def compressed(squares, tmp_path_factory):
    """RUN folder of a first stage."""
    out = tmp_path_factory.mktemp("first") / "A"
    small = """--model kl-f4 --model-args base_channels=8 channel_multipliers=[1,2] num_res_blocks=1 norm_groups=4
        latent_channels=2 middle_attention=false --image-size 16 16 --loading.load-size 16 16 --perceptual.weight 0
        --discriminator.weight 0 --loading.batch-size 8 --loading.workers 0 --loop.epochs 2 --loop.precision fp32
        --loop.device cpu"""
    assert main([*f"train autoencoder --data {squares} --out {out}".split(), *small.split()]) == 0
    return out


def test_from_a_folder_to_generated_images(squares, compressed, tmp_path, capsys):
    out = tmp_path / "B"
    command = (
        f"train latent-diffusion --data {squares} --first-stage {compressed} --condition text --out {out}"
    )
    command = [*command.split(), *SMALL.split(), *TRAINING.split()]
    assert main(command) == 0
    written = {path.name for path in out.iterdir()}
    assert {"model.safetensors", "config.json", "log.jsonl", "latents", "samples"} <= written
    assert main(command) == 0  # the same command: the run is finished
    image = tmp_path / "red.png"
    assert (
        main(["generate", "a red square", "--model", str(out), "--num-steps", "3", "--out", str(image)]) == 0
    )
    with Image.open(image) as opened:
        opened.load()
        assert opened.size == (16, 16)
        assert json.loads(opened.info["triptych"])["prompt"] == "a red square"
    capsys.readouterr()
    assert main(["info", str(out), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["family"] == "latent-diffusion"
    evaluation = (
        f"evaluate {out} --data {squares} --samples 6 --num-steps 2 --batch-size 6 --workers 0 --json"
    )
    assert main([*evaluation.split(), "--reference", str(tmp_path / "real.safetensors")]) == 0
    metrics = json.loads(capsys.readouterr().out)
    assert metrics["count"] == 6
    assert metrics["frechet"] > 0


def test_a_folder_without_captions_is_one_line(images, compressed, tmp_path, capsys):
    command = f"train latent-diffusion --data {images} --first-stage {compressed} --out {tmp_path / 'B'}"
    assert main([*command.split(), *SMALL.split(), *TRAINING.split()]) == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1
    assert "has no captions, and --condition text needs them" in lines[0]
    assert not (tmp_path / "B").exists()
