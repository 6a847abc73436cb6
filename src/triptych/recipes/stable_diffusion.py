"""Recipes that fine-tune a Stable Diffusion: each returns a whole config; its docstring has the command. The settings
are those that are usual in the field; none was run here at full size, so there are no scores."""

from dataclasses import replace

from triptych.data.config import DataConfig
from triptych.training.configs.base import LoopConfig, OptimConfig
from triptych.training.configs.second_stage import FLIP_ONLY, SamplesConfig, SecondStageConfig

SD1 = "stable-diffusion-v1-5/stable-diffusion-v1-5"
SAMPLES = SamplesConfig(count=4, steps=25, guidance=7.5)


def sd_full() -> SecondStageConfig:
    """Your pictures with captions: all of a Stable Diffusion's UNet learns, and what is kept is its average.

        triptych train sd_full --data DIR --init sd-v1-5.safetensors --out RUN
        triptych train sd_full --data DIR --init SD --out RUN --text.train on      # its text encoder, too
        triptych train sd_full --data DIR --init sd2.safetensors --prediction v --out RUN
        triptych generate "a red apple" --model RUN

    `--init` is a single file of CompVis or a web UI, a folder of diffusers, a hub id or a RUN; without it, Stable
    Diffusion 1.5 from the hub. Its autoencoder, text encoder and process stay as they are. With gradients, the average
    and the optimiser's state its 860 M weights take 17 GB before activations. For many thousands of pictures; for fewer
    `sd_lora` forgets less.
    """
    return SecondStageConfig(
        init=SD1,
        samples=SAMPLES,
        loading=DataConfig(batch_size=8, eval_fraction=0.02),
        optim=OptimConfig(lr=1e-5, final_lr=1.0, warmup=0.02, weight_decay=0.01),
        loop=LoopConfig(epochs=10, ema=0.9999),
    )


def sd_lora() -> SecondStageConfig:
    """20 to 1,000 pictures with captions: low-rank updates of a Stable Diffusion's attention (Hu et al. 2021).

        triptych train sd_lora --data DIR --init sd-v1-5.safetensors --out RUN
        triptych train sd_lora --data DIR --init SD --out RUN --lora.rank 32 --lora.feed-forward True --text.train on
        triptych generate "a red apple" --model sd-v1-5.safetensors --lora RUN:0.8

    RUN/lora.safetensors (13 MB at rank 16 in SD 1, fp32) has kohya's names, which web UIs and diffusers read.
    """
    return SecondStageConfig(
        init=SD1,
        train="lora",
        samples=SAMPLES,
        augment=replace(FLIP_ONLY, flip=0.0),
        loading=DataConfig(batch_size=4, eval_fraction=0.1),
        optim=OptimConfig(lr=1e-4, warmup=0.05, weight_decay=0.01),
        loop=LoopConfig(epochs=100, eval_every=20),
    )


def sd_words() -> SecondStageConfig:
    """3 to 10 pictures of one thing or style: a new word for it, and nothing else (Gal et al. 2023, textual inversion).

        triptych train sd_words --data DIR --init SD --out RUN --word.name "<toy>" --word.like toy
        triptych train sd_words --data DIR --init SD --out RUN --word.name "<ink>" --word.like painting \\
            --word.templates "a painting in the style of {}" "a picture in the style of {}"
        triptych generate "a <toy> on the beach" --model SD --embedding RUN

    No captions are needed. RUN/word.safetensors is read by web UIs, whose word is its file's name, and by diffusers.
    600 epochs of 5 pictures are 3,000 steps, the usual number; of n pictures give `--loop.epochs` 3000 / n.
    """
    return SecondStageConfig(
        init=SD1,
        train="words",
        drop_condition=0.0,
        samples=SAMPLES,
        augment=replace(FLIP_ONLY, flip=0.0),
        loading=DataConfig(batch_size=1, eval_fraction=0.01),
        optim=OptimConfig(lr=5e-3, final_lr=0.1, warmup=0.0, weight_decay=0.0),
        loop=LoopConfig(epochs=600, eval_every=100),
    )
