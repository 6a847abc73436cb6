"""The second stage: what is trained, exact resume on latents and on images, conditions, invalid input."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image
from tests.training.interrupted_runs import interrupt_after, last_checkpoint, log_rows

import triptych as tp
from triptych.data.config import DataConfig
from triptych.data.images import decode
from triptych.diffusion.config import NoiseConfig, ProcessConfig
from triptych.errors import TriptychError
from triptych.training import run
from triptych.training.configs.base import LoopConfig, OptimConfig
from triptych.training.configs.second_stage import (
    FLIP_ONLY,
    CaptionConfig,
    LatentCacheConfig,
    SamplesConfig,
    SecondStageConfig,
)
from triptych.training.runner import prepare

COLORS = {"red": (220, 30, 30), "green": (30, 180, 40), "blue": (40, 50, 220), "yellow": (230, 210, 40)}
TINY = (
    "base_channels=8",
    "channel_multipliers=[1,2]",
    "num_res_blocks=1",
    "attention_downsample_factors=[2]",
    "norm_groups=4",
    "head_dim=8",
)


@pytest.fixture(scope="session")
def captioned(tmp_path_factory):
    """Squares of four colors in class folders, with captions in text files, some of them unusual."""
    folder = tmp_path_factory.mktemp("captioned")
    rng = np.random.default_rng(0)
    for name, color in COLORS.items():
        (folder / name).mkdir()
        for i in range(6):
            pixels = np.clip(np.array(color) + rng.normal(0, 8, (16, 16, 3)), 0, 255).astype(np.uint8)
            Image.fromarray(pixels).save(folder / name / f"{i}.png")
            (folder / name / f"{i}.txt").write_text(f"a {name} square\nthe color {name}\n")
    (folder / "red" / "0.txt").write_text("")
    (folder / "red" / "1.txt").write_text("a red square " * 1000)
    (folder / "red" / "2.txt").write_text("赤い四角 مربع أحمر 🟥")
    return folder


@pytest.fixture(scope="session")
def shapes(tmp_path_factory):
    """Two classes of images of three shapes."""
    folder = tmp_path_factory.mktemp("shapes")
    rng = np.random.default_rng(0)
    for name in ("left", "right"):
        (folder / name).mkdir()
        for i, size in enumerate([(16, 16), (12, 24), (24, 12)] * 4):
            pixels = rng.integers(0, 256, (*size, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(folder / name / f"{i}.png")
    return folder


@pytest.fixture(scope="session")
def first_stage(tmp_path_factory):
    torch.manual_seed(0)
    small = {
        "base_channels": 8,
        "channel_multipliers": (1, 2),
        "num_res_blocks": 1,
        "norm_groups": 4,
        "middle_attention": False,
    }
    net = tp.create("kl-f8", image_size=16, latent_channels=2, scale=2.0, **small)
    path = tmp_path_factory.mktemp("stage") / "tiny.safetensors"
    tp.save(net, path)
    return path


@pytest.fixture
def config(captioned, first_stage):
    return SecondStageConfig(
        data=str(captioned),
        first_stage=str(first_stage),
        condition="text",
        model="unet-emoji",
        model_args=TINY,
        text=CaptionConfig(vocabulary=300, embed_dim=16, depth=1, head_dim=8, max_length=12),
        process=ProcessConfig(prediction="v"),
        noise=NoiseConfig(min_snr=5.0, offset=0.1),
        drop_condition=0.2,
        samples=SamplesConfig(num_images=2, num_steps=2),
        loading=DataConfig(batch_size=8, workers=0, eval_fraction=0.2),
        optim=OptimConfig(lr=2e-3),
        loop=LoopConfig(epochs=2, ema=0.9, precision="fp32", device="cpu"),
    )


def with_cache(config, use):
    return replace(config, cache=replace(config.cache, use=use))


@pytest.mark.parametrize(
    ("condition", "use", "buckets"),
    [("text", "on", 1), ("text", "off", 1), ("class", "on", 3), ("none", "off", 3)],
)
def test_a_run_cut_off_and_repeated_is_the_unbroken_run_bit_for_bit(
    config, shapes, tmp_path, monkeypatch, condition, use, buckets
):
    config = replace(with_cache(config, use), condition=condition, buckets=buckets)
    if buckets > 1:
        config = replace(config, data=str(shapes))
    run(config, tmp_path / "whole")
    with monkeypatch.context() as patch:
        interrupt_after(patch, 3)
        assert not run(config, tmp_path / "cut").finished
    assert run(config, tmp_path / "cut").finished
    (one, _), (other, _) = last_checkpoint(tmp_path / "whole"), last_checkpoint(tmp_path / "cut")
    assert one.keys() == other.keys()
    assert [name for name in one if not torch.equal(one[name], other[name])] == []
    assert not [name for name in one if "autoencoder" in name]


def test_a_batch_is_of_one_bucket(config, shapes):
    config = replace(config, data=str(shapes), condition="class", buckets=3)
    for use, name, wanted in (("on", "mean", (8, 6, 11)), ("off", "image", (16, 12, 22))):
        square, short, long = wanted
        loader = prepare(with_cache(config, use)).train_loader
        seen = {tuple(batch[name].shape[-2:]) for batch in loader}
        assert seen == {(square, square), (short, long), (long, short)}


def test_the_saved_model_has_the_average_weights_first_stage_and_tokenizer(config, first_stage, tmp_path):
    outcome = run(config, tmp_path)
    losses = {row["step"]: row["eval"]["loss"] for row in log_rows(tmp_path) if "eval" in row}
    assert outcome.best["loss"] == losses[outcome.best["step"]] == min(losses.values())
    newest = tmp_path if outcome.best["step"] == outcome.step else tmp_path / "newest"
    net = tp.load(newest)
    assert net.card.figures["loss"] == losses[outcome.step]
    assert type(net).__name__ == "LatentDiffusion"
    tensors, _ = last_checkpoint(tmp_path)
    for name, parameter in net.network.named_parameters():
        assert torch.equal(parameter, tensors[f"ema.network.{name}"])
    for name, parameter in tp.load(first_stage).named_parameters():
        assert torch.equal(parameter, net.autoencoder.get_parameter(name))
    assert net.text_encoder.tokenizer.ids("a red square")
    assert net.text_encoder(["a red square"]).shape == (1, 12, 16)
    (image,) = tp.DiffusionPipeline(net, dtype="fp32").text_to_image("a red square", num_steps=2)
    assert image.size == (16, 16)
    sheets = sorted(path.name for path in (tmp_path / "samples").iterdir())
    assert sheets[-1] == f"step-{outcome.step:07d}.png"
    with Image.open(tmp_path / "samples" / sheets[-1]) as sheet:
        assert sheet.size == (34, 16)


def test_all_but_the_first_stage_is_trained(config):
    parts = prepare(config)
    assert not any(p.requires_grad for p in parts.task.first_stage.parameters())
    names = {name.split(".")[0] for name, _ in parts.net.named_parameters()}
    assert names == {"network", "text_encoder"}
    batch = {**next(iter(parts.train_loader)), "seed": (0, 1, 0)}
    torch.nn.init.normal_(parts.net.network.out.weight)  # 0 at first, where all gradients are 0
    for part in parts.net.network.modules():
        for end in ("conv2", "proj_out"):
            if hasattr(part, end):
                torch.nn.init.normal_(getattr(part, end).weight, std=0.1)
    parts.task.loss(parts.net, batch)[0].backward()
    assert [n for n, p in parts.net.named_parameters() if p.grad is None or not p.grad.any()] == []


def test_the_loss_is_a_function_of_the_seed_alone(config):
    parts = prepare(config)
    batch = next(iter(parts.train_loader))
    torch.nn.init.normal_(parts.net.network.out.weight)
    losses = []
    for seed in ((0, 1, 0), (0, 1, 0), (0, 2, 0)):
        torch.manual_seed(len(losses))  # torch's global RNG does not matter
        losses.append(parts.task.loss(parts.net, {**batch, "seed": seed})[0].item())
    assert losses[0] == losses[1] != losses[2]


def test_cached_latents_are_those_of_the_images(config):
    one, other = prepare(with_cache(config, "on")), prepare(with_cache(config, "off"))
    generator = torch.Generator()
    cached_batch, image_batch = (next(iter(parts.eval_loader)) for parts in (one, other))
    assert cached_batch["row"] == image_batch["row"]
    from_cache = one.task.latents(cached_batch, None, generator.manual_seed(0))
    from_pixels = other.task.latents(image_batch, None, generator.manual_seed(0))
    torch.testing.assert_close(from_cache, from_pixels, atol=1e-4, rtol=1e-4)


def test_conditions_are_dropped_and_captions_chosen_at_their_rates(config):
    parts = prepare(replace(config, drop_condition=0.25))
    condition = parts.task.condition
    seen = []
    parts.task.error = lambda model, x0, condition, indices, generator: seen.append(indices)
    batch = next(iter(parts.train_loader))
    for step in range(200):
        parts.task.loss(parts.net, {**batch, "seed": (0, step, 0)})
    indices = np.concatenate(seen)
    plain = [row for row in batch["row"] if condition.count[row] == 2]
    dropped = np.stack(seen)[:, [batch["row"].index(row) for row in plain]] == condition.null_index
    assert dropped.mean() == pytest.approx(0.25, abs=0.03)
    texts = [condition.texts[i] for i in indices if i != condition.null_index]
    for name in COLORS:
        first, second = texts.count(f"a {name} square"), texts.count(f"the color {name}")
        if first + second:
            assert first / (first + second) == pytest.approx(0.5, abs=0.08)


def test_a_frozen_text_encoder_is_saved_and_not_trained(config, tmp_path):
    torch.manual_seed(1)
    encoder = tp.create("clip-l", embed_dim=16, depth=1, num_heads=2, mlp_ratio=1.0)
    tp.save(encoder, tmp_path / "clip.safetensors")
    config = replace(config, text=CaptionConfig(encoder=str(tmp_path / "clip.safetensors")))
    run(config, tmp_path / "r")
    tensors, _ = last_checkpoint(tmp_path / "r")
    assert not [name for name in tensors if "text_encoder." in name]
    net = tp.load(tmp_path / "r")
    for name, parameter in encoder.named_parameters():
        assert torch.equal(parameter, net.text_encoder.get_parameter(name))


@pytest.mark.parametrize("family", ["vit", "swin"])
def test_the_condition_can_be_an_image(config, tmp_path, family):
    torch.manual_seed(2)
    if family == "vit":
        encoder = tp.create(
            "vit-ti16", depth=1, embed_dim=12, mlp_ratio=1.0, image_size=16, patch_size=8, num_classes=3
        )
    else:
        encoder = tp.create(
            "swin-t", embed_dim=8, depths=(1, 1), num_heads=(1, 2), window_size=2, image_size=16
        )
    encoder.card = replace(encoder.card, preprocess=replace(encoder.card.preprocess, size=(16, 16)))
    tp.save(encoder, tmp_path / "seeing.safetensors")
    config = replace(config, condition="image", image_encoder=str(tmp_path / "seeing.safetensors"))
    run(replace(config, loop=replace(config.loop, epochs=1)), tmp_path / "r")
    tensors, _ = last_checkpoint(tmp_path / "r")
    assert not [name for name in tensors if "backbone" in name]
    ldm = tp.load(tmp_path / "r")
    images = torch.rand(2, 3, 24, 20) * 2 - 1
    context = ldm.text_encoder(images)
    assert context.shape == (2, 4, 16)
    assert ldm.text_encoder.null_tokens(4).shape == (1, 4, 16)
    for name, parameter in ldm.text_encoder.projection.named_parameters():
        assert torch.equal(parameter, tensors[f"ema.text_encoder.{name}"])
    saved = dict(ldm.text_encoder.backbone.named_parameters())
    assert all(
        torch.equal(parameter, saved[name]) for name, parameter in encoder.named_parameters() if name in saved
    )
    assert torch.isfinite(ldm.denoiser(context)(torch.randn(2, 2, 8, 8), torch.full((2,), 500.0))).all()
    with pytest.raises(TriptychError, match=r"is conditioned on images, for which there is no task"):
        tp.DiffusionPipeline(ldm).text_to_image("a red square")


def test_cached_features_are_those_of_the_image(config, tmp_path):
    torch.manual_seed(2)
    encoder = tp.create(
        "vit-ti16", depth=1, embed_dim=12, mlp_ratio=1.0, image_size=16, patch_size=8, num_classes=3
    )
    encoder.card = replace(encoder.card, preprocess=replace(encoder.card.preprocess, size=(16, 16)))
    tp.save(encoder, tmp_path / "seeing.safetensors")
    parts = prepare(replace(config, condition="image", image_encoder=str(tmp_path / "seeing.safetensors")))
    condition, model = parts.task.condition, parts.task.product(parts.net)
    indices = np.array([3, condition.null_index, 0, 3])
    with torch.no_grad():
        context = condition.context(parts.net.text_encoder, indices)
        pixels = torch.from_numpy(decode(condition.source[3].image))
        image = pixels.movedim(-1, 0)[None] / 127.5 - 1
        torch.testing.assert_close(context[:1], model.text_encoder(image), atol=2e-2, rtol=2e-2)
        assert torch.equal(context[1], model.text_encoder.null_tokens(4)[0])
        assert torch.equal(context[0], context[3])
        assert not torch.equal(context[0], context[2])


def test_training_can_start_from_a_model(config, tmp_path):
    run(config, tmp_path / "a")
    more = replace(config, init=str(tmp_path / "a"), first_stage=None, loop=replace(config.loop, epochs=1))
    before = tp.load(tmp_path / "a")
    parts = prepare(more)
    for name, parameter in before.network.named_parameters():
        assert torch.equal(parameter, parts.net.network.get_parameter(name))
    assert parts.net.text_encoder.tokenizer.ids("a red square") == before.text_encoder.tokenizer.ids(
        "a red square"
    )
    with pytest.raises(
        TriptychError, match=r"init .* takes a condition of 16 channels, and condition 'none' has 0"
    ):
        prepare(replace(more, condition="none"))


def test_emoji_of_training_concepts_are_held_out(config):
    parts = prepare(replace(config, data="emoji", image_size=(16, 16)))
    train, held = parts.train_loader.dataset.source, parts.eval_loader.dataset.source
    assert set(held.labels) <= set(train.labels)
    assert {style.name for style in held.source.styles} == {"fluent-3d", "noto", "noto-v1"}
    assert "an owl" in {text for texts in train.captions for text in texts}


def test_bad_input_is_one_line(config, image_folder, tmp_path):
    with pytest.raises(
        TriptychError, match=r"has no captions, and --condition text needs them: put NAME.txt beside"
    ):
        prepare(replace(config, data=str(image_folder)))
    with pytest.raises(TriptychError, match=r"no first stage was named; give --first-stage A"):
        prepare(replace(config, first_stage=None))
    with pytest.raises(
        TriptychError, match=r"image_size is 15 x 16, and the first stage needs multiples of 2"
    ):
        prepare(replace(config, image_size=(15, 16)))
    with pytest.raises(TriptychError, match=r"no denoiser is called 'unet-emojy'; near names: unet-emoji"):
        prepare(replace(config, model="unet-emojy"))
    with pytest.raises(TriptychError, match=r"unet-emoji has no field 'widht'"):
        prepare(replace(config, model_args=("widht=8",)))
    net = tp.create("vit-ti16", depth=1, image_size=32)
    tp.save(net, tmp_path / "vit.safetensors")
    with pytest.raises(TriptychError, match=r"first_stage .* is a ViT; give an autoencoder"):
        prepare(replace(config, first_stage=str(tmp_path / "vit.safetensors")))
    other = tp.create(
        "kl-f8",
        image_size=16,
        base_channels=8,
        channel_multipliers=(1, 2),
        num_res_blocks=1,
        norm_groups=4,
        latent_channels=3,
    )
    tp.save(other, tmp_path / "other.safetensors")
    run(replace(config, loop=replace(config.loop, epochs=1)), tmp_path / "r")
    with pytest.raises(
        TriptychError, match=r"has latents of 3 channels at 1/2, init .* was trained on 2 at 1/2"
    ):
        prepare(replace(config, init=str(tmp_path / "r"), first_stage=str(tmp_path / "other.safetensors")))
    with pytest.raises(TriptychError, match=r"only latents of images that are at most flipped can be cached"):
        replace(with_cache(config, "on"), augment=replace(config.augment, hue=0.1))


def test_a_cache_belongs_to_one_first_stage_and_one_set_of_images(config, first_stage, captioned, tmp_path):
    config = replace(config, cache=LatentCacheConfig(folder=str(tmp_path / "latents")))
    short = replace(config, loop=replace(config.loop, epochs=1))
    run(short, tmp_path / "a")
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "latents").rglob("*.safetensors")}
    run(replace(short, drop_condition=0.5), tmp_path / "b")  # another run on the same latents
    assert before == {path: path.stat().st_mtime_ns for path in (tmp_path / "latents").rglob("*.safetensors")}
    other = tp.load(first_stage)
    torch.nn.init.normal_(other.encoder.conv_in.weight)
    tp.save(other, tmp_path / "other.safetensors")
    with pytest.raises(
        TriptychError, match=r"latents/train has latents of another first stage; remove it, or give"
    ):
        run(replace(short, first_stage=str(tmp_path / "other.safetensors")), tmp_path / "c")
    with pytest.raises(TriptychError, match=r"has latents of size \[16, 16\], not \[32, 32\]"):
        run(replace(short, image_size=(32, 32)), tmp_path / "d")


def test_another_seed_holds_out_other_images(config, tmp_path):
    config = replace(config, cache=LatentCacheConfig(folder=str(tmp_path / "latents")))
    run(replace(config, loop=replace(config.loop, epochs=1)), tmp_path / "a")
    with pytest.raises(TriptychError, match=r"has latents of another data"):
        run(replace(config, loop=replace(config.loop, epochs=1, seed=5)), tmp_path / "b")


def test_dry_run_writes_nothing(config, tmp_path, monkeypatch):
    from triptych.training import dry_run

    monkeypatch.chdir(tmp_path)
    report = dry_run(config)
    assert report["parameters_trained"] < report["parameters"]
    assert report["flops_per_image"] > 0
    assert list(tmp_path.iterdir()) == []
    assert json.dumps(report)


@pytest.mark.slow
def test_four_images_are_generated_from_their_captions(tmp_path):
    """Train a first stage on four images, and a second one that generates each from its caption."""
    rng = np.random.default_rng(1)
    folder = tmp_path / "four"
    folder.mkdir()
    known = {}
    for name in ("apple", "boat", "cat", "door"):
        coarse = rng.integers(0, 256, (4, 4, 3)).astype(np.uint8)
        known[name] = np.asarray(Image.fromarray(coarse).resize((16, 16), Image.Resampling.BILINEAR))
        for copy in range(4):  # some of which are held out
            Image.fromarray(known[name]).save(folder / f"{name}{copy}.png")
            (folder / f"{name}{copy}.txt").write_text(f"{'an' if name == 'apple' else 'a'} {name}")
    torch.manual_seed(0)
    small = {
        "base_channels": 16,
        "channel_multipliers": (1, 2, 2),
        "num_res_blocks": 1,
        "norm_groups": 4,
        "middle_attention": False,
    }
    stage = tp.create("kl-f4", image_size=16, latent_channels=4, **small)
    images = torch.from_numpy(np.stack(list(known.values()))).movedim(-1, 1) / 127.5 - 1
    optimizer = torch.optim.Adam(stage.parameters(), lr=3e-3)
    for _ in range(150):
        mean, logvar = stage.posterior(images)
        z = mean + torch.exp(0.5 * logvar) * torch.randn_like(mean)
        loss = (stage.render(z) - images).abs().mean() + 1e-4 * (mean**2 + logvar.exp() - logvar).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    with torch.no_grad():
        mean = stage.posterior(images)[0]
    stage.config = replace(stage.config, scale=1 / mean.std().item(), shift=mean.mean().item())
    tp.save(stage, tmp_path / "stage.safetensors")
    run(
        SecondStageConfig(
            data=str(folder),
            first_stage=str(tmp_path / "stage.safetensors"),
            model="unet-emoji",
            model_args=(
                "base_channels=32",
                "channel_multipliers=[1,2]",
                "num_res_blocks=1",
                "norm_groups=8",
                "head_dim=16",
            ),
            text=CaptionConfig(vocabulary=300, embed_dim=32, depth=2, head_dim=16),
            process=ProcessConfig(schedule="flow", prediction="flow"),
            samples=SamplesConfig(num_images=0),
            augment=replace(FLIP_ONLY, flip=0.0),
            loading=DataConfig(batch_size=16, workers=0, eval_fraction=0.25),
            optim=OptimConfig(lr=2e-3),
            loop=LoopConfig(epochs=400, ema=0.99, eval_every=400, precision="fp32", device="cpu"),
        ),
        tmp_path / "run",
    )
    pipe = tp.DiffusionPipeline(tmp_path / "run", dtype="fp32")
    right = 0
    for name in known:
        for image in pipe.text_to_image(
            f"{'an' if name == 'apple' else 'a'} {name}", num_steps=10, guidance_scale=2.0, num_images=2
        ):
            far = {
                other: np.abs(np.asarray(image).astype(float) - truth).mean()
                for other, truth in known.items()
            }
            right += min(far, key=lambda other: far[other]) == name
    assert right == 8


def test_nothing_is_encoded_into_the_folder_of_another_run(config, first_stage, tmp_path):
    short = replace(config, loop=replace(config.loop, epochs=1))
    run(with_cache(short, "off"), tmp_path / "r")
    with pytest.raises(TriptychError, match=r"has a run with cache.use 'off', and 'on' was requested"):
        run(with_cache(short, "on"), tmp_path / "r")
    assert not (tmp_path / "r" / "latents").exists()
    other = tp.load(first_stage)
    torch.nn.init.normal_(other.encoder.conv_in.weight)
    tp.save(other, tmp_path / "stage.safetensors")
    copied = replace(with_cache(short, "off"), first_stage=str(tmp_path / "stage.safetensors"))
    run(copied, tmp_path / "s")
    tp.save(tp.load(first_stage), tmp_path / "stage.safetensors")
    with pytest.raises(TriptychError, match=r"the images in .* or the first stage changed since the run in"):
        run(copied, tmp_path / "s")
