"""What a checkpoint is: its format, and the plan to load it."""

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from triptych.errors import CheckpointError, TriptychError
from triptych.network import on_meta_device
from triptych.weights import linear_head, native, unwrapping
from triptych.weights.files.checkpoint import CheckpointFile
from triptych.weights.files.sanitize import printable
from triptych.weights.files.tensor_entry import TensorEntry
from triptych.weights.filling import rules_for
from triptych.weights.mapping import families
from triptych.weights.mapping.format import Format, Hints, LoadPlan, StateDictKeys, state_dict_shapes
from triptych.weights.mapping.registry import all_formats
from triptych.weights.mapping.round_trip import (
    SidecarFields,
    hints_from_sidecar,
    sidecar_path,
    with_sidecar,
)
from triptych.weights.mapping.rules import drop, plan_rules

# Parts of keys of networks that this package does not have.
_UNSUPPORTED = (
    ("joint_blocks.0.", "a Stable Diffusion 3"),
    ("transformer_blocks.0.norm1_context.", "a Stable Diffusion 3"),
    ("double_blocks.0.img_attn.", "a FLUX.1"),
    ("single_transformer_blocks.0.", "a FLUX.1"),
    ("controlnet_cond_embedding.", "a ControlNet"),
    ("input_hint_block.", "a ControlNet"),
    ("caption_projection.", "a PixArt"),
    ("motion_modules.", "an AnimateDiff"),
)
# What transformers and timm call the networks that are read.
_MODEL_TYPES = frozenset(
    {
        "vit",
        "vit_mae",
        "vit_msn",
        "deit",
        "dinov2",
        "dinov2_with_registers",
        "dinov3_vit",
        "swin",
        "swinv2",
        "upernet",
    }
    | {"timm_wrapper", "clip", "clip_text_model"}
)
_TIMM = re.compile(r"vit_|deit|flexivit|swin")
# Parts of keys that identify a checkpoint which no format matches.
_FAMILIAR = (
    ("pixel_level_module.", "a MaskFormer or Mask2Former"),
    ("decode_head.", "a segmentation network of another backbone or head"),
    ("attn.meta_mlp.", "timm's own SwinV2 (swinv2_cr)"),
    ("spatial_mlp", "a SwinMLP"),
    ("relative_position_bias_table", "a Swin Transformer (or BEiT)"),
    ("logit_scale", "a CLIP, or a Swin Transformer v2"),
    ("model.diffusion_model.", "a latent diffusion model"),
    ("first_stage_model.", "a latent diffusion model"),
    ("down_blocks.0.", "a diffusion UNet or autoencoder"),
    ("decoder_embed.", "a masked autoencoder with its decoder"),
    ("vision_model.", "a CLIP or SigLIP"),
    ("visual.", "a CLIP"),
    ("word_embeddings", "a language model"),
    ("layer1.0.conv1.", "a ResNet"),
    ("downsample_layers.", "a ConvNeXt"),
    ("stages.0.blocks.0.", "a ConvNeXt or another staged network"),
)


def plan_loading(
    checkpoint: CheckpointFile, hints: Hints
) -> tuple[CheckpointFile, LoadPlan, str, torch.dtype | None]:
    """Return how to load a checkpoint.

    Returns:
        The checkpoint, of the tensors of the network alone; the plan; the name of its format; and the dtype to load in
        (None: the file's own).

    Raises:
        CheckpointError: an unknown format, or a damaged config.
    """
    if native.is_ours(checkpoint) and hints.weights != "ema":
        plan, dtype = native.read(checkpoint)
        return checkpoint, plan, "triptych", dtype
    keys = StateDictKeys(checkpoint)
    if (title := unsupported(keys)) is not None and not native.is_ours(checkpoint):
        raise CheckpointError(f"{checkpoint.path} is {title}; this version of triptych does not support it")
    format = None if native.is_ours(checkpoint) else recognize(keys)
    plan = None
    choose = hints.weights is not None or unwrapping.passes_over_an_average(checkpoint)
    choose = choose and (format is None or format.name != "compvis")
    if choose and (result := _search(checkpoint, hints)) is not None:
        return result
    if hints.weights == "ema" and choose:
        raise CheckpointError(
            f"{checkpoint.path} has no averaged weights in addition to its own; leave weights out"
        )
    if format is not None:
        try:
            plan = _plan(checkpoint, format, hints)
        except CheckpointError as problem:
            _refuse_foreign(checkpoint, problem)
            raise
        if unwrapping.is_complete(checkpoint.entries, plan.rules):
            return checkpoint, plan, format.name, None
    result = None if native.is_ours(checkpoint) else _search(checkpoint, hints)
    if result is not None and (
        plan is None or plan.family == result[1].family
    ):  # no part of a larger network
        return result
    if plan is not None and format is not None:  # what does not fit is listed when it is filled
        _refuse_foreign(checkpoint)
        return checkpoint, plan, format.name, None
    raise CheckpointError(
        f"{checkpoint.path} is no network of a known format: it looks like {looks_like(keys)}; "
        "known are ViT, DeiT, DINO, Swin, UPerNet on Swin, DiT, latent diffusion, and Stable Diffusion 1 and 2"
    )


def foreign_title(settings: dict[str, Any]) -> str | None:
    """Return the network that a config.json names, if it is none of this package; else None."""
    config = settings.get("config", {})
    architecture, model_type = config.get("architecture"), config.get("model_type")
    if isinstance(architecture, str) and not _TIMM.match(architecture):
        return f"timm's {printable(architecture, 60)}"
    if isinstance(model_type, str) and model_type not in _MODEL_TYPES:
        classes = config.get("architectures")
        name = classes[0] if isinstance(classes, list) and classes else model_type
        return f"transformers' {printable(name, 60)}"
    return None


def _refuse_foreign(checkpoint: CheckpointFile, problem: Exception | None = None) -> None:
    """Refuse a checkpoint that is not read because it is another network, by the name in its config."""
    if (title := foreign_title(checkpoint.settings)) is not None:
        reason = "" if problem is None else str(problem).removeprefix(str(checkpoint.path)).lstrip(": ")
        raise CheckpointError(
            f"{checkpoint.path} is {title} (config.json); this package has no such network"
            + (f" ({reason})" if reason else "")
        ) from problem


def _search(checkpoint: CheckpointFile, hints: Hints) -> tuple[CheckpointFile, LoadPlan, str, None] | None:
    """Return the network that is somewhere in the file as a whole, or None."""
    results: list[tuple[str, dict[str, TensorEntry], LoadPlan, str]] = []
    for place, entries in unwrapping.candidates(checkpoint.everything, hints.weights):
        part = unwrapping.unwrapped(checkpoint, place, entries, ())
        format = recognize(StateDictKeys(part))
        if format is None or (results and _adds_nothing(entries, results[0][1])):
            continue
        try:
            plan = _plan(part, format, hints)
            if _fits(part, plan):
                results.append((place, entries, plan, format.name))
        except TriptychError:
            continue
        if len(results) == 2:
            break
    if not results:
        return None
    place, entries, plan, name = results[0]
    if hints.weights == "ema" and not unwrapping.is_averaged(place):
        return None
    return (
        unwrapping.unwrapped(checkpoint, place, entries, [other for other, *_ in results[1:]]),
        plan,
        name,
        None,
    )


def _adds_nothing(entries: dict[str, TensorEntry], network: dict[str, TensorEntry]) -> bool:
    """Return whether tensors are too few for another network, or a part of the one that was found."""
    used = set(map(id, network.values()))
    return 2 * len(entries) < len(network) or any(id(entry) in used for entry in entries.values())


def _fits(checkpoint: CheckpointFile, plan: LoadPlan) -> bool:
    """Return whether the tensors match the network exactly."""
    with on_meta_device():
        net = families.build(plan.config)
    try:
        plan_rules(rules_for(net, plan), checkpoint.shapes, state_dict_shapes(net), "")
    except TriptychError:
        return False
    return True


def _plan(checkpoint: CheckpointFile, format: Format, hints: Hints) -> LoadPlan:
    """Return the plan of a format's reader, with rules that drop what is no part of the network."""
    weights, sidecar = _read_sidecar(checkpoint)
    keys = StateDictKeys(checkpoint)
    try:
        if sidecar:
            hints = replace(hints_from_sidecar(sidecar), weights=hints.weights)
        plan = format.read(keys, hints)
        if sidecar:
            plan.config = with_sidecar(plan.config, sidecar)
            plan.facts |= {name.split(".")[-1]: sidecar_path(weights).name for name in sidecar}
    except TriptychError as problem:
        line = str(problem)
        if str(checkpoint.path) in line:
            raise
        raise CheckpointError(f"{checkpoint.path}: {line}") from problem
    except (TypeError, ValueError, KeyError, AttributeError, ArithmeticError) as problem:
        # Only the JSON next to the file is free-form enough to break a reader.
        raise CheckpointError(
            f"{checkpoint.path} read as {format.title}: its config.json is damaged ({printable(problem)}); "
            "fetch it again"
        ) from problem
    plan = linear_head.with_bias(plan, checkpoint.entries)
    plan = _with_linear_head(checkpoint, format, hints, plan)
    if plan.rules is not None and (foreign := unwrapping.foreign_keys(checkpoint.entries, plan.rules)):
        plan.rules = [*plan.rules, *(drop(key, "it is no part of the network") for key in foreign)]
        plan.notes.append(unwrapping.left_out(foreign))
    return plan


def _with_linear_head(checkpoint: CheckpointFile, format: Format, hints: Hints, plan: LoadPlan) -> LoadPlan:
    """Return the plan of a network without classes, with a classifier that the file has under another name."""
    if plan.family not in ("vit", "swin") or plan.rules is None or plan.config.num_classes:
        return plan
    foreign = unwrapping.foreign_keys(checkpoint.entries, plan.rules)
    name = linear_head.find(checkpoint.shapes, foreign)
    if name is None:
        return plan
    for usual in linear_head.USUAL_HEADS:
        keys = StateDictKeys(checkpoint)
        keys.shapes = {
            key.replace(name, usual) if key in foreign else key: s for key, s in keys.shapes.items()
        }
        try:
            other = linear_head.renamed(format.read(keys, hints), usual, name)
        except (TriptychError, TypeError, ValueError, KeyError, AttributeError):
            continue
        if other.config.num_classes:
            rest = unwrapping.foreign_keys(checkpoint.entries, other.rules or ())
            fitting = replace(other, rules=[*(other.rules or ()), *(drop(key, "") for key in rest)])
            if _fits(checkpoint, fitting):
                return other
    return plan


def _read_sidecar(checkpoint: CheckpointFile) -> tuple[Path, SidecarFields]:
    """Return the file of the weights and the fields in its sidecar, which are empty if there is none."""
    files = sorted({entry.path for entry in checkpoint.entries.values()})
    described = [file for file in files if sidecar_path(file).is_file()]  # of two halves, next to one
    weights = files[0] if len(files) == 1 else (described or [checkpoint.path])[0]
    path = sidecar_path(weights)
    if not path.is_file() or path.stat().st_size > 2**20:
        return weights, {}
    try:
        sidecar = json.loads(path.read_text())["triptych"]
    except (ValueError, KeyError, TypeError, RecursionError):
        return weights, {}  # JSON of another program
    return weights, sidecar if isinstance(sidecar, dict) else {}


def recognize(keys: StateDictKeys) -> Format | None:
    """Return the first format that matches, or None."""
    return next((format for format in all_formats() if format.matches(keys)), None)


def unsupported(keys: StateDictKeys) -> str | None:
    """Return the name of a known network that this package does not have, or None."""
    names = keys.shapes
    width = names.get("label_emb.0.0.weight", names.get("model.diffusion_model.label_emb.0.0.weight", ()))
    if keys.any_startswith("conditioner.embedders."):
        return "a Stable Diffusion XL"
    if width[1:] in ((2816,), (2560,)) or keys.any_startswith(("add_embedding.", "unet/add_embedding.")):
        return "a Stable Diffusion XL UNet"
    return next((title for part, title in _UNSUPPORTED if any(part in key for key in names)), None)


def _part_of_a_model(keys: StateDictKeys) -> str | None:
    """Return what a file is that another one needs or completes, or None."""
    half = _taesd_half(keys)
    if half is not None:
        return half
    if keys.any_endswith("lin4.model.1.weight"):
        return "the linear heads of LPIPS, which need the weights of VGG16"
    if (shape := _embedding_of(keys)) is not None:
        return f"a textual inversion of {shape[0]} vectors of width {shape[1]}, which adds a word to a text encoder"
    return None


def _taesd_half(keys: StateDictKeys) -> str | None:
    """Return which half of a TAESD a file is, or None."""
    if "1.conv.0.weight" in keys and "0.weight" in keys:
        half, other = "encoder", "decoder"
    elif "1.weight" in keys and "3.conv.0.weight" in keys:
        half, other = "decoder", "encoder"
    else:
        return None
    return f"the {half} of a TAESD; put the file of its {other} next to it, named alike with {other!r}"


def _embedding_of(keys: StateDictKeys) -> tuple[int, int] | None:
    """Return number and width of the vectors of a textual inversion, or None."""
    shapes = [(1, *shape) if len(shape) == 1 else shape for shape in keys.shapes.values()]
    named = all(name.split("/")[-1].startswith("<") for name in keys.shapes)
    if len(shapes) > 1 and named and len({shape[1:] for shape in shapes}) == 1 and len(shapes[0]) == 2:
        return sum(shape[0] for shape in shapes), shapes[0][1]
    if len(keys.shapes) > 2:
        return None
    names = ("string_to_param/*", "emb_params", "clip_l", "clip_g")
    for name, shape in keys.shapes.items():
        known = (
            name in names or name.startswith(("<", "string_to_")) or shape[-1:] in ((768,), (1024,), (1280,))
        )
        if known and len(shape) in (1, 2):
            return (1, *shape) if len(shape) == 1 else shape  # type: ignore[return-value]
    return None


def looks_like(keys: StateDictKeys) -> str:
    """Return a guess, in words, of what an unknown checkpoint is."""
    from triptych.weights.diffusion.adapters.numbered import is_numbered  # imports all tables of diffusion
    from triptych.weights.diffusion.adapters.tensors import methods

    if methods(keys.shapes):
        return "a LoRA, which changes another model: give that one, and this with --lora"
    if is_numbered(keys.shapes):
        return "a list of tensors without names, as some LoRAs are: give their model, and this with --lora"
    if (title := unsupported(keys)) is not None:
        return f"{title}; not supported"
    if (title := _part_of_a_model(keys)) is not None:
        return title
    if (title := foreign_title(keys.settings)) is not None:
        return f"{title} (config.json)"
    for part, title in _FAMILIAR:
        if any(part in key for key in keys.shapes):
            return title
    return (
        f"{len(keys.shapes)} tensors such as {', '.join(printable(key, 80) for key in list(keys.shapes)[:3])}"
    )
