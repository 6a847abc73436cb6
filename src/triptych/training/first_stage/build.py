"""Build a training run of a first stage."""

import functools
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from triptych import weights
from triptych.data.loading.loader import Loader, make_loader
from triptych.data.open import train_and_eval
from triptych.device import choose_device
from triptych.errors import CheckpointError, ConfigError
from triptych.evaluation.feature_extractor import open_extractor
from triptych.evaluation.latent_statistics import measure_latents
from triptych.evaluation.perceptual_distance import make_distance
from triptych.models.autoencoder import Autoencoder
from triptych.models.discriminator import Discriminator
from triptych.models.registry import build, config_for
from triptych.training.adversary import Adversary
from triptych.training.configs.first_stage import CompressConfig
from triptych.training.first_stage.task import Compress, Compression
from triptych.training.run_folder import MODEL_FILE, NEWEST
from triptych.training.runner import Run, make_run, match_preprocessing
from triptych.training.tasks.initial_network import describe_origin, parse_model_args


def prepare(config: CompressConfig) -> Run:
    """Open the data, build the networks, and place them on the device.

    Raises:
        ConfigError, DataError, CheckpointError: config, data and weights do not fit together.
    """
    loading = config.loading
    source, held_out = train_and_eval(config.data, loading.eval_fraction, config.loop.seed, **loading.columns)
    net = build_network(config)
    if net.codebook is not None and config.loop.parallel == "fsdp":
        raise ConfigError(
            "training updates a codebook in place, which FSDP does not allow for its shards; give --loop.parallel ddp"
        )
    preprocess = net.card.preprocess
    min_size = None if config.enlarge else preprocess.size
    train = make_loader(source, loading, preprocess, train=True, seed=config.loop.seed, min_size=min_size)
    evaluate = make_loader(held_out, loading, preprocess, train=False, min_size=min_size)
    device = choose_device(None if config.loop.device == "auto" else config.loop.device)
    steps = round(config.loop.epochs * len(train) / config.loop.accumulate)
    discriminator = make_discriminator(config, device)
    task = Compress(
        config,
        match_preprocessing(config.augment, preprocess),
        make_distance(config.perceptual, device),
        discriminator,
        steps,
        open_extractor(config.features, image_size=preprocess.size, device=device)
        if config.features
        else None,
    )
    # Convolutions are a third faster; the maps of an autoencoder in training have this memory format anyway.
    net.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    run = make_run(
        config, net, task, train, evaluate, source.fingerprint, (len(source), len(held_out))
    )  # fmt: skip
    if discriminator is not None:
        optim = replace(config.optim, lr=config.discriminator.lr or config.optim.lr, layer_decay=1.0)
        run.adversary = Adversary(discriminator, optim, task.discriminator_loss)
    run.on_evaluation = task.save_images
    run.on_finish = functools.partial(
        finish, run, make_loader(source, loading, preprocess, train=False, min_size=min_size)
    )
    return run


def build_network(config: CompressConfig) -> Compression:
    """Return the autoencoder to train, created by name or loaded. Its scale and shift are not measured yet."""
    with torch.random.fork_rng():
        torch.manual_seed(config.loop.seed)
        if config.init is None:
            changes: dict[str, Any] = parse_model_args(config.model_args)
            if config.image_size is not None:
                changes["image_size"] = config.image_size
            model_config = config_for(config.model, **changes)
            net = build(model_config)
        else:
            net = weights.load(config.init).float()
        if not isinstance(net, Autoencoder):
            name = config.init or config.model
            raise CheckpointError(
                f"{name} is not a KL or VQ autoencoder; `triptych list` shows those that can be trained"
            )
        size = config.image_size or net.config.image_size
        factor = net.config.downsample_factor
        if any(side % factor for side in size):
            raise ConfigError(
                f"image_size is {size[0]} x {size[1]}, and the autoencoder needs multiples of {factor}; change one of "
                "the two"
            )
        net.config = replace(net.config, image_size=size, scale=1.0, shift=0.0)
        net.card = replace(
            net.card,
            preprocess=replace(net.card.preprocess, size=size, crop=1.0),
            figures={},
            **describe_origin(config),
        )
        return Compression(net, config)


def make_discriminator(config: CompressConfig, device: torch.device) -> Discriminator | None:
    """Return the discriminator of a config, on the device; None if its weight is 0."""
    options = config.discriminator
    if not options.weight:
        return None
    with torch.random.fork_rng():
        torch.manual_seed(config.loop.seed + 1)
        return Discriminator(options.channels, options.layers).to(device)


def finish(run: Run, loader: Loader, out: Path) -> None:
    """Set scale and shift of all saved networks to those that their latents have over the training images.

    Until then they have those over the held-out images, which each evaluation measures.

    Args:
        run: the finished run.
        loader: the training images, not augmented.
        out: the run's folder.
    """
    config = run.config
    assert isinstance(config, CompressConfig)
    for path in (out / MODEL_FILE, out / NEWEST / MODEL_FILE):
        if not path.exists():
            continue
        net = weights.load(path)
        assert isinstance(net, Autoencoder)
        net.to(run.device)
        with run.autocast():
            scale, shift = measure_latents(net, loader, config.scale_per_channel, config.scale_images)
        net.config = replace(net.config, scale=scale, shift=shift)
        weights.save(net, path)
