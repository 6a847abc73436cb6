"""Recipes that fine-tune Stable Diffusion: each returns a complete config; its docstring has the command.

The settings are the usual ones. None was run here at full size, so there are no scores.
"""

from dataclasses import replace

from triptych.data.config import DataConfig
from triptych.training.configs.base import LoopConfig, OptimConfig
from triptych.training.configs.second_stage import FLIP_ONLY, SamplesConfig, SecondStageConfig

SD1 = "stable-diffusion-v1-5/stable-diffusion-v1-5"
_SAMPLES = SamplesConfig(num_images=4, num_steps=25, guidance_scale=7.5)


def sd_full() -> SecondStageConfig:
    """Fine-tune all of a Stable Diffusion UNet on your images with captions, and save the average of its weights.

        triptych train sd_full --data DIR --init sd-v1-5.safetensors --out RUN
        triptych train sd_full --data DIR --init SD --out RUN --text.train on      # also its text encoder
        triptych train sd_full --data DIR --init sd2.safetensors --prediction v --out RUN
        triptych generate "a red apple" --model RUN

    `--init` is a single file of CompVis or a web UI, a folder of diffusers, a hub id or a RUN; by default it is Stable
    Diffusion 1.5 from the hub. The autoencoder, the text encoder and the diffusion process do not change. With
    gradients, moving average and optimizer state, the 860 M weights take 17 GB, without activations. Meant for many
    thousands of images; with fewer, use `sd_lora`, which forgets less.
    """
    return SecondStageConfig(
        init=SD1,
        samples=_SAMPLES,
        loading=DataConfig(batch_size=8, eval_fraction=0.02),
        optim=OptimConfig(lr=1e-5, final_lr=1.0, warmup=0.02, weight_decay=0.01),
        loop=LoopConfig(epochs=10, ema=0.9999),
    )


def sd_lora() -> SecondStageConfig:
    """Train low-rank updates of Stable Diffusion's attention (Hu et al. 2021) on 20 to 1,000 images with captions.

        triptych train sd_lora --data DIR --init sd-v1-5.safetensors --out RUN
        triptych train sd_lora --data DIR --init SD --out RUN --lora.rank 32 --lora.feed-forward True --text.train on
        triptych generate "a red apple" --model sd-v1-5.safetensors --lora RUN:0.8

    RUN/lora.safetensors (13 MB at rank 16 in SD 1, fp32) uses kohya's names, which web UIs and diffusers read.
    """
    return SecondStageConfig(
        init=SD1,
        train="lora",
        samples=_SAMPLES,
        augment=replace(FLIP_ONLY, flip=0.0),
        loading=DataConfig(batch_size=4, eval_fraction=0.1),
        optim=OptimConfig(lr=1e-4, warmup=0.05, weight_decay=0.01),
        loop=LoopConfig(epochs=100, eval_every=20),
    )


def sd_words() -> SecondStageConfig:
    """Train only a new word, for an object or style in 3 to 10 images (textual inversion, Gal et al. 2023).

        triptych train sd_words --data DIR --init SD --out RUN --word.name "<toy>" --word.like toy
        triptych train sd_words --data DIR --init SD --out RUN --word.name "<ink>" --word.like drawing \\
            --word.templates "a drawing in the style of {}" "an image in the style of {}"
        triptych generate "a <toy> on the beach" --model SD --embedding RUN

    No captions are needed. Web UIs and diffusers read RUN/word.safetensors; in web UIs, the word is the file's name.
    600 epochs of 5 images are 3,000 steps, the usual number; for n images, set `--loop.epochs` to 3000 / n.
    """
    return SecondStageConfig(
        init=SD1,
        train="words",
        drop_condition=0.0,
        samples=_SAMPLES,
        augment=replace(FLIP_ONLY, flip=0.0),
        loading=DataConfig(batch_size=1, eval_fraction=0.01),
        optim=OptimConfig(lr=5e-3, final_lr=0.1, warmup=0.0, weight_decay=0.0),
        loop=LoopConfig(epochs=600, eval_every=100),
    )
