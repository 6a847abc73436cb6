"""The second pass, variation seeds and clip skip, beside the same computation written out."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from triptych.diffusion.config import ProcessConfig
from triptych.diffusion.noise import mix_noise, seeded_noise
from triptych.diffusion.process import Process
from triptych.diffusion.samplers import SAMPLERS
from triptych.diffusion.schedule import spaced_levels
from triptych.errors import ConfigError
from triptych.pipelines.diffusion import image_metadata
from triptych.pipelines.diffusion.hires import LATENT_MODES, hires_levels
from triptych.pipelines.diffusion.options import GenerationRecord, SamplingOptions
from triptych.pipelines.diffusion.pipeline import DiffusionPipeline

pytestmark = pytest.mark.proves(
    "Samplers", "second pass, variation seeds and clip skip of the web UI", by="formula"
)

PROMPT = "a red apple"


@pytest.fixture(scope="module")
def pipe(ldm):
    return DiffusionPipeline(ldm("text"), device="cpu", dtype="fp32")


def same(a, b) -> bool:
    return np.array_equal(np.asarray(a), np.asarray(b))


@pytest.mark.parametrize(
    ("steps", "hires_steps", "strength", "total"), [(20, None, 0.7, 28), (20, 10, 0.5, 20), (5, None, 1.0, 5)]
)
def test_the_levels_are_the_web_uis(steps, hires_steps, strength, total):
    """Its setup_img2img_steps: int(steps / min(strength, 0.999)) steps, of which the last `steps` are taken."""
    process = Process(ProcessConfig())
    record = GenerationRecord(num_steps=steps, hires_steps=hires_steps, hires_strength=strength)
    levels = hires_levels(process, record, "karras")
    num_taken = hires_steps or steps
    assert len(levels) == num_taken + 1
    assert levels == spaced_levels(process, total, "karras")[total - num_taken :]


@pytest.mark.parametrize("upscaler", LATENT_MODES)
def test_the_second_pass_written_out(pipe, upscaler):
    options = {"num_steps": 3, "guidance_scale": 1.0, "sampler": "euler", "schedule": "karras", "seed": 3}
    (image,) = pipe.text_to_image(
        PROMPT, hires_scale=1.5, hires_strength=0.6, hires_upscaler=upscaler, **options
    )
    assert image.size == (48, 48)
    net = pipe.net
    with torch.inference_mode():
        denoise = net.denoiser(net.text_encoder.encode_prompts([PROMPT]))
        x = seeded_noise([3], (4, 8, 8))
        for levels in (
            spaced_levels(net.process, 3, "karras"),
            spaced_levels(net.process, 5, "karras")[2:],  # int(3 / 0.6) = 5
        ):
            if levels[0].t < 999:
                mode, antialias = LATENT_MODES[upscaler]
                x = levels[0].noised(
                    F.interpolate(x, (12, 12), mode=mode, antialias=antialias), seeded_noise([3], (4, 12, 12))
                )
            *_, last = SAMPLERS["euler"](denoise, x, levels, noise=torch.zeros)
            x = last.x
        expected = pipe.model.codec.decode(x)
    # The pipeline packs weights, which sums in another order.
    assert np.abs(np.asarray(image).astype(int) - expected).max() <= 1


def test_the_second_pass_is_recorded_counted_and_read(pipe, tmp_path):
    options = {"num_steps": 2, "hires_scale": 1.5, "hires_steps": 3, "hires_upscaler": "lanczos", "seed": 5}
    steps, ticks = [], []
    (image,) = pipe.text_to_image(
        PROMPT,
        sampler="dpm++sde",
        preview=lambda preview: steps.append((preview.step, preview.num_steps, preview.latents.shape[-1])),
        progress=lambda done, total: ticks.append((done, total)),
        **options,
    )
    assert steps == [(1, 5, 8), (2, 5, 8), (3, 5, 12), (4, 5, 12), (5, 5, 12)]
    assert ticks[-1] == (5, 5)
    assert "Hires upscale: 1.5, Hires steps: 3, Hires upscaler: Lanczos" in image.info["parameters"]
    (path,) = pipe.save([image], tmp_path / "x.png")
    assert same(pipe.regenerate(path)[0], image)
    read = image_metadata.parse_parameters(image.info["parameters"])
    assert {name: getattr(read, name) for name in options} == options
    assert same(pipe.regenerate(read)[0], image)


def test_canceled_in_the_second_pass(pipe):
    calls = []
    (image,) = pipe.text_to_image(
        PROMPT, num_steps=2, hires_scale=1.5, cancel=lambda: calls.append(1) or len(calls) >= 3
    )
    assert image.info["stopped_at"] == 3
    assert image.size == (48, 48)


def test_images_are_independent_of_their_number(pipe):
    options = {"num_steps": 2, "hires_scale": 1.5, "sampler": "euler-ancestral", "deep_cache": 2}
    both = pipe.text_to_image(PROMPT, num_images=2, seed=7, **options)
    assert same(pipe.text_to_image(PROMPT, seed=8, **options)[0], both[1])


def test_variation(pipe):
    options = {"num_steps": 2, "seed": 3}
    latents = mix_noise(seeded_noise([3], (4, 8, 8)), seeded_noise([9], (4, 8, 8)), 0.25)
    images = pipe.text_to_image(PROMPT, variation_seed=8, variation_strength=0.25, num_images=2, **options)
    assert [(image.info["seed"], image.info["variation_seed"]) for image in images] == [(3, 8), (3, 9)]
    assert same(images[1], pipe.text_to_image(PROMPT, latents=latents, **options)[0])
    assert same(pipe.regenerate(image_metadata.parse_parameters(images[0].info["parameters"]))[0], images[0])
    assert same(
        pipe.text_to_image(PROMPT, variation_seed=8, **options)[0], pipe.text_to_image(PROMPT, **options)[0]
    )


def test_noise_of_a_gpu(pipe):
    options = {"num_steps": 2, "seed": 3, "sampler": "euler-ancestral"}
    (image,) = pipe.text_to_image(PROMPT, rng="cuda", **options)
    assert "RNG: NV" in image.info["parameters"]
    assert not same(image, pipe.text_to_image(PROMPT, **options)[0])
    assert same(pipe.regenerate(image_metadata.parse_parameters(image.info["parameters"]))[0], image)


def test_clip_skip(pipe):
    (image,) = pipe.text_to_image(PROMPT, num_steps=1, clip_skip=2)
    assert "Clip skip: 2" in image.info["parameters"]
    assert not same(image, pipe.text_to_image(PROMPT, num_steps=1)[0])
    assert same(
        pipe.text_to_image(PROMPT, num_steps=1, clip_skip=1)[0], pipe.text_to_image(PROMPT, num_steps=1)[0]
    )
    with pytest.raises(ConfigError, match="clip_skip is 3, which must be from 1 to 2"):
        pipe.text_to_image(PROMPT, num_steps=1, clip_skip=3)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"sampler": "euler_a"}, "near names: euler-ancestral$"),
        ({"sampler": "DPM++ 2M Karras"}, r"near names: dpm\+\+2m with the schedule karras$"),
        ({"sampler": "dpm++2n"}, "near names"),
        ({"schedule": "SGM Uniform"}, "near names: sgm-uniform$"),
        ({"schedule": "kerras"}, "near names: karras"),
        ({"hires_upscaler": "lanczoz"}, "near names: lanczos"),
        ({"hires_scale": 0.5}, "hires_scale is 0.5, which must be from 1"),
        ({"hires_strength": 0.0}, "hires_strength is 0.0"),
        ({"hires_steps": 0}, "hires_steps is 0"),
        ({"variation_strength": 2.0}, "variation_strength is 2.0"),
        ({"clip_skip": 0}, "clip_skip is 0"),
    ],
)
def test_what_cannot_be_is_one_line(options, message):
    with pytest.raises(ConfigError, match=message) as raised:
        SamplingOptions(**options)
    assert "\n" not in str(raised.value)


def test_a_second_pass_needs_plain_noise(pipe, ldm, photo):
    with pytest.raises(ConfigError, match="hires_scale is 2, which is for images made from noise alone"):
        pipe.image_to_image(PROMPT, photo(32, 32), hires_scale=2.0)
    classes = DiffusionPipeline(ldm("classes"), device="cpu", dtype="fp32")
    with pytest.raises(ConfigError, match="clip_skip is for models that read prompts"):
        classes.class_conditional(1, clip_skip=2)
    (image,) = classes.class_conditional(1, num_steps=1, hires_scale=2.0)
    assert image.size == (64, 64)
