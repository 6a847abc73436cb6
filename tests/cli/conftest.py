"""A tiny classifier on disk and a few pictures, for the verbs to work on."""

import io
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

import triptych as tp
from triptych.card import Preprocess

NAMES = ("cat", "dog", "fox", "owl")


@pytest.fixture(scope="session")
def model(tmp_path_factory):
    """A classifier with four classes of 32 x 32 pixels in a file of ours."""
    torch.manual_seed(0)
    net = tp.create(
        "vit-ti16", depth=2, embed_dim=24, num_heads=3, mlp_dim=24, num_classes=4, image_size=32, patch_size=8
    )
    torch.nn.init.normal_(net.head.weight)
    net.card = replace(net.card, preprocess=Preprocess(size=(32, 32), crop=1.0), classes=NAMES)
    path = tmp_path_factory.mktemp("model") / "tiny.safetensors"
    tp.save(net, path)
    return path


@pytest.fixture(scope="session")
def pictures(tmp_path_factory):
    """Five good pictures."""
    folder = tmp_path_factory.mktemp("pictures")
    rng = np.random.default_rng(0)
    for i in range(5):
        Image.fromarray(rng.integers(0, 256, (40, 50, 3), dtype=np.uint8)).save(folder / f"{i}.png")
    return folder


@pytest.fixture(scope="session")
def labelled(tmp_path_factory):
    """train and val of class folders: three of the model's four classes, 4 pictures each, one damaged."""
    folder = tmp_path_factory.mktemp("labelled")
    rng = np.random.default_rng(1)
    for split in ("train", "val"):
        for name in NAMES[:3]:
            (folder / split / name).mkdir(parents=True)
            for i in range(4):
                pixels = rng.integers(0, 256, (40, 50, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(folder / split / name / f"{i}.png")
    damaged = folder / "val" / "fox" / "3.png"
    damaged.write_bytes(damaged.read_bytes()[:500])
    return folder


@pytest.fixture(scope="session")
def odd(tmp_path_factory):
    """Files that are no pictures, and one pixel that is."""
    folder = tmp_path_factory.mktemp("odd")
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8))
    whole = io.BytesIO()
    noise.save(whole, format="JPEG")
    (folder / "empty.png").touch()
    (folder / "text.png").write_text("this is text")
    (folder / "cut.jpg").write_bytes(whole.getvalue()[: len(whole.getvalue()) // 2])
    noise.resize((1, 1)).save(folder / "pixel.png")
    Image.new("1", (20_000, 10_000)).save(folder / "bomb.png")
    (folder / "folder").mkdir()
    return folder
