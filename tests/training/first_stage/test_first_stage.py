"""Training of first stages: losses, gradients and complete runs."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from tests.training.interrupted_runs import interrupt_after, last_checkpoint

import triptych as tp
from triptych.cli import main
from triptych.data.config import AugmentConfig, DataConfig
from triptych.data.images import decode
from triptych.data.resizing import resize_crop
from triptych.errors import CheckpointError, ConfigError, DataError
from triptych.evaluation.config import PerceptualConfig
from triptych.evaluation.latent_statistics import measure_latents
from triptych.training import dry_run, evaluate, run
from triptych.training.configs.base import LoopConfig, OptimConfig
from triptych.training.configs.first_stage import (
    CodebookConfig,
    CompressConfig,
    DiscriminatorConfig,
)
from triptych.training.first_stage.build import prepare
from triptych.training.first_stage.task import adaptive_weight, adversarial_loss
from triptych.training.loop import endless_batches
from triptych.training.task import AdversaryInputs

TINY = (
    "base_channels=8",
    "norm_groups=4",
    "channel_multipliers=[1,2]",
    "num_res_blocks=1",
    "latent_channels=4",
    "middle_attention=false",
)


@pytest.fixture(scope="module")
def feature_net(tmp_path_factory):
    """A small random ViT as feature extractor."""
    path = tmp_path_factory.mktemp("looker") / "vit.safetensors"
    net = tp.create(
        "vit-emoji",
        image_size=16,
        depth=2,
        embed_dim=24,
        num_heads=2,
        mlp_ratio=2.0,
        stem_widths=(8, 8),
        num_classes=0,
    )
    tp.save(net, path)
    return str(path)


@pytest.fixture
def config(image_folder, feature_net) -> CompressConfig:
    return CompressConfig(
        data=str(image_folder),
        model_args=TINY,
        image_size=(16, 16),
        perceptual=PerceptualConfig(model=feature_net, weight=0.3),
        discriminator=DiscriminatorConfig(channels=4, layers=1, start=0.3),
        features=feature_net,
        loading=DataConfig(batch_size=8, workers=0, eval_fraction=0.2),
        augment=AugmentConfig(crop_scale=(0.6, 1.0)),
        optim=OptimConfig(lr=3e-3, warmup=0.1, betas=(0.5, 0.9)),
        loop=LoopConfig(epochs=3, ema=0.9, precision="fp32", device="cpu"),
    )


@pytest.fixture
def vq(config) -> CompressConfig:
    return replace(config, model="vq-f4", model_args=(*TINY, "codebook_size=16"))


def first_batch(parts, progress=1.0):
    return {**next(endless_batches(parts.train_loader)), "seed": (0, 0, 0), "progress": progress}


def grads(net):
    return {name: p.grad.clone() for name, p in net.named_parameters() if p.grad is not None}


def test_a_run_leaves_an_autoencoder_with_measured_latents(config, tmp_path, capsys):
    long = replace(config, loop=replace(config.loop, epochs=12), scale_per_channel=True)
    outcome = run(long, tmp_path / "r")
    assert outcome.finished
    net = tp.load(tmp_path / "r")
    assert net.config.image_size == (16, 16)
    assert len(net.config.scale) == len(net.config.shift) == 4
    parts = prepare(long)
    source = parts.train_loader.dataset.source
    pixels = [resize_crop(decode(source[i].image), (16, 16)) for i in range(len(source))]
    images = torch.from_numpy(np.stack(pixels)).permute(0, 3, 1, 2) / 127.5 - 1
    z = net.encode(images, sample=True, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(z.mean((0, 2, 3)), torch.zeros(4), atol=0.05, rtol=0)
    torch.testing.assert_close(z.std((0, 2, 3)), torch.ones(4), atol=0.05, rtol=0)
    sheets = sorted((tmp_path / "r" / "reconstructions").iterdir())
    assert len(sheets) == 12
    assert decode(sheets[-1]).shape == (2 * 18 - 2, 8 * 18 - 2, 3)
    rows = [json.loads(line) for line in (tmp_path / "r" / "log.jsonl").read_text().splitlines()]
    metrics = [row["eval"] for row in rows if "eval" in row]
    assert metrics[-1]["psnr"] > metrics[0]["psnr"] + 3
    assert {"psnr", "ssim", "l1", "perceptual", "frechet", "kernel"} <= net.card.figures.keys()
    assert metrics[-1]["frechet"] < metrics[0]["frechet"]
    result = evaluate(tmp_path / "r", workers=0, dtype="fp32")
    for name in ("psnr", "ssim", "perceptual", "frechet", "kernel"):
        assert getattr(result, name) == pytest.approx(net.card.figures[name], abs=1e-4)
    assert result.extractor == config.features
    assert result.identity["preparation"]["picture"] == [16, 16]  # words: quoted
    assert evaluate(net, config.data, workers=0).count == 42
    capsys.readouterr()
    assert main(["evaluate", str(tmp_path / "r"), "--workers", "0"]) == 0
    printed = capsys.readouterr().out
    assert "PSNR (dB)" in printed
    assert f"features of {config.features} (" in printed
    assert json.loads((tmp_path / "r" / "metrics.json").read_text())["task"] == "reconstruction"


def test_reconstructions_are_compared_in_the_features_that_are_named(config, feature_net, tmp_path, capsys):
    """The result is equal to that of `evaluate` on folders of images and of reconstructions."""
    torch.manual_seed(0)
    net = tp.create(
        "kl-f4", base_channels=8, norm_groups=4, channel_multipliers=(1, 2), num_res_blocks=1, image_size=16
    )
    tp.save(net, tmp_path / "a.safetensors")
    source = prepare(config).train_loader.dataset.source
    for side in ("real", "generated"):
        (tmp_path / side).mkdir()
    for i in range(len(source)):
        pixels = resize_crop(decode(source[i].image), (16, 16))
        image = torch.from_numpy(pixels.copy()).permute(2, 0, 1)[None] / 127.5 - 1
        reconstruction = net.eval().decode(net.encode(image)).clamp(-1, 1).detach()
        levels = ((reconstruction + 1) * 127.5).round().byte()[0].permute(1, 2, 0).numpy()
        Image.fromarray(pixels).save(tmp_path / "real" / f"{i:03}.png")
        Image.fromarray(levels).save(tmp_path / "generated" / f"{i:03}.png")
    options = ("--data", str(tmp_path / "real"), "--workers", "0", "--dtype", "fp32", "--json")
    assert main(["evaluate", str(tmp_path / "a.safetensors"), "--extractor", feature_net, *options]) == 0
    metrics = json.loads(capsys.readouterr().out)
    assert (
        main(["evaluate", "--samples", str(tmp_path / "generated"), "--extractor", feature_net, *options])
        == 0
    )
    other = json.loads(capsys.readouterr().out)
    assert metrics["frechet"] == pytest.approx(other["frechet"], rel=1e-3)
    assert metrics["extractor"] == feature_net
    for name in ("extractor", "preparation"):
        assert metrics["identity"][name] == other["identity"][name]
    assert main(["evaluate", feature_net, "--extractor", feature_net, *options]) == 2
    assert "ViT generates no images to compare in the features of an extractor" in capsys.readouterr().err


def test_the_features_are_free_to_change_or_to_be_left_out(config, tmp_path):
    short = replace(config, loop=replace(config.loop, epochs=1))
    run(replace(short, features=None), tmp_path)
    rows = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert all("frechet" not in row["eval"] for row in rows if "eval" in row)
    assert run(short, tmp_path).finished
    with pytest.raises(CheckpointError, match="has a run with kl"):
        run(replace(short, kl=0.5), tmp_path)


@pytest.mark.parametrize("per_channel", [False, True])
def test_an_interrupted_run_leaves_measured_latents_too(per_channel, config, tmp_path, monkeypatch):
    """They are measured on the held-out images at the best evaluation, and at the end on the training images."""
    config = replace(config, scale_per_channel=per_channel)
    with monkeypatch.context() as patch:
        interrupt_after(patch, 7)
        assert not run(config, tmp_path).finished
    net, parts = tp.load(tmp_path), prepare(config)
    held_out = measure_latents(net, parts.eval_loader, per_channel)
    torch.testing.assert_close((net.config.scale, net.config.shift), held_out, rtol=1e-5, atol=1e-6)
    assert np.ndim(net.config.scale) == int(per_channel)
    assert parts.net.autoencoder.config.scale == 1
    assert run(config, tmp_path).finished
    net = tp.load(tmp_path)
    assert net.config.scale != measure_latents(net, parts.eval_loader, per_channel)[0]


@pytest.mark.parametrize(("regularization", "cut"), [("kl", 2), ("kl", 7), ("vq", 5), ("ema", 3)])
def test_a_run_cut_off_and_repeated_is_the_unbroken_run_bit_for_bit(
    regularization, cut, config, vq, tmp_path, monkeypatch
):
    """Interrupted before the discriminator starts, and after; also with moving averages of the codebook."""
    ema = replace(
        vq,
        codebook=CodebookConfig(update="ema", decay=0.8, revive_below=0.3),
        loop=replace(vq.loop, accumulate=2),
    )
    chosen = {"kl": replace(config, logvar=True), "vq": vq, "ema": ema}[regularization]
    run(chosen, tmp_path / "whole")
    with monkeypatch.context() as patch:
        interrupt_after(patch, cut)
        assert not run(chosen, tmp_path / "cut").finished
    assert run(chosen, tmp_path / "cut").finished
    (one, facts), (other, others) = last_checkpoint(tmp_path / "whole"), last_checkpoint(tmp_path / "cut")
    assert facts == others
    assert one.keys() == other.keys()
    assert any(name.startswith("adversary.optimizer.") for name in one)
    assert [name for name in one if not torch.equal(one[name], other[name])] == []
    uninterrupted, cut_off = ((tmp_path / n / "model.safetensors").read_bytes() for n in ("whole", "cut"))
    assert uninterrupted == cut_off


# Defects of a published trainer


def test_the_perceptual_distance_moves_the_autoencoder(config):
    """The distance is computed with gradients."""
    gradients = []
    for weight in (0.3, 0.6):
        parts = prepare(replace(config, perceptual=replace(config.perceptual, weight=weight)))
        parts.task.loss(parts.net, first_batch(parts, 0.0))[0].backward()
        gradients.append(grads(parts.net))
    one, two = gradients
    last = one["autoencoder.decoder.conv_out.weight"], two["autoencoder.decoder.conv_out.weight"]
    assert (last[0] - last[1]).norm() > 0.05 * last[0].norm()
    first = one["autoencoder.encoder.conv_in.weight"], two["autoencoder.encoder.conv_in.weight"]
    assert (first[0] - first[1]).norm() > 0.05 * first[0].norm()
    assert parts.task.distance is not None
    assert all(p.grad is None for p in parts.task.distance.parameters())


def test_neither_step_leaves_a_gradient_in_the_other_network(config):
    parts = prepare(config)
    batch = first_batch(parts)
    adversary = parts.adversary
    output = parts.task.loss(parts.net, batch)
    output.loss.backward()
    assert all(p.grad is None for p in adversary.net.parameters())
    before = grads(parts.net)
    assert len(before) == len(list(parts.net.autoencoder.parameters()))
    adversary.backward(output.adversary_inputs, 1.0, parts.autocast)
    assert all(p.grad is not None for p in adversary.net.parameters())
    after = grads(parts.net)
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_both_networks_are_updated_at_each_step_from_the_start(config, tmp_path):
    """They do not alternate, and the checkpoint has the trained discriminator."""
    start = prepare(config).adversary.net.state_dict()
    run(config, tmp_path)
    rows = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    rows = [row for row in rows if "loss" in row]
    steps = len(rows)
    for row in rows:
        active = (row["step"] - 0.5) / steps >= 0.3
        assert ("fooled" in row) == ("discriminator" in row) == ("adversary_grad_norm" in row) == active
        assert row["grad_norm"] > 0
    tensors = last_checkpoint(tmp_path)[0]
    assert not torch.equal(tensors["adversary.net.conv_in.weight"], start["conv_in.weight"])
    assert tensors["adversary.optimizer.conv_in.weight.step"] == sum("fooled" in row for row in rows)


def test_the_loss_is_its_definition_and_so_is_its_gradient(config):
    """Equal to the plain sum, with the adaptive weight computed from two full backward passes."""
    for adversarial in ("hinge", "non_saturating"):
        changed = replace(config, logvar=True, discriminator=replace(config.discriminator, loss=adversarial))
        parts = prepare(changed)
        parts.net.logvar.data.fill_(0.7)
        task, net, last = parts.task, parts.net, parts.net.autoencoder.decoder.conv_out.weight
        torch.manual_seed(0)
        loss, logs, inputs = task.loss(net, first_batch(parts))
        loss.backward()
        fast = grads(net)
        net.zero_grad()

        torch.manual_seed(0)
        images = inputs.real
        out, bound, _ = task.reconstruct(net, images)
        rest = task.error(out, images)[0] * torch.exp(-net.logvar) + net.logvar
        fooled = adversarial_loss(task.discriminator(out), changed.discriminator)
        one = torch.autograd.grad(rest, last, retain_graph=True)[0].norm()
        other = torch.autograd.grad(fooled, last, retain_graph=True)[0].norm()
        weight = 0.5 * (one / (other + 1e-4)).clamp(0, 1e4)
        torch.testing.assert_close(logs["adaptive"], weight)
        slow = rest + weight.detach() * fooled + bound
        slow.backward()
        torch.testing.assert_close(loss, slow)
        for name, grad in grads(net).items():
            torch.testing.assert_close(fast[name], grad, atol=1e-6, rtol=1e-3, msg=name)


def test_the_adaptive_weight_is_clamped():
    last = torch.ones(1, requires_grad=True)
    reconstructions = (last * torch.ones(1, 3, 2, 2)).requires_grad_()
    ones = torch.ones(1, 3, 2, 2)
    assert adaptive_weight(reconstructions, last, ones, ones * 2) == pytest.approx(0.5, rel=1e-4)
    assert adaptive_weight(reconstructions, last, ones * 100, ones * 0) == 1e4


def test_the_kl_term_is_the_divergence_over_the_number_of_pixel_values(config):
    parts = prepare(replace(config, kl=0.25))
    images = torch.rand(3, 3, 16, 16) * 2 - 1
    _, bound, logs = parts.task.reconstruct(parts.net, images)
    mean, logvar = parts.net.autoencoder.posterior(images)
    q, p = torch.distributions.Normal(mean, torch.exp(logvar / 2)), torch.distributions.Normal(0.0, 1.0)
    nats = torch.distributions.kl_divergence(q, p).sum() / 3
    torch.testing.assert_close(logs["kl"], nats.detach())
    torch.testing.assert_close(bound, 0.25 * nats / (3 * 16 * 16))


def test_losses_of_the_discriminator_have_their_closed_form(config):
    parts = prepare(config)
    task = parts.task
    real, generated = torch.tensor([0.5, 2.0]), torch.tensor([-2.0, 0.5])
    answers = {1.0: real, -1.0: generated}
    task.discriminator = lambda images: answers[float(images)]
    inputs = AdversaryInputs(torch.tensor(1.0), torch.tensor(-1.0))
    torch.testing.assert_close(task.discriminator_loss(inputs)[0], torch.tensor((0.25 + 0.75) / 2))
    early, late = ({"progress": progress} for progress in (0.29, 0.3))
    assert not task.discriminator_is_active(early)
    assert task.discriminator_is_active(late)
    task.options = replace(config, discriminator=replace(config.discriminator, loss="non_saturating"))
    expected = (-F.logsigmoid(real).mean() - F.logsigmoid(-generated).mean()) / 2
    torch.testing.assert_close(task.discriminator_loss(inputs)[0], expected)


def test_the_discriminator_starts_at_a_step_or_a_fraction_of_the_run(config):
    steps = 4 * 3
    assert prepare(config).task.start == 0.3
    late = prepare(replace(config, discriminator=replace(config.discriminator, start=6))).task
    assert late.start == 6 / steps
    none = prepare(replace(config, discriminator=replace(config.discriminator, weight=0.0)))
    assert none.adversary is None
    assert none.task.discriminator is None


def test_dry_run_includes_the_discriminator_and_writes_nothing(config, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    report = dry_run(config, steps=1)
    assert list(tmp_path.iterdir()) == []
    assert report["parameters"] == sum(p.numel() for p in tp.create("kl-f8", **{
        "base_channels": 8, "norm_groups": 4, "channel_multipliers": (1, 2), "num_res_blocks": 1, "latent_channels": 4,
        "middle_attention": False,
    }).parameters())  # fmt: skip


def test_images_smaller_than_the_crop_are_refused_in_one_line(config, tmp_path):
    big = replace(config, image_size=(32, 32))
    with pytest.raises(DataError, match=r"is 24 x 24 pixels, smaller than the crop of 32 x 32; use larger"):
        run(big, tmp_path / "r")
    assert run(replace(big, enlarge=True, loop=replace(big.loop, epochs=1)), tmp_path / "s").finished


def test_users_mistakes(config, tmp_path):
    with pytest.raises(ConfigError, match="is 15 x 16, and the autoencoder needs multiples of 2"):
        run(replace(config, image_size=(15, 16)), tmp_path / "r")
    with pytest.raises(CheckpointError, match="vit-b16 is not a KL or VQ autoencoder"):
        run(replace(config, model="vit-b16", model_args=()), tmp_path / "r")
    tp.save(tp.create("kl-f4", base_channels=8, norm_groups=4), tmp_path / "a.safetensors")
    blind = replace(config, perceptual=PerceptualConfig(model=str(tmp_path / "a.safetensors")))
    with pytest.raises(CheckpointError, match="Autoencoder has no features to compare images by"):
        run(blind, tmp_path / "r")
    with pytest.raises(ConfigError, match="LPIPS heads need their VGG network"):
        PerceptualConfig(heads="x.pth")


@pytest.mark.slow
@pytest.mark.parametrize("regularization", ["kl", "vq"])
def test_eight_images_are_overfitted(regularization, tmp_path):
    rng = np.random.default_rng(0)
    (tmp_path / "data" / "train").mkdir(parents=True)
    for i in range(8):
        small = Image.fromarray(rng.integers(0, 255, (4, 4, 3), np.uint8))
        small.resize((16, 16), Image.Resampling.BICUBIC).save(tmp_path / "data" / "train" / f"{i}.png")
    (tmp_path / "data" / "val").symlink_to(tmp_path / "data" / "train", target_is_directory=True)
    args = (
        "base_channels=32",
        "norm_groups=8",
        "channel_multipliers=[1,2]",
        "num_res_blocks=1",
        "latent_channels=8",
        "middle_attention=false",
    )
    heart = CompressConfig(
        data=str(tmp_path / "data"),
        model="kl-f4" if regularization == "kl" else "vq-f4",
        model_args=args if regularization == "kl" else (*args, "codebook_size=256"),
        image_size=(16, 16),
        discriminator=DiscriminatorConfig(channels=8, layers=1, weight=0.05),
        perceptual=PerceptualConfig(weight=0.0),
        loading=DataConfig(batch_size=8, workers=0, load_size=(16, 16)),
        augment=AugmentConfig(crop_scale=(1.0, 1.0), crop_ratio=(1.0, 1.0), flip=0.0),
        optim=OptimConfig(lr=4e-3, weight_decay=0.0),
        loop=LoopConfig(epochs=400, eval_every=400, device="cpu", precision="fp32"),
    )
    assert run(heart, tmp_path / "r").best["psnr"] > 30
