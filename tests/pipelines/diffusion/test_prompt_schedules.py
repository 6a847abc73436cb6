"""Prompts that change and are composed, in a pipeline: as a sampler that is run step by step with plain prompts."""

import numpy as np
import pytest
import torch

from triptych.diffusion.guidance import composed
from triptych.diffusion.noise import seeded_noise
from triptych.diffusion.samplers import euler
from triptych.diffusion.schedule import from_strength, spaced_levels
from triptych.errors import TriptychError
from triptych.pipelines.diffusion.pipeline import DiffusionPipeline

CALL = {
    "num_steps": 4,
    "height": 16,
    "width": 16,
    "progress": False,
    "sampler": "euler",
    "schedule": "leading",
}
LONG = "a red apple on a table next to a green pear under a blue sky with white clouds and some birds in it"


@pytest.fixture(scope="module")
def pipe(ldm):
    return DiffusionPipeline(ldm("text"), dtype="fp32", low_memory=True, device="cpu")


def array(images):
    return np.asarray(images[0])


def last_x0(pipe, prompt, call=None, **options):
    """The latents that the last step predicts."""
    seen = []
    pipe.text_to_image(
        prompt, preview=lambda preview: seen.append(preview.latents), **{**CALL, **(call or {}), **options}
    )
    return seen[-1]


@torch.no_grad()
def stepwise(net, texts, scale, negative="", seed=0, weights=(1.0,)):
    """A slow twin: each step its own sampler, its own prompts, and a call of the network for each prompt."""
    x = seeded_noise([seed], (net.config.autoencoder.latent_channels, 4, 4))
    levels = spaced_levels(net.process, len(texts), "leading")
    for k, prompts in enumerate(texts):
        contexts = net.text_encoder.encode_prompts([*prompts, negative])

        def denoise(x, t, contexts=contexts):
            *each, uncond = (net.denoiser(context[None])(x, t) for context in contexts)
            return uncond + sum(w * scale * (x0 - uncond) for w, x0 in zip(weights, each, strict=True))

        (step,) = euler(denoise, x, levels[k : k + 2])
        x = step.x
    return step.x0


@pytest.mark.parametrize(
    ("prompt", "texts"),
    [
        ("a [red:green:0.5] apple", ["a red apple"] * 3 + ["a green apple"]),
        ("a [red::1] apple", ["a red apple"] * 2 + ["a  apple"] * 2),
        ("[red|green|blue] apple", ["red apple", "red apple", "green apple", "blue apple"]),
        (f"an apple[, {LONG}:0.25]", ["an apple"] * 2 + [f"an apple, {LONG}"] * 2),
    ],
)
def test_each_step_has_its_prompt(prompt, texts, ldm):
    pipe = DiffusionPipeline(ldm("text"), dtype="fp32", device="cpu")
    x0 = last_x0(pipe, prompt, guidance_scale=3.0, negative_prompt="a pear")
    expected = stepwise(ldm("text"), [[text] for text in texts], 3.0, "a pear")
    torch.testing.assert_close(x0, expected, atol=1e-4, rtol=1e-4)
    plain = last_x0(pipe, texts[0], guidance_scale=3.0, negative_prompt="a pear")
    assert not torch.allclose(x0, plain, atol=1e-3)


def test_the_negative_prompt_changes_too(ldm):
    pipe = DiffusionPipeline(ldm("text"), dtype="fp32", device="cpu")
    late = last_x0(pipe, "an apple", guidance_scale=3.0, negative_prompt="[a pear::10]")
    assert torch.equal(late, last_x0(pipe, "an apple", guidance_scale=3.0, negative_prompt="a pear"))
    early = last_x0(pipe, "an apple", guidance_scale=3.0, negative_prompt="[a pear::1]")
    assert not torch.allclose(late, early, atol=1e-3)


@pytest.mark.parametrize("scale", [1.0, 3.0])
def test_composed_prompts(scale, ldm):
    """eps = eps_uncond + sum of w_i s (eps_i - eps_uncond) (Liu et al. 2022, Equation 11), which x_0 shares."""
    pipe = DiffusionPipeline(ldm("text"), dtype="fp32", device="cpu")
    prompt = "a red apple :1.2 AND a [dog:cat:2] :-0.5 AND a tree"
    texts = [["a red apple", " a dog", " a tree"]] * 3 + [["a red apple", " a cat", " a tree"]]
    x0 = last_x0(pipe, prompt, guidance_scale=scale)
    expected = stepwise(ldm("text"), texts, scale, weights=(1.2, -0.5, 1.0))
    torch.testing.assert_close(x0, expected, atol=1e-4, rtol=1e-4)


def test_composition_by_hand():
    values = torch.tensor([1.0, 10.0, 100.0])  # two prompts and the negative one

    def denoise(x, t):
        return values[: len(x), None] * torch.ones_like(x)

    pair = composed(denoise, (2.0, -0.5))(torch.zeros(2, 1), torch.zeros(2))
    assert pair.flatten().tolist() == [100 + 2 * (1 - 100) - 0.5 * (10 - 100), 100]
    assert composed(denoise, (1.0,)) is denoise


def test_a_plain_prompt_is_not_touched_and_the_record_keeps_what_was_typed(pipe, ldm):
    prompt = "a [red:green:2] apple AND [a|b] :0.5"
    fresh = DiffusionPipeline(ldm("text"), dtype="fp32", device="cpu", low_memory=True)
    (image,) = fresh.text_to_image(prompt, guidance_scale=2.0, **CALL)
    assert image.info["prompt"] == prompt
    assert image.info["parameters"].startswith(prompt + "\n")
    assert np.array_equal(array(fresh.regenerate(image, progress=False)), np.asarray(image))
    plain = DiffusionPipeline(ldm("text"), dtype="fp32", device="cpu")
    for scale in (1.0, 2.0):
        switched = array(plain.text_to_image("[a pear:an apple:0]", guidance_scale=scale, **CALL))
        assert np.array_equal(switched, array(plain.text_to_image("an apple", guidance_scale=scale, **CALL)))


def test_images_of_a_batch_and_multistep_samplers(ldm):
    pipe = DiffusionPipeline(ldm("text"), dtype="fp32", device="cpu")
    call = CALL | {"sampler": "dpm++2m", "guidance_scale": 2.0}
    prompt = "a [red:green:0.5] apple AND a cat :0.3"
    together = pipe.text_to_image(prompt, num_images=3, batch_size=2, **call)
    for k, image in enumerate(together):
        (alone,) = pipe.text_to_image(prompt, seed=k, **call)
        assert np.abs(np.asarray(alone).astype(int) - np.asarray(image)).max() <= 1


def test_a_second_pass_goes_on_where_the_first_ended(ldm):
    pipe = DiffusionPipeline(ldm("text"), dtype="fp32", device="cpu")
    call = {**CALL, "guidance_scale": 3.0, "hires_scale": 1.5, "hires_steps": 4}
    plain = array(pipe.text_to_image("an apple", **call))
    late = array(pipe.text_to_image("[an apple:a pear:1.25]", **call))
    assert not np.array_equal(late, plain)
    assert np.array_equal(array(pipe.text_to_image("[an apple:a pear:5]", **call)), late)
    assert np.array_equal(array(pipe.text_to_image("[an apple:a pear:9]", **call)), plain)


def test_image_to_image_counts_the_full_steps(ldm, photo):
    """As in the web UI, whose steps of half a strength end before the middle of the schedule."""
    pipe = DiffusionPipeline(ldm("text"), dtype="fp32", device="cpu")
    call = {**CALL, "height": None, "width": None, "num_steps": 8, "guidance_scale": 2.0, "strength": 0.5}
    init = photo(16, 16)
    assert len(from_strength(spaced_levels(pipe.net.process, 8, "leading"), 0.5)) == 5
    first = array(pipe.image_to_image("[an apple:a pear:0.5]", init, **call))
    assert np.array_equal(first, array(pipe.image_to_image("an apple", init, **call)))
    second = array(pipe.image_to_image("[an apple:a pear:0.125]", init, **call))
    assert not np.array_equal(first, second)
    mask = np.zeros((16, 16), np.uint8)
    mask[4:12, 4:12] = 255
    generated = array(pipe.inpaint("[a|b] AND c", init, mask, **{**call, "strength": 1.0}))
    assert np.array_equal(generated[mask == 0], init[mask == 0])


@pytest.mark.parametrize(
    ("prompt", "options", "words"),
    [
        ("a {red|green} apple", {}, "variants are not chosen"),
        ("an apple", {"negative_prompt": "__bad__"}, "wildcards are not replaced"),
        ("an apple <hypernet:x:1>", {}, "hypernetworks cannot be loaded"),
        ("an apple AND a pear :20000", {}, "must be at most 10000"),
    ],
)
def test_refusals(pipe, prompt, options, words):
    with pytest.raises(TriptychError, match=words):
        pipe.text_to_image(prompt, **options, **CALL)
