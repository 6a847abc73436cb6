"""transformers' config.json for a network of ours."""

from typing import Any

from triptych.errors import UserError
from triptych.models.configs.vit import ViTConfig
from triptych.models.vit import ViT
from triptych.weights.mapping.defaults import to_id2label

ARCHITECTURES = {
    "vit": ("ViTModel", "ViTForImageClassification"),
    "deit": ("DeiTModel", "DeiTForImageClassificationWithTeacher"),
    "dinov2": ("Dinov2Model", "Dinov2ForImageClassification"),
    "dinov2_with_registers": ("Dinov2WithRegistersModel", "Dinov2WithRegistersForImageClassification"),
    "dinov3_vit": ("DINOv3ViTModel", "DINOv3ViTModel"),
}


def kind_of(config: ViTConfig) -> str:
    """transformers' model_type for a network of ours."""
    if config.distill_token:
        return "deit"
    if config.position == "rotary":
        return "dinov3_vit"
    if config.num_registers:
        return "dinov2_with_registers"
    return "dinov2" if config.layer_scale is not None else "vit"


def _ratio(config: ViTConfig) -> int:
    """The whole number that transformers derives DINOv2's hidden width from; SwiGLU takes two thirds."""
    for ratio in range(1, 33):
        hidden = ratio * config.embed_dim
        if config.mlp == "swiglu":
            hidden = (int(hidden * 2 / 3) + 7) // 8 * 8
        if hidden == config.mlp_dim:
            return ratio
    raise UserError(
        f"transformers' DINOv2 cannot have mlp_dim {config.mlp_dim} at width {config.embed_dim}; choose timm"
    )


def settings(net: ViT, kind: str) -> dict[str, Any]:
    """The whole config.json, class names included.

    Raises:
        UserError: transformers derives this network's hidden width from a whole ratio, and there is none.
    """
    config = net.config
    height, width = config.image_size
    square = height == width
    found: dict[str, Any] = {
        "model_type": kind,
        "architectures": [ARCHITECTURES[kind][config.num_classes > 0]],
        "hidden_size": config.embed_dim,
        "num_hidden_layers": config.depth,
        "num_attention_heads": config.num_heads,
        "image_size": height if square else [height, width],
        "patch_size": config.patch_size,
        "num_channels": config.in_channels,
        "layer_norm_eps": config.norm_eps,
        "hidden_act": {
            "gelu": "gelu",
            "gelu_tanh": "gelu_pytorch_tanh",
            "swiglu": "silu" if kind == "dinov3_vit" else "gelu",
        }[config.mlp],
        "qkv_bias": config.qkv_bias == "qkv",
        "dtype": str(next(net.parameters()).dtype).removeprefix("torch."),
    }
    if kind.startswith("dinov2"):
        found |= {"mlp_ratio": _ratio(config), "use_swiglu_ffn": config.mlp == "swiglu"}
        found["layerscale_value"] = config.layer_scale
    else:
        found["intermediate_size"] = config.mlp_dim
    if config.num_registers:
        found["num_register_tokens"] = config.num_registers
    if kind == "dinov3_vit":
        bias = config.qkv_bias
        found |= {"query_bias": bias != "none", "key_bias": bias == "qkv", "value_bias": bias != "none"}
        found |= {"use_gated_mlp": config.mlp == "swiglu", "rope_theta": config.rotary_base}
    if config.head == "mlp":
        found |= {"pooler_act": "tanh", "pooler_output_size": config.head_dim or config.embed_dim}
    return found | to_id2label(net.card.classes, config.num_classes)
