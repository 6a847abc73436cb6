"""torchvision's VisionTransformer: `nn.MultiheadAttention`, a class token, learned positions."""

from triptych.model_card import ModelCard
from triptych.models.configs.vit import ViTConfig
from triptych.models.vit import ViT
from triptych.weights.mapping.defaults import (
    class_names,
    default_num_heads,
    describe_preprocess,
    imagenet_preprocess,
)
from triptych.weights.mapping.format import Draft, Format, Hints, LoadPlan, StateDictKeys, cpu_state_dict
from triptych.weights.mapping.round_trip import verify_round_trip
from triptych.weights.mapping.rules import Rule, expand, export_tensors, rename
from triptych.weights.vit.position_grid import learned_grid

TITLE = "torchvision"
RESIZED = {(1024, 16): 224 / 242}
"""Width and patch -> the crop of networks that were trained otherwise than with 224 pixels of 256."""


def table(config: ViTConfig, old_mlp: bool = False) -> list[Rule]:
    """Return the rules. Before version 0.13 the MLP's layers were called linear_1 and linear_2."""
    block = "encoder.layers.encoder_layer_{i}."
    mlp = "mlp.{linear_1,linear_2}" if old_mlp else "mlp.{0,3}"
    rules = [
        rename("conv_proj.{weight,bias}", "patch.proj.{weight,bias}"),
        rename("class_token", "class_token"),
        rename("encoder.pos_embedding", "positions"),
        rename(block + "ln_1.{weight,bias}", "encoder.{i}.norm1.{weight,bias}"),
        rename(block + "self_attention.in_proj_{weight,bias}", "encoder.{i}.attn.qkv.{weight,bias}"),
        rename(block + "self_attention.out_proj.{weight,bias}", "encoder.{i}.attn.proj.{weight,bias}"),
        rename(block + "ln_2.{weight,bias}", "encoder.{i}.norm2.{weight,bias}"),
        rename(block + mlp + ".weight", "encoder.{i}.mlp.{fc1,fc2}.weight"),
        rename(block + mlp + ".bias", "encoder.{i}.mlp.{fc1,fc2}.bias"),
        rename("encoder.ln.{weight,bias}", "norm.{weight,bias}"),
    ]
    if config.head == "mlp":
        rules.append(rename("heads.pre_logits.{weight,bias}", "head.hidden.{weight,bias}"))
    if config.num_classes:
        head = "head.out" if config.head == "mlp" else "head"
        rules.append(rename("heads.head.{weight,bias}", head + ".{weight,bias}"))
    return expand(rules, config.depth)


def matches(keys: StateDictKeys) -> bool:
    return "conv_proj.weight" in keys and keys.any_startswith("encoder.layers.encoder_layer_0.")


def read(keys: StateDictKeys, hints: Hints) -> LoadPlan:
    width, channels, patch, _ = keys.shape("conv_proj.weight", 4)
    block = "encoder.layers.encoder_layer_0."
    old_mlp = block + "mlp.linear_1.weight" in keys
    heads, where_heads = default_num_heads(width)
    image_size, where_size = learned_grid(keys, "encoder.pos_embedding", 1, patch, None, hints)
    mlp_head = "heads.pre_logits.weight" in keys
    classes = keys.shape("heads.head.weight", 2)[0] if "heads.head.weight" in keys else 0
    config = ViTConfig(
        image_size=image_size,
        patch_size=patch,
        in_channels=channels,
        embed_dim=width,
        depth=keys.count_blocks("encoder.layers.encoder_layer_{i}."),
        num_heads=heads,
        mlp_ratio=keys.shape(block + ("mlp.linear_1.weight" if old_mlp else "mlp.0.weight"), 2)[0] / width,
        num_classes=classes,
        head="mlp" if mlp_head else "linear",
        head_dim=keys.shape("heads.pre_logits.weight", 2)[0] if mlp_head else 0,
        position_resampling="aligned",
    )
    # The weights trained at 224 expect a crop; those of SWAG, at other sizes, the full image.
    small = image_size == (224, 224)
    crop = RESIZED.get((width, patch), 0.875) if small else 1.0
    preprocess = imagenet_preprocess(image_size, crop, "bilinear" if small else "bicubic")
    labels, where = class_names(classes, None, "")
    facts = {
        "num_heads": where_heads,
        "image_size": where_size,
        "norm_eps": "convention: 1e-6",
        "mlp": "convention: the exact GELU",
        "preprocess": f"convention: {describe_preprocess(preprocess)}",
        "classes": where,
    }
    return LoadPlan(
        "vit", config, table(config, old_mlp), ModelCard(preprocess=preprocess, classes=labels), facts
    )


def draft(net: ViT) -> Draft:
    tensors = export_tensors(
        table(net.config), cpu_state_dict(net), f"{TITLE} has no key for all of this network"
    )
    return verify_round_trip(Draft(tensors), net, read, TITLE)


FORMAT = Format("torchvision", "vit", "torchvision (.pth)", "torch", matches, read, draft)
