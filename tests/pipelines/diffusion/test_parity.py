"""The same latents as diffusers' pipelines, with its own networks, from the same noise, images and masks."""

import copy
import importlib.util
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # of deprecations when it is imported
    import diffusers
    from diffusers import AutoencoderKL, UNet2DConditionModel
    from diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion import StableDiffusionPipeline
    from diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion_img2img import (
        StableDiffusionImg2ImgPipeline,
    )
    from diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion_inpaint import (
        StableDiffusionInpaintPipeline,
    )
    from diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion_upscale import (
        StableDiffusionUpscalePipeline,
    )

from triptych.diffusion.noise import seeded_noise
from triptych.models.latent_diffusion import LatentDiffusion
from triptych.pipelines.diffusion.pipeline import DiffusionPipeline

pytestmark = pytest.mark.proves("Samplers", "pipelines of diffusers: the same latents", by="diffusers")

PROMPT, NEGATIVE = "a red apple", "blurry"
STABLE = {
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "steps_offset": 1,
    "clip_sample": False,
    "set_alpha_to_one": False,
}
SCHEDULERS = {
    "ddim": ("DDIMScheduler", STABLE),
    "dpm++2m": ("DPMSolverMultistepScheduler", {}),
    "unipc": ("UniPCMultistepScheduler", {}),
}


def names_of(test: str):
    """Return the module of another test, which maps our parameters to diffusers' names."""
    path = Path(__file__).parents[2] / "models" / f"{test}.py"
    spec = importlib.util.spec_from_file_location(f"names_of_{test}", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def pair(ldm):
    """Return our model of that name, and diffusers' parts with the same weights."""
    unet_names, vae_names = names_of("test_unet"), names_of("test_autoencoder")
    pairs = {}

    def get(model: str) -> tuple[LatentDiffusion, dict]:
        if model in pairs:
            return pairs[model]
        net = copy.deepcopy(ldm(model))
        # diffusers draws from the posterior; without variance that is its mean.
        net.autoencoder.quant.weight[4:] = 0
        net.autoencoder.quant.bias[4:] = -30
        vae = AutoencoderKL(**vae_names.THEIRS | {"latent_channels": 4, "scaling_factor": 0.5}).eval()
        vae.load_state_dict(vae_names.as_theirs(net.autoencoder))
        config = net.config.network
        unet = UNet2DConditionModel(
            in_channels=config.in_channels,
            out_channels=4,
            sample_size=8,
            block_out_channels=(16, 32),
            layers_per_block=1,
            down_block_types=["DownBlock2D", "DownBlock2D"],
            up_block_types=["UpBlock2D", "UpBlock2D"],
            cross_attention_dim=24,
            attention_head_dim=2,
            norm_num_groups=8,
            num_class_embeds=config.num_classes or None,
        ).eval()
        state = {}
        for name, value in net.network.state_dict().items():
            keys = unet_names.theirs_for(name)
            for key, part in zip(keys, value.chunk(len(keys)), strict=True):
                state[key] = part.view(unet.state_dict()[key].shape)
        unet.load_state_dict(state)
        pairs[model] = net, {"vae": vae, "unet": unet}
        return pairs[model]

    return get


@pytest.fixture
def ours(monkeypatch):
    """Return a pipeline and a list of the latents that it decodes."""

    def make(net):
        pipe, seen = DiffusionPipeline(net, device="cpu", dtype="fp32"), []
        pixels = pipe.model.codec.decode
        monkeypatch.setattr(pipe.model.codec, "decode", lambda z, *args: seen.append(z) or pixels(z, *args))
        return pipe, seen

    return make


def theirs(cls, parts, sampler="ddim", **more):
    name, changes = SCHEDULERS[sampler]
    stable = {key: STABLE[key] for key in ("beta_start", "beta_end", "beta_schedule")}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        scheduler = getattr(diffusers, name)(**stable | changes)
        arguments = parts | {
            "text_encoder": None,
            "tokenizer": None,
            "scheduler": scheduler,
            "safety_checker": None,
            "feature_extractor": None,
        }
        if cls is not StableDiffusionUpscalePipeline:
            arguments["requires_safety_checker"] = False
        pipe = cls(**arguments, **more)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def called(pipe, net, **arguments) -> torch.Tensor:
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        contexts = net.text_encoder.encode_prompts([PROMPT, NEGATIVE])
        return pipe(
            prompt_embeds=contexts[:1], negative_prompt_embeds=contexts[1:], output_type="latent", **arguments
        ).images


def close(got: torch.Tensor, expected: torch.Tensor) -> None:
    assert expected.std() > 0.1
    torch.testing.assert_close(got, expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("sampler", SCHEDULERS)
def test_text_to_image(pair, ours, sampler):
    net, parts = pair("text")
    pipe, seen = ours(net)
    noise = torch.randn(1, 4, 8, 10)
    pipe.text_to_image(PROMPT, NEGATIVE, num_steps=5, guidance_scale=5.0, sampler=sampler, latents=noise)
    expected = called(
        theirs(StableDiffusionPipeline, parts, sampler),
        net,
        latents=noise,
        num_inference_steps=5,
        guidance_scale=5.0,
        height=32,
        width=40,
    )
    close(seen[0], expected)


def test_the_seeds_noise_is_diffusers(pair, ours):
    net, parts = pair("text")
    pipe, seen = ours(net)
    pipe.text_to_image(
        PROMPT, NEGATIVE, num_steps=3, guidance_scale=5.0, sampler="ddim", seed=11, guidance_rescale=0.7
    )
    expected = called(
        theirs(StableDiffusionPipeline, parts),
        net,
        generator=torch.Generator().manual_seed(11),
        num_inference_steps=3,
        guidance_scale=5.0,
        guidance_rescale=0.7,
    )
    close(seen[0], expected)


def test_image_to_image(pair, ours, photo, monkeypatch):
    net, parts = pair("text")
    pipe, seen = ours(net)
    init_image = photo(32, 40)
    pipe.image_to_image(
        PROMPT,
        init_image,
        strength=0.6,
        negative_prompt=NEGATIVE,
        num_steps=5,
        guidance_scale=5.0,
        sampler="ddim",
        seed=3,
    )
    same_noise(monkeypatch, "img2img", seeded_noise([3], (4, 8, 10)))
    expected = called(
        theirs(StableDiffusionImg2ImgPipeline, parts),
        net,
        image=Image.fromarray(init_image),
        strength=0.6,
        num_inference_steps=5,
        guidance_scale=5.0,
    )
    close(seen[0], expected)


@pytest.mark.parametrize("name", ["text", "inpaint"])
@pytest.mark.parametrize("strength", [1.0, 0.6])
def test_inpaint(pair, ours, photo, name, strength, monkeypatch):
    net, parts = pair(name)
    pipe, seen = ours(net)
    init_image, mask = photo(32, 40), np.zeros((32, 40), np.uint8)
    mask[8:24, 4:20] = 255  # aligned with the grid of latents, where both libraries choose the same cells
    pipe.inpaint(
        PROMPT,
        init_image,
        mask,
        strength=strength,
        negative_prompt=NEGATIVE,
        num_steps=5,
        guidance_scale=5.0,
        sampler="ddim",
        seed=3,
    )
    same_noise(monkeypatch, "inpaint", seeded_noise([3], (4, 8, 10)))
    expected = called(
        theirs(StableDiffusionInpaintPipeline, parts),
        net,
        image=Image.fromarray(init_image),
        mask_image=Image.fromarray(mask),
        strength=strength,
        num_inference_steps=5,
        guidance_scale=5.0,
        height=32,
        width=40,
    )
    if name == "inpaint":
        close(seen[0], expected)
    else:  # CompVis' last level has a little noise left; diffusers pastes the clean image outside the mask
        close(seen[0][..., 2:6, 1:5], expected[..., 2:6, 1:5])


def test_upscale(pair, ours, photo, monkeypatch):
    net, parts = pair("upscaler")
    pipe, seen = ours(net)
    small = photo(8, 12)
    pipe.upscale(
        PROMPT,
        small,
        noise_level=20,
        negative_prompt=NEGATIVE,
        num_steps=4,
        guidance_scale=5.0,
        sampler="ddim",
        seed=3,
    )
    same_noise(
        monkeypatch, "upscale", seeded_noise([3], (3, 8, 12), "condition"), seeded_noise([3], (4, 8, 12))
    )
    low = diffusers.DDPMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear")
    expected = called(
        theirs(StableDiffusionUpscalePipeline, parts, low_res_scheduler=low),
        net,
        image=Image.fromarray(small),
        noise_level=20,
        num_inference_steps=4,
        guidance_scale=5.0,
    )
    close(seen[0], expected)


def same_noise(monkeypatch, name: str, *noises: torch.Tensor) -> None:
    """Make diffusers' pipeline draw these in this order; it draws the posterior elsewhere."""
    left = list(noises)
    module = getattr(diffusers.pipelines.stable_diffusion, f"pipeline_stable_diffusion_{name}")
    monkeypatch.setattr(module, "randn_tensor", lambda *a, **k: left.pop(0))
