"""A small folder of images, and a config that trains on it in a second."""

from dataclasses import replace
from pathlib import Path

import pytest

from triptych.data.config import AugmentConfig, DataConfig
from triptych.training.configs.base import ClassifyConfig, LoopConfig, OptimConfig


@pytest.fixture(scope="session")
def image_folder(color_images) -> Path:
    return color_images


@pytest.fixture
def config(image_folder) -> ClassifyConfig:
    return ClassifyConfig(
        data=str(image_folder),
        model="vit-ti16",
        model_args=("depth=2", "embed_dim=24", "mlp_ratio=2.0", "patch_size=8", "dropout=0.1"),
        image_size=(16, 16),
        drop_path_rate=0.2,
        loading=DataConfig(batch_size=8, workers=0, eval_fraction=0.2),
        augment=AugmentConfig(brightness=0.1, mixup=0.2, erasing=0.2),
        optim=OptimConfig(lr=3e-3, warmup=0.1),
        loop=LoopConfig(epochs=3, ema=0.9, precision="fp32", device="cpu"),
    )


@pytest.fixture
def short(config) -> ClassifyConfig:
    return replace(config, loop=replace(config.loop, epochs=1))
