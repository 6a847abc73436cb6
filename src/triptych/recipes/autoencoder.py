"""Recipes for the first stage of latent diffusion: each returns a complete config; its docstring has the command and
the score."""

from dataclasses import replace

from triptych.data.config import AugmentConfig, DataConfig
from triptych.evaluation.config import PerceptualConfig
from triptych.training.configs.base import LoopConfig, OptimConfig
from triptych.training.configs.first_stage import (
    CodebookConfig,
    CompressConfig,
    DiscriminatorConfig,
)

SMALL = (
    "base_channels=48",
    "patch_size=2",
    "channel_multipliers=[1,2,3]",
    "num_res_blocks=1",
    "latent_channels=8",
    "norm_groups=8",
)
PAPER_BETAS = (0.5, 0.9)


def autoencoder() -> CompressConfig:
    """Train a small KL autoencoder at 64 px, with latents of 8 x 8, on your own folder of images; runs on a laptop.

        triptych train autoencoder --data DIR --out RUN
        triptych train autoencoder --data DIR --out RUN --image-size 128 128      # latents of 16 x 16

    The second stage takes it as `--first-stage RUN`. With a GPU and large images, use `autoencoder_kl_f8`.
    """
    return CompressConfig(
        data="DIR",
        model="kl-f8",
        model_args=SMALL,
        image_size=(64, 64),
        discriminator=DiscriminatorConfig(channels=32, layers=2, weight=0.2),
        loading=DataConfig(batch_size=32),
        augment=AugmentConfig(crop_scale=(0.5, 1.0)),
        optim=OptimConfig(lr=1e-3, warmup=0.02, weight_decay=0.01, betas=(0.9, 0.99)),
        loop=LoopConfig(epochs=60, ema=0.998, eval_every=5),
    )


def autoencoder_emoji() -> CompressConfig:
    """Train the first stage of `latent_diffusion_emoji`: the built-in drawings at 64 px, latents of 8 x 8.

    python tools/make_emoji.py --styles all --out EMOJI
    triptych train autoencoder_emoji --data emoji:EMOJI --out runs/autoencoder_emoji

    On Twemoji, a style that it was not trained on: PSNR 28.7 dB, Fréchet distance 0.11 in the features of vit-emoji.
    """
    return replace(
        autoencoder(),
        data="emoji",
        model_args=(
            "base_channels=32",
            "patch_size=2",
            "channel_multipliers=[1,2,4]",
            "num_res_blocks=1",
            "latent_channels=8",
            "norm_groups=8",
        ),
        kl=0.02,
        discriminator=DiscriminatorConfig(channels=32, layers=2, weight=0.2, start=0.6, lr=5e-4),
        loading=DataConfig(batch_size=16, eval_batch_size=64, workers=0, load_size=(64, 64)),
        augment=AugmentConfig(
            crop_scale=(1.0, 1.0),
            crop_ratio=(1.0, 1.0),
            random_background=0.1,
            brightness=0.1,
            contrast=0.1,
            saturation=0.2,
            hue=0.05,
        ),
        optim=OptimConfig(lr=1e-3, warmup=0.02, weight_decay=0.01, betas=(0.9, 0.99)),
        loop=LoopConfig(epochs=34, ema=0.999, eval_every=4, save_every=300),
    )


def autoencoder_kl_f8() -> CompressConfig:
    """Train KL-f8 at 256 px with LPIPS and a discriminator (Rombach et al. 2022, Table 8): published rFID 0.90.

        triptych train autoencoder_kl_f8 --data OPENIMAGES --perceptual.vgg VGG16 --perceptual.heads LPIPS --out RUN

    As published: 256 px crops, L1 loss, KL weight 1e-6, a discriminator from step 50,001 with weight 0.5, and a
    constant learning rate of 4.5e-6 per image of the batch. Not run here: the score is the publication's.
    """
    return CompressConfig(
        data="OPENIMAGES",
        model="kl-f8",
        kl=1e-6,
        logvar=True,
        discriminator=DiscriminatorConfig(start=50_001, weight=0.5),
        loading=DataConfig(batch_size=12, workers=8, load_size=(292, 292)),
        augment=AugmentConfig(crop_scale=(0.7, 1.0), crop_ratio=(1.0, 1.0), flip=0.5),
        optim=OptimConfig(
            lr=12 * 4.5e-6, final_lr=1.0, warmup=0.0, weight_decay=0.0, betas=PAPER_BETAS, clip=0.0
        ),
        loop=LoopConfig(epochs=3, eval_every=0.1),
    )


def autoencoder_vq_f4() -> CompressConfig:
    """Train VQ-f4 at 256 px with LPIPS and a discriminator (Rombach et al. 2022, Table 8): published rFID 0.58.

        triptych train autoencoder_vq_f4 --data OPENIMAGES --perceptual.vgg VGG16 --perceptual.heads LPIPS --out RUN

    As published, the codebook of 8,192 entries is trained by its gradient, with a commitment weight of 0.25. With
    `--codebook.update ema` it is updated as a moving average. Not run here: the score is the publication's.
    """
    small = autoencoder_kl_f8()
    return replace(
        small,
        model="vq-f4",
        logvar=False,
        discriminator=DiscriminatorConfig(start=1, weight=0.75),
        codebook=CodebookConfig(revive_below=0.0),
        perceptual=PerceptualConfig(weight=1.0),
        loading=replace(small.loading, batch_size=8),
        optim=replace(small.optim, lr=8 * 4.5e-6),
    )
