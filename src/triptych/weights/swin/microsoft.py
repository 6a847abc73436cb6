"""Swin's own repository, .pth: {"model": tensors, "config": a yacs node}, and SimMIM's pre-trained networks.

Merging stands at the end of a stage there, which is the start of the next one here. The file holds tables that
follow from the sizes, and so tells windows and image size; a last stage whose map is smaller than the window has a
smaller one, as built (microsoft/SimMIM#30).
"""

from dataclasses import replace
from typing import Any

from triptych.errors import CheckpointError
from triptych.model_card import ModelCard, Preprocess
from triptych.models.configs.swin import maps_at, windows_of
from triptych.models.swin import Swin
from triptych.weights.mapping.defaults import (
    class_names,
    describe_preprocess,
    imagenet_preprocess,
    parse_size,
)
from triptych.weights.mapping.format import Draft, Format, Hints, LoadPlan, StateDictKeys, cpu_state_dict
from triptych.weights.mapping.round_trip import verify_round_trip
from triptych.weights.mapping.rules import drop, export_tensors
from triptych.weights.swin.infer_config import SwinFileConfig, num_stages, read_sizes, single_window
from triptych.weights.swin.key_layout import Layout, classifier, prefix_layout, table

TITLE = "Microsoft Swin-Transformer (.pth)"

MICROSOFT = Layout(
    embed="patch_embed.proj",
    embed_norm="patch_embed.norm",
    block=lambda stage: f"layers.{stage}.blocks.{{i}}.",
    merge=lambda stage: f"layers.{stage - 1}.downsample",
    saved=("index", "coordinates", "mask"),
)
# SimMIM's first SwinV2s have another name for the small MLP.
OLD = replace(MICROSOFT, bias_mlp=("attn.rpe_mlp.0", "attn.rpe_mlp.2"))


def matches(keys: StateDictKeys) -> bool:
    return any(
        f"{prefix}layers.0.blocks.0.attn.qkv.weight" in keys and f"{prefix}patch_embed.proj.weight" in keys
        for prefix in ("", "encoder.")
    )


def read(keys: StateDictKeys, hints: Hints) -> LoadPlan:
    prefix = "" if "patch_embed.proj.weight" in keys else "encoder."
    layout = prefix_layout(OLD if keys.any_endswith(".attn.rpe_mlp.0.weight") else MICROSOFT, prefix)
    yacs = _node(keys.settings.get("inside"), "config")
    config, facts = read_sizes(keys, layout, hints, _file_config(yacs, num_stages(keys, layout)))
    rules = [*table(config, layout), *classifier(config)]
    if prefix:
        reason = "only masked pre-training uses it"
        rules += [drop(f"{prefix}mask_token", reason), drop("decoder.*", reason)]
    preprocess, facts["preprocess"] = _preprocess(yacs, config.image_size)
    labels, facts["classes"] = class_names(config.num_classes, None, "")
    return LoadPlan("swin", config, rules, ModelCard(preprocess=preprocess, classes=labels), facts)


def _node(node: Any, *path: str) -> dict[str, Any]:
    """Return a node of a nested config; empty if there is none."""
    for key in path:
        node = node.get(key) if isinstance(node, dict) else None
    return node if isinstance(node, dict) else {}


def _file_config(yacs: dict[str, Any], stages: int) -> SwinFileConfig:
    """Return the values in the config of the training run, which is pickled with the weights."""
    model_type = _node(yacs, "MODEL").get("TYPE")
    sizes = _node(yacs, "MODEL", "SWINV2" if model_type == "swinv2" else "SWIN")
    if sizes.get("QK_SCALE") is not None:
        raise CheckpointError(
            f"config in the file says QK_SCALE {sizes['QK_SCALE']!r}; needed is none, for the width of a head"
        )
    window, before = sizes.get("WINDOW_SIZE"), sizes.get("PRETRAINED_WINDOW_SIZES")
    return SwinFileConfig(
        where="config in the file",
        image_size=parse_size(_node(yacs, "DATA").get("IMG_SIZE")),
        window_size=None if window is None else windows_of(window, stages),
        pretrained=None if before is None else windows_of(before, stages),
    )


def _preprocess(yacs: dict[str, Any], size: tuple[int, int]) -> tuple[Preprocess, str]:
    """Return the preprocessing of its `build_transform`.

    The shorter side is resized to 256 / 224 of the size and cropped; without TEST.CROP the image is squashed, as for
    all networks that were fine-tuned at 384."""
    interpolation = _node(yacs, "DATA").get("INTERPOLATION", "bicubic")
    crop = _node(yacs, "TEST").get("CROP", min(size) < 384 or bool(yacs))
    preprocess = imagenet_preprocess(size, 0.875, interpolation if interpolation == "bilinear" else "bicubic")
    if not crop:
        preprocess = Preprocess(size=size, crop=1.0, mode="squash", interpolation=preprocess.interpolation)
    return preprocess, "config in the file" if yacs else f"convention: {describe_preprocess(preprocess)}"


def draft(net: Swin) -> Draft:
    config = net.config
    single_window(config, TITLE)
    for (rows, columns), (h, w) in zip(maps_at(config, config.image_size), config.window_size, strict=True):
        if rows % h or columns % w:
            raise CheckpointError(
                f"{TITLE} cannot store images of {config.image_size[0]}x{config.image_size[1]}: a map of "
                f"{rows}x{columns} does not divide into windows of {h}x{w}; load with another image_size"
            )
    rules = [*table(config, MICROSOFT), *classifier(config)]
    tensors = export_tensors(rules, cpu_state_dict(net), f"{TITLE} has no key for all of this network")
    return verify_round_trip(Draft(tensors, wrapper_key="model"), net, read, TITLE)


FORMAT = Format("microsoft", "swin", TITLE, "torch", matches, read, draft)
