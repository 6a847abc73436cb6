"""Readers and writers for the table in `timm.py`: timm itself, and Facebook's DeiT, DINOv2 and DINOv3 files."""

import re
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from triptych.errors import CheckpointError, TriptychError
from triptych.model_card import ModelCard, Preprocess
from triptych.models.configs.vit import ViTConfig
from triptych.models.vit import ViT
from triptych.weights.mapping.defaults import (
    class_names,
    default_num_heads,
    from_label_names,
    from_pretrained_cfg,
    half_preprocess,
    imagenet_preprocess,
    parse_size,
)
from triptych.weights.mapping.format import Draft, Format, Hints, LoadPlan, StateDictKeys, cpu_state_dict
from triptych.weights.mapping.round_trip import verify_round_trip
from triptych.weights.mapping.rules import Rule, drop, export_tensors
from triptych.weights.mapping.timm_architecture import architecture_of
from triptych.weights.vit import timm_config
from triptych.weights.vit.position_grid import cut_preprocess, learned_grid
from triptych.weights.vit.timm import UNUSED, Layout, table
from triptych.weights.vit.timm_unsupported import refuse_unsupported

TIMM = Layout()
TIMM_DINOV3 = Layout(scale="gamma_{1,2}", swiglu="split")
DEIT = Layout(scale="gamma_{1,2}")
DINOV2 = Layout(registers="register_tokens", swiglu="w12", mask_token=2)
DINOV3 = Layout(registers="storage_tokens", swiglu="w123", masked_bias=True, mask_token=2)

# timm's ports of SigLIP with the tanh form of GELU; the older ones have the exact form.
_TANH = re.compile(
    r"vit_(base_patch32|so400m_patch16|giantopt_patch16)_siglip|vit_large_patch16_siglip_(gap_)?512"
)


# Of the DINOv3s that were trained on satellite images.
SATELLITE = {"mean": (0.430, 0.411, 0.296), "std": (0.213, 0.156, 0.143)}


def matches(keys: StateDictKeys) -> bool:
    return (
        "patch_embed.proj.weight" in keys
        and "blocks.0.norm1.weight" in keys
        and "blocks.0.attn.proj.weight" in keys
    )


def layout_of(keys: StateDictKeys) -> Layout:
    """Infer which variant the keys belong to."""
    mask = len(keys.shapes.get("mask_token", ()))
    if "storage_tokens" in keys or keys.any_startswith("rope_embed."):
        base = DINOV3
    elif "mask_token" in keys and "pos_embed" in keys and keys.any_endswith(".ls1.gamma"):
        base = DINOV2
    elif keys.any_endswith(".gamma_1"):
        base = DEIT if "pos_embed" in keys else TIMM_DINOV3
    else:
        base = TIMM
    swiglu = next(
        (
            layout
            for layout, key in (("w12", "w12"), ("w123", "w1"), ("split", "fc1_g"))
            if keys.any_endswith(f"mlp.{key}.weight")
        ),
        "packed",
    )
    return Layout(
        registers=base.registers,
        distill_head=base.distill_head,
        scale=base.scale,
        swiglu=swiglu,
        masked_bias=keys.any_endswith("attn.qkv.bias_mask"),
        patch_bias="patch_embed.proj.bias" in keys,
        mask_token=mask,
        probe_eps=1e-6 if "head.0.running_var" in keys and "head.0.weight" not in keys else None,
    )


def read(keys: StateDictKeys, hints: Hints) -> LoadPlan:
    layout, settings = layout_of(keys), keys.settings.get("config", {})
    architecture, named_in = architecture_of(keys)
    args = settings.get("model_args") or {}
    cfg = settings.get("pretrained_cfg") or (settings if "input_size" in settings else {})
    refuse_unsupported(keys, architecture, named_in)
    width, channels, patch, _ = keys.shape("patch_embed.proj.weight", 4)
    facts: dict[str, str] = {}
    root, depths = _stem(keys)
    stride = patch * (4 * 2 ** max(len(depths) - 1, 0) if root else 1)
    rotary = _rotary(keys, layout, architecture, args)
    heads, facts["num_heads"] = _heads(keys, width, architecture, args, layout, rotary)
    class_token, distilled = "cls_token" in keys, "dist_token" in keys
    registers = keys.shape(layout.registers, 3)[1] if layout.registers in keys else 0
    norm_after = "fc_norm.weight" in keys
    pool, facts["pool"] = _pool(
        keys, settings, norm_after, class_token, rotary and layout.scale == "gamma_{1,2}"
    )
    configured = parse_size(args.get("img_size")) or parse_size(cfg.get("input_size"))
    image_size, placed = hints.image_size or configured or (224, 224), True
    if "pos_embed" in keys:
        tokens = int(class_token) + int(distilled)
        placed = _placed(keys, tokens, stride, configured, hints)
        prefix = tokens if placed else 0
        unplaced = placed or _placed(keys, 0, stride, configured, hints)
        if registers and not unplaced and _placed(keys, tokens + registers, stride, configured, hints):
            layout, prefix, placed = replace(layout, registers_placed=True), tokens + registers, True
        image_size, facts["image_size"] = learned_grid(keys, "pos_embed", prefix, stride, configured, hints)
    hidden, swiglu = _mlp(keys, layout)
    head = "head.weight" if layout.probe_eps is None else "head.1.weight"
    classes = keys.shape(head, 2)[0] if head in keys else 0
    pre_norm = "norm_pre.weight" in keys
    activation, facts["mlp"] = _activation(keys, architecture, named_in, args, pre_norm)
    eps = 1e-5 if rotary or pre_norm else 1e-6
    facts["norm_eps"] = f"convention: {eps:g}"
    if rotary:
        facts["rotary_base"] = "convention: DINOv3's 100"
    config = ViTConfig(
        image_size=image_size,
        patch_size=patch,
        in_channels=root[1] if root else channels,
        embed_dim=width,
        depth=keys.count_blocks("blocks.{i}."),
        num_heads=heads,
        mlp_ratio=hidden / width,
        num_classes=classes,
        stem="resnet" if root else "patch",
        stem_widths=(root[0],) if root else (),
        stem_depths=depths,
        class_token=class_token,
        distill_token=distilled,
        num_registers=registers,
        position="learned" if "pos_embed" in keys else ("rotary" if rotary else "none"),
        prefix_positions=placed,
        pool=pool,
        norm_after_pool=norm_after,
        pre_norm=pre_norm,
        mlp="swiglu" if swiglu else activation,
        qkv_bias=_bias(keys, layout),
        qk_norm=keys.any_endswith("attn.q_norm.weight"),
        layer_scale=1e-5 if keys.any_endswith("gamma_1") or keys.any_endswith("ls1.gamma") else None,
        norm_eps=eps,
    )
    if "pos_embed" in keys:
        resampling, facts["position_resampling"] = _resampling(keys, layout, config)
        config = replace(config, position_resampling=resampling)
    if layout.scale == "gamma_{1,2}" and "pos_embed" in keys and not (architecture or keys.notes):
        facts["position"] = (
            "guess: no rotary positions, as in DeiT III; RoPE-ViT has the same keys, so put timm's config.json next "
            "to the file"
        )
    preprocess, facts["preprocess"] = from_pretrained_cfg(cfg, _convention(keys, layout, config))
    if configured is not None and configured != image_size:
        preprocess = cut_preprocess(preprocess, image_size)
        facts["image_size"] += f"; of {configured[0]}x{configured[1]} pixels, the last are of no full patch"
    labels, facts["classes"] = class_names(classes, from_label_names(settings, cfg), "config.json")
    card = ModelCard(
        preprocess=preprocess,
        classes=labels,
        license=cfg.get("license") if isinstance(cfg.get("license"), str) else None,
    )
    return LoadPlan("vit", config, [*table(config, layout), *UNUSED], card, facts)


def _rotary(keys: StateDictKeys, layout: Layout, architecture: str, args: dict[str, Any]) -> bool:
    """Return whether the network is a DINOv3, whose rotary positions have no keys.

    Raises:
        CheckpointError: it may have any positions.
    """
    if "pos_embed" in keys:
        return False
    if layout.registers == "storage_tokens" or re.search("dinov3|lingbot", architecture):
        return True
    if args.get("pos_embed") == "none":
        return False
    tokens = "cls_token" in keys and layout.registers in keys and "fc_norm.weight" not in keys
    if keys.any_endswith(".gamma_1") and tokens and not architecture:
        return True
    raise CheckpointError(
        f"{keys.path} has no table of positions, and nothing tells the positions of this network; put its config.json "
        "next to it"
    )


def _activation(
    keys: StateDictKeys, architecture: str, named_in: str, args: dict[str, Any], pre_norm: bool
) -> tuple[Any, str]:
    """Return the form of GELU and its origin.

    Raises:
        CheckpointError: another activation.
    """
    named = args.get("act_layer")
    if named is not None:
        if named not in ("gelu", "gelu_tanh", "quick_gelu"):
            raise CheckpointError(
                f"{keys.path}: config.json says {architecture} with act_layer {named!r}; needed is gelu, "
                "gelu_tanh or quick_gelu"
            )
        return named, "model_args in config.json"
    if architecture:
        form = (
            "quick_gelu"
            if "quickgelu" in architecture
            else "gelu_tanh"
            if _TANH.match(architecture)
            else "gelu"
        )
        return form, named_in
    if pre_norm:
        return "gelu", (
            "guess: the exact GELU; CLIP towers of OpenAI, MetaCLIP and DFN have quick_gelu, so put timm's config.json "
            "next to the file"
        )
    return "gelu", "convention: the exact GELU"


def _heads(
    keys: StateDictKeys, width: int, architecture: str, args: dict[str, Any], layout: Layout, rotary: bool
) -> tuple[int, str]:
    if isinstance(args.get("num_heads"), int):
        return args["num_heads"], "model_args in config.json"
    if "blocks.0.attn.q_norm.weight" in keys:
        return width // keys.shape("blocks.0.attn.q_norm.weight", 1)[0], "shape of q_norm"
    if architecture.startswith("vit_base_patch16_gap_224"):
        return 16, "architecture: timm's has 16"
    if width == 1536 and not _mlp(keys, layout)[1]:
        return 16, "convention: SigLIP 2's giant has 16 heads"
    if rotary:
        # DINOv3 has 64 channels per head also at the width where Google's ViT-H has 80; the 7B has 128.
        return (32 if width == 4096 else width // 64), "convention: DINOv3's heads"
    return default_num_heads(width)


def _stem(keys: StateDictKeys) -> tuple[tuple[int, int] | None, tuple[int, ...]]:
    """Return (width of the root, image channels), or None, and the number of units in each stage of a hybrid."""
    backbone = "patch_embed.backbone."
    root = next((n for n in (f"{backbone}stem.conv.weight", f"{backbone}conv.weight") if n in keys), None)
    if root is None:
        return None, ()
    depths = []
    while count := keys.count_blocks(f"{backbone}stages.{len(depths)}.blocks.{{i}}."):
        depths.append(count)
    width, channels, _, _ = keys.shape(root, 4)
    return (width, channels), tuple(depths)


def _pool(
    keys: StateDictKeys, settings: dict[str, Any], norm_after: bool, class_token: bool, timms_dinov3: bool
) -> tuple[Any, str]:
    if "attn_pool.latent" in keys:
        return "attention", "keys"
    global_pool = settings.get("global_pool") or (settings.get("model_args") or {}).get("global_pool")
    if global_pool in ("token", "avg"):
        return ("token" if global_pool == "token" else "mean"), "config.json"
    if global_pool:
        raise CheckpointError(
            f"{keys.path}: config.json says global_pool {global_pool!r}; needed is token, avg or map"
        )
    if norm_after:
        return "mean", "convention: fc_norm follows mean pooling"
    if timms_dinov3:
        return "mean", "convention: timm's DINOv3 pools by the mean"
    return ("token" if class_token else "mean"), "convention: the class token where there is one"


def _placed(
    keys: StateDictKeys, prefix: int, stride: int, configured: tuple[int, int] | None, hints: Hints
) -> bool:
    """Return whether tokens in front of the patches have positions. DeiT-III and models with registers have none."""
    try:
        learned_grid(keys, "pos_embed", prefix, stride, configured, hints)
    except TriptychError:
        return False
    return True


def _mlp(keys: StateDictKeys, layout: Layout) -> tuple[int, bool]:
    """Return the hidden width, and whether the MLP is SwiGLU."""
    b = "blocks.0.mlp."
    if layout.swiglu == "w12":
        return keys.shape(f"{b}w12.weight", 2)[0] // 2, True
    if layout.swiglu in ("w123", "split"):
        return keys.shape(f"{b}{'w1' if layout.swiglu == 'w123' else 'fc1_g'}.weight", 2)[0], True
    rows, columns = keys.shape(f"{b}fc1.weight", 2)[0], keys.shape(f"{b}fc2.weight", 2)[1]
    return columns, rows == 2 * columns


def _bias(keys: StateDictKeys, layout: Layout) -> Any:
    if layout.masked_bias or keys.any_endswith("attn.q_bias"):
        return "qv"
    return "qkv" if keys.any_endswith("attn.qkv.bias") else "none"


def _convention(keys: StateDictKeys, layout: Layout, config: ViTConfig) -> Preprocess:
    """Return the preprocessing of the publisher."""
    if (
        layout.registers in ("register_tokens", "storage_tokens")
        or layout.mask_token
        or config.position == "rotary"
    ):
        preprocess = imagenet_preprocess((224, 224), 0.875, "bicubic")
        return replace(preprocess, **SATELLITE) if _of_satellites(keys, config) else preprocess
    size, large = config.image_size, min(config.image_size) > 224
    published_by_facebook = _is_of_deit(keys) or _is_dino(keys, config)
    if config.distill_token or config.layer_scale is not None or published_by_facebook:
        return imagenet_preprocess(size, 1.0 if large else 0.875, "bicubic")
    return half_preprocess(size, crop=1.0 if large else 0.9, interpolation="bicubic")


def _of_satellites(keys: StateDictKeys, config: ViTConfig) -> bool:
    """Return whether a DINOv3 was trained on satellite images: its file's name says so, and among those of its width
    only that one has a norm for local crops."""
    separate = "local_cls_norm.weight" in keys and config.embed_dim == 1024
    return config.position == "rotary" and (separate or "sat493m" in keys.path.name)


def _is_of_deit(keys: StateDictKeys) -> bool:
    """Return whether a file is nested as those of DeiT and of MAE."""
    return keys.container == "pickle" and any("'model'" in note for note in keys.notes)


def _is_dino(keys: StateDictKeys, config: ViTConfig) -> bool:
    """Return whether a file without a config is taken for DINO's: a class token and no head."""
    return keys.container == "pickle" and config.num_classes == 0 and config.class_token


def _resampling(keys: StateDictKeys, layout: Layout, config: ViTConfig) -> tuple[Any, str]:
    """Return how the publisher resamples positions to other grids, and its origin."""
    if "register_tokens" in keys:
        return "antialiased", "convention: DINOv2 with registers"
    if layout.mask_token:
        return "dino", "convention: DINOv2"
    if not keys.settings.get("config"):
        if layout.scale == "gamma_{1,2}" or _is_of_deit(keys):
            return "bicubic", "convention: DeiT and MAE"
        if _is_dino(keys, config):
            return "dino", "convention: DINO"
    return "antialiased", "convention: timm"


def _timm_layout(config: ViTConfig) -> Layout:
    return TIMM_DINOV3 if config.position == "rotary" else Layout(patch_bias=not config.pre_norm)


def _writer(
    title: str,
    layout: Callable[[ViTConfig], Layout],
    settings: Callable[[ViT], dict[str, Any]],
    wrapper_key: str | None = None,
    more: Callable[[ViTConfig], list[Rule]] = lambda config: [],
):
    def draft(net: ViT) -> Draft:
        config = net.config
        tensors = export_tensors(
            [*table(config, layout(config)), *more(config)],
            cpu_state_dict(net),
            f"{title} has no key for all of this network",
        )
        config_json = settings(net)
        return verify_round_trip(
            Draft(tensors, {"config": config_json} if config_json else {}, wrapper_key), net, read, title
        )

    return draft


def _nothing(net: ViT) -> dict[str, Any]:
    return {}


def _rotary_periods(config: ViTConfig) -> list[Rule]:
    """Return the rule for the periods of DINOv3's rotary positions, which its authors' code stores."""
    head_dim = config.embed_dim // config.num_heads

    def periods() -> Tensor:
        return config.rotary_base ** (2 * torch.arange(head_dim // 4, dtype=torch.float32) / (head_dim // 2))

    return [drop("rope_embed.periods", "they follow from the config", periods)]


TIMM_FORMAT = Format(
    "timm", "vit", "timm", "folder", matches, read, _writer("timm", _timm_layout, timm_config.settings)
)
DEIT_FORMAT = Format(
    "deit",
    "vit",
    "Facebook DeiT (.pth)",
    "torch",
    lambda keys: matches(keys) and keys.any_endswith(".gamma_1") and "pos_embed" in keys,
    read,
    _writer("DeiT", lambda config: DEIT, _nothing, wrapper_key="model"),
)
DINOV2_FORMAT = Format(
    "dinov2",
    "vit",
    "Facebook DINOv2 (.pth)",
    "torch",
    lambda keys: matches(keys) and "mask_token" in keys and "pos_embed" in keys,
    read,
    _writer("DINOv2", lambda config: DINOV2, _nothing),
)
DINOV3_FORMAT = Format(
    "dinov3",
    "vit",
    "Facebook DINOv3 (.pth)",
    "torch",
    lambda keys: matches(keys) and ("storage_tokens" in keys or keys.any_startswith("rope_embed.")),
    read,
    _writer("DINOv3", lambda config: DINOV3, _nothing, more=_rotary_periods),
)
