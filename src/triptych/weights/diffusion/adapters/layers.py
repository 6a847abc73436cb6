"""The layers that an adapter's file may name, and the parameters of ours that they are."""

import re
from collections.abc import Mapping
from dataclasses import dataclass

from triptych.errors import CheckpointError
from triptych.models.configs.latent_diffusion import LatentDiffusionConfig
from triptych.models.configs.text import TextConfig
from triptych.models.configs.unet import UNetConfig
from triptych.models.latent_diffusion import LatentDiffusion
from triptych.weights.diffusion import text, unet
from triptych.weights.mapping.rules import Rule, add_prefixes

UNET_PREFIXES = (
    "lora_unet_",
    "lycoris_",
    "unet_",
    "base_model_model_",
    "unet_base_model_model_",
    "model_diffusion_model_",
    "diffusion_model_",
    "",
)
TEXT_PREFIXES = (
    "lora_te_",
    "lora_te1_",
    "lycoris_",
    "text_encoder_",
    "base_model_model_",
    "text_encoder_base_model_model_",
    "text_encoders_clip_l_transformer_",
    "text_encoders_clip_h_transformer_",
    "clip_l_transformer_",
    "clip_h_transformer_",
    "cond_stage_model_transformer_",
    "",
)


@dataclass(frozen=True)
class Place:
    """The location of a layer's weight or bias in ours: rows of a parameter."""

    parameter: str
    first: int
    rows: int


Places = Mapping[str, Place]
"""Weights and, with ".bias" at their end, biases by their flat names."""


def layer_names(config: LatentDiffusionConfig) -> dict[str, tuple[str, ...]]:
    """Return each of our weights, such as "network.middle.transformer.blocks.0.attn.qkv.weight", and its layers.

    The layers are stacked along the first axis, under the names that `save_kohya` takes.

    Raises:
        CheckpointError: the model has a DiT.
    """
    denoiser = unet_of(config)
    layout = unet.Diffusers(len(denoiser.channel_multipliers), denoiser.num_res_blocks)
    rules = add_prefixes(unet.table(denoiser, layout), "unet.", "network.")
    if isinstance(config.text_encoder, TextConfig) and config.text_encoder.causal:
        rules += add_prefixes(
            text.table(config.text_encoder, text.HF), "text_encoder.text_model.", "text_encoder."
        )
    return {
        one.ours[0]: tuple(name.removesuffix(".weight") for name in one.theirs)
        for one in rules
        if one.ours and one.ours[0].endswith(".weight")
    }


def unet_of(config: LatentDiffusionConfig) -> UNetConfig:
    """Return the config of a model's UNet.

    Raises:
        CheckpointError: the model has a DiT.
    """
    if not isinstance(config.network, UNetConfig):
        raise CheckpointError("these LoRAs are changes to a UNet, and this model has a DiT")
    return config.network


def places_of(net: LatentDiffusion) -> dict[str, Place]:
    """Return the location of each layer that a file may name, by its flat name with every known prefix."""
    config = net.config
    denoiser = unet_of(config)
    count, depth = len(denoiser.channel_multipliers), denoiser.num_res_blocks
    tables: list[tuple[tuple[str, ...], list[Rule], str]] = [
        (UNET_PREFIXES, unet.table(denoiser, layout), "network.")
        for layout in (unet.CompVis(count, depth), unet.Diffusers(count, depth))
    ]
    reader = config.text_encoder
    if net.text_encoder is not None and isinstance(reader, TextConfig) and reader.causal:
        for inner in ("text_model.", ""):
            rules = add_prefixes(text.table(reader, text.HF), inner)
            tables.append((TEXT_PREFIXES, rules, "text_encoder."))
    sizes = {name: len(parameter) for name, parameter in net.named_parameters()}
    places: dict[str, Place] = {}
    for prefixes, rules, part in tables:
        for rule in rules:
            name = part + rule.ours[0] if rule.ours else ""
            leaf = ".bias" if name.endswith(".bias") else ""
            if not (leaf or name.endswith(".weight")) or name == "text_encoder.tokens.weight":
                continue
            rows = sizes[name] // len(rule.theirs)
            for k, theirs in enumerate(rule.theirs):
                flat = flat_name(re.sub(r"[._](weight|bias)$", "", theirs))
                for prefix in prefixes:
                    places[prefix + flat + leaf] = Place(name, k * rows, rows)
    return places


def flat_name(name: str) -> str:
    """Return a layer's name in a form common to all dialects, with underscores for dots."""
    name = re.sub(
        r"(\.attn\d?)\.[a-z]+(?=\.to_)", r"\1", name
    )  # the module that held the layers before diffusers 0.17
    name = re.sub(r"\.(base_layer|modules_to_save)(?=$|\.)", "", name).replace(".", "_")
    name = re.sub(r"_self_attn_to_([qkv])$", r"_self_attn_\1_proj", name)  # diffusers 0.15's text encoder
    name = re.sub(r"_self_attn_to_out$", "_self_attn_out_proj", name)
    return re.sub(r"_to_out$", "_to_out_0", name)
