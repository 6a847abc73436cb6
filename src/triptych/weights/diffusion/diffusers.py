"""diffusers' folders: a pipeline with a folder for each part, and its UNets and autoencoders by themselves."""

import functools
from dataclasses import replace
from pathlib import Path
from typing import Any

from triptych.errors import CheckpointError
from triptych.model_card import ModelCard, Preprocess
from triptych.models.autoencoder import Autoencoder
from triptych.models.configs.autoencoder import AutoencoderConfig
from triptych.models.configs.image_tokens import ImageTokensConfig
from triptych.models.configs.latent_diffusion import LatentDiffusionConfig
from triptych.models.configs.text import ClassTokenConfig, TextConfig
from triptych.models.configs.unet import UNetConfig
from triptych.models.latent_diffusion import LatentDiffusion
from triptych.models.tiny_autoencoder import TinyAutoencoder
from triptych.models.tokenization.files import load_tokenizer, save_tokenizer
from triptych.models.unet import UNet
from triptych.weights.diffusion import autoencoder, text, unet
from triptych.weights.diffusion.compvis import infer_concat, stage_reading, unet_reading
from triptych.weights.diffusion.diffusers_config import (
    READERS,
    STAGES,
    TITLE,
    VERSION,
    file_config_of,
    process_settings,
    read_process,
    stage_of,
    stage_settings,
    text_settings,
    unet_settings,
)
from triptych.weights.mapping.defaults import HALF
from triptych.weights.mapping.format import (
    Draft,
    Format,
    Hints,
    LoadPlan,
    Settings,
    StateDictKeys,
    cpu_state_dict,
)
from triptych.weights.mapping.round_trip import verify_round_trip
from triptych.weights.mapping.rules import add_prefixes, drop, export_tensors


def matches(keys: StateDictKeys) -> bool:
    return "model_index" in keys.settings and keys.any_startswith("unet/")


def read(keys: StateDictKeys, hints: Hints) -> LoadPlan:
    settings = keys.settings
    unet_said = settings.get("unet/config", {})
    part = keys.subset("unet/")
    layout = unet.Diffusers.of(part)
    net, facts = unet.read(part, layout, file_config_of(part, unet_said))
    rules = add_prefixes(unet.table(net, layout), "unet/", "network.")
    where = next((name for name in STAGES if keys.any_startswith(f"{name}/")), "vae")
    result = stage_of(keys.subset(f"{where}/"), settings.get(f"{where}/config", {}))
    if result is None:
        raise CheckpointError(
            f"{keys.path} has no vae or vqvae that this triptych knows; give the whole folder"
        )
    stage, stage_rules, more = result
    rules += add_prefixes(stage_rules, f"{where}/", "autoencoder.")
    facts |= more
    reader, finish = None, None
    where = next((name for name in READERS if keys.any_startswith(f"{name}/")), "")
    if where:
        part = keys.subset(f"{where}/")
        named = text.layout_of(part)
        if named is None:
            raise CheckpointError(
                f"{keys.path} has a {where} that this triptych does not know; needed is CLIP or LDMBert"
            )
        tokenizer = load_tokenizer(keys.path) if (keys.path / "tokenizer").is_dir() else None
        added = 0 if tokenizer is None else sum(map(len, tokenizer.added.values()))
        text_layout, prefix = named
        reader, more = text.read(part.subset(prefix), text_layout, settings.get(f"{where}/config", {}), added)
        if tokenizer is not None:
            reader = replace(reader, pad_token=tokenizer.pad)
            finish = functools.partial(_give_tokenizer, tokenizer)
        rules += add_prefixes(text.table(reader, text_layout), f"{where}/{prefix}", "text_encoder.")
        rules += [
            drop(f"{where}/{name}", "only the pooled embedding uses it")
            for name in ("text_projection.*",)
            if prefix
        ]
        facts |= more
    process = read_process(settings.get("scheduler/scheduler_config"), f"{keys.path}/scheduler")
    low = settings.get("low_res_scheduler/scheduler_config")
    config = LatentDiffusionConfig(
        autoencoder=stage,
        network=net,
        text_encoder=reader,
        process=process,
        concat=infer_concat(keys, net.in_channels, stage.latent_channels, reader is not None),
        low_res_process=None if low is None else read_process(low, f"{keys.path}/low_res_scheduler"),
    )
    facts |= {
        "process": "scheduler_config.json",
        "preprocess": "convention: pixels in [-1, 1]",
        "classes": "none",
    }
    card = ModelCard(preprocess=Preprocess(size=config.image_size, mean=HALF, std=HALF))
    return LoadPlan("latent-diffusion", config, rules, card, facts, finish=finish)


def _give_tokenizer(tokenizer: Any, net: Any) -> None:
    net.text_encoder.tokenizer = tokenizer


def draft(net: LatentDiffusion) -> Draft:
    config = net.config
    if not isinstance(config.network, UNetConfig):
        raise CheckpointError(f"{TITLE} has no pipeline with a DiT and these parts; choose another format")
    reader = config.text_encoder
    if isinstance(reader, ClassTokenConfig | ImageTokensConfig) or config.concat in ("depth", "semantic_map"):
        what = "a map of classes" if config.semantic_map is not None else "depth without its estimator"
        what = "a table of classes" if isinstance(reader, ClassTokenConfig) else what
        what = "an image encoder" if isinstance(reader, ImageTokensConfig) else what
        raise CheckpointError(f"{TITLE} has no pipeline with {what}; choose another format")
    old = reader is None or reader.type == "ldm-bert"
    stage_at, reader_at = ("vqvae", "bert") if old else ("vae", "text_encoder")
    layout = unet.Diffusers(len(config.network.channel_multipliers), config.network.num_res_blocks)
    rules = add_prefixes(unet.table(config.network, layout), "unet/", "network.")
    if isinstance(config.autoencoder, AutoencoderConfig):
        table = autoencoder.table(config.autoencoder, autoencoder.DIFFUSERS)
    else:
        table = autoencoder.tiny_table(config.autoencoder, "diffusers")
    rules += add_prefixes(table, f"{stage_at}/", "autoencoder.")
    settings: Settings = {
        "unet/config": unet_settings(config.network),
        f"{stage_at}/config": stage_settings(config.autoencoder),
        "scheduler/scheduler_config": process_settings(config.process),
    }
    index: Settings = {
        "_class_name": _pipeline_of(config),
        "_diffusers_version": VERSION,
        "unet": [TITLE, settings["unet/config"]["_class_name"]],
        stage_at: [TITLE, settings[f"{stage_at}/config"]["_class_name"]],
        "scheduler": [TITLE, "DDIMScheduler"],
    }
    tensors, finish = cpu_state_dict(net), None
    if reader is not None:
        prefix = "" if old else "text_model."
        text_layout = text.LDM_BERT if old else text.HF
        short = text.shortened(reader)
        skipped = {f"text_encoder.encoder.{i}." for i in range(short.depth, reader.depth)}  # unused blocks
        tensors = {name: t for name, t in tensors.items() if not name.startswith(tuple(skipped) or "\0")}
        rules += add_prefixes(text.table(short, text_layout), f"{reader_at}/{prefix}", "text_encoder.")
        settings[f"{reader_at}/config"] = text_settings(reader, net)
        tokens = "CLIPTokenizer" if not old else "BertTokenizer"
        maker = ["latent_diffusion", "LDMBertModel"] if old else ["transformers", "CLIPTextModel"]
        index |= {reader_at: maker, "tokenizer": ["transformers", tokens]}
        if not old or net.text_encoder.has_tokenizer:  # type: ignore[union-attr]
            finish = functools.partial(_write_tokenizer, net)
    if config.low_res_process is not None:
        settings["low_res_scheduler/scheduler_config"] = process_settings(
            config.low_res_process, "DDPMScheduler"
        )
        index |= {"low_res_scheduler": [TITLE, "DDPMScheduler"], "max_noise_level": 350}
    elif not old:
        index |= {
            "safety_checker": [None, None],
            "feature_extractor": [None, None],
            "requires_safety_checker": False,
        }
    settings["model_index"] = index
    rules = [one for one in rules if one.ours]
    out = export_tensors(rules, tensors, f"{TITLE} has no key for all of this network")
    return verify_round_trip(Draft(out, settings, finish=finish), net, read, TITLE, "safetensors")


def _write_tokenizer(net: LatentDiffusion, folder: Path) -> None:
    reader: Any = net.text_encoder
    save_tokenizer(reader.tokenizer, folder / "tokenizer", reader.config.pad_token, reader.config.max_length)


def _pipeline_of(config: LatentDiffusionConfig) -> str:
    if config.text_encoder is None:
        return "LDMSuperResolutionPipeline" if config.concat == "image" else "LDMPipeline"
    if isinstance(config.text_encoder, TextConfig) and config.text_encoder.type == "ldm-bert":
        return "LDMTextToImagePipeline"
    if config.low_res_process is not None:
        return "StableDiffusionUpscalePipeline"
    return (
        "StableDiffusionInpaintPipeline"
        if config.concat == "mask+masked_image"
        else "StableDiffusionPipeline"
    )


# ---------------------------------------------------------------------------------------------- parts alone


def matches_unet(keys: StateDictKeys) -> bool:
    return "down_blocks.0.resnets.0.conv1.weight" in keys and "time_embedding.linear_1.weight" in keys


def read_unet(keys: StateDictKeys, hints: Hints) -> LoadPlan:
    layout = unet.Diffusers.of(keys)
    config_json = keys.settings.get("config", {})
    config, facts = unet.read(
        keys, layout, file_config_of(keys, config_json) if config_json else unet.hinted(hints)
    )
    return unet_reading(config, unet.table(config, layout), facts)


def draft_unet(net: UNet) -> Draft:
    layout = unet.Diffusers(len(net.config.channel_multipliers), net.config.num_res_blocks)
    tensors = export_tensors(
        unet.table(net.config, layout), cpu_state_dict(net), f"{TITLE} has no key for all of this network"
    )
    return verify_round_trip(Draft(tensors, {"config": unet_settings(net.config)}), net, read_unet, TITLE)


def matches_stage(keys: StateDictKeys) -> bool:
    return autoencoder.layout_of(keys) not in (None, autoencoder.COMPVIS)


def matches_tiny(keys: StateDictKeys) -> bool:
    return autoencoder.tiny_layout(keys) == "diffusers"


def read_stage(keys: StateDictKeys, hints: Hints) -> LoadPlan:
    result = stage_of(keys, keys.settings.get("config", {}))
    if result is None:
        raise CheckpointError(f"{keys.path} is no first stage of {TITLE}")
    return stage_reading(*result)


def draft_stage(net: Autoencoder | TinyAutoencoder) -> Draft:
    config = net.config
    if isinstance(config, AutoencoderConfig):
        rules = [one for one in autoencoder.table(config, autoencoder.DIFFUSERS) if one.ours]
    else:
        rules = autoencoder.tiny_table(config, "diffusers")
    tensors = export_tensors(rules, cpu_state_dict(net), f"{TITLE} has no key for all of this network")
    return verify_round_trip(Draft(tensors, {"config": stage_settings(config)}), net, read_stage, TITLE)


STEM = "diffusion_pytorch_model"
FORMATS = (
    Format(
        "diffusers",
        "latent-diffusion",
        "diffusers (a pipeline's folder)",
        "pipeline",
        matches,
        read,
        draft,
    ),
    Format("diffusers", "unet", "diffusers (a UNet)", "folder", matches_unet, read_unet, draft_unet, STEM),
    Format(
        "diffusers",
        "autoencoder",
        "diffusers (a first stage)",
        "folder",
        matches_stage,
        read_stage,
        draft_stage,
        STEM,
    ),
    Format(
        "diffusers",
        "tiny-autoencoder",
        "diffusers (TAESD)",
        "folder",
        matches_tiny,
        read_stage,
        draft_stage,
        STEM,
    ),
)
