"""From a folder of pictures with captions to pictures of one's own, all through the command line."""

import json

import numpy as np
import pytest
from PIL import Image

from triptych.cli import main

COLOURS = {"red": (230, 30, 30), "green": (30, 190, 40), "blue": (40, 50, 230), "yellow": (240, 220, 40)}
DENOISER = "width=16 multipliers=[1,2] depth=1 attention_factors=[2] groups=4 head_dim=8".split()


@pytest.fixture(scope="module")
def squares(tmp_path_factory):
    """Six squares of each of four colours, 16 x 16, with a metadata.jsonl."""
    folder = tmp_path_factory.mktemp("squares")
    rng = np.random.default_rng(0)
    rows = []
    for name, colour in COLOURS.items():
        for i in range(6):
            pixels = np.clip(np.array(colour) + rng.normal(0, 5, (16, 16, 3)), 0, 255).astype(np.uint8)
            Image.fromarray(pixels).save(folder / f"{name}{i}.png")
            rows.append({"file_name": f"{name}{i}.png", "text": f"a {name} square"})
    (folder / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return folder


@pytest.fixture(scope="module")
def compressed(squares, tmp_path_factory):
    """A RUN of the first stage."""
    out = tmp_path_factory.mktemp("first") / "A"
    small = "width=8 multipliers=[1,2] depth=1 groups=4 latent_channels=2 middle_attention=false".split()
    code = main(
        ["train", "autoencoder", "--data", str(squares), "--out", str(out), "--model", "kl-f4", "--model-args", *small]
        + ["--image-size", "16", "16", "--loading.batch-size", "8", "--loading.workers", "0", "--loop.epochs", "2"]
        + ["--perceptual.kind", "none", "--loop.precision", "fp32", "--loop.device", "cpu"]
    )
    assert code == 0
    return out


def trained(squares, compressed, out, *more):
    return main(
        ["train", "latent-diffusion", "--data", str(squares), "--first-stage", str(compressed), "--out", str(out)]
        + ["--model", "unet-emoji", "--model-args", *DENOISER, "--text.width", "16", "--text.depth", "1"]
        + ["--text.head-dim", "8", "--loading.batch-size", "8", "--loading.workers", "0", "--loop.epochs", "2"]
        + ["--loop.precision", "fp32", "--loop.device", "cpu", "--samples.count", "2", "--samples.steps", "2", *more]
    )


def test_from_a_folder_to_pictures_and_figures(squares, compressed, tmp_path, capsys):
    out = tmp_path / "B"
    assert trained(squares, compressed, out, "--condition", "text") == 0
    assert {"model.safetensors", "config.json", "log.jsonl", "latents", "samples"} <= {p.name for p in out.iterdir()}
    assert trained(squares, compressed, out, "--condition", "text") == 0  # the same command: nothing is left to do
    picture = tmp_path / "red.png"
    code = main(["generate", "a red square", "--model", str(out), "--steps", "3", "--out", str(picture)])
    assert code == 0
    with Image.open(picture) as image:
        assert image.size == (16, 16)
        assert json.loads(image.info["triptych"])["prompt"] == "a red square"
    capsys.readouterr()
    code = main(
        ["evaluate", str(out), "--data", str(squares), "--samples", "8", "--steps", "2", "--batch-size", "8"]
        + ["--workers", "0", "--classifier", "none", "--json"]
    )
    assert code == 0
    assert json.loads(capsys.readouterr().out)["frechet"] > 0
