"""Build a training run of the second stage: frozen first stage, denoiser, condition, latents."""

import functools
import hashlib
from collections.abc import Sequence
from dataclasses import fields, replace
from typing import Any

import numpy as np
import torch

from triptych import weights
from triptych.data.open import is_built_in, open_source, train_and_eval
from triptych.data.source import Source, Subset
from triptych.data.sources.splits import choose_held_out
from triptych.device import choose_device
from triptych.diffusion.config import ProcessConfig
from triptych.errors import CheckpointError, ConfigError, require_known
from triptych.metrics.cost import count_macs
from triptych.model_card import ModelCard
from triptych.models.autoencoder import FirstStage
from triptych.models.configs import dit as dit_config
from triptych.models.configs import unet as unet_config
from triptych.models.configs.dit import DiTConfig
from triptych.models.configs.latent_diffusion import LatentDiffusionConfig
from triptych.models.configs.text import TextConfig
from triptych.models.configs.unet import UNetConfig
from triptych.models.image_tokens import ImageTokens
from triptych.models.latent_diffusion import LatentDiffusion
from triptych.models.registry import build
from triptych.network import Network
from triptych.training.configs.second_stage import SamplesConfig, SecondStageConfig, flips_only
from triptych.training.distributed.parallelize import prepare_blocks
from triptych.training.runner import Run, make_run, match_preprocessing
from triptych.training.second_stage.build_conditions import EncodedConditions, build_conditions
from triptych.training.second_stage.conditions import Condition
from triptych.training.second_stage.finetune import Tune, kohya_metadata, make_tuning
from triptych.training.second_stage.latent_cache import encoder_hash
from triptych.training.second_stage.loaders import fill_caches, image_loader, latent_loader
from triptych.training.second_stage.task import Denoise, SecondStage
from triptych.training.tasks.initial_network import describe_origin, parse_model_args


def prepare(config: SecondStageConfig) -> Run:
    """Open the data and the first stage, build what is trained, and place it on the device.

    Raises:
        ConfigError, DataError, CheckpointError: config, data and weights do not fit together.
    """
    source, held_out = open_data(config)
    first_stage, start = open_first_stage(config)
    size = config.image_size or (first_stage if start is None else start).config.image_size
    latent_size = latent_shape(config, first_stage, size)
    with torch.random.fork_rng():
        torch.manual_seed(config.loop.seed)
        conditions = build_conditions(config, source, held_out, start)
        denoiser = build_denoiser(config, first_stage, latent_size, conditions.encoder, start)
    second_stage = assemble(config, first_stage, denoiser, conditions, start)
    second_stage.card = make_card(config, source, first_stage, start, size)
    net, task = make_task(config, second_stage, first_stage, conditions, len(source))
    frozen = [first_stage, conditions.frozen_encoder, None if net is second_stage else second_stage]
    frozen = place_frozen([part for part in frozen if part is not None], config.loop.device)
    uses_cache = config.cache.use == "on" or (config.cache.use == "auto" and flips_only(config.augment))
    make = latent_loader if uses_cache else image_loader
    data_fingerprint = fingerprint(source, frozen)
    run = make_run(
        config,
        net,
        task,
        make(config, source, first_stage, second_stage.card.preprocess, train=True),
        make(config, held_out, first_stage, second_stage.card.preprocess, train=False),
        data_fingerprint,
        (len(source), len(held_out)),
    )
    run.on_evaluation = task.save_images
    run.macs = functools.partial(denoiser_macs, second_stage)
    run.save = task.save_tuning if isinstance(task, Tune) else None
    if uses_cache:
        run.on_start = functools.partial(fill_caches, config.cache.folder, run.train_loader, run.eval_loader)
    return run


def assemble(
    config: SecondStageConfig,
    first_stage: FirstStage,
    denoiser: Network,
    conditions: EncodedConditions,
    start: LatentDiffusion | None,
) -> SecondStage:
    """Return the denoiser and the trained encoder as one network, with the config of the complete model."""
    encoder = conditions.encoder
    model_config = LatentDiffusionConfig(
        autoencoder=first_stage.config,  # type: ignore[arg-type]
        network=denoiser.config,
        text_encoder=None if encoder is None else encoder.config,
        process=choose_process(config, start),
    )
    return SecondStage(model_config, denoiser, conditions.trained_encoder)


def make_card(
    config: SecondStageConfig,
    source: Source,
    first_stage: FirstStage,
    start: LatentDiffusion | None,
    size: tuple[int, int],
) -> ModelCard:
    """Return the model card of the saved model."""
    return replace(
        ModelCard(
            preprocess=replace(first_stage.card.preprocess, size=size, crop=1.0, mode="crop"),
            classes=source.classes if config.condition == "class" else None,
            # New models are used with the guidance of their samples.
            guidance_scale=config.samples.guidance_scale if start is None else start.card.guidance_scale,
        ),
        **describe_origin(config),
    )


def make_task(
    config: SecondStageConfig,
    second_stage: SecondStage,
    first_stage: FirstStage,
    conditions: EncodedConditions,
    num_images: int,
) -> tuple[Network, Denoise]:
    """Return the network whose parameters are trained, and the task: all of the second stage, or a `Tuning` of it."""
    card = second_stage.card
    arguments = (
        match_preprocessing(config.augment, card.preprocess),
        config.noise,
        second_stage.config,
        first_stage,
        conditions.frozen_encoder,
        conditions.train,
        conditions.held_out,
        config.drop_condition,
        card,
        choose_samples(config, conditions.held_out),
        config.buckets > 1,
    )
    if config.train == "all":
        return second_stage, Denoise(*arguments)
    with torch.random.fork_rng():
        torch.manual_seed(config.loop.seed)
        net = make_tuning(config, second_stage)
    prepare_blocks(second_stage, config.loop)
    metadata = kohya_metadata(config, second_stage, num_images, card.preprocess.size)
    return net, Tune(*arguments, base=second_stage, metadata=metadata)


def place_frozen(frozen: Sequence[Network], device: str) -> Sequence[Network]:
    """Move frozen networks to the device of the run, in fp32, and return them."""
    chosen = choose_device(None if device == "auto" else device)
    for part in frozen:
        part.to(chosen).float()
    return frozen


def choose_samples(config: SecondStageConfig, condition: Condition) -> SamplesConfig:
    """Return what to generate at evaluations: the config's prompts, or some held-out conditions; nothing if the
    condition is an image."""
    options = config.samples
    if config.condition == "image":
        return replace(options, num_images=0)
    return replace(options, prompts=options.prompts or condition.prompts(options.num_images))


def open_data(config: SecondStageConfig) -> tuple[Source, Source]:
    """Open the training and the held-out images.

    Of the built-in drawings, a part of the training styles is held out, such that another drawing of each concept is
    trained on: the model generates these styles, not unseen ones.
    """
    loading = config.loading
    if is_built_in(config.data) and config.data.startswith("emoji"):
        source = open_source(config.data)
        is_held_out = choose_held_out(len(source), source.labels, loading.eval_fraction, config.loop.seed)
        return Subset(source, np.flatnonzero(~is_held_out)), Subset(source, np.flatnonzero(is_held_out))
    return train_and_eval(config.data, loading.eval_fraction, config.loop.seed, **loading.columns)


def open_first_stage(config: SecondStageConfig) -> tuple[FirstStage, LatentDiffusion | None]:
    """Load the first stage, and the model to start from if `init` names one.

    The first stage is `first_stage`, or else the autoencoder of that model.

    Raises:
        CheckpointError: one of the two is another type of network, or they do not fit together.
        ConfigError: neither is named.
    """
    start: Any = None
    if config.init is not None:
        start = weights.load(config.init, prediction=config.prediction).float()
        if not isinstance(start, LatentDiffusion):
            raise CheckpointError(
                f"init {config.init} is a {type(start).__name__}; give a latent diffusion model to start from"
            )
    if config.first_stage is None:
        if start is None:
            raise ConfigError(
                "no first stage was named; give --first-stage A, for example the RUN of `triptych train autoencoder`"
            )
        return start.autoencoder, start
    loaded: Any = weights.load(config.first_stage).float()
    if isinstance(loaded, LatentDiffusion):
        loaded = loaded.autoencoder
    if not isinstance(loaded, FirstStage):
        raise CheckpointError(
            f"first_stage {config.first_stage} is a {type(loaded).__name__}; give an autoencoder, or a model with one"
        )
    if start is not None:
        new, old = loaded.config, start.config.autoencoder
        if (new.latent_channels, new.downsample_factor) != (old.latent_channels, old.downsample_factor):
            raise CheckpointError(
                f"first_stage {config.first_stage} has latents of {new.latent_channels} channels at "
                f"1/{new.downsample_factor}, "
                f"init {config.init} was trained on {old.latent_channels} at 1/{old.downsample_factor}; "
                "leave one of the two out"
            )
    return loaded, start


def choose_process(config: SecondStageConfig, start: LatentDiffusion | None) -> ProcessConfig:
    """Return the diffusion process: that of the model to start from, where only zero terminal SNR (Lin et al. 2023) can
    be set; else the config's."""
    if start is None or not config.process.zero_terminal_snr:
        return config.process if start is None else start.config.process
    return replace(start.config.process, zero_terminal_snr=True)


def latent_shape(
    config: SecondStageConfig, first_stage: FirstStage, size: tuple[int, int]
) -> tuple[int, int]:
    """Return height and width of the latents.

    Raises:
        ConfigError: the image size is not a multiple of the first stage's factor.
    """
    factor = first_stage.config.downsample_factor
    if any(side % factor for side in size):
        near = [max(1, round(side / factor)) * factor for side in size]
        raise ConfigError(
            f"image_size is {size[0]} x {size[1]}, and the first stage needs multiples of {factor}; give "
            f"--image-size {near[0]} {near[1]}"
        )
    return size[0] // factor, size[1] // factor


def build_denoiser(
    config: SecondStageConfig,
    first_stage: FirstStage,
    latent_size: tuple[int, int],
    encoder: Network | None,
    start: LatentDiffusion | None,
) -> Network:
    """Return the denoiser to train, created by name with random weights, or that of the model to start from.

    Args:
        latent_size: height and width of the latents.
        encoder: encoder of the condition; None for an unconditional model.

    Raises:
        CheckpointError: the model to start from needs another condition.
        ConfigError: unknown denoiser or field.
    """
    context_dim = 0 if encoder is None else encoder.config.embed_dim
    if start is not None:
        if start.config.concat != "none":
            raise CheckpointError(
                f"init {config.init} also needs {start.config.concat} as condition, which the data does not have; "
                "start from a model that generates from prompts alone"
            )
        if start.config.network.context_dim != context_dim:
            raise CheckpointError(
                f"init {config.init} takes a condition of {start.config.network.context_dim} channels, and condition "
                f"{config.condition!r} has {context_dim}; start from a model with the same type of condition"
            )
        start.network.config = replace(start.network.config, latent_size=latent_size)
        return start.network
    channels = first_stage.config.latent_channels
    changes: dict[str, Any] = {
        "latent_size": latent_size,
        "in_channels": channels,
        "out_channels": channels,
        "context_dim": context_dim,
        "num_classes": 0,
        **parse_model_args(config.model_args),
    }
    model_config = denoiser_config(config.model)
    if isinstance(model_config, DiTConfig):
        changes["learn_sigma"] = False
    known = {field.name for field in fields(model_config)}
    if unknown := [name for name in parse_model_args(config.model_args) if name not in known]:
        raise ConfigError(f"{config.model} has no field {unknown[0]!r}; it has {', '.join(sorted(known))}")
    return build(replace(model_config, **changes))


def denoiser_config(name: str) -> UNetConfig | DiTConfig:
    """Return the config of a denoiser by name."""
    sizes = {**unet_config.SIZES, **dit_config.SIZES}
    return sizes[require_known(name, sizes, "denoiser")]


def denoiser_macs(net: SecondStage) -> int:
    """Return the multiply-accumulates of one evaluation of the denoiser for one image."""
    config, text = net.config.network, net.config.text_encoder
    shapes: list[tuple[int, ...]] = [(1, config.in_channels, *config.latent_size), (1,)]
    if text is not None:
        shapes.append((1, text.max_length if isinstance(text, TextConfig) else 1, text.embed_dim))
    return count_macs(net.network, *shapes)


def fingerprint(source: Source, frozen: Sequence[Network]) -> str:
    """Return a hash of the data and of all frozen networks."""
    parts = [source.fingerprint]
    parts += [encoder_hash(net.backbone if isinstance(net, ImageTokens) else net) for net in frozen]
    return hashlib.sha256(" ".join(parts).encode()).hexdigest()[:32]
