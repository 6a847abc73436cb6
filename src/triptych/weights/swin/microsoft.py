"""Swin's own repository, .pth: {"model": tensors, "config": a yacs node}, and what SimMIM pre-trained with it.

Merging stands at the end of a stage there, which is the start of the next one here. The file holds tables that
follow from the sizes, and so tells windows and image size; a last stage whose map is smaller than the window has a
smaller one, as built (microsoft/SimMIM#30).
"""

from dataclasses import replace
from typing import Any

from triptych.errors import UserError
from triptych.model_card import ModelCard, Preprocess
from triptych.models.configs.swin import maps_at, windows_of
from triptych.models.swin import Swin
from triptych.weights.mapping.defaults import class_names, describe, imagenet_style, pair
from triptych.weights.mapping.format import Draft, Format, Hints, Names, Reading, state
from triptych.weights.mapping.round_trip import checked
from triptych.weights.mapping.rules import drop, to_theirs
from triptych.weights.swin.infer_config import Said, read_sizes, single, stages_of
from triptych.weights.swin.key_layout import Layout, classifier, inside, table

TITLE = "Microsoft Swin-Transformer (.pth)"

MICROSOFT = Layout(
    embed="patch_embed.proj",
    embed_norm="patch_embed.norm",
    block=lambda stage: f"layers.{stage}.blocks.{{i}}.",
    merge=lambda stage: f"layers.{stage - 1}.downsample",
    saved=("index", "coordinates", "mask"),
)
# SimMIM's first SwinV2s called the small MLP otherwise.
OLD = replace(MICROSOFT, bias_mlp=("attn.rpe_mlp.0", "attn.rpe_mlp.2"))


def recognises(names: Names) -> bool:
    return any(
        f"{prefix}layers.0.blocks.0.attn.qkv.weight" in names and f"{prefix}patch_embed.proj.weight" in names
        for prefix in ("", "encoder.")
    )


def read(names: Names, hints: Hints) -> Reading:
    prefix = "" if "patch_embed.proj.weight" in names else "encoder."
    layout = inside(OLD if names.any(".attn.rpe_mlp.0.weight") else MICROSOFT, prefix)
    yacs = _node(names.settings.get("inside"), "config")
    config, facts = read_sizes(names, layout, hints, _said(yacs, stages_of(names, layout)))
    rules = [*table(config, layout), *classifier(config)]
    if prefix:
        reason = "only masked pre-training reads it"
        rules += [drop(f"{prefix}mask_token", reason), drop("decoder.*", reason)]
    preprocess, facts["preprocess"] = _preprocess(yacs, config.image_size)
    labels, facts["classes"] = class_names(config.num_classes, None, "")
    return Reading("swin", config, rules, ModelCard(preprocess=preprocess, classes=labels), facts)


def _node(found: Any, *path: str) -> dict[str, Any]:
    """A node of a nested config; empty where there is none."""
    for key in path:
        found = found.get(key) if isinstance(found, dict) else None
    return found if isinstance(found, dict) else {}


def _said(yacs: dict[str, Any], stages: int) -> Said:
    """What a training run's own config, pickled beside the weights, says."""
    kind = _node(yacs, "MODEL").get("TYPE")
    sizes = _node(yacs, "MODEL", "SWINV2" if kind == "swinv2" else "SWIN")
    window, before = sizes.get("WINDOW_SIZE"), sizes.get("PRETRAINED_WINDOW_SIZES")
    return Said(
        where="config in the file",
        image_size=pair(_node(yacs, "DATA").get("IMG_SIZE")),
        window_size=None if window is None else windows_of(window, stages),
        pretrained=None if before is None else windows_of(before, stages),
    )


def _preprocess(yacs: dict[str, Any], size: tuple[int, int]) -> tuple[Preprocess, str]:
    """As `build_transform` there: short side to 256 / 224 of the size and cropped, or stretched without TEST.CROP, as
    all that were fine-tuned at 384 are."""
    interpolation = _node(yacs, "DATA").get("INTERPOLATION", "bicubic")
    crop = _node(yacs, "TEST").get("CROP", min(size) < 384 or bool(yacs))
    made = imagenet_style(size, 0.875, interpolation if interpolation == "bilinear" else "bicubic")
    if not crop:
        made = Preprocess(size=size, crop=1.0, mode="squash", interpolation=made.interpolation)
    return made, "config in the file" if yacs else f"convention: {describe(made)}"


def draft(net: Swin) -> Draft:
    config = net.config
    single(config, TITLE)
    for (rows, columns), (h, w) in zip(maps_at(config, config.image_size), config.window_size, strict=True):
        if rows % h or columns % w:
            raise UserError(
                f"{TITLE} cannot say images of {config.image_size[0]}x{config.image_size[1]}: a map of "
                f"{rows}x{columns} does not divide into windows of {h}x{w}; load with another image_size"
            )
    rules = [*table(config, MICROSOFT), *classifier(config)]
    tensors = to_theirs(rules, state(net), f"{TITLE} has no place for all of this network")
    return checked(Draft(tensors, nest="model"), net, read, TITLE)


FORMAT = Format("microsoft", "swin", TITLE, "torch", recognises, read, draft)
