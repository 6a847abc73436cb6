"""Fine-tuning a Stable Diffusion: all of it, a LoRA, a word. What changes and what does not, exact resume, the files as
other programs read them, bad input."""

import json
import re
import warnings
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors import safe_open
from tests.train.test_run import cut_after, final

import triptych as tp
from triptych.data.config import DataConfig
from triptych.diffusion.config import NoiseConfig, ProcessConfig
from triptych.errors import UserError
from triptych.models.autoencoder_config import AutoencoderConfig
from triptych.models.dit_config import DiTConfig
from triptych.models.latent_diffusion import LatentDiffusion
from triptych.models.latent_diffusion_config import SIZES, LatentDiffusionConfig
from triptych.models.text_config import TextConfig
from triptych.models.unet_config import UNetConfig
from triptych.train import dry_run, run
from triptych.train.config import LoopConfig, OptimConfig
from triptych.train.running import prepare
from triptych.train.second_stage_config import (
    STILL,
    CaptionConfig,
    LoraConfig,
    SamplesConfig,
    SecondStageConfig,
    WordConfig,
)
from triptych.weights.diffusion.lora import layer_names

SD = LatentDiffusionConfig(
    autoencoder=AutoencoderConfig(
        kind="kl", width=8, multipliers=(1, 2), depth=1, latent_channels=4, groups=4, image_size=(16, 16), scale=0.5
    ),
    unet=UNetConfig(
        latent_size=(8, 8),
        width=8,
        multipliers=(1, 2),
        depth=1,
        attention_factors=(2,),
        heads=2,
        context_dim=8,
        groups=4,
    ),
    text=TextConfig(kind="clip", vocab_size=49408, width=8, depth=1, heads=2, mlp_dim=16, length=12, pad=49407),
    process=ProcessConfig(prediction="v"),
)
TUNED = {
    "all": {},
    "lora": {"lora": LoraConfig(rank=2, alpha=4.0)},
    "words": {"word": WordConfig(name="<toy>", like="toy", vectors=2), "drop_condition": 0.0},
}


def filled(config):
    """A network whose numbers are all random, norms near 1."""
    net = LatentDiffusion(config)
    for part in net.modules():
        for parameter in part.parameters(recurse=False):
            fan = parameter[0].numel() if parameter.ndim > 1 else 100
            torch.nn.init.normal_(parameter, std=fan**-0.5)
        if isinstance(part, torch.nn.LayerNorm | torch.nn.GroupNorm):
            torch.nn.init.normal_(part.weight, mean=1.0, std=0.1)
    return net.eval()


@pytest.fixture(scope="session")
def sd(tmp_path_factory):
    """A tiny Stable Diffusion as a folder of diffusers."""
    torch.manual_seed(0)
    net = filled(SD)
    folder = tmp_path_factory.mktemp("sd") / "tiny"
    tp.export(net, folder, "diffusers")
    return folder


@pytest.fixture(scope="session")
def toys(tmp_path_factory):
    """Ten pictures; five have captions, of which two name a <toy>."""
    folder = tmp_path_factory.mktemp("toys")
    rng = np.random.default_rng(0)
    for i in range(10):
        pixels = rng.integers(0, 256, (16, 16, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{i}.png")
        if i < 5:
            (folder / f"{i}.txt").write_text("a <Toy> on a table" if i < 2 else "a table")
    return folder


@pytest.fixture
def config(sd, toys):
    def make(train, **changes):
        return SecondStageConfig(
            **{
                "data": str(toys),
                "init": str(sd),
                "train": train,
                "noise": NoiseConfig(min_snr=5.0, offset=0.1),
                "samples": SamplesConfig(count=2, steps=2, guidance=2.0),
                "augment": replace(STILL, flip=0.0),
                "loading": DataConfig(batch_size=4, workers=0, eval_fraction=0.2),
                "optim": OptimConfig(lr=1e-2, weight_decay=0.0),
                "loop": LoopConfig(epochs=2, precision="fp32", device="cpu"),
                **TUNED[train],
                **changes,
            }
        )

    return make


@pytest.mark.parametrize(
    ("train", "use", "ema"), [("all", "on", 0.9), ("lora", "on", 0.9), ("lora", "off", 0.0), ("words", "on", 0.0)]
)
def test_a_run_cut_off_and_repeated_is_the_unbroken_run_bit_for_bit(config, tmp_path, monkeypatch, train, use, ema):
    one = config(train)
    one = replace(one, cache=replace(one.cache, use=use), loop=replace(one.loop, ema=ema))
    run(one, tmp_path / "whole")
    with monkeypatch.context() as patch:
        cut_after(patch, 3)
        assert not run(one, tmp_path / "cut").finished
    assert run(one, tmp_path / "cut").finished
    name = {"all": "model", "lora": "lora", "words": "word"}[train]
    (left, _), (right, _) = final(tmp_path / "whole"), final(tmp_path / "cut")
    assert left.keys() == right.keys()
    assert [key for key in left if not torch.equal(left[key], right[key])] == []
    files = [(tmp_path / folder / f"{name}.safetensors").read_bytes() for folder in ("whole", "cut")]
    assert files[0] == files[1]
