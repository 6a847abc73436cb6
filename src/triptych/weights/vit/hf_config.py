"""transformers' config.json for a ViT of ours."""

from typing import Any

from triptych.errors import CheckpointError
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


def model_type_of(config: ViTConfig) -> str:
    """Return transformers' model_type of a config."""
    if config.distill_token:
        return "deit"
    if config.position == "rotary":
        return "dinov3_vit"
    if config.num_registers:
        return "dinov2_with_registers"
    return "dinov2" if config.layer_scale is not None else "vit"


def _ratio(config: ViTConfig) -> int:
    """Return the integer ratio from which transformers derives DINOv2's hidden width; SwiGLU uses two thirds of it."""
    for ratio in range(1, 33):
        hidden = ratio * config.embed_dim
        if config.mlp == "swiglu":
            hidden = (int(hidden * 2 / 3) + 7) // 8 * 8
        if hidden == config.mlp_dim:
            return ratio
    raise CheckpointError(
        f"transformers' DINOv2 cannot have mlp_dim {config.mlp_dim} at width {config.embed_dim}; choose timm"
    )


def settings(net: ViT, model_type: str) -> dict[str, Any]:
    """Return config.json, class names included.

    Raises:
        CheckpointError: transformers derives the hidden width from an integer ratio, and none gives this network's.
    """
    config = net.config
    height, width = config.image_size
    square = height == width
    result: dict[str, Any] = {
        "model_type": model_type,
        "architectures": [ARCHITECTURES[model_type][config.num_classes > 0]],
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
            "quick_gelu": "quick_gelu",
            "swiglu": "silu" if model_type == "dinov3_vit" else "gelu",
        }[config.mlp],
        "qkv_bias": config.qkv_bias == "qkv",
        "dtype": str(next(net.parameters()).dtype).removeprefix("torch."),
    }
    if model_type.startswith("dinov2"):
        result |= {"mlp_ratio": _ratio(config), "use_swiglu_ffn": config.mlp == "swiglu"}
        result["layerscale_value"] = config.layer_scale
    else:
        result["intermediate_size"] = config.mlp_dim
    if config.num_registers:
        result["num_register_tokens"] = config.num_registers
    if model_type == "dinov3_vit":
        bias = config.qkv_bias
        result |= {"query_bias": bias != "none", "key_bias": bias == "qkv", "value_bias": bias != "none"}
        result |= {"use_gated_mlp": config.mlp == "swiglu", "rope_theta": config.rotary_base}
    if config.head == "mlp":
        result |= {"pooler_act": "tanh", "pooler_output_size": config.head_dim or config.embed_dim}
    return result | to_id2label(net.card.classes, config.num_classes)
