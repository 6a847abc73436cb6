"""Every task of a latent diffusion model, with tiny random networks."""

import copy
import logging
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

from triptych.diffusion.config import ADAPTIVE_SAMPLERS, SAMPLERS
from triptych.errors import TriptychError
from triptych.layers.resnet import Conv
from triptych.pipelines.diffusion.latent_codec import LatentCodec
from triptych.pipelines.diffusion.options import GenerationRecord
from triptych.pipelines.diffusion.pipeline import DiffusionPipeline
from triptych.pipelines.diffusion.records import class_index

STOCHASTIC = ["ddpm", "euler-ancestral", "dpm++2m-sde", "lcm"]
PROMPT = "a (red:1.3) apple"


@pytest.fixture(scope="module")
def pipe(ldm):
    """Return the pipeline of a named model, built once."""
    pipelines = {}

    def get(name: str = "text") -> DiffusionPipeline:
        if name not in pipelines:
            pipelines[name] = DiffusionPipeline(ldm(name), device="cpu", dtype="fp32")
        return pipelines[name]

    return get


@pytest.fixture
def recorded(monkeypatch):
    """Record the batches that a pipeline's UNet is called with: (x, t, labels)."""

    def listen(pipe: DiffusionPipeline) -> list[tuple]:
        calls = []
        forward = pipe.net.network.forward

        def spy(x, t, context=None, labels=None):
            calls.append((x.clone(), t.clone(), labels))
            return forward(x, t, context, labels)

        monkeypatch.setattr(pipe.net.network, "forward", spy)
        return calls

    return listen


def arrays(images) -> np.ndarray:
    return np.stack([np.asarray(image) for image in images]).astype(int)


def same(a, b) -> bool:
    return np.array_equal(arrays(a), arrays(b))


# Seeds


@pytest.mark.parametrize("sampler", ["dpm++2m", *STOCHASTIC])
def test_each_image_depends_only_on_its_own_seed(pipe, sampler):
    paint, steps = pipe().text_to_image, 2
    together = paint(PROMPT, num_steps=steps, seed=7, num_images=4, sampler=sampler)
    alone = [paint(PROMPT, num_steps=steps, seed=7 + k, sampler=sampler)[0] for k in range(4)]
    assert same(together, alone)
    assert [image.info["seed"] for image in together] == [7, 8, 9, 10]
    assert len({image.tobytes() for image in together}) == 4
    for size in (3, 4):
        batched = paint(PROMPT, num_steps=steps, seed=7, num_images=4, sampler=sampler, batch_size=size)
        # Kernels that take more images at once may add in another order.
        assert np.abs(arrays(batched) - arrays(together)).max() <= 1


@pytest.mark.parametrize("sampler", ADAPTIVE_SAMPLERS)
def test_adaptive_samplers_generate_images_one_by_one(pipe, sampler):
    paint, ticks = pipe().text_to_image, []
    options = {"num_steps": 4, "sampler": sampler}
    batched = paint(
        PROMPT, seed=7, num_images=2, batch_size=2, progress=lambda *at: ticks.append(at), **options
    )
    alone = [paint(PROMPT, seed=seed, **options)[0] for seed in (7, 8)]
    assert same(batched, alone)
    assert ticks == [(done, 8) for done in range(1, 9)]  # however many calls the sampler needed


def test_latents_instead_of_the_seeds_noise(pipe):
    paint = pipe().text_to_image
    noise = torch.randn(4, 8, 8, generator=torch.Generator().manual_seed(9))[None]
    assert same(paint(PROMPT, num_steps=2, seed=9), paint(PROMPT, num_steps=2, latents=noise))
    two = torch.cat([noise, noise.roll(1, -1)])
    assert same(
        paint(PROMPT, num_steps=2, latents=two, num_images=2)[1:],
        paint(PROMPT, num_steps=2, latents=two[1:]),
    )
    wide = torch.randn(1, 4, 6, 10)
    assert paint(PROMPT, num_steps=1, latents=wide)[0].size == (40, 24)


# Text to image


@pytest.mark.parametrize("name", ["text", "text-v"])
@pytest.mark.parametrize("sampler", SAMPLERS)
def test_every_sampler_at_any_size(pipe, name, sampler):
    (image,) = pipe(name).text_to_image(PROMPT, num_steps=2, sampler=sampler, height=20, width=36)
    assert image.size == (36, 20)
    assert image.mode == "RGB"
    assert 5 < arrays([image]).std() < 128
    assert image.info["sampler"] == sampler
    assert image.info["schedule"]


@pytest.mark.parametrize("guidance", [1.0, 4.0])
def test_prompts_in_one_batch_give_the_same_images_as_one_by_one(pipe, guidance):
    prompts = ["a red apple", "an owl", PROMPT, "an owl"]
    look = {"num_steps": 2, "guidance_scale": guidance, "negative_prompt": "gray"}
    alone = [pipe().text_to_image(p, seed=3 + i, **look)[0] for i, p in enumerate(prompts)]
    each = [GenerationRecord(prompt=p, seed=3 + i, **look) for i, p in enumerate(prompts)]
    assert same(pipe().generate(each), alone)
    for size in (2, 3):
        assert np.abs(arrays(pipe().generate(each, batch_size=size)) - arrays(alone)).max() <= 1
    assert [image.info["prompt"] for image in pipe().generate(each, batch_size=2)] == prompts
    long = replace(each[0], prompt="owl " * 80)
    assert pipe().net.text_encoder.chunks(long.prompt) == 2
    with pytest.raises(TriptychError, match="different numbers of chunks"):
        pipe().generate([*each, long])


def test_one_call_of_the_network_a_step(pipe, recorded):
    calls = recorded(pipe())
    pipe().text_to_image(PROMPT, num_steps=3, num_images=2, batch_size=2)
    assert [len(x) for x, _, _ in calls] == [4] * 3
    calls.clear()
    pipe().text_to_image(PROMPT, num_steps=3, guidance_scale=1)
    assert [len(x) for x, _, _ in calls] == [1] * 3
    calls.clear()
    pipe().text_to_image(
        PROMPT, num_steps=8, guidance_interval=(0.3, 3.0), sampler="euler", schedule="karras"
    )
    batches = [len(x) for x, _, _ in calls]
    assert batches[0] == batches[-1] == 1
    assert 2 in batches


def test_guidance_and_its_corrections(pipe):
    def paint(**options):
        return arrays(pipe().text_to_image(PROMPT, "blurry", num_steps=3, sampler="euler", **options))

    plain, alone = paint(), paint(guidance_scale=1)
    assert not np.array_equal(plain, alone)
    assert np.array_equal(paint(guidance_interval=(0.0, 1e9)), plain)
    assert np.array_equal(paint(guidance_interval=(1e8, 1e9)), alone)
    assert np.array_equal(paint(guidance_rescale=0.0, apg=None), plain)
    assert np.abs(paint(apg={"eta": 1.0}) - plain).max() <= 1  # keeping the parallel part is plain guidance
    assert np.abs(paint(apg=True) - plain).max() > 1
    assert np.abs(paint(guidance_rescale=0.7) - plain).max() > 1


def test_every_part_of_the_prompt_matters(pipe):
    def paint(*texts):
        return arrays(pipe().text_to_image(*texts, num_steps=2))

    seen = [
        paint(PROMPT),
        paint("a red apple"),
        paint(""),
        paint(PROMPT, "blurry"),
        paint(PROMPT + " BREAK x"),
    ]
    for i, image in enumerate(seen):
        assert not any(np.array_equal(image, other) for other in seen[:i])


def test_a_prompt_of_5000_words(pipe):
    prompt = " ".join(["red", "apple"] * 2500)
    (image,) = pipe().text_to_image(prompt, "blurry", num_steps=1)
    assert image.info["prompt"] == prompt


# From an image


def test_image_to_image(pipe, photo, recorded):
    init_image = photo()
    back = pipe().image_to_image(PROMPT, init_image, strength=0)
    with torch.no_grad():
        x = torch.from_numpy(init_image).permute(2, 0, 1)[None] / 127.5 - 1
        net = pipe().net.autoencoder
        expected = (net.decode(net.encode(x)) * 127.5 + 127.5).clamp(0, 255).round()[0].permute(1, 2, 0)
    assert np.abs(arrays(back)[0] - expected.numpy()).max() <= 1
    calls = recorded(pipe())
    some = pipe().image_to_image(PROMPT, init_image, strength=0.5, num_steps=4)
    assert len(calls) == 2
    most = pipe().image_to_image(PROMPT, init_image, strength=1.0, num_steps=4)
    assert len(calls) == 6
    assert np.abs(arrays(some) - arrays(back)).mean() < np.abs(arrays(most) - arrays(back)).mean()


def test_image_to_image_keeps_any_size(pipe, photo):
    (image,) = pipe().image_to_image(PROMPT, photo(27, 41), num_steps=2)
    assert image.size == (41, 27)
    assert (image.info["height"], image.info["width"]) == (28, 44)  # what was sampled
    (image,) = pipe().image_to_image(PROMPT, Image.fromarray(photo(27, 41)), num_steps=2, height=24, width=24)
    assert image.size == (24, 24)


def test_an_image_far_larger_than_the_training_size_is_reported(pipe, photo, caplog):
    pipe().image_to_image(PROMPT, photo(72, 96), strength=0)
    assert "its own 96x72 pixels, but the model was trained on 32x32" in caplog.text
    caplog.clear()
    pipe().image_to_image(PROMPT, photo(72, 96), strength=0, height=72, width=96)
    assert not caplog.records


@pytest.mark.parametrize("name", ["text", "inpaint", "ldm-inpaint"])
@pytest.mark.parametrize(
    "options",
    [{}, {"strength": 0.5}, {"mask_feather": 4.0}, {"height": 24, "width": 36}],
    ids=lambda options: "".join(options) or "plain",
)
def test_outside_the_mask_nothing_changes(pipe, name, options, photo, blob):
    init_image, mask = photo(33, 45), blob(33, 45)
    prompt = "" if name == "ldm-inpaint" else PROMPT
    (image,) = pipe(name).inpaint(prompt, init_image, mask, num_steps=2, **options)
    got = np.asarray(image)
    assert got.shape == init_image.shape
    assert np.array_equal(got[mask == 0], init_image[mask == 0])
    assert (got[mask > 0] != init_image[mask > 0]).any(axis=1).mean() > 0.8


def test_a_feathered_mask_rises_from_its_edge(pipe, photo, blob):
    init_image, mask = photo(64, 64), blob(64, 64)
    hard, soft = (
        arrays(pipe().inpaint(PROMPT, init_image, mask, num_steps=1, mask_feather=feather))[0]
        for feather in (0, 6)
    )
    hard_change = np.abs(hard - init_image).sum(axis=2)
    soft_change = np.abs(soft - init_image).sum(axis=2)
    center = (28, 38)
    assert soft_change[center] >= 0.95 * hard_change[center]
    edge = (mask > 0) & ~np.asarray(np.roll(mask, 2, 0) * np.roll(mask, -2, 0) > 0)
    assert soft_change[edge].mean() < 0.6 * hard_change[edge].mean()


def test_a_thin_mask_is_inpainted(pipe, photo):
    """A line that lies between the pixels sampled for the latent grid."""
    mask = np.zeros((32, 32), np.uint8)
    mask[14] = 255
    (image,) = pipe().inpaint(PROMPT, photo(), mask, num_steps=2)
    assert (np.asarray(image)[14] != photo()[14]).mean() > 0.5


def test_the_inputs_of_an_inpainting_network(pipe, photo, recorded):
    """Stable Diffusion: mask of 0 and 1, then the image with a gray hole. Paper: black hole, then mask of -1 and 1."""
    init_image = photo()
    mask = np.zeros((32, 32), np.uint8)
    mask[8:24, 4:20] = 255
    cells = torch.zeros(1, 1, 8, 8)
    cells[:, :, 2:6, 1:5] = 1
    x = torch.from_numpy(init_image).permute(2, 0, 1)[None] / 127.5 - 1
    for name, hole, channels in (("inpaint", 0.0, 4), ("ldm-inpaint", -1.0, 3)):
        calls = recorded(pipe(name))
        pipe(name).inpaint("", init_image, mask, num_steps=1, num_images=2, batch_size=2)
        ((seen, _, _),) = calls
        holed = x.clone()
        holed[:, :, 8:24, 4:20] = hole
        with torch.no_grad():
            left = pipe(name).net.autoencoder.encode(holed)
        extra = torch.cat([cells, left] if name == "inpaint" else [left, 2 * cells - 1], dim=1)
        assert len(seen) == (4 if name == "inpaint" else 2)
        for sample in seen:
            torch.testing.assert_close(sample[channels:], extra[0], atol=1e-5, rtol=1e-5)


def test_depth(pipe, photo, recorded):
    calls = recorded(pipe("depth"))
    ramp = np.tile(np.arange(0, 64, 2, dtype=np.uint8), (32, 1))
    pipe("depth").text_to_image(PROMPT, num_steps=1, depth_map=ramp)
    pipe("depth").image_to_image(PROMPT, photo(), depth_map=ramp, num_steps=1, strength=1)
    for seen, _, _ in calls:
        assert seen[0, 4].min() == -1
        assert seen[0, 4].max() == 1
        assert (seen[0, 4].diff(dim=1) > 0).all()


def test_upscale(pipe, photo, recorded):
    calls = recorded(pipe("upscaler"))
    small = photo(7, 9)
    images = pipe("upscaler").upscale(PROMPT, small, noise_level=30, num_steps=1, seed=3, num_images=2)
    assert images[0].size == (36, 28)
    assert images[0].info["guidance_scale"] == 9
    x = torch.from_numpy(small).permute(2, 0, 1) / 127.5 - 1
    shown = [seen[0, 4:] for seen, _, _ in calls]
    for seen, _, labels in calls:
        assert labels.tolist() == [30, 30]
        assert torch.equal(seen[0, 4:], seen[1, 4:])  # the same noise for prompt and negative prompt
    assert not torch.equal(*shown)  # but another for each image
    assert 0.05 < (shown[0] - x).std() < 0.5
    again = pipe("upscaler").upscale(PROMPT, small, noise_level=30, num_steps=1, seed=4)
    assert same(again, images[1:])
    with pytest.raises(TriptychError, match="noise_level is 50, which must be from 0 to 49"):
        pipe("upscaler").upscale(PROMPT, small, noise_level=50)


def test_upscale_without_words_or_noise(pipe, photo, recorded):
    calls = recorded(pipe("sr"))
    (image,) = pipe("sr").upscale("", photo(8, 8), num_steps=2)
    assert image.size == (32, 32)
    x = torch.from_numpy(photo(8, 8)).permute(2, 0, 1) / 127.5 - 1
    torch.testing.assert_close(calls[0][0][0, 3:], x)


# Without a prompt


def test_unconditional(pipe):
    images = pipe("unconditional").unconditional(num_steps=2, num_images=2)
    assert not same(images[:1], images[1:])
    assert images[0].info["guidance_scale"] == 1
    over = pipe("unconditional").image_to_image("", images[0], num_steps=2)
    assert over[0].size == images[0].size


def test_classes(ldm, recorded):
    net = copy.copy(ldm("classes"))
    net.card = replace(net.card, classes=("tabby, tabby cat", "lynx", "owl"))
    pipe = DiffusionPipeline(net, device="cpu", dtype="fp32")
    paint = pipe.class_conditional
    images = paint(["tabby cat", 1, "2"], num_steps=2, num_images=2, seed=5)
    assert [image.info["label"] for image in images] == [0, 0, 1, 1, 2, 2]
    assert [image.info["seed"] for image in images] == list(range(5, 11))
    assert images[2].info["class_name"] == "lynx"
    assert images[2].info["parameters"].startswith("lynx\nSteps: 2,")
    assert same(paint("Lynx", num_steps=2, seed=7), images[2:3])
    batched = paint([0, 1, 2], num_steps=2, num_images=2, seed=5, batch_size=4)
    assert np.abs(arrays(batched) - arrays(images)).max() <= 1
    calls = recorded(pipe)
    paint(0, num_steps=1)
    paint(0, num_steps=1, guidance_scale=1)
    assert [len(x) for x, _, _ in calls] == [2, 1]
    for wrong, message in (
        ("tabbi", "near names: tabby"),
        (3, "class 3 is not from 0 to 2"),
        ([], "name at least one class"),
    ):
        with pytest.raises(TriptychError, match=message):
            paint(wrong)


def test_classes_that_know_no_class_cannot_be_guided(pipe, recorded):
    calls = recorded(pipe("classes-without-null"))
    (image,) = pipe("classes-without-null").class_conditional(0, num_steps=1)
    assert len(calls[0][0]) == 1
    assert image.info["guidance_scale"] == 1
    with pytest.raises(TriptychError, match="nothing to guide away from"):
        pipe("classes-without-null").class_conditional(0, guidance_scale=2.0)


def test_classes_by_their_names():
    names = ["tabby, tabby cat", "tiger cat", "7"]
    assert [class_index(name, names, 9) for name in ("tabby", "TABBY CAT", "tiger cat ", "7", "8")] == [
        0,
        0,
        1,
        2,
        8,
    ]


# Tiling, overflow, previews, memory


def test_seamless(pipe):
    """Rolling the noise along a seamless side rolls the image; along another side it does not."""
    noise = torch.randn(1, 4, 8, 8)
    for tiling in ("", "x", "y", (True, True)):
        paint = [
            arrays(pipe().text_to_image(PROMPT, num_steps=2, latents=noise_in, tiling=tiling))[0]
            for noise_in in (noise, noise.roll(2, -1), noise.roll(2, -2))
        ]
        joined = [
            np.abs(np.roll(paint[0], 8, axis) - rolled).max() <= 2
            for axis, rolled in ((1, paint[1]), (0, paint[2]))
        ]
        assert joined == [tiling in ("x", (True, True)), tiling in ("y", (True, True))]
    plain = pipe().text_to_image(PROMPT, num_steps=2, latents=noise)
    assert same(
        plain, pipe().text_to_image(PROMPT, num_steps=2, latents=noise)
    )  # tiling leaves nothing behind


def test_tiles(pipe, monkeypatch):
    from triptych.models.autoencoder import FirstStage

    untiled = pipe().text_to_image(PROMPT, num_steps=1, height=40, width=48)
    sizes = []
    decode = FirstStage.decode_tiled
    monkeypatch.setattr(
        FirstStage, "decode_tiled", lambda net, z: sizes.append(z.shape) or decode(net, z, tile=8, overlap=4)
    )
    tiled = pipe().text_to_image(PROMPT, num_steps=1, height=40, width=48, tiled_decode=True)
    assert sizes == [(1, 4, 10, 12)]
    assert tiled[0].size == untiled[0].size
    monkeypatch.setattr("triptych.pipelines.diffusion.latent_codec.TILED_FROM", 40 * 48 - 1)
    assert same(pipe().text_to_image(PROMPT, num_steps=1, height=40, width=48), tiled)
    assert same(pipe().text_to_image(PROMPT, num_steps=1, height=40, width=48, tiled_decode=False), untiled)


def test_a_decoder_that_overflows_is_run_again_in_fp32(ldm, caplog):
    net = copy.deepcopy(ldm("unconditional"))
    net.autoencoder.post_quant.weight *= 1e3  # beyond fp16's 65504; the norms remove the factor
    net.autoencoder.decoder.conv_in.weight *= 1e3
    paint = DiffusionPipeline(net, device="cpu", dtype="fp16").unconditional
    with caplog.at_level(logging.WARNING):
        images = paint(num_steps=1, num_images=2)
    assert [r.message for r in caplog.records] == ["the decoder overflows in float16; decoding in fp32"]
    exact = DiffusionPipeline(net, device="cpu", dtype="fp32").unconditional(num_steps=1, num_images=2)
    assert np.abs(arrays(images) - arrays(exact)).mean() < 3


def test_after_an_overflow_the_next_image_is_unchanged(ldm, monkeypatch):
    """An overflow in one image or preview must not change how the others are decoded."""
    paint = DiffusionPipeline(ldm("unconditional"), device="cpu", dtype="bf16").unconditional
    alone = paint(num_steps=1, seed=1)
    decode, calls = LatentCodec._decode, []

    def overflows_once(self, net, *options):
        decoded = decode(self, net, *options)
        calls.append(next(net.parameters()).dtype)
        return decoded * float("nan") if len(calls) == 1 else decoded

    monkeypatch.setattr(LatentCodec, "_decode", overflows_once)
    paint = DiffusionPipeline(ldm("unconditional"), device="cpu", dtype="bf16").unconditional
    assert same(paint(num_steps=1, seed=0, num_images=2)[1:], alone)
    assert calls == [torch.bfloat16, torch.float32, torch.bfloat16]


@pytest.mark.parametrize(
    ("part", "message"),
    [
        ("autoencoder.decoder.conv_out", "decoder gives NaN in fp32 too"),
        ("network.out", "seed 3 became NaN in fp32: lower guidance_scale"),
    ],
)
def test_damaged_weights_are_named(ldm, part, message):
    net = copy.deepcopy(ldm("unconditional"))
    net.get_submodule(part).weight[0, 0, 0, 0] = float("nan")
    with pytest.raises(TriptychError, match=message):
        DiffusionPipeline(net, device="cpu", dtype="fp32").unconditional(num_steps=1, seed=3)


def test_latents_that_no_decoder_can_take_are_not_its_fault(pipe):
    with pytest.raises(
        TriptychError, match=r"NaN in fp32 too: the latents reach 1e\+30; lower guidance_scale"
    ):
        pipe().model.codec.decode(torch.full((1, 4, 4, 4), 1e30))


def test_progress_and_preview(pipe):
    ticks, seen, finished = [], [], []

    def look(preview):
        (small,) = preview.images(16)
        (full_size,) = preview.images(None)
        seen.append((preview.step, preview.num_steps, preview.seeds, small.size, full_size.size))

    looked_at = {"progress": lambda *at: ticks.append(at), "preview": look, "on_image": finished.append}
    images = pipe().text_to_image(PROMPT, num_steps=2, num_images=2, seed=4, height=24, width=32, **looked_at)
    assert [id(image) for image in finished] == [id(image) for image in images]
    assert ticks == [(1, 4), (2, 4), (3, 4), (4, 4)]
    assert seen == [(i, 2, [seed], (16, 12), (32, 24)) for seed in (4, 5) for i in (1, 2)]


def test_previews_change_nothing_and_the_last_is_the_image(pipe):
    previews = []
    images = pipe().text_to_image(
        PROMPT, num_steps=3, preview=lambda preview: previews.append(preview.images(None))
    )
    assert same(images, pipe().text_to_image(PROMPT, num_steps=3))
    assert same(previews[-1], images)  # dpm++2m's last step goes to the network's x0


def test_cancelled_at_a_step(pipe):
    done, previews = [], []

    def paint(stop_after):
        done.clear()
        previews.clear()
        return pipe().text_to_image(
            PROMPT,
            num_steps=4,
            num_images=3,
            progress=lambda *at: done.append(at),
            preview=lambda preview: previews.append(preview.images(None)),
            cancel=lambda: len(done) >= stop_after,
        )

    images = paint(2)
    assert len(done) == 2
    assert images[0].info["stopped_at"] == 2
    assert same(images, previews[1])  # the preview of that step
    images = paint(6)
    assert [image.info["stopped_at"] for image in images] == [None, 2]
    images = paint(4)  # just as the first image is done
    assert [image.info["stopped_at"] for image in images] == [None]


def test_low_memory(ldm):
    pipe = DiffusionPipeline(ldm("text"), device="cpu", dtype="fp32", low_memory=True)
    first = pipe.text_to_image(PROMPT, num_steps=1)
    assert pipe.net.text_encoder is None
    assert ldm("text").text_encoder is not None
    assert same(first, pipe.text_to_image(PROMPT, num_steps=1))
    with pytest.raises(TriptychError, match="low_memory=True"):
        pipe.text_to_image("another", num_steps=1)


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_weights_are_packed_only_while_sampling(ldm, dtype):
    """Packed or not, the image is the same up to rounding."""
    net, seen = ldm("text"), []

    def packed(pipe):
        return [part.packed for part in pipe.net.modules() if isinstance(part, Conv)]

    results = []
    for low_memory in (False, True):
        pipe = DiffusionPipeline(net, device="cpu", dtype=dtype, low_memory=low_memory)
        results.append(
            pipe.text_to_image(PROMPT, num_steps=2, preview=lambda _, pipe=pipe: seen.append(packed(pipe)))
        )
        assert packed(pipe) == [None] * len(packed(pipe))
    unet = sum(isinstance(part, Conv) for part in net.network.modules())
    assert [sum(weight is not None for weight in step) for step in seen] == [unet, unet, 0, 0]
    most = {"fp32": 1, "bf16": 24}[dtype]
    assert np.abs(arrays(results[0]).astype(int) - arrays(results[1]).astype(int)).max() <= most


def test_halves(ldm, pipe):
    images = DiffusionPipeline(ldm("text"), device="cpu", dtype="bf16").text_to_image(
        PROMPT, num_steps=2, guidance_scale=2
    )
    exact = pipe().text_to_image(PROMPT, num_steps=2, guidance_scale=2)
    assert images[0].info["dtype"] == "bf16"
    assert np.abs(arrays(images) - arrays(exact)).mean() < 8


def test_a_map_of_classes(pipe, recorded, tmp_path):
    semantic = pipe("semantic")
    calls = recorded(semantic)
    classes = np.zeros((24, 32), np.uint8)
    classes[:, 12:] = 3
    classes[0, 0] = 255
    call = {"num_steps": 2, "seed": 4}
    (images,) = semantic.semantic(classes, **call)
    assert images.size == (32, 24)
    expected = semantic.net.semantic_map(torch.from_numpy(classes)[None], 4)
    assert torch.equal(calls[0][0][:, 3:], expected)
    assert not same([images], semantic.semantic(np.zeros_like(classes), **call))
    gray = Image.fromarray(classes)
    gray.save(tmp_path / "map.png")
    (from_file,) = semantic.semantic(tmp_path / "map.png", **call)
    assert same([from_file], [images])
    assert same([images], semantic.semantic(gray, **call))
    assert same([images], semantic.regenerate(from_file))
    assert from_file.info["class_map"] == str(tmp_path / "map.png")
    assert semantic.semantic(classes, height=16, width=16, **call)[0].size == (16, 16)


def test_boxes(pipe):
    layout = pipe("layout")
    boxes = [(7, 0, 0, 0.5, 1), (2, 0.25, 0.25, 1.0, 0.75)]
    image = layout.layout(boxes, num_steps=2, seed=4, height=32, width=32)
    assert not same(image, layout.layout(boxes[:1], num_steps=2, seed=4, height=32, width=32))
    assert same(image, layout.regenerate(image[0]))
    assert image[0].info["boxes"] == [[7, 0.0, 0.0, 0.5, 1.0], [2, 0.25, 0.25, 1.0, 0.75]]
    assert image[0].info["guidance_scale"] == 1
    assert layout.layout([], num_steps=1, height=16, width=16)[0].size == (16, 16)


# Mistakes


@pytest.mark.parametrize(
    ("name", "call", "message"),
    [
        ("text", lambda p, _: p.text_to_image("x", sampler="euler a"), "near names: euler"),
        ("text", lambda p, _: p.text_to_image("x", schedule="karas"), "near names: karras"),
        ("text", lambda p, _: p.text_to_image("x", height=30, width=32), "multiples of 4, such as 32x32"),
        (
            "text",
            lambda p, _: p.text_to_image("x", height=0, width=32),
            "height is 0, which must be a positive number",
        ),
        ("text", lambda p, _: p.text_to_image("x", num_steps=0), "num_steps is 0"),
        ("text", lambda p, _: p.text_to_image("x", num_steps=-5), "num_steps is -5"),
        ("text", lambda p, _: p.text_to_image("x", num_steps=2000), "from 1 to 999"),
        ("text", lambda p, _: p.text_to_image("x", num_steps=2.5), "GenerationRecord.num_steps is 2.5"),
        ("text", lambda p, _: p.text_to_image("x", guidance_scale=float("nan")), "guidance_scale is nan"),
        ("text", lambda p, _: p.text_to_image("x", seed=-1), "seed is -1"),
        ("text", lambda p, _: p.text_to_image("x", num_images=0), "num_images is 0"),
        ("text", lambda p, _: p.text_to_image("x", batch_size=0), "batch_size is 0"),
        ("text", lambda p, _: p.text_to_image("x", guidance_rescale=2), "guidance_rescale is 2"),
        ("text", lambda p, _: p.text_to_image("x", guidance_rescale=0.5, apg=True), "give one of the two"),
        ("text", lambda p, _: p.text_to_image("x", guidance_interval=(3, 1)), "two rising values"),
        ("text", lambda p, _: p.text_to_image("x", apg={"beta": 1}), "eta, threshold, momentum"),
        ("text", lambda p, _: p.text_to_image("x", tiling="z"), "tiling is 'z'"),
        ("text", lambda p, _: p.text_to_image("x", latents=torch.zeros(2, 4, 8, 8)), "(1 or 1, 4,"),
        ("text", lambda p, _: p.text_to_image(["x"]), "prompt is ['x']"),
        ("text", lambda p, _: p.text_to_image("a \udcff"), "prompt holds bytes that are not UTF-8 text"),
        ("text", lambda p, _: p.text_to_image("a", "\ud83c"), "negative_prompt holds bytes"),
        ("text", lambda p, _: p.text_to_image("a <lora:water:1>"), "no LoRA is called 'water'"),
        ("text", lambda p, _: p.text_to_image("(a:99999)"), "which must be at most 10000"),
        ("text", lambda p, i: p.image_to_image("x", i, strength=1.5), "strength is 1.5"),
        ("text", lambda p, i: p.inpaint("x", i, i[:8]), "make the mask as large as the image"),
        ("text", lambda p, i: p.inpaint("x", i, None), "needs mask_image (--mask-image)"),
        ("text", lambda p, i: p.inpaint("x", "none.png", i), "none.png does not exist"),
        (
            "text",
            lambda p, i: p.text_to_image("x", depth_map=i),
            "does not use depth_map; leave depth_map (--depth-map) out",
        ),
        (
            "text",
            lambda p, i: p.upscale("x", i),
            "takes no spatial condition: it does text_to_image, image_to_image, inpaint, not upscale",
        ),
        ("text", lambda p, _: p.unconditional(), "reads prompts"),
        ("text", lambda p, _: p.class_conditional(1), "reads prompts"),
        (
            "inpaint",
            lambda p, _: p.text_to_image("x"),
            "is made to inpaint: it does inpaint, not text_to_image",
        ),
        ("upscaler", lambda p, i: p.image_to_image("x", i), "made to upscale"),
        ("depth", lambda p, _: p.text_to_image("x"), "needs depth_map"),
        ("classes", lambda p, _: p.text_to_image("x"), "takes a class, not a prompt"),
        ("classes", lambda p, i: p.image_to_image("x", i), "takes a class, not a prompt"),
        ("unconditional", lambda p, _: p.text_to_image("x"), "takes neither prompt nor class"),
        ("unconditional", lambda p, _: p.class_conditional(1), "takes neither prompt nor class"),
        ("ldm-inpaint", lambda p, i: p.inpaint("x", i, i), "takes neither prompt nor class"),
        (
            "unconditional",
            lambda p, i: p.image_to_image("", i, guidance_scale=3),
            "nothing to guide away",
        ),
        ("unconditional", lambda p, i: p.semantic(i), "it does unconditional, image_to_image, inpaint"),
        ("text", lambda p, _: p.layout([]), "takes no boxes"),
        ("semantic", lambda p, _: p.text_to_image("x"), "takes neither prompt nor class"),
        ("semantic", lambda p, _: p.unconditional(), "takes a map of classes: it does semantic"),
        ("semantic", lambda p, i: p.semantic(i), "holds no map"),
        (
            "semantic",
            lambda p, i: p.semantic(np.full((8, 8), 5)),
            "holds 5, which must be a class from 0 to 4",
        ),
        ("semantic", lambda p, i: p.semantic(np.zeros((9, 8), int)), "the class map is 8x9"),
        ("semantic", lambda p, i: p.semantic("none.png"), "none.png does not exist"),
        ("layout", lambda p, _: p.text_to_image("x"), "takes boxes, not a prompt"),
        ("layout", lambda p, _: p.layout([(99, 0, 0, 1, 1)]), "class 99"),
        ("layout", lambda p, _: p.layout([(1, 0, 0, 1)]), "GenerationRecord.boxes[0] has 4 values"),
    ],
)
def test_mistakes_are_reported_in_one_line(pipe, photo, name, call, message):
    with pytest.raises(TriptychError) as caught:
        call(pipe(name), photo())
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_wrong_argument_is_a_type_error(pipe):
    with pytest.raises(TypeError, match="did you mean 'guidance_rescale'"):
        pipe().text_to_image("x", guidance_rescal=0.7)


def test_a_network_that_generates_no_images_is_refused():
    with pytest.raises(TriptychError, match="Linear, which generates no images"):
        DiffusionPipeline(torch.nn.Linear(1, 1))
