"""Tiny latent diffusion models for every task, with random weights."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn

from triptych.diffusion.config import ProcessConfig
from triptych.models.configs.autoencoder import AutoencoderConfig
from triptych.models.configs.latent_diffusion import LatentDiffusionConfig, SemanticMapConfig
from triptych.models.configs.text import ClassTokenConfig, TextConfig
from triptych.models.configs.unet import UNetConfig
from triptych.models.latent_diffusion import LatentDiffusion

KL = AutoencoderConfig(
    regularization="kl",
    base_channels=8,
    channel_multipliers=(1, 2, 3),
    num_res_blocks=1,
    latent_channels=4,
    norm_groups=4,
    scale=0.5,
)
VQ = replace(KL, regularization="vq", codebook_size=64, latent_channels=3, scale=1.0)
UNET = UNetConfig(
    latent_size=(8, 8),
    base_channels=16,
    channel_multipliers=(1, 2),
    num_res_blocks=1,
    attention_downsample_factors=(),
    num_heads=2,
    context_dim=24,
    norm_groups=8,
)
TEXT = TextConfig(
    type="clip", vocab_size=49408, embed_dim=24, depth=2, num_heads=2, mlp_ratio=40 / 24, pad_token=49407
)
PLAIN = replace(UNET, in_channels=3, out_channels=3, context_dim=0)
CONFIGS = {
    "text": LatentDiffusionConfig(autoencoder=KL, network=UNET, text_encoder=TEXT),
    "text-v": LatentDiffusionConfig(
        autoencoder=KL,
        network=UNET,
        text_encoder=TEXT,
        process=ProcessConfig(prediction="v", zero_terminal_snr=True),
    ),
    "inpaint": LatentDiffusionConfig(
        autoencoder=KL, network=replace(UNET, in_channels=9), text_encoder=TEXT, concat="mask+masked_image"
    ),
    "ldm-inpaint": LatentDiffusionConfig(
        autoencoder=VQ, network=replace(PLAIN, in_channels=7), concat="masked_image+mask"
    ),
    "depth": LatentDiffusionConfig(
        autoencoder=KL, network=replace(UNET, in_channels=5), text_encoder=TEXT, concat="depth"
    ),
    "upscaler": LatentDiffusionConfig(
        autoencoder=KL,
        network=replace(UNET, in_channels=7, num_classes=50),
        text_encoder=TEXT,
        concat="image",
        low_res_process=ProcessConfig(),
    ),
    "sr": LatentDiffusionConfig(autoencoder=VQ, network=replace(PLAIN, in_channels=6), concat="image"),
    "classes": LatentDiffusionConfig(
        autoencoder=VQ,
        network=replace(PLAIN, context_dim=12),
        text_encoder=ClassTokenConfig(num_classes=3, embed_dim=12),
    ),
    "classes-without-null": LatentDiffusionConfig(
        autoencoder=VQ,
        network=replace(PLAIN, context_dim=12),
        text_encoder=ClassTokenConfig(num_classes=3, embed_dim=12, null_class=False),
    ),
    "unconditional": LatentDiffusionConfig(autoencoder=VQ, network=PLAIN),
    "semantic": LatentDiffusionConfig(
        autoencoder=VQ,
        network=replace(PLAIN, in_channels=6),
        concat="semantic_map",
        semantic_map=SemanticMapConfig(num_classes=5),
    ),
    "layout": LatentDiffusionConfig(
        autoencoder=VQ,
        network=replace(PLAIN, context_dim=24),
        text_encoder=replace(TEXT, type="ldm-bert", vocab_size=82, max_length=11, pad_token=0, boxes=True),
    ),
}


@pytest.fixture(scope="session")
def ldm():
    """Return the model of that name in eval mode. All tests share it and none may change it."""
    models: dict[str, LatentDiffusion] = {}

    def get(name: str) -> LatentDiffusion:
        if name not in models:
            models[name] = scrambled(CONFIGS[name])
        return models[name]

    return get


def scrambled(config: LatentDiffusionConfig) -> LatentDiffusion:
    with torch.random.fork_rng():
        torch.manual_seed(5)
        net = LatentDiffusion(config)
        for part in net.modules():
            for parameter in part.parameters(recurse=False):
                fan = parameter[0].numel() if parameter.ndim > 1 else 100
                nn.init.normal_(parameter, std=fan**-0.5)
            if isinstance(part, nn.LayerNorm | nn.GroupNorm):
                nn.init.normal_(part.weight, mean=1.0, std=0.1)
    return net.eval().requires_grad_(False)


@pytest.fixture
def photo():
    """A smooth image with some noise, (height, width, 3)."""

    def make(height: int = 32, width: int = 32) -> np.ndarray:
        rng = np.random.default_rng(height * 1000 + width)
        y, x = np.mgrid[0 : 1 : height * 1j, 0 : 1 : width * 1j]
        waves = np.stack([np.sin(6 * x + 1), np.cos(5 * y), np.sin(4 * (x + y))], axis=2)
        return np.clip(128 + 90 * waves + rng.normal(0, 8, (height, width, 3)), 0, 255).astype(np.uint8)

    return make


@pytest.fixture
def blob():
    """A mask whose edge goes across the grid of latents, (height, width)."""

    def make(height: int = 32, width: int = 32) -> np.ndarray:
        y, x = np.mgrid[0:height, 0:width]
        inside = ((y - height * 0.45) / height) ** 2 + ((x - width * 0.6) / width) ** 2 < 0.07
        return (inside * 255).astype(np.uint8)

    return make
