"""torchvision's VisionTransformer: `nn.MultiheadAttention`, a class token, learned positions."""

from triptych.model_card import ModelCard
from triptych.models.configs.vit import ViTConfig
from triptych.models.vit import ViT
from triptych.weights.mapping.defaults import class_names, describe, heads_of, imagenet_style
from triptych.weights.mapping.format import Draft, Format, Hints, Names, Reading, state
from triptych.weights.mapping.round_trip import checked
from triptych.weights.mapping.rules import Rule, expand, same, to_theirs
from triptych.weights.vit.position_grid import learned_grid

TITLE = "torchvision"


def table(config: ViTConfig, old_mlp: bool = False) -> list[Rule]:
    """Theirs <-> ours. Before version 0.13 the MLP's layers were called linear_1 and linear_2."""
    block = "encoder.layers.encoder_layer_{i}."
    mlp = "mlp.{linear_1,linear_2}" if old_mlp else "mlp.{0,3}"
    rules = [
        same("conv_proj.{weight,bias}", "patch.proj.{weight,bias}"),
        same("class_token", "class_token"),
        same("encoder.pos_embedding", "positions"),
        same(block + "ln_1.{weight,bias}", "encoder.{i}.norm1.{weight,bias}"),
        same(block + "self_attention.in_proj_{weight,bias}", "encoder.{i}.attn.qkv.{weight,bias}"),
        same(block + "self_attention.out_proj.{weight,bias}", "encoder.{i}.attn.proj.{weight,bias}"),
        same(block + "ln_2.{weight,bias}", "encoder.{i}.norm2.{weight,bias}"),
        same(block + mlp + ".weight", "encoder.{i}.mlp.{fc1,fc2}.weight"),
        same(block + mlp + ".bias", "encoder.{i}.mlp.{fc1,fc2}.bias"),
        same("encoder.ln.{weight,bias}", "norm.{weight,bias}"),
    ]
    if config.head == "mlp":
        rules.append(same("heads.pre_logits.{weight,bias}", "head.hidden.{weight,bias}"))
    if config.num_classes:
        head = "head.out" if config.head == "mlp" else "head"
        rules.append(same("heads.head.{weight,bias}", head + ".{weight,bias}"))
    return expand(rules, config.depth)


def recognises(names: Names) -> bool:
    return "conv_proj.weight" in names and names.starts("encoder.layers.encoder_layer_0.")


def read(names: Names, hints: Hints) -> Reading:
    width, channels, patch, _ = names.shape("conv_proj.weight", 4)
    block = "encoder.layers.encoder_layer_0."
    old_mlp = block + "mlp.linear_1.weight" in names
    heads, where_heads = heads_of(width)
    image_size, where_size = learned_grid(names, "encoder.pos_embedding", 1, patch, None, hints)
    mlp_head = "heads.pre_logits.weight" in names
    classes = names.shape("heads.head.weight", 2)[0] if "heads.head.weight" in names else 0
    config = ViTConfig(
        image_size=image_size,
        patch_size=patch,
        in_channels=channels,
        embed_dim=width,
        depth=names.count("encoder.layers.encoder_layer_{i}."),
        num_heads=heads,
        mlp_ratio=names.shape(block + ("mlp.linear_1.weight" if old_mlp else "mlp.0.weight"), 2)[0] / width,
        num_classes=classes,
        head="mlp" if mlp_head else "linear",
        head_dim=names.shape("heads.pre_logits.weight", 2)[0] if mlp_head else 0,
    )
    # The weights trained at 224 expect a crop; those of SWAG, at other sizes, the whole picture.
    small = image_size == (224, 224)
    preprocess = imagenet_style(image_size, 0.875 if small else 1.0, "bilinear" if small else "bicubic")
    labels, where = class_names(classes, None, "")
    facts = {
        "num_heads": where_heads,
        "image_size": where_size,
        "norm_eps": "convention: 1e-6",
        "mlp": "convention: the exact GELU",
        "preprocess": f"convention: {describe(preprocess)}",
        "classes": where,
    }
    return Reading(
        "vit", config, table(config, old_mlp), ModelCard(preprocess=preprocess, classes=labels), facts
    )


def draft(net: ViT) -> Draft:
    made = Draft(to_theirs(table(net.config), state(net), f"{TITLE} has no place for all of this network"))
    return checked(made, net, read, TITLE)


FORMAT = Format("torchvision", "vit", "torchvision (.pth)", "torch", recognises, read, draft)
