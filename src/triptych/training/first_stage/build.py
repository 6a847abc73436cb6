"""What a training run of a first stage is made of."""

import functools
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from triptych import weights
from triptych.data.loading.loader import Loader, make_loader
from triptych.data.open import train_and_eval
from triptych.device import choose_device
from triptych.errors import UserError
from triptych.evaluation.feature_extractor import open_extractor
from triptych.evaluation.latent_statistics import measure_latents
from triptych.evaluation.perceptual_distance import make_distance
from triptych.models.autoencoder import Autoencoder
from triptych.models.discriminator import Discriminator
from triptych.models.registry import build, config_for
from triptych.training.adversary import Adversary
from triptych.training.configs.first_stage import CompressConfig
from triptych.training.first_stage.task import Compress, Compression
from triptych.training.runner import Run, make_run, match_preprocessing
from triptych.training.tasks.initial_network import origin, parsed


def prepare(config: CompressConfig) -> Run:
    """Open the data, build the networks, and place them."""
    loading = config.loading
    source, held_out = train_and_eval(config.data, loading.eval_fraction, config.loop.seed, **loading.columns)
    net = build_network(config)
    if net.codebook is not None and config.loop.parallel == "fsdp":
        raise UserError(
            "a codebook is written to while it learns, which FSDP's shards are not; give --loop.parallel ddp"
        )
    how = net.card.preprocess
    smallest = None if config.enlarge else how.size
    train = make_loader(source, loading, how, train=True, seed=config.loop.seed, min_size=smallest)
    evaluate = make_loader(held_out, loading, how, train=False, min_size=smallest)
    device = choose_device(None if config.loop.device == "auto" else config.loop.device)
    steps = round(config.loop.epochs * len(train) / config.loop.accumulate)
    discriminator = make_discriminator(config, device)
    task = Compress(
        config,
        match_preprocessing(config.augment, how),
        make_distance(config.perceptual, device),
        discriminator,
        steps,
        open_extractor(config.features, image_size=how.size, device=device) if config.features else None,
    )
    # Convolutions are a third faster so; the maps of an autoencoder that learns are in this order anyhow.
    net.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    parts = make_run(
        config, net, task, train, evaluate, source.fingerprint, (len(source), len(held_out))
    )  # fmt: skip
    if discriminator is not None:
        optim = replace(config.optim, lr=config.discriminator.lr or config.optim.lr, layer_decay=1.0)
        parts.adversary = Adversary(discriminator, optim, task.against)
    parts.on_evaluation = task.illustrate
    parts.on_finish = functools.partial(
        finish, parts, make_loader(source, loading, how, train=False, min_size=smallest)
    )
    return parts


def build_network(config: CompressConfig) -> Compression:
    """The autoencoder to train, by name or loaded, its scale and shift not yet known."""
    with torch.random.fork_rng():
        torch.manual_seed(config.loop.seed)
        if config.init is None:
            changes: dict[str, Any] = parsed(config.model_args)
            if config.image_size is not None:
                changes["image_size"] = config.image_size
            made = config_for(config.model, **changes)
            net = build(made)
        else:
            net = weights.load(config.init).float()
        if not isinstance(net, Autoencoder):
            name = config.init or config.model
            raise UserError(
                f"{name} is no autoencoder to train, KL or VQ; `triptych list` shows which there are"
            )
        size = config.image_size or net.config.image_size
        factor = net.config.downsample_factor
        if any(side % factor for side in size):
            raise UserError(
                f"image_size is {size[0]} x {size[1]}, and the autoencoder takes multiples of {factor}; change one"
            )
        net.config = replace(net.config, image_size=size, scale=1.0, shift=0.0)
        net.card = replace(
            net.card,
            preprocess=replace(net.card.preprocess, size=size, crop=1.0),
            figures={},
            **origin(config),
        )
        return Compression(net, config)


def make_discriminator(config: CompressConfig, device: torch.device) -> Discriminator | None:
    """The discriminator that the config names, on the device; none where its weight is 0."""
    said = config.discriminator
    if not said.weight:
        return None
    with torch.random.fork_rng():
        torch.manual_seed(config.loop.seed + 1)
        return Discriminator(said.channels, said.layers).to(device)


def finish(parts: Run, pictures: Loader, out: Path) -> None:
    """Give the kept weights the scale and shift that their latents have over the training pictures. Until then they
    have those over the held-out pictures, which each evaluation measures."""
    config = parts.config
    assert isinstance(config, CompressConfig)
    net = weights.load(out / "model.safetensors")
    assert isinstance(net, Autoencoder)
    net.to(parts.device)
    with parts.autocast():
        scale, shift = measure_latents(net, pictures, config.scale_per_channel, config.scale_images)
    net.config = replace(net.config, scale=scale, shift=shift)
    weights.save(net, out / "model.safetensors")
