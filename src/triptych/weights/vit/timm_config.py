"""timm's config.json: a registered architecture close to the network, and the arguments that make them equal."""

from typing import Any

from triptych.errors import CheckpointError
from triptych.models.configs.vit import ViTConfig
from triptych.models.vit import ViT
from triptych.weights.mapping.defaults import to_pretrained_cfg

HYBRIDS = {
    (): "vit_tiny_r_s16_p8_224",
    (2, 2, 2, 2): "vit_small_r26_s32_224",
    (3, 4, 9): "vit_base_r50_s16_224",
    (3, 4, 6, 3): "vit_large_r50_s32_224",
}


def architecture(config: ViTConfig) -> str:
    """Return a registered architecture with the network's epsilon, MLP and stem, which arguments cannot change.

    Raises:
        CheckpointError: timm has none.
    """
    if config.position == "rotary":
        if config.mlp == "swiglu":
            return "vit_huge_plus_patch16_dinov3" + ("_qkvb" if config.qkv_bias == "qv" else "")
        return "vit_small_patch16_dinov3" + ("_qkvb" if config.qkv_bias == "qv" else "")
    if config.num_registers and config.class_token and config.prefix_positions:
        raise CheckpointError(
            "timm cannot store registers beside a class token with a position; choose hf or dinov2"
        )
    if config.distill_token:
        return "deit_base_distilled_patch16_224"
    if config.stem == "resnet":
        if config.stem_depths not in HYBRIDS or config.stem_widths != (64,):
            raise CheckpointError(
                f"timm has no ResNet stem of {config.stem_depths} units and width {config.stem_widths}"
            )
        return HYBRIDS[config.stem_depths]
    if config.mlp == "swiglu":
        return "vit_giant_patch14_dinov2"
    return "vit_base_patch16_clip_224" if config.pre_norm else "vit_base_patch16_224"


def arguments(config: ViTConfig, pool: str | None) -> dict[str, Any]:
    """Return the arguments of `create_model` that differ from the architecture."""
    args: dict[str, Any] = {
        "img_size": list(config.image_size),
        "patch_size": config.patch_size,
        "in_chans": config.in_channels,
        "embed_dim": config.embed_dim,
        "depth": config.depth,
        "num_heads": config.num_heads,
        "mlp_ratio": ratio(config),
    }
    if config.position == "rotary":
        return args | {"num_reg_tokens": config.num_registers, "global_pool": pool}
    args["qkv_bias"] = config.qkv_bias == "qkv"
    args["qk_norm"] = config.qk_norm
    if config.layer_scale is not None:
        args["init_values"] = config.layer_scale
    if config.mlp in ("gelu_tanh", "quick_gelu"):
        args["act_layer"] = config.mlp
    if config.distill_token:
        return args
    return args | {
        "class_token": config.class_token,
        "reg_tokens": config.num_registers,
        "no_embed_class": not (config.class_token and config.prefix_positions),
        "pos_embed": "learn" if config.position == "learned" else "none",
        "pre_norm": config.pre_norm,
        "fc_norm": config.norm_after_pool,
        "global_pool": pool,
    }


def ratio(config: ViTConfig) -> float:
    """Return the MLP ratio from which timm, rounding down, derives the hidden width.

    If gate and up are one layer, timm counts both.
    """
    hidden = config.mlp_dim * (2 if config.mlp == "swiglu" and config.position != "rotary" else 1)
    exact = hidden / config.embed_dim
    return exact if int(config.embed_dim * exact) == hidden else (hidden + 0.5) / config.embed_dim


def settings(net: ViT) -> dict[str, Any]:
    """Return config.json, preprocessing and class names included.

    Raises:
        CheckpointError: timm has no such network.
    """
    config = net.config
    pool = {"token": "token", "mean": "avg", "attention": "map"}.get(config.pool)
    result: dict[str, Any] = {
        "architecture": architecture(config),
        "num_classes": config.num_classes,
        "num_features": config.embed_dim,
        "global_pool": pool,
        "model_args": arguments(config, pool),
        "pretrained_cfg": {
            **to_pretrained_cfg(net.card.preprocess),
            "num_classes": config.num_classes,
            "first_conv": "patch_embed.proj",
            "classifier": ["head", "head_dist"] if config.distill_token else "head",
        },
    }
    if net.card.classes is not None:
        result["label_names"] = list(net.card.classes)
    return result
