"""timm's SwinTransformer and SwinTransformerV2, whose merging stands at the start of a stage as here."""

import re
from typing import Any

from triptych.errors import UserError
from triptych.model_card import ModelCard
from triptych.models.configs.swin import SwinConfig, windows_of
from triptych.models.swin import Swin
from triptych.weights.mapping.defaults import (
    class_names,
    from_label_names,
    from_pretrained_cfg,
    imagenet_style,
    pair,
    to_pretrained_cfg,
)
from triptych.weights.mapping.format import Draft, Format, Hints, Names, Reading, state
from triptych.weights.mapping.round_trip import checked
from triptych.weights.mapping.rules import to_theirs
from triptych.weights.swin.infer_config import Said, fitted, read_sizes, stages_of
from triptych.weights.swin.key_layout import Layout, classifier, table

TITLE = "timm"
HEAD = "head.fc"
TIMM = Layout(
    embed="patch_embed.proj",
    embed_norm="patch_embed.norm",
    block=lambda stage: f"layers.{stage}.blocks.{{i}}.",
    merge=lambda stage: f"layers.{stage}.downsample",
)

# swinv2_base_window12to24_192to384: windows and sizes, of pre-training too.
_V2 = re.compile(r"swinv2_\w+?_window(\d+)(?:to(\d+))?_(\d+)(?:to(\d+))?")


def recognises(names: Names) -> bool:
    ours = "layers.1.downsample.reduction.weight" in names
    return (
        "layers.0.blocks.0.attn.qkv.weight" in names
        and "patch_embed.proj.weight" in names
        and (f"{HEAD}.weight" in names or (ours and "layers.0.downsample.reduction.weight" not in names))
    )


def read(names: Names, hints: Hints) -> Reading:
    settings = names.settings.get("config", {})
    architecture = settings.get("architecture") if isinstance(settings.get("architecture"), str) else ""
    args = settings.get("model_args") or {}
    cfg = settings.get("pretrained_cfg") or (settings if "input_size" in settings else {})
    if args.get("act_layer", "gelu") != "gelu":
        raise UserError(f"{names.path}: config.json says act_layer {args['act_layer']!r}; needed is gelu")
    said = _said(architecture or "", args, cfg, stages_of(names, TIMM))
    config, facts = read_sizes(names, TIMM, hints, said, HEAD)
    # Published ones resize the short side to 1 / 0.9 of the size; at 384 they take the whole picture.
    convention = imagenet_style(config.image_size, 1.0 if min(config.image_size) >= 384 else 0.9, "bicubic")
    preprocess, facts["preprocess"] = from_pretrained_cfg(cfg, convention)
    labels, facts["classes"] = class_names(config.num_classes, from_label_names(settings, cfg), "config.json")
    license = cfg.get("license") if isinstance(cfg.get("license"), str) else None
    card = ModelCard(preprocess=preprocess, classes=labels, license=license)
    return Reading("swin", config, [*table(config, TIMM), *classifier(config, HEAD)], card, facts)


def _said(architecture: str, args: dict[str, Any], cfg: dict[str, Any], stages: int) -> Said:
    """What config.json says; of what `model_args` leaves out the architecture's name says some."""
    window, before = args.get("window_size"), args.get("pretrained_window_sizes")
    size = pair(args.get("img_size")) or pair(cfg.get("input_size"))
    pretrained = None if before is None else windows_of(before, stages)
    if named := _V2.match(architecture):
        first, second, old, new = (int(number) if number else None for number in named.groups())
        size, window = size or pair(new or old), window or second or first
        if second and pretrained is None:
            strides = [4 * 2**stage for stage in range(stages)]
            pretrained = fitted(windows_of(first, stages), (old or 1, old or 1), strides, "axis")
    return Said(
        image_size=size,
        window_size=None if window is None else windows_of(_for_all(window, stages), stages),
        pretrained=pretrained,
        fit="never" if args.get("always_partition") else "axis",
    )


def _for_all(window: Any, stages: int) -> Any:
    """Two numbers are height and width to timm, even of a network of two stages."""
    two = isinstance(window, list) and len(window) == 2
    return [window] * stages if two and all(isinstance(side, int) for side in window) else window


def settings(net: Swin) -> dict[str, Any]:
    """The whole config.json, preprocessing and class names included.

    Raises:
        UserError: timm would build other windows.
    """
    config = net.config
    found: dict[str, Any] = {
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
        found["model_args"]["pretrained_window_sizes"] = [list(window) for window in before]
    if net.card.classes is not None:
        found["label_names"] = list(net.card.classes)
    return found


def window_size(config: SwinConfig) -> Any:
    """timm's argument: one window for all stages, or of version 1 one for each; it makes them no larger than maps.

    Raises:
        UserError: timm would build others.
    """
    stages = len(config.depths)
    h, w = (max(window[axis] for window in config.window_size) for axis in (0, 1))
    options: list[Any] = [h if h == w else [h, w]]
    if config.version == 1 and stages != 2:
        options.append([list(window) for window in config.window_size])
    for option in options:
        given = windows_of(_for_all(option, stages), stages)
        if fitted(given, config.image_size, config.strides, "axis") == config.window_size:
            return option
    raise UserError(
        f"timm cannot say windows {config.window_size} for images of {config.image_size[0]}x{config.image_size[1]}: "
        "it makes none larger than a map, and version 2's are one for all stages; choose triptych's own format"
    )


def draft(net: Swin) -> Draft:
    config = net.config
    rules = [*table(config, TIMM), *classifier(config, HEAD)]
    tensors = to_theirs(rules, state(net), f"{TITLE} has no place for all of this network")
    return checked(Draft(tensors, {"config": settings(net)}), net, read, TITLE)


FORMAT = Format("timm", "swin", TITLE, "folder", recognises, read, draft)
