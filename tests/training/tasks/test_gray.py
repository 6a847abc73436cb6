"""Networks of gray images: trained, evaluated and used alike."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

import triptych as tp
from triptych.data.augment.batch import augment, preprocess_batch
from triptych.data.config import AugmentConfig
from triptych.errors import ConfigError
from triptych.model_card import Preprocess
from triptych.pipelines.image_input import batched
from triptych.training import run
from triptych.training.tasks.classification import build_network


@pytest.fixture
def gray_folder(tmp_path):
    rng = np.random.default_rng(0)
    for name, level in (("dark", 40), ("light", 200)):
        (tmp_path / "data" / name).mkdir(parents=True)
        for i in range(12):
            pixels = (rng.normal(level, 10, (16, 16)) * 16).clip(0, 4095).astype(np.uint16)
            pixels[0, 0] = 4095
            Image.fromarray(pixels).save(tmp_path / "data" / name / f"{i}.png")
    return tmp_path / "data"


def test_all_paths_normalize_alike():
    images = torch.randint(0, 256, (3, 3, 8, 8), dtype=torch.uint8)
    mean, std = (0.4,), (0.2,)
    plain = AugmentConfig(image_size=(8, 8), crop_scale=(1, 1), flip=0, mean=mean, std=std)
    trained = augment(images, None, plain, 0)[0]
    evaluated = preprocess_batch(images, mean, std)
    pixels = list(images.permute(0, 2, 3, 1).numpy())
    used = batched(pixels, Preprocess(size=(8, 8), mean=mean, std=std), channels=1)
    luma = np.array([np.asarray(Image.fromarray(p).convert("F")) for p in pixels])
    assert trained.shape == evaluated.shape == used.shape == (3, 1, 8, 8)
    torch.testing.assert_close(trained, evaluated, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(used, evaluated, atol=1e-5, rtol=1e-5)
    assert np.abs((evaluated[:, 0].numpy() * 0.2 + 0.4) * 255 - luma).max() < 0.01


def test_a_run(config, gray_folder, tmp_path):
    config = replace(config, data=str(gray_folder), in_channels=1)
    assert run(config, tmp_path / "run").finished
    net = tp.load(tmp_path / "run")
    assert net.config.in_channels == 1
    assert len(net.card.preprocess.mean) == 1
    assert tp.evaluate(tmp_path / "run", workers=0).count > 0
    assert len(tp.ClassificationPipeline(net, device="cpu")(str(gray_folder / "dark" / "0.png"))) == 2


def test_weights_are_adapted(config):
    config = replace(
        config, init="vit-emoji", model_args=(), drop_path_rate=None, image_size=None, in_channels=1
    )
    net = build_network(config, ("a", "b"), {})
    old, new = (n.stem.state_dict() for n in (tp.load("vit-emoji"), net))
    first = next(name for name in old if old[name].ndim == 4)
    torch.testing.assert_close(new[first], old[first].sum(1, keepdim=True))


def test_an_augmentation_has_a_deviation_for_each_mean():
    with pytest.raises(ConfigError, match="as many values as mean"):
        AugmentConfig(mean=(0.5,))
