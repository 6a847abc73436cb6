"""What a run of the second stage is made of: frozen first stage, denoiser, condition, latents."""

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
from triptych.errors import UserError, require_known
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
from triptych.training.second_stage.build_conditions import build_conditions
from triptych.training.second_stage.conditions import Condition
from triptych.training.second_stage.finetune import Tune, make_tuning, metadata
from triptych.training.second_stage.latent_cache import encoder_hash
from triptych.training.second_stage.loaders import fill, image_loader, latent_loader
from triptych.training.second_stage.task import Denoise, SecondStage
from triptych.training.tasks.initial_network import origin, parsed


def prepare(config: SecondStageConfig) -> Run:
    """Open the data and the first stage, build what learns, and place it."""
    source, held_out = open_data(config)
    first_stage, start = open_first_stage(config)
    size = config.image_size or (first_stage if start is None else start).config.image_size
    latent = latent_size(config, first_stage, size)
    with torch.random.fork_rng():
        torch.manual_seed(config.loop.seed)
        text, frozen, said, said_held = build_conditions(config, source, held_out, start)
        reader = frozen or text
        denoiser = build_denoiser(config, first_stage, latent, reader, start)
    model = LatentDiffusionConfig(
        autoencoder=first_stage.config,  # type: ignore[arg-type]
        network=denoiser.config,
        text_encoder=None if reader is None else reader.config,
        process=choose_process(config, start),
    )
    how = replace(first_stage.card.preprocess, size=size, crop=1.0, mode="crop")
    classes = source.classes if config.condition == "class" else None
    guidance = (
        config.samples.guidance if start is None else start.card.guidance_scale
    )  # as it was looked at, it is used
    card = replace(ModelCard(preprocess=how, classes=classes, guidance_scale=guidance), **origin(config))
    whole = SecondStage(model, denoiser, text)
    whole.card = card
    augment = match_preprocessing(config.augment, how)
    parts_of_task = (
        augment, config.noise, model, first_stage, frozen, said, said_held, config.drop_condition, card,
        choose_samples(config, said_held),
        config.buckets > 1,
    )  # fmt: skip
    net: Network = whole
    if config.train == "all":
        task = Denoise(*parts_of_task)
    else:
        with torch.random.fork_rng():
            torch.manual_seed(config.loop.seed)
            net = make_tuning(config, whole)
        prepare_blocks(whole, config.loop)
        task = Tune(*parts_of_task, base=whole, about=metadata(config, whole, len(source), size))
    device = choose_device(None if config.loop.device == "auto" else config.loop.device)
    still_parts = [
        part for part in (first_stage, frozen, *([] if net is whole else [whole])) if part is not None
    ]
    for part in still_parts:
        part.to(device).float()
    cached = config.cache.use == "on" or (config.cache.use == "auto" and flips_only(config.augment))
    make = latent_loader if cached else image_loader
    data = fingerprint(source, still_parts)
    parts = make_run(
        config,
        net,
        task,
        make(config, source, first_stage, how, train=True),
        make(config, held_out, first_stage, how, train=False),
        data,
        (len(source), len(held_out)),
    )
    parts.on_evaluation = task.illustrate
    parts.macs = functools.partial(denoiser_macs, whole)
    parts.save_best = task.keep if isinstance(task, Tune) else None
    if cached:
        parts.on_start = functools.partial(fill, config.cache.folder, parts.train_loader, parts.eval_loader)
    return parts


def choose_samples(config: SecondStageConfig, said: Condition) -> SamplesConfig:
    """What to paint: the prompts asked for, or some of those held back; nothing where a model is shown pictures."""
    how = config.samples
    if config.condition == "image":
        return replace(how, count=0)
    return replace(how, prompts=how.prompts or said.named(how.count))


def open_data(config: SecondStageConfig) -> tuple[Source, Source]:
    """What to learn from and what is held back. Of the built-in drawings that is a share of those of the training
    styles, each of a concept that another one shows too: what is asked of the model is their hand, not a new one."""
    loading = config.loading
    if is_built_in(config.data) and config.data.startswith("emoji"):
        whole = open_source(config.data)
        held = choose_held_out(len(whole), whole.labels, loading.eval_fraction, config.loop.seed)
        return Subset(whole, np.flatnonzero(~held)), Subset(whole, np.flatnonzero(held))
    return train_and_eval(config.data, loading.eval_fraction, config.loop.seed, **loading.columns)


def open_first_stage(config: SecondStageConfig) -> tuple[FirstStage, LatentDiffusion | None]:
    """The autoencoder, and the model to start from if one is named, whose autoencoder it is unless another is named."""
    start: Any = None
    if config.init is not None:
        start = weights.load(config.init, prediction=config.prediction).float()
        if not isinstance(start, LatentDiffusion):
            raise UserError(
                f"init {config.init} is a {type(start).__name__}; give a latent diffusion model to start from"
            )
    if config.first_stage is None:
        if start is None:
            raise UserError(
                "no first stage was named; give --first-stage A, for example the RUN of `triptych train autoencoder`"
            )
        return start.autoencoder, start
    loaded: Any = weights.load(config.first_stage).float()
    if isinstance(loaded, LatentDiffusion):
        loaded = loaded.autoencoder
    if not isinstance(loaded, FirstStage):
        raise UserError(
            f"first_stage {config.first_stage} is a {type(loaded).__name__}; give an autoencoder, or a model with one"
        )
    if start is not None:
        mine, its = loaded.config, start.config.autoencoder
        if (mine.latent_channels, mine.downsample_factor) != (its.latent_channels, its.downsample_factor):
            raise UserError(
                f"first_stage {config.first_stage} has latents of {mine.latent_channels} channels at "
                f"1/{mine.downsample_factor}, "
                f"init {config.init} was trained on {its.latent_channels} at 1/{its.downsample_factor}; "
                "leave one of the two out"
            )
    return loaded, start


def choose_process(config: SecondStageConfig, start: LatentDiffusion | None) -> ProcessConfig:
    """The model's own to start from, which may be asked to end in pure noise (Lin et al. 2023); else the config's."""
    if start is None or not config.process.zero_terminal_snr:
        return config.process if start is None else start.config.process
    return replace(start.config.process, zero_terminal_snr=True)


def latent_size(config: SecondStageConfig, first_stage: FirstStage, size: tuple[int, int]) -> tuple[int, int]:
    """Rows and columns of the latents."""
    factor = first_stage.config.downsample_factor
    if any(side % factor for side in size):
        near = [max(1, round(side / factor)) * factor for side in size]
        raise UserError(
            f"image_size is {size[0]} x {size[1]}, and the first stage takes multiples of {factor}; give "
            f"--image-size {near[0]} {near[1]}"
        )
    return size[0] // factor, size[1] // factor


def build_denoiser(
    config: SecondStageConfig,
    first_stage: FirstStage,
    latent: tuple[int, int],
    reader: Network | None,
    start: LatentDiffusion | None,
) -> Network:
    """The denoiser to train: by name with random weights, or loaded."""
    width = 0 if reader is None else reader.config.embed_dim
    if start is not None:
        if start.config.concat != "none":
            raise UserError(
                f"init {config.init} takes {start.config.concat} beside its latents, of which the data have nothing; "
                "start from a model that paints from its prompt alone"
            )
        if start.config.network.context_dim != width:
            raise UserError(
                f"init {config.init} reads a condition of width {start.config.network.context_dim}, and condition "
                f"{config.condition!r} gives {width}; start from a model of the same kind"
            )
        start.network.config = replace(start.network.config, latent_size=latent)
        return start.network
    channels = first_stage.config.latent_channels
    made: dict[str, Any] = {
        "latent_size": latent,
        "in_channels": channels,
        "out_channels": channels,
        "context_dim": width,
        "num_classes": 0,
        **parsed(config.model_args),
    }
    named = denoiser_config(config.model)
    if isinstance(named, DiTConfig):
        made["learn_sigma"] = False
    known = {field.name for field in fields(named)}
    if wrong := [name for name in parsed(config.model_args) if name not in known]:
        raise UserError(f"{config.model} has no field {wrong[0]!r}; it has {', '.join(sorted(known))}")
    return build(replace(named, **made))


def denoiser_config(name: str) -> UNetConfig | DiTConfig:
    """The config of a denoiser by name."""
    sizes = {**unet_config.SIZES, **dit_config.SIZES}
    return sizes[require_known(name, sizes, "denoiser")]


def denoiser_macs(net: SecondStage) -> int:
    """Of one step of the denoiser for one picture."""
    config, text = net.config.network, net.config.text_encoder
    shapes: list[tuple[int, ...]] = [(1, config.in_channels, *config.latent_size), (1,)]
    if text is not None:
        shapes.append((1, text.max_length if isinstance(text, TextConfig) else 1, text.embed_dim))
    return count_macs(net.network, *shapes)


def fingerprint(source: Source, frozen: Sequence[Network]) -> str:
    """Of all that is read and does not learn."""
    parts = [source.fingerprint]
    parts += [encoder_hash(one.backbone if isinstance(one, ImageTokens) else one) for one in frozen]
    return hashlib.sha256(" ".join(parts).encode()).hexdigest()[:32]
