"""Single files of CompVis and A1111, .ckpt or .safetensors, and their parts alone.

The prefixes are `model.diffusion_model.`, `first_stage_model.` and `cond_stage_model.`."""

from dataclasses import replace
from typing import Any, cast

import torch

from triptych.diffusion.config import ProcessConfig
from triptych.errors import CheckpointError
from triptych.model_card import ModelCard, Preprocess
from triptych.models.autoencoder import Autoencoder
from triptych.models.configs import latent_diffusion as latent_diffusion_config
from triptych.models.configs.autoencoder import AutoencoderConfig
from triptych.models.configs.image_tokens import ImageTokensConfig
from triptych.models.configs.latent_diffusion import (
    CONCAT_CHANNELS,
    ConcatConditioning,
    LatentDiffusionConfig,
    SemanticMapConfig,
)
from triptych.models.configs.text import ClassTokenConfig, TextConfig
from triptych.models.configs.unet import UNetConfig
from triptych.models.latent_diffusion import LatentDiffusion
from triptych.models.tiny_autoencoder import TinyAutoencoder
from triptych.models.unet import UNet
from triptych.weights.diffusion import autoencoder, schedule, text, unet
from triptych.weights.diffusion.compvis_config import ModelYaml, read_yaml
from triptych.weights.diffusion.rule_helpers import scalar_factory, shortest_decimal
from triptych.weights.mapping.defaults import HALF
from triptych.weights.mapping.format import Draft, Format, Hints, LoadPlan, StateDictKeys, cpu_state_dict
from triptych.weights.mapping.round_trip import canonical, verify_round_trip
from triptych.weights.mapping.rules import Rule, add_prefixes, drop, export_tensors, rename

TITLE = "CompVis (Stable Diffusion and LDM in one file)"
UNET, STAGE, TEXT = "model.diffusion_model.", "first_stage_model.", "cond_stage_model."
CLASSES, MAP = f"{TEXT}embedding.weight", f"{TEXT}channel_mapper.weight"
EMA = "model_ema."
# Other tensors that training leaves in a file.
LEFT = (
    ("logvar", "only training uses it"),
    ("loss.*", "only training uses it"),
    ("lvlb_weights", "only training uses it"),
    ("depth_model.*", "the estimator of depth is another network"),
    ("v_pred", "it says what the network predicts"),
    ("ztsnr", "it says what the schedule is"),
)
# What a whole CLIP has in addition to its text encoder, as other programs save it.
LEFT_OF_CLIP = tuple(
    (f"{TEXT}{name}", "sampling does not read it")
    for name in (
        "logit_scale",
        "text_projection",
        "transformer.logit_scale",
        "transformer.text_projection.weight",
        "transformer.visual_projection.weight",
        "transformer.vision_model.*",
    )
)
# Prefix of each type of text encoder in written files.
PLACES = {
    "clip": f"{TEXT}transformer.text_model.",
    "openclip": f"{TEXT}model.",
    "ldm-bert": f"{TEXT}transformer.",
}
LAYOUTS = {"clip": text.HF, "openclip": text.OPENCLIP, "ldm-bert": text.BERT}


def matches(keys: StateDictKeys) -> bool:
    return f"{UNET}input_blocks.0.0.weight" in keys and keys.any_startswith(STAGE)


def read(keys: StateDictKeys, hints: Hints) -> LoadPlan:
    if keys.any_startswith("conditioner.embedders."):
        raise CheckpointError(
            f"{keys.path} is a Stable Diffusion XL; this triptych reads Stable Diffusion 1 and 2, and LDM"
        )
    unet_names, stage_names = keys.subset(UNET), keys.subset(STAGE)
    yaml = read_yaml(keys.yaml)
    layout = unet.CompVis.of(unet_names)
    unet_config, facts = unet.read(unet_names, layout, _file_config(hints, yaml))
    rules, chosen = averaged(
        keys, hints, yaml, add_prefixes(unet.table(unet_config, layout), UNET, "network.")
    )
    facts |= chosen
    stage = autoencoder.layout_of(stage_names)
    if stage is None:
        raise CheckpointError(
            f"{keys.path} has {STAGE}* of no first stage that this triptych knows; give a whole checkpoint"
        )
    stage_config, _ = autoencoder.read(stage_names, stage)
    rules += add_prefixes(autoencoder.table(stage_config, stage), STAGE, "autoencoder.")
    text_config, text_rules, more = _text(keys, yaml)
    config, process_facts = _assemble_config(keys, hints, yaml, stage_config, unet_config, text_config)
    if config.semantic_map is not None:
        rules.append(rename(MAP, "semantic_map.mix.weight"))
    rules += text_rules + _buffers(config) + [drop(name, reason) for name, reason in LEFT]
    dropped = tuple(one.theirs[0].rstrip("*") for one in text_rules if not one.ours)
    rules += [drop(name, reason) for name, reason in LEFT_OF_CLIP if not name.startswith(dropped)]
    facts |= more | process_facts
    preprocess = Preprocess(size=config.image_size, mean=HALF, std=HALF)
    facts |= {"preprocess": "convention: pixels in [-1, 1]", "classes": "none"}
    return LoadPlan("latent-diffusion", config, rules, ModelCard(preprocess=preprocess), facts)


def _file_config(hints: Hints, yaml: ModelYaml) -> unet.UNetFileConfig:
    """Return what is known of a UNet in addition to its shapes: from the sidecar, else from the YAML."""
    known = unet.hinted(hints)
    if hints.heads is not None or (heads := yaml.heads()) is None:
        return known
    return replace(known, heads=heads[0], head_dim=heads[1], where=yaml.name)


def averaged(
    keys: StateDictKeys, hints: Hints, yaml: ModelYaml, rules: list[Rule]
) -> tuple[list[Rule], dict[str, str]]:
    """Return the rules for the chosen set of UNet weights, which drop the other set, and the choice.

    Raises:
        CheckpointError: the averaged weights were requested and are missing.
    """
    if not keys.any_startswith(EMA):
        if hints.weights == "ema":
            raise CheckpointError(f"{keys.path} has no averaged weights ({EMA}*); leave weights out")
        return rules, {}
    if hints.weights == "raw" or (hints.weights is None and not yaml.averaged()):
        why = (
            "as requested"
            if hints.weights
            else "convention, as web UIs do"
            if yaml.path is None
            else yaml.name
        )
        unread = [drop(f"{EMA}*", "the raw weights are read")]
        return rules + unread, {"weights": f"raw, not {EMA}* ({why})"}
    why = "as requested" if hints.weights else f"{yaml.name} does not say use_ema: false"
    rules = [replace(one, theirs=tuple(map(averaged_name, one.theirs))) for one in rules]
    rules += [drop(f"{EMA}{name}", "only training uses it") for name in ("decay", "num_updates")]
    return [*rules, drop(f"{UNET}*", "their average is read")], {"weights": f"ema, {EMA}* ({why})"}


def averaged_name(name: str) -> str:
    """Return the key of a weight's average in CompVis' `LitEma`: a buffer, whose name has no dots."""
    return EMA + name.removeprefix("model.").replace(".", "")


def _text(
    keys: StateDictKeys, yaml: ModelYaml
) -> tuple[TextConfig | ClassTokenConfig | None, list[Rule], dict[str, str]]:
    """Return config, rules and facts of the text encoder or the class embedding."""
    if CLASSES in keys:
        return text.read_classes(keys, CLASSES), [rename(CLASSES, "text_encoder.classes.weight")], {}
    for place in (f"{TEXT}transformer.", f"{TEXT}model.", TEXT):
        part = keys.subset(place)
        if (match := text.layout_of(part)) is not None:
            layout, prefix = match
            config, facts = text.read(part.subset(prefix), layout)
            if layout is text.OPENCLIP and (skip := yaml.skipped()) is not None and skip < config.depth:
                config, facts["text_encoder.skip_last_blocks"] = (
                    replace(config, skip_last_blocks=skip),
                    yaml.name,
                )
            if layout is text.BERT and (boxes := yaml.boxes()) is not None:
                config, facts["text_encoder.boxes"] = replace(config, boxes=boxes), yaml.name
            return config, add_prefixes(text.table(config, layout), place + prefix, "text_encoder."), facts
    return None, [], {}


def _assemble_config(
    keys: StateDictKeys,
    hints: Hints,
    yaml: ModelYaml,
    stage: AutoencoderConfig,
    net: UNetConfig,
    reader: TextConfig | ClassTokenConfig | None,
) -> tuple[LatentDiffusionConfig, dict[str, str]]:
    """Return the config of all parts together: process, scale and concatenated conditioning."""
    latents = stage.latent_channels
    published = [
        known
        for known in latent_diffusion_config.SIZES.values()
        if canonical(replace(known.network, latent_size=net.latent_size)) == canonical(net)
        and known.autoencoder.latent_channels == latents
        and _conditioning_type(known.text_encoder) == _conditioning_type(reader)
    ]
    concat, map_config = "semantic_map", None
    if MAP in keys:
        channels, classes = keys.shape(MAP, 4)[:2]
        map_config = SemanticMapConfig(num_classes=classes, channels=channels)
    else:
        concat = infer_concat(keys, net.in_channels, latents, reader is not None)
    low = "low_scale_model." if keys.any_startswith("low_scale_model.") else ""
    upscales = low or (concat == "image" and net.num_classes > 0)
    prediction, facts = _prediction(keys, hints, yaml, net, concat, bool(upscales))
    matching = [known for known in published if known.process.prediction == prediction] or published
    if matching:
        usual = replace(matching[0].process, prediction=prediction)
        net = replace(net, latent_size=matching[0].network.latent_size)
        stage = replace(stage, image_size=matching[0].autoencoder.image_size)
    else:
        net = replace(net, latent_size=yaml.latent_size() or net.latent_size)
        usual = ProcessConfig(prediction=prediction)
        if _conditioning_type(reader) in ("none", "class"):  # the paper's models without text
            usual = replace(usual, beta_start=0.0015, beta_end=0.0195)
    process, facts["process"] = schedule.read(keys, "", yaml.process(usual), yaml.name)
    low_res_process = None
    if upscales:
        noise = (
            matching[0].low_res_process
            if matching and matching[0].low_res_process
            else ProcessConfig(beta_start=1e-4, beta_end=0.02)
        )
        noise = yaml.process(noise, "low_scale_config", "params", "noise_schedule_config")
        low_res_process, facts["low_res_process"] = schedule.read(keys, low, noise, yaml.name)
    stage, facts["scale"] = _scaled(keys, yaml, stage, [known.autoencoder.scale for known in matching])
    return LatentDiffusionConfig(
        autoencoder=stage,
        network=net,
        text_encoder=reader,
        process=process,
        concat=concat,
        semantic_map=map_config,
        low_res_process=low_res_process,
    ), facts


def _conditioning_type(config: TextConfig | ClassTokenConfig | ImageTokensConfig | None) -> str:
    if config is None:
        return "none"
    return config.type if isinstance(config, TextConfig) else "class"


def infer_concat(keys: StateDictKeys, channels: int, latents: int, prompted: bool) -> ConcatConditioning:
    """Infer the concatenated conditioning of a UNet from its number of input channels.

    Args:
        channels: input channels of the UNet.
        latents: channels of the latents.
        prompted: whether there is a text encoder.

    Raises:
        CheckpointError: no conditioning has this number of channels.
    """
    masks: ConcatConditioning = "mask+masked_image" if prompted else "masked_image+mask"
    choices: tuple[ConcatConditioning, ...] = ("none", masks, "depth", "image")
    for choice in choices:
        times, more = CONCAT_CHANNELS[choice]
        if channels == latents * (1 + times) + more:
            return choice
    raise CheckpointError(
        f"{keys.path} has a UNet of {channels} channels for latents of {latents}; needed are {latents}, "
        f"{2 * latents + 1} (a mask), {latents + 1} (depth) or {latents + 3} (an image)"
    )


def _prediction(
    keys: StateDictKeys,
    hints: Hints,
    yaml: ModelYaml,
    net: UNetConfig,
    concat: ConcatConditioning,
    upscales: bool,
) -> tuple[Any, dict[str, str]]:
    """Return eps or v. Shapes of Stable Diffusion 2 are equal for both, and most files do not store it."""
    if hints.prediction is not None:
        return hints.prediction, {"prediction": "as requested"}
    if "v_pred" in keys:
        return "v", {"prediction": "v_pred in the file"}
    spelled = str(keys.metadata.get("modelspec.prediction_type", "")).lower()
    if spelled in ("v", "v_prediction", "epsilon", "eps"):
        return ("v" if spelled.startswith("v") else "eps"), {
            "prediction": "modelspec.prediction_type in the file"
        }
    if (value := yaml.prediction()) is not None:
        return value, {"prediction": yaml.name}
    if yaml.path is not None:
        return "eps", {"prediction": f"{yaml.name} leaves it at CompVis' default"}
    if upscales:
        return "v", {"prediction": "convention: upscalers predict v"}
    if net.projection == "linear" and net.context_dim and concat == "none":
        raise CheckpointError(
            f"{keys.path} is a Stable Diffusion 2, whose shapes do not tell what it predicts; load it with "
            'prediction="v" (768 pixels) or prediction="eps" (512 pixels, base), --prediction v or eps'
        )
    return "eps", {"prediction": "convention"}


def _scaled(
    keys: StateDictKeys, yaml: ModelYaml, stage: AutoencoderConfig, usual: list[Any]
) -> tuple[AutoencoderConfig, str]:
    """Return the first stage with the scale of its latents: `scale_factor` in the file, else the published one."""
    stored = keys.read_small("scale_factor", 64)
    if stored is not None and stored.numel() == 1:
        return replace(stage, scale=shortest_decimal(stored)), "scale_factor in the file"
    if (value := yaml.scale()) is not None:
        return replace(stage, scale=value), yaml.name
    return replace(
        stage, scale=usual[0] if usual else 0.18215 if stage.regularization == "kl" else 1.0
    ), "convention"


def _buffers(config: LatentDiffusionConfig) -> list[Rule]:
    scale = config.autoencoder.scale
    known = isinstance(scale, float) and scale not in (1.0, 0.18215, 0.08333)
    return [
        *schedule.rules(config.process),
        *(
            []
            if config.low_res_process is None
            else schedule.rules(config.low_res_process, "low_scale_model.", False)
        ),
        drop(
            "scale_factor",
            "it is the first stage's scale",
            scalar_factory(float(cast(float, scale))) if known else None,
        ),  # type: ignore
    ]


def draft_averaged(net: LatentDiffusion) -> Draft:
    """Return a draft that holds the UNet twice, for CompVis' own scripts.

    Without `use_ema: False` these sample from the averaged weights, and from random ones if the file has none."""
    result = draft(net)
    twins = {averaged_name(name): t for name, t in result.tensors.items() if name.startswith(UNET)}
    result.tensors |= twins | {
        f"{EMA}decay": torch.tensor(0.9999),
        f"{EMA}num_updates": torch.tensor(0, dtype=torch.int),
    }
    return result


def draft(net: LatentDiffusion) -> Draft:
    config = net.config
    if not isinstance(config.autoencoder, AutoencoderConfig):
        raise CheckpointError(f"{TITLE} has no key for a tiny autoencoder; choose triptych's own format")
    if not isinstance(config.network, UNetConfig):
        raise CheckpointError(f"{TITLE} has no key for a DiT; choose diffusers' or triptych's own format")
    if isinstance(config.text_encoder, ImageTokensConfig):
        raise CheckpointError(f"{TITLE} has no key for an image encoder; choose triptych's own format")
    if config.process.schedule == "flow":
        raise CheckpointError(f"{TITLE} cannot store a flow; choose triptych's own format")
    layout = unet.CompVis(len(config.network.channel_multipliers), config.network.num_res_blocks)
    rules = add_prefixes(unet.table(config.network, layout), UNET, "network.")
    rules += add_prefixes(autoencoder.table(config.autoencoder, autoencoder.COMPVIS), STAGE, "autoencoder.")
    if config.semantic_map is not None:
        rules.append(rename(MAP, "semantic_map.mix.weight"))
    if isinstance(config.text_encoder, ClassTokenConfig):
        rules.append(rename(CLASSES, "text_encoder.classes.weight"))
    elif config.text_encoder is not None:
        if config.text_encoder.num_added_tokens:
            raise CheckpointError(
                f"{TITLE} has no key for added words; save them with weights.diffusion.embeddings.save_embedding, "
                "or choose triptych's own format"
            )
        layout_of_text, place = LAYOUTS[config.text_encoder.type], PLACES[config.text_encoder.type]
        rules += add_prefixes(text.table(config.text_encoder, layout_of_text), place, "text_encoder.")
        if config.text_encoder.type == "clip":
            length = config.text_encoder.max_length
            rules.append(
                drop(f"{place}embeddings.position_ids", "it counts", lambda: torch.arange(length)[None])
            )
    rules = [one for one in rules if one.ours or one.restore] + _buffers(config)
    tensors = export_tensors(rules, cpu_state_dict(net), f"{TITLE} has no key for all of this network")
    return verify_round_trip(Draft(tensors, wrapper_key="state_dict"), net, read, TITLE)


# ------------------------------------------------------------------------------------------- parts alone


def _first_stage(keys: StateDictKeys) -> StateDictKeys:
    return keys.subset(STAGE) if keys.any_startswith(STAGE) else keys


def matches_stage(keys: StateDictKeys) -> bool:
    return autoencoder.layout_of(_first_stage(keys)) is autoencoder.COMPVIS


def read_stage(keys: StateDictKeys, hints: Hints) -> LoadPlan:
    prefix = STAGE if keys.any_startswith(STAGE) else ""
    config, facts = autoencoder.read(_first_stage(keys), autoencoder.COMPVIS)
    if (published := autoencoder.scaled(config)) is not None:
        sizes = {"scale": published.scale, "shift": published.shift, "image_size": published.image_size}
        config, facts["scale"] = replace(config, **sizes), f"convention: {published.scale}"
    rules = add_prefixes(autoencoder.table(config, autoencoder.COMPVIS), prefix)
    return stage_reading(config, rules, facts)


def stage_reading(config: Any, rules: list[Rule], facts: dict[str, str]) -> LoadPlan:
    """Return the plan for a first stage alone."""
    preprocess = Preprocess(size=config.image_size, crop=1.0, mean=HALF, std=HALF)
    family = "autoencoder" if isinstance(config, AutoencoderConfig) else "tiny-autoencoder"
    facts = {**facts, "preprocess": "convention: pixels in [-1, 1]", "classes": "none"}
    return LoadPlan(family, config, rules, ModelCard(preprocess=preprocess), facts)


def draft_stage(net: Autoencoder) -> Draft:
    rules = autoencoder.table(net.config, autoencoder.COMPVIS)
    tensors = export_tensors(rules, cpu_state_dict(net), f"{TITLE} has no key for all of this network")
    return verify_round_trip(Draft(tensors, wrapper_key="state_dict"), net, read_stage, TITLE)


def matches_tiny(keys: StateDictKeys) -> bool:
    return autoencoder.tiny_layout(keys) == "taesd"


def read_tiny(keys: StateDictKeys, hints: Hints) -> LoadPlan:
    config = autoencoder.read_tiny(keys, "taesd")
    return stage_reading(config, autoencoder.tiny_table(config, "taesd"), {"scale": "convention: 1"})


def draft_tiny(net: TinyAutoencoder) -> Draft:
    rules = autoencoder.tiny_table(net.config, "taesd")
    tensors = export_tensors(rules, cpu_state_dict(net), "taesd has no key for all of this network")
    return verify_round_trip(Draft(tensors), net, read_tiny, "taesd")


def _unet_place(keys: StateDictKeys) -> str | None:
    places = (UNET, "diffusion_model.", "")
    return next((place for place in places if f"{place}input_blocks.0.0.weight" in keys), None)


def matches_unet(keys: StateDictKeys) -> bool:
    return _unet_place(keys) is not None


def read_unet(keys: StateDictKeys, hints: Hints) -> LoadPlan:
    place = _unet_place(keys) or ""
    part = keys.subset(place)
    layout = unet.CompVis.of(part)
    yaml = read_yaml(keys.yaml)
    config, facts = unet.read(part, layout, _file_config(hints, yaml))
    rules = add_prefixes(unet.table(config, layout), place)
    if place == UNET:
        rules, chosen = averaged(keys, hints, yaml, rules)
        facts |= chosen
    rules += [drop(name, reason) for name, reason in LEFT]
    return unet_reading(config, rules, facts)


def unet_reading(config: UNetConfig, rules: list[Rule], facts: dict[str, str]) -> LoadPlan:
    return LoadPlan("unet", config, rules, ModelCard(), {**facts, "preprocess": "none", "classes": "none"})


def draft_unet(net: UNet) -> Draft:
    layout = unet.CompVis(len(net.config.channel_multipliers), net.config.num_res_blocks)
    rules = add_prefixes(unet.table(net.config, layout), UNET)
    tensors = export_tensors(rules, cpu_state_dict(net), f"{TITLE} has no key for all of this network")
    return verify_round_trip(Draft(tensors, wrapper_key="state_dict"), net, read_unet, TITLE)


FORMATS = (
    Format("compvis", "latent-diffusion", TITLE, "torch", matches, read, draft),
    Format(
        "compvis-ema",
        "latent-diffusion",
        "CompVis, with averaged weights in addition",
        "torch",
        lambda keys: False,  # "compvis" reads it
        read,
        draft_averaged,
    ),
    Format("compvis", "unet", "CompVis (a UNet)", "torch", matches_unet, read_unet, draft_unet),
    Format(
        "compvis",
        "autoencoder",
        "CompVis (a first stage)",
        "torch",
        matches_stage,
        read_stage,
        draft_stage,
    ),
    Format(
        "taesd",
        "tiny-autoencoder",
        "TAESD (its author's names)",
        "torch",
        matches_tiny,
        read_tiny,
        draft_tiny,
        stem="taesd",
        halves=("decoder", "encoder"),
    ),
)
