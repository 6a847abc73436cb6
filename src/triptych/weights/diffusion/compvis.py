"""CompVis' and A1111's single files, .ckpt or .safetensors: `model.diffusion_model.`, `first_stage_model.`,
`cond_stage_model.`, and their parts by themselves."""

from dataclasses import replace
from typing import Any

import torch

from triptych.diffusion.config import ProcessConfig
from triptych.errors import UserError
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
from triptych.weights.diffusion.rule_helpers import inside, number, shortest
from triptych.weights.mapping.defaults import HALF
from triptych.weights.mapping.format import Draft, Format, Hints, Names, Reading, state
from triptych.weights.mapping.round_trip import checked, comparable
from triptych.weights.mapping.rules import Rule, drop, same, to_theirs

TITLE = "CompVis (Stable Diffusion and LDM in one file)"
UNET, STAGE, TEXT = "model.diffusion_model.", "first_stage_model.", "cond_stage_model."
CLASSES, MAP = f"{TEXT}embedding.weight", f"{TEXT}channel_mapper.weight"
EMA = "model_ema."
# What else training leaves in a file.
LEFT = (
    ("logvar", "only training reads it"),
    ("loss.*", "only training reads it"),
    ("lvlb_weights", "only training reads it"),
    ("depth_model.*", "the estimator of depth is another network"),
    ("v_pred", "it says what the network predicts"),
    ("ztsnr", "it says what the schedule is"),
)
# What stands in front of a text encoder's names, by what it is, where it is written.
PLACES = {
    "clip": f"{TEXT}transformer.text_model.",
    "openclip": f"{TEXT}model.",
    "ldm-bert": f"{TEXT}transformer.",
}
LAYOUTS = {"clip": text.HF, "openclip": text.OPENCLIP, "ldm-bert": text.BERT}


def recognises(names: Names) -> bool:
    return f"{UNET}input_blocks.0.0.weight" in names and names.starts(STAGE)


def read(names: Names, hints: Hints) -> Reading:
    if names.starts("conditioner.embedders."):
        raise UserError(
            f"{names.path} is a Stable Diffusion XL; this triptych reads Stable Diffusion 1 and 2, and LDM"
        )
    unet_names, stage_names = names.within(UNET), names.within(STAGE)
    said = read_yaml(names.yaml)
    layout = unet.CompVis.of(unet_names)
    unet_config, facts = unet.read(unet_names, layout, _said(hints, said))
    rules, chosen = averaged(names, hints, said, inside(unet.table(unet_config, layout), UNET, "network."))
    facts |= chosen
    stage = autoencoder.layout_of(stage_names)
    if stage is None:
        raise UserError(
            f"{names.path} has {STAGE}* of no first stage that this triptych knows; give a whole checkpoint"
        )
    stage_config, _ = autoencoder.read(stage_names, stage)
    rules += inside(autoencoder.table(stage_config, stage), STAGE, "autoencoder.")
    text_config, text_rules, more = _text(names, said)
    config, process_facts = _whole(names, hints, said, stage_config, unet_config, text_config)
    if config.semantic_map is not None:
        rules.append(same(MAP, "semantic_map.mix.weight"))
    rules += text_rules + _buffers(config) + [drop(name, reason) for name, reason in LEFT]
    facts |= more | process_facts
    preprocess = Preprocess(size=config.image_size, mean=HALF, std=HALF)
    facts |= {"preprocess": "convention: pixels in [-1, 1]", "classes": "none"}
    return Reading("latent-diffusion", config, rules, ModelCard(preprocess=preprocess), facts)


def _said(hints: Hints, said: ModelYaml) -> unet.Said:
    """What is known of a UNet beside its shapes, from what was written for this file, else from the YAML."""
    known = unet.hinted(hints)
    if hints.heads is not None or (heads := said.heads()) is None:
        return known
    return replace(known, heads=heads[0], head_dim=heads[1], where=said.name)


def averaged(
    names: Names, hints: Hints, said: ModelYaml, rules: list[Rule]
) -> tuple[list[Rule], dict[str, str]]:
    """The rules of a UNet for the weights that were chosen, the others dropped, and which these are.

    Raises:
        UserError: averaged ones were asked for and are not there.
    """
    if not names.starts(EMA):
        if hints.weights == "ema":
            raise UserError(f"{names.path} has no averaged weights ({EMA}*); leave weights out")
        return rules, {}
    if hints.weights == "raw" or (hints.weights is None and not said.averaged()):
        why = "as asked" if hints.weights else "convention, as web UIs do" if said.path is None else said.name
        unread = [drop(f"{EMA}*", "the weights beside them are read")]
        return rules + unread, {"weights": f"raw, not {EMA}* ({why})"}
    why = "as asked" if hints.weights else f"{said.name} does not say use_ema: false"
    rules = [replace(one, theirs=tuple(map(averaged_name, one.theirs))) for one in rules]
    rules += [drop(f"{EMA}{name}", "only training reads it") for name in ("decay", "num_updates")]
    return [*rules, drop(f"{UNET}*", "their average is read")], {"weights": f"ema, {EMA}* ({why})"}


def averaged_name(name: str) -> str:
    """What CompVis' `LitEma` calls the average of a weight: a buffer, whose name has no dots."""
    return EMA + name.removeprefix("model.").replace(".", "")


def _text(
    names: Names, said: ModelYaml
) -> tuple[TextConfig | ClassTokenConfig | None, list[Rule], dict[str, str]]:
    """What reads the prompt."""
    if CLASSES in names:
        return text.read_classes(names, CLASSES), [same(CLASSES, "text_encoder.classes.weight")], {}
    for place in (f"{TEXT}transformer.", f"{TEXT}model.", TEXT):
        part = names.within(place)
        if (found := text.layout_of(part)) is not None:
            layout, prefix = found
            config, facts = text.read(part.within(prefix), layout)
            if layout is text.OPENCLIP and (skip := said.skipped()) is not None and skip < config.depth:
                config, facts["text_encoder.skip_last_blocks"] = (
                    replace(config, skip_last_blocks=skip),
                    said.name,
                )
            if layout is text.BERT and (boxes := said.boxes()) is not None:
                config, facts["text_encoder.boxes"] = replace(config, boxes=boxes), said.name
            return config, inside(text.table(config, layout), place + prefix, "text_encoder."), facts
    return None, [], {}


def _whole(
    names: Names,
    hints: Hints,
    yaml: ModelYaml,
    stage: AutoencoderConfig,
    net: UNetConfig,
    reader: TextConfig | ClassTokenConfig | None,
) -> tuple[LatentDiffusionConfig, dict[str, str]]:
    """The config of all parts together: process, scale and what lies beside the latents."""
    latents = stage.latent_channels
    published = [
        known
        for known in latent_diffusion_config.SIZES.values()
        if comparable(replace(known.network, latent_size=net.latent_size)) == comparable(net)
        and known.autoencoder.latent_channels == latents
        and _kind(known.text_encoder) == _kind(reader)
    ]
    beside, map_config = "semantic_map", None
    if MAP in names:
        channels, classes = names.shape(MAP, 4)[:2]
        map_config = SemanticMapConfig(num_classes=classes, channels=channels)
    else:
        beside = beside_of(names, net.in_channels, latents, reader is not None)
    low = "low_scale_model." if names.starts("low_scale_model.") else ""
    upscales = low or (beside == "image" and net.num_classes > 0)
    prediction, facts = _prediction(names, hints, yaml, net, beside, bool(upscales))
    said = [known for known in published if known.process.prediction == prediction] or published
    if said:
        usual = replace(said[0].process, prediction=prediction)
        net = replace(net, latent_size=said[0].network.latent_size)
        stage = replace(stage, image_size=said[0].autoencoder.image_size)
    else:
        net = replace(net, latent_size=yaml.latent_size() or net.latent_size)
        usual = ProcessConfig(prediction=prediction)
        if _kind(reader) in ("none", "class"):  # the paper's models without text
            usual = replace(usual, beta_start=0.0015, beta_end=0.0195)
    process, facts["process"] = schedule.read(names, "", yaml.process(usual), yaml.name)
    low_res_process = None
    if upscales:
        noise = (
            said[0].low_res_process
            if said and said[0].low_res_process
            else ProcessConfig(beta_start=1e-4, beta_end=0.02)
        )
        noise = yaml.process(noise, "low_scale_config", "params", "noise_schedule_config")
        low_res_process, facts["low_res_process"] = schedule.read(names, low, noise, yaml.name)
    stage, facts["scale"] = _scaled(names, yaml, stage, [known.autoencoder.scale for known in said])
    return LatentDiffusionConfig(
        autoencoder=stage,
        network=net,
        text_encoder=reader,
        process=process,
        concat=beside,
        semantic_map=map_config,
        low_res_process=low_res_process,
    ), facts


def _kind(config: TextConfig | ClassTokenConfig | ImageTokensConfig | None) -> str:
    if config is None:
        return "none"
    return config.type if isinstance(config, TextConfig) else "class"


def beside_of(names: Names, channels: int, latents: int, prompted: bool) -> ConcatConditioning:
    """What a UNet of so many channels is given beside its latents."""
    masks: ConcatConditioning = "mask+masked_image" if prompted else "masked_image+mask"
    kinds: tuple[ConcatConditioning, ...] = ("none", masks, "depth", "image")
    for kind in kinds:
        times, more = CONCAT_CHANNELS[kind]
        if channels == latents * (1 + times) + more:
            return kind
    raise UserError(
        f"{names.path} has a UNet of {channels} channels for latents of {latents}; needed are {latents}, "
        f"{2 * latents + 1} (a mask), {latents + 1} (depth) or {latents + 3} (a picture)"
    )


def _prediction(
    names: Names, hints: Hints, yaml: ModelYaml, net: UNetConfig, beside: ConcatConditioning, upscales: bool
) -> tuple[Any, dict[str, str]]:
    """eps or v. Files of the second Stable Diffusion are shaped alike for both, and mostly do not tell."""
    if hints.prediction is not None:
        return hints.prediction, {"prediction": "as told"}
    if "v_pred" in names:
        return "v", {"prediction": "v_pred in the file"}
    spelled = str(names.metadata.get("modelspec.prediction_type", "")).lower()
    if spelled in ("v", "v_prediction", "epsilon", "eps"):
        return ("v" if spelled.startswith("v") else "eps"), {
            "prediction": "modelspec.prediction_type in the file"
        }
    if (said := yaml.prediction()) is not None:
        return said, {"prediction": yaml.name}
    if yaml.path is not None:
        return "eps", {"prediction": f"{yaml.name} leaves it at CompVis' default"}
    if upscales:
        return "v", {"prediction": "convention: upscalers predict v"}
    if net.projection == "linear" and net.context_dim and beside == "none":
        raise UserError(
            f"{names.path} is a Stable Diffusion 2, whose shapes do not tell what it predicts; load it with "
            'prediction="v" (768 pixels) or prediction="eps" (512 pixels, base), --prediction v or eps'
        )
    return "eps", {"prediction": "convention"}


def _scaled(
    names: Names, yaml: ModelYaml, stage: AutoencoderConfig, usual: list[Any]
) -> tuple[AutoencoderConfig, str]:
    """The first stage with the scale of its latents: `scale_factor` in the file, else the published one."""
    given = names.numbers("scale_factor", 64)
    if given is not None and given.numel() == 1:
        return replace(stage, scale=shortest(given)), "scale_factor in the file"
    if (said := yaml.scale()) is not None:
        return replace(stage, scale=said), yaml.name
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
        drop("scale_factor", "it is the first stage's scale", number(float(scale)) if known else None),  # type: ignore
    ]


def draft_averaged(net: LatentDiffusion) -> Draft:
    """With its UNet twice, for CompVis' own scripts: without `use_ema: False` they sample from the averages, and where
    a file has none from random numbers."""
    made = draft(net)
    twins = {averaged_name(name): t for name, t in made.tensors.items() if name.startswith(UNET)}
    made.tensors |= twins | {
        f"{EMA}decay": torch.tensor(0.9999),
        f"{EMA}num_updates": torch.tensor(0, dtype=torch.int),
    }
    return made


def draft(net: LatentDiffusion) -> Draft:
    config = net.config
    if not isinstance(config.autoencoder, AutoencoderConfig):
        raise UserError(f"{TITLE} has no place for a tiny autoencoder; choose triptych's own format")
    if not isinstance(config.network, UNetConfig):
        raise UserError(f"{TITLE} has no place for a DiT; choose diffusers' or triptych's own format")
    if isinstance(config.text_encoder, ImageTokensConfig):
        raise UserError(f"{TITLE} has no place for what reads pictures; choose triptych's own format")
    if config.process.schedule == "flow":
        raise UserError(f"{TITLE} cannot say a flow; choose triptych's own format")
    layout = unet.CompVis(len(config.network.channel_multipliers), config.network.num_res_blocks)
    rules = inside(unet.table(config.network, layout), UNET, "network.")
    rules += inside(autoencoder.table(config.autoencoder, autoencoder.COMPVIS), STAGE, "autoencoder.")
    if config.semantic_map is not None:
        rules.append(same(MAP, "semantic_map.mix.weight"))
    if isinstance(config.text_encoder, ClassTokenConfig):
        rules.append(same(CLASSES, "text_encoder.classes.weight"))
    elif config.text_encoder is not None:
        if config.text_encoder.num_added_tokens:
            raise UserError(
                f"{TITLE} has no place for added words; save them with weights.diffusion.embeddings.save_embedding, "
                "or choose triptych's own format"
            )
        layout_of_text, place = LAYOUTS[config.text_encoder.type], PLACES[config.text_encoder.type]
        rules += inside(text.table(config.text_encoder, layout_of_text), place, "text_encoder.")
        if config.text_encoder.type == "clip":
            length = config.text_encoder.max_length
            rules.append(
                drop(f"{place}embeddings.position_ids", "it counts", lambda: torch.arange(length)[None])
            )
    rules = [one for one in rules if one.ours or one.restore] + _buffers(config)
    tensors = to_theirs(rules, state(net), f"{TITLE} has no place for all of this network")
    return checked(Draft(tensors, nest="state_dict"), net, read, TITLE)


# ------------------------------------------------------------------------------------------- parts alone


def _first_stage(names: Names) -> Names:
    return names.within(STAGE) if names.starts(STAGE) else names


def recognises_stage(names: Names) -> bool:
    return autoencoder.layout_of(_first_stage(names)) is autoencoder.COMPVIS


def read_stage(names: Names, hints: Hints) -> Reading:
    prefix = STAGE if names.starts(STAGE) else ""
    config, facts = autoencoder.read(_first_stage(names), autoencoder.COMPVIS)
    if (published := autoencoder.scaled(config)) is not None:
        sizes = {"scale": published.scale, "shift": published.shift, "image_size": published.image_size}
        config, facts["scale"] = replace(config, **sizes), f"convention: {published.scale}"
    rules = inside(autoencoder.table(config, autoencoder.COMPVIS), prefix)
    return stage_reading(config, rules, facts)


def stage_reading(config: Any, rules: list[Rule], facts: dict[str, str]) -> Reading:
    """A first stage by itself, with the card that all have."""
    preprocess = Preprocess(size=config.image_size, crop=1.0, mean=HALF, std=HALF)
    family = "autoencoder" if isinstance(config, AutoencoderConfig) else "tiny-autoencoder"
    facts = {**facts, "preprocess": "convention: pixels in [-1, 1]", "classes": "none"}
    return Reading(family, config, rules, ModelCard(preprocess=preprocess), facts)


def draft_stage(net: Autoencoder) -> Draft:
    rules = autoencoder.table(net.config, autoencoder.COMPVIS)
    tensors = to_theirs(rules, state(net), f"{TITLE} has no place for all of this network")
    return checked(Draft(tensors, nest="state_dict"), net, read_stage, TITLE)


def recognises_tiny(names: Names) -> bool:
    return autoencoder.tiny_layout(names) == "taesd"


def read_tiny(names: Names, hints: Hints) -> Reading:
    config = autoencoder.read_tiny(names, "taesd")
    return stage_reading(config, autoencoder.tiny_table(config, "taesd"), {"scale": "convention: 1"})


def draft_tiny(net: TinyAutoencoder) -> Draft:
    rules = autoencoder.tiny_table(net.config, "taesd")
    tensors = to_theirs(rules, state(net), "taesd has no place for all of this network")
    return checked(Draft(tensors), net, read_tiny, "taesd")


def _unet_place(names: Names) -> str | None:
    places = (UNET, "diffusion_model.", "")
    return next((place for place in places if f"{place}input_blocks.0.0.weight" in names), None)


def recognises_unet(names: Names) -> bool:
    return _unet_place(names) is not None


def read_unet(names: Names, hints: Hints) -> Reading:
    place = _unet_place(names) or ""
    part = names.within(place)
    layout = unet.CompVis.of(part)
    said = read_yaml(names.yaml)
    config, facts = unet.read(part, layout, _said(hints, said))
    rules = inside(unet.table(config, layout), place)
    if place == UNET:
        rules, chosen = averaged(names, hints, said, rules)
        facts |= chosen
    rules += [drop(name, reason) for name, reason in LEFT]
    return unet_reading(config, rules, facts)


def unet_reading(config: UNetConfig, rules: list[Rule], facts: dict[str, str]) -> Reading:
    return Reading("unet", config, rules, ModelCard(), {**facts, "preprocess": "none", "classes": "none"})


def draft_unet(net: UNet) -> Draft:
    layout = unet.CompVis(len(net.config.channel_multipliers), net.config.num_res_blocks)
    rules = inside(unet.table(net.config, layout), UNET)
    tensors = to_theirs(rules, state(net), f"{TITLE} has no place for all of this network")
    return checked(Draft(tensors, nest="state_dict"), net, read_unet, TITLE)


FORMATS = (
    Format("compvis", "latent-diffusion", TITLE, "torch", recognises, read, draft),
    Format(
        "compvis-ema",
        "latent-diffusion",
        "CompVis, with averaged weights beside",
        "torch",
        lambda names: False,  # "compvis" reads it
        read,
        draft_averaged,
    ),
    Format("compvis", "unet", "CompVis (a UNet)", "torch", recognises_unet, read_unet, draft_unet),
    Format(
        "compvis",
        "autoencoder",
        "CompVis (a first stage)",
        "torch",
        recognises_stage,
        read_stage,
        draft_stage,
    ),
    Format(
        "taesd",
        "tiny-autoencoder",
        "TAESD (its author's names)",
        "torch",
        recognises_tiny,
        read_tiny,
        draft_tiny,
    ),
)
