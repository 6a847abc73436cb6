"""Generating with a DiT: by class, with the label as the network's input, and by prompt."""

import warnings
from dataclasses import replace

import numpy as np
import pytest
import torch

import triptych as tp
from triptych.diffusion.config import ProcessConfig
from triptych.errors import ConfigError
from triptych.model_card import ModelCard
from triptych.models.configs.autoencoder import AutoencoderConfig
from triptych.models.configs.dit import DiTConfig
from triptych.models.configs.latent_diffusion import LatentDiffusionConfig
from triptych.models.registry import build

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # of deprecations when it is imported
    from diffusers import DiTPipeline

STAGE = AutoencoderConfig(
    regularization="kl",
    base_channels=8,
    channel_multipliers=(1, 2),
    num_res_blocks=1,
    latent_channels=4,
    norm_groups=4,
    scale=0.5,
)
DIT = DiTConfig(
    latent_size=(8, 8),
    patch_size=2,
    embed_dim=32,
    depth=2,
    num_heads=4,
    num_classes=1000,
    learn_sigma=True,
    time_frequencies="closed",
)


@pytest.fixture(scope="module")
def net():
    torch.manual_seed(0)
    process = ProcessConfig(schedule="linear", beta_start=0.0001, beta_end=0.02)
    model = build(LatentDiffusionConfig(autoencoder=STAGE, network=DIT, process=process))
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.15)
    model.card = ModelCard(preprocess=model.card.preprocess, classes=tuple(f"thing {i}" for i in range(1000)))
    return model.eval().requires_grad_(False)


def pixels(images):
    return np.stack([np.asarray(image) for image in images]).astype(int)


def test_an_image_depends_only_on_its_class_and_seed(net):
    paint = tp.DiffusionPipeline(net, device="cpu", dtype="fp32").class_conditional
    each = paint([3, "thing 8"], num_steps=3, num_images=2, seed=5, guidance_scale=2.0)
    assert [image.info["class_name"] for image in each] == ["thing 3", "thing 3", "thing 8", "thing 8"]
    alone = [
        paint(label, num_steps=3, seed=seed, guidance_scale=2.0)[0]
        for label, seed in ((3, 5), (3, 6), (8, 7), (8, 8))
    ]
    assert np.array_equal(pixels(each), pixels(alone))
    together = paint([3, 8], num_steps=3, num_images=2, seed=5, guidance_scale=2.0, batch_size=3)
    assert np.abs(pixels(together) - pixels(each)).max() <= 1
    (other,) = paint(8, num_steps=3, seed=5, guidance_scale=2.0)
    assert np.abs(pixels([other]) - pixels(each)[0]).max() > 1


@pytest.mark.parametrize("guidance", [1.0, 4.0])
@pytest.mark.filterwarnings("ignore")
def test_parity_with_the_pipeline_of_diffusers(net, guidance, tmp_path, monkeypatch):
    """The same folder and seed give the same image."""
    tp.export(net, tmp_path / "dit", "diffusers")
    theirs = DiTPipeline.from_pretrained(tmp_path / "dit", local_files_only=True)
    theirs.set_progress_bar_config(disable=True)
    assert theirs.get_label_ids(["thing 8"]) == [8]
    generator = torch.Generator().manual_seed(7)
    expected = theirs(
        [8], guidance_scale=guidance, generator=generator, num_inference_steps=5, output_type="np"
    ).images
    back = tp.load(tmp_path / "dit")
    assert back.config == net.config
    assert back.card.classes == net.card.classes
    pipe = tp.DiffusionPipeline(back, device="cpu", dtype="fp32")
    (image,) = pipe.class_conditional(8, num_steps=5, guidance_scale=guidance, seed=7, sampler="ddim")
    assert np.abs(np.asarray(image) - 255 * expected[0]).max() < 1


def test_a_prompt_by_cross_attention(ldm):
    config = ldm("text").config
    net = build(replace(config, network=replace(DIT, num_classes=0, learn_sigma=False, context_dim=24)))
    for parameter in net.parameters():
        torch.nn.init.normal_(parameter, std=0.15)
    pipe = tp.DiffusionPipeline(net.eval(), device="cpu", dtype="fp32")
    _, second = pipe.text_to_image("a red apple", "blurry", num_steps=2, seed=1, num_images=2)
    (alone,) = pipe.text_to_image("a red apple", "blurry", num_steps=2, seed=2)
    assert np.array_equal(pixels([second]), pixels([alone]))
    (wide,) = pipe.text_to_image("a red apple", num_steps=2, height=32, width=64)
    assert wide.size == (64, 32)


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda p: p.unconditional(), "takes a class"),
        (lambda p: p.text_to_image("an apple"), "takes a class"),
        (lambda p: p.class_conditional(1000), "class 1000 is not from 0 to 999"),
        (lambda p: p.class_conditional(1, tiling="x"), "a DiT, which cannot wrap around"),
    ],
)
def test_mistakes_are_reported(net, call, words):
    with pytest.raises(ConfigError, match=words) as caught:
        call(tp.DiffusionPipeline(net, device="cpu", dtype="fp32"))
    assert "\n" not in str(caught.value)


def test_without_a_class_that_stands_for_none(net):
    config = replace(net.config, network=replace(DIT, null_class=False, num_classes=5))
    pipe = tp.DiffusionPipeline(build(config).eval(), device="cpu", dtype="fp32")
    assert pipe.class_conditional(2, num_steps=1)[0].info["guidance_scale"] == 1.0
    with pytest.raises(ConfigError, match="no null class"):
        pipe.class_conditional(2, guidance_scale=2.0)
