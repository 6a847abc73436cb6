"""A small folder of pictures, and a config that trains on it in a second."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from triptych.data.config import AugmentConfig, DataConfig
from triptych.train.configs.base import ClassifyConfig, LoopConfig, OptimConfig


@pytest.fixture(scope="session")
def pictures(tmp_path_factory) -> Path:
    """Three classes of noisy plain colours, 14 pictures each."""
    folder = tmp_path_factory.mktemp("pictures")
    rng = np.random.default_rng(0)
    for name, colour in {"blue": (30, 40, 200), "green": (40, 190, 40), "red": (200, 30, 30)}.items():
        (folder / name).mkdir()
        for i in range(14):
            pixels = np.clip(np.array(colour) + rng.normal(0, 25, (24, 24, 3)), 0, 255).astype(np.uint8)
            Image.fromarray(pixels).save(folder / name / f"{i}.png")
    return folder


@pytest.fixture
def config(pictures) -> ClassifyConfig:
    return ClassifyConfig(
        data=str(pictures),
        model="vit-ti16",
        model_args=("depth=2", "embed_dim=24", "mlp_dim=48", "patch_size=8", "dropout=0.1"),
        image_size=(16, 16),
        drop_path=0.2,
        loading=DataConfig(batch_size=8, workers=0, eval_fraction=0.2),
        augment=AugmentConfig(brightness=0.1, mixup=0.2, erasing=0.2),
        optim=OptimConfig(lr=3e-3, warmup=0.1),
        loop=LoopConfig(epochs=3, ema=0.9, precision="fp32", device="cpu"),
    )


@pytest.fixture
def short(config) -> ClassifyConfig:
    return replace(config, loop=replace(config.loop, epochs=1))
