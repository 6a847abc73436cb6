"""Recipes for the second stage, a latent diffusion model on a frozen autoencoder: each returns a complete config; its
docstring has the command and the score."""

from dataclasses import replace

from triptych.data.config import DataConfig
from triptych.diffusion.config import NoiseConfig, ProcessConfig
from triptych.training.configs.base import LoopConfig, OptimConfig
from triptych.training.configs.second_stage import FLIP_ONLY, CaptionConfig, SamplesConfig, SecondStageConfig


def latent_diffusion() -> SecondStageConfig:
    """Train a text-to-image model from scratch on your own folder of images with captions.

        triptych train autoencoder --data DIR --out A
        triptych train latent-diffusion --data DIR --first-stage A --condition text --out B
        triptych generate "a red apple" --model B

    DIR has a metadata.jsonl with a caption for each image, or a .txt file next to each image. For class folders, use
    `--condition class`; without captions or classes, `--condition none`. `--first-stage` also takes a published
    autoencoder, or a Stable Diffusion model that contains one.
    """
    return SecondStageConfig(
        model="unet-s",
        process=ProcessConfig(schedule="flow", prediction="flow"),
        noise=NoiseConfig(times="logit_normal"),
        loading=DataConfig(batch_size=64),
        optim=OptimConfig(lr=3e-4, warmup=0.02, weight_decay=0.01, betas=(0.9, 0.99)),
        loop=LoopConfig(epochs=200, ema=0.9995, eval_every=5),
    )


def latent_diffusion_emoji() -> SecondStageConfig:
    """Train a small text-to-image model on the built-in drawings at 64 px, in the 8 x 8 latents of `autoencoder_emoji`.

    python tools/make_emoji.py --styles all --out EMOJI
    triptych train latent_diffusion_emoji --data emoji:EMOJI --first-stage A --out runs/latent_diffusion_emoji

    Stopped after 680,000 latents (122 epochs), a classifier finds the prompted subgroup in 0.53 of the samples (0.98 of
    real images). After 140 more epochs from these weights it is 0.89, with a Fréchet distance of 0.67 in the features
    of vit-emoji (perfect samples would have 0.33 at this count). The README reports the latter:

    triptych train latent_diffusion_emoji --data emoji:EMOJI --first-stage A --init runs/latent_diffusion_emoji \\
        --optim.lr 5e-4 --loop.epochs 140 --loop.seed 1 --out runs/longer
    """
    return SecondStageConfig(
        model="unet-emoji",
        model_args=("channel_multipliers=[1,2]", "attention_downsample_factors=[1,2]"),
        text=CaptionConfig(vocabulary=2048, max_length=20, embed_dim=128, depth=4, head_dim=32),
        process=ProcessConfig(schedule="flow", prediction="flow"),
        noise=NoiseConfig(times="logit_normal"),
        samples=SamplesConfig(
            prompts=(
                "a red apple, noto style",
                "an owl, fluent-3d style",
                "a sailboat",
                "a grinning face, noto style",
            )
        ),
        loading=DataConfig(batch_size=64, workers=0, eval_fraction=0.03),
        augment=replace(FLIP_ONLY, flip=0.0),  # mirrored clocks and letters are wrong
        optim=OptimConfig(lr=7e-4, warmup=0.02, weight_decay=0.01, betas=(0.9, 0.99)),
        loop=LoopConfig(epochs=130, ema=0.999, eval_every=10, save_every=300),
    )
