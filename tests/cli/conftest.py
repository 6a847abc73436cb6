"""A tiny classifier and a tiny segmenter on disk, and a few images, for the tests of commands."""

import io
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

import triptych as tp
from triptych.heads.config import HeadConfig, SegmenterConfig
from triptych.heads.segmenter import Segmenter
from triptych.model_card import ModelCard, Preprocess

NAMES = ("cat", "dog", "fox", "owl")


@pytest.fixture(scope="session")
def model(tmp_path_factory):
    """File of a classifier of four classes, for 32 x 32 pixels."""
    torch.manual_seed(0)
    net = tp.create(
        "vit-ti16",
        depth=2,
        embed_dim=24,
        num_heads=3,
        mlp_ratio=1.0,
        num_classes=4,
        image_size=32,
        patch_size=8,
    )
    torch.nn.init.normal_(net.head.weight)
    net.card = replace(net.card, preprocess=Preprocess(size=(32, 32), crop=1.0), classes=NAMES)
    path = tmp_path_factory.mktemp("model") / "tiny.safetensors"
    tp.save(net, path)
    return path


@pytest.fixture(scope="session")
def parser(tmp_path_factory):
    """File of a segmenter with the classes of `scenes` and a Swin backbone, for 32 x 32 pixels."""
    from triptych.data.builtin.scenes import scenes

    torch.manual_seed(0)
    names = scenes("test", 1).mask_classes
    backbone = tp.create(
        "swin-t", embed_dim=8, depths=(1, 2), num_heads=(1, 2), window_size=4, image_size=32, num_classes=0
    )
    backbone.prepare_maps()
    head = HeadConfig(type="fpn", channels=8, num_classes=len(names))
    net = Segmenter(SegmenterConfig(backbone=backbone.config, head=head), backbone)
    net.card = ModelCard(preprocess=Preprocess(size=(32, 32), mode="squash", crop=1.0), classes=names)
    path = tmp_path_factory.mktemp("parser") / "tiny.safetensors"
    tp.save(net, path)
    return path


@pytest.fixture(scope="session")
def masked(tmp_path_factory):
    """Folder with images and masks of four scenes of 48 x 40 pixels, and the class names."""
    from triptych.data.builtin.scenes import scenes

    folder = tmp_path_factory.mktemp("masked")
    for part in ("images", "masks"):
        (folder / part).mkdir()
    source = scenes("test", 4, (40, 48))
    for i, scene in enumerate(source):
        Image.fromarray(np.asarray(scene.image)).save(folder / "images" / f"{i}.png")
        Image.fromarray(scene.mask).save(folder / "masks" / f"{i}.png")
    (folder / "classes.txt").write_text("\n".join(source.mask_classes))
    return folder


@pytest.fixture(scope="session")
def images(tmp_path_factory):
    """Folder of five images."""
    folder = tmp_path_factory.mktemp("images")
    rng = np.random.default_rng(0)
    for i in range(5):
        Image.fromarray(rng.integers(0, 256, (40, 50, 3), dtype=np.uint8)).save(folder / f"{i}.png")
    return folder


@pytest.fixture(scope="session")
def labeled(tmp_path_factory):
    """Folder with train and val of three of the model's four classes, 4 images each, one of which is damaged."""
    folder = tmp_path_factory.mktemp("labeled")
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
    """Folder of files that are not images, and an image of one pixel."""
    folder = tmp_path_factory.mktemp("odd")
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8))
    encoded = io.BytesIO()
    noise.save(encoded, format="JPEG")
    (folder / "empty.png").touch()
    (folder / "text.png").write_text("this is text")
    (folder / "cut.jpg").write_bytes(encoded.getvalue()[: len(encoded.getvalue()) // 2])
    noise.resize((1, 1)).save(folder / "pixel.png")
    Image.new("1", (20_000, 10_000)).save(folder / "bomb.png")
    (folder / "folder").mkdir()
    return folder
