"""timm's SwinTransformer and SwinTransformerV2. Patch merging is at the start of a stage, as here."""

import re
from typing import Any

from triptych.errors import CheckpointError
from triptych.model_card import ModelCard
from triptych.models.configs.swin import SwinConfig, windows_of
from triptych.models.swin import Swin
from triptych.weights.mapping.defaults import (
    class_names,
    from_label_names,
    from_pretrained_cfg,
    imagenet_preprocess,
    parse_size,
    to_pretrained_cfg,
)
from triptych.weights.mapping.format import Draft, Format, Hints, LoadPlan, StateDictKeys, cpu_state_dict
from triptych.weights.mapping.round_trip import verify_round_trip
from triptych.weights.mapping.rules import export_tensors
from triptych.weights.mapping.timm_architecture import architecture_of
from triptych.weights.swin.infer_config import SwinFileConfig, fit_windows, num_stages, read_sizes
from triptych.weights.swin.key_layout import Layout, classifier, table

TITLE = "timm"
HEAD = "head.fc"
TIMM = Layout(
    embed="patch_embed.proj",
    embed_norm="patch_embed.norm",
    block=lambda stage: f"layers.{stage}.blocks.{{i}}.",
    merge=lambda stage: f"layers.{stage}.downsample",
)

# swinv2_base_window12to24_192to384: windows and image sizes, of pre-training first.
_V2 = re.compile(r"swinv2_\w+?_window(\d+)(?:to(\d+))?_(\d+)(?:to(\d+))?")


def matches(keys: StateDictKeys) -> bool:
    ours = "layers.1.downsample.reduction.weight" in keys
    return (
        "layers.0.blocks.0.attn.qkv.weight" in keys
        and "patch_embed.proj.weight" in keys
        and (f"{HEAD}.weight" in keys or (ours and "layers.0.downsample.reduction.weight" not in keys))
    )


def read(keys: StateDictKeys, hints: Hints) -> LoadPlan:
    settings = keys.settings.get("config", {})
    architecture, where = architecture_of(keys)
    args = settings.get("model_args") or {}
    cfg = settings.get("pretrained_cfg") or (settings if "input_size" in settings else {})
    if args.get("act_layer", "gelu") != "gelu":
        raise CheckpointError(
            f"{keys.path}: config.json says act_layer {args['act_layer']!r}; needed is gelu"
        )
    file_config = _file_config(architecture, args, cfg, num_stages(keys, TIMM), where)
    config, facts = read_sizes(keys, TIMM, hints, file_config, HEAD)
    # Published networks resize the shorter side to 1 / 0.9 of the size; at 384 they use the full image.
    convention = imagenet_preprocess(
        config.image_size, 1.0 if min(config.image_size) >= 384 else 0.9, "bicubic"
    )
    preprocess, facts["preprocess"] = from_pretrained_cfg(cfg, convention)
    labels, facts["classes"] = class_names(config.num_classes, from_label_names(settings, cfg), "config.json")
    license = cfg.get("license") if isinstance(cfg.get("license"), str) else None
    card = ModelCard(preprocess=preprocess, classes=labels, license=license)
    return LoadPlan("swin", config, [*table(config, TIMM), *classifier(config, HEAD)], card, facts)


def _file_config(
    architecture: str, args: dict[str, Any], cfg: dict[str, Any], stages: int, where: str
) -> SwinFileConfig:
    """Return the values in config.json. The architecture's name has some that `model_args` lacks."""
    window, before = args.get("window_size"), args.get("pretrained_window_sizes")
    size = parse_size(args.get("img_size")) or parse_size(cfg.get("input_size"))
    pretrained = None if before is None else windows_of(before, stages)
    if named := _V2.match(architecture):
        first, second, old, new = (int(number) if number else None for number in named.groups())
        size, window = size or parse_size(new or old), window or second or first
        if second and pretrained is None:
            strides = [4 * 2**stage for stage in range(stages)]
            pretrained = fit_windows(windows_of(first, stages), (old or 1, old or 1), strides, "axis")
    return SwinFileConfig(
        where="config.json" if args or cfg or not architecture else where,
        image_size=size,
        window_size=None if window is None else windows_of(_for_all(window, stages), stages),
        pretrained=pretrained,
        fit="never" if args.get("always_partition") else "axis",
    )


def _for_all(window: Any, stages: int) -> Any:
    """Two numbers are height and width in timm, even for a network of two stages."""
    two = isinstance(window, list) and len(window) == 2
    return [window] * stages if two and all(isinstance(side, int) for side in window) else window


def settings(net: Swin) -> dict[str, Any]:
    """Return config.json, preprocessing and class names included.

    Raises:
        CheckpointError: timm would build other windows.
    """
    config = net.config
    result: dict[str, Any] = {
        "architecture": "swin_tiny_patch4_window7_224" if config.version == 1 else "swinv2_tiny_window8_256",
        "num_classes": config.num_classes,
        "num_features": config.widths[-1],
        "global_pool": "avg",
        "model_args": {
            "img_size": list(config.image_size),
            "patch_size": config.patch_size,
            "in_chans": config.in_channels,
            "embed_dim": config.embed_dim,
            "depths": list(config.depths),
            "num_heads": list(config.num_heads),
            "window_size": window_size(config),
            "mlp_ratio": config.mlp_ratio,
            "qkv_bias": config.qkv_bias != "none",
        },
        "pretrained_cfg": {
            **to_pretrained_cfg(net.card.preprocess),
            "num_classes": config.num_classes,
            "first_conv": "patch_embed.proj",
            "classifier": HEAD,
        },
    }
    if config.version == 2:
        before = config.pretrained_window_size or ((0, 0),) * len(config.depths)
        result["model_args"]["pretrained_window_sizes"] = [list(window) for window in before]
    if net.card.classes is not None:
        result["label_names"] = list(net.card.classes)
    return result


def window_size(config: SwinConfig) -> Any:
    """Return timm's argument: one window for all stages, or in version 1 one for each. timm reduces them to the maps.

    Raises:
        CheckpointError: timm would build other windows.
    """
    stages = len(config.depths)
    h, w = (max(window[axis] for window in config.window_size) for axis in (0, 1))
    options: list[Any] = [h if h == w else [h, w]]
    if config.version == 1 and stages != 2:
        options.append([list(window) for window in config.window_size])
    for option in options:
        windows = windows_of(_for_all(option, stages), stages)
        if fit_windows(windows, config.image_size, config.strides, "axis") == config.window_size:
            return option
    raise CheckpointError(
        f"timm cannot store windows {config.window_size} for images of {config.image_size[0]}x{config.image_size[1]}: "
        "it makes none larger than a map, and version 2's are one for all stages; choose triptych's own format"
    )


def draft(net: Swin) -> Draft:
    config = net.config
    rules = [*table(config, TIMM), *classifier(config, HEAD)]
    tensors = export_tensors(rules, cpu_state_dict(net), f"{TITLE} has no key for all of this network")
    return verify_round_trip(Draft(tensors, {"config": settings(net)}), net, read, TITLE)


FORMAT = Format("timm", "swin", TITLE, "folder", matches, read, draft)
