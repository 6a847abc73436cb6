"""transformers: ViT, DeiT with its teacher token, DINOv2 with and without registers, DINOv3.

Files on the hub keep the names of transformers 4; version 5 renames in memory and may be saved so. Both are
read, the first is written, which every version reads.
"""

from dataclasses import dataclass
from typing import Any

from triptych.errors import UserError
from triptych.model_card import ModelCard, Preprocess
from triptych.models.configs.vit import ViTConfig
from triptych.models.vit import ViT
from triptych.weights.mapping.defaults import (
    class_names,
    from_id2label,
    from_processor,
    half_style,
    heads_of,
    imagenet_style,
    pair,
    to_processor,
)
from triptych.weights.mapping.format import Draft, Format, Hints, Names, Reading, state, zeros
from triptych.weights.mapping.round_trip import checked
from triptych.weights.mapping.rules import CONCATENATE, Rule, drop, expand, rule, same, to_theirs
from triptych.weights.vit import hf_config
from triptych.weights.vit.position_grid import learned_grid
from triptych.weights.vit.timm import PACKED

TITLE = "transformers"


@dataclass(frozen=True)
class Layout:
    """Which model, under which names."""

    kind: str
    """transformers' model_type: vit, deit, dinov2, dinov2_with_registers, dinov3_vit."""
    prefix: str = ""
    """In front of the backbone's names where a classifier stands beside it: "vit."."""
    block: str = "encoder.layer.{i}."
    old: bool = True
    pooler: bool = False


PREFIX = {
    "vit": "vit.",
    "deit": "deit.",
    "dinov2": "dinov2.",
    "dinov2_with_registers": "dinov2_with_registers.",
}
EPS = {"vit": 1e-12, "deit": 1e-12, "dinov2": 1e-6, "dinov2_with_registers": 1e-6, "dinov3_vit": 1e-5}
ACTIVATIONS = {
    "gelu": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
}


def table(config: ViTConfig, layout: Layout) -> list[Rule]:
    """Theirs <-> ours, top to bottom as the network runs."""
    p, kind = layout.prefix, layout.kind
    e, b, ours = p + "embeddings.", p + layout.block, "encoder.{i}."
    dino, v3 = kind.startswith("dino"), kind == "dinov3_vit"
    projection = "patch_embeddings" if v3 else "patch_embeddings.projection"
    rules = [
        same(f"{e}{projection}.{{weight,bias}}", "patch.proj.{weight,bias}"),
        same(e + "cls_token", "class_token"),
    ]
    if config.distill_token:
        rules.append(same(e + "distillation_token", "distill_token"))
    if config.num_registers:
        rules.append(same(e + "register_tokens", "registers"))
    elif v3:
        rules.append(drop(e + "register_tokens", "there are none", zeros(1, 0, config.embed_dim)))
    if config.position == "learned":
        rules.append(same(e + "position_embeddings", "positions"))
    if dino:
        shape = (1, 1, config.embed_dim) if v3 else (1, config.embed_dim)
        rules.append(drop(e + "mask_token", "only masked pre-training reads it", zeros(*shape)))
    norm1, norm2 = ("norm1", "norm2") if dino else ("layernorm_before", "layernorm_after")
    rules += [
        same(f"{b}{norm1}.{{weight,bias}}", ours + "norm1.{weight,bias}"),
        *attention(config, layout, b, ours),
        same(f"{b}{norm2}.{{weight,bias}}", ours + "norm2.{weight,bias}"),
        *mlp(config, layout, b, ours),
    ]
    if config.layer_scale is not None:
        rules.append(same(b + "layer_scale{1,2}.lambda1", ours + "{scale1,scale2}.gamma"))
    rules.append(same(p + ("norm" if v3 else "layernorm") + ".{weight,bias}", "norm.{weight,bias}"))
    return expand(rules + heads(config, layout), config.depth)


def attention(config: ViTConfig, layout: Layout, b: str, ours: str) -> list[Rule]:
    """Three layers of theirs are one of ours."""
    if layout.old and layout.kind != "dinov3_vit":
        inside, out = (
            [f"{b}attention.attention.{n}" for n in ("query", "key", "value")],
            f"{b}attention.output.dense",
        )
    else:
        inside, out = [f"{b}attention.{n}_proj" for n in "qkv"], f"{b}attention.o_proj"
    rules = [rule(tuple(f"{n}.weight" for n in inside), ours + "attn.qkv.weight", CONCATENATE)]
    if config.qkv_bias == "qkv":
        rules.append(rule(tuple(f"{n}.bias" for n in inside), ours + "attn.qkv.bias", CONCATENATE))
    if config.qkv_bias == "qv":
        rules += [
            same(f"{inside[0]}.bias", ours + "attn.q_bias"),
            same(f"{inside[2]}.bias", ours + "attn.v_bias"),
        ]
    return [*rules, same(out + ".{weight,bias}", ours + "attn.proj.{weight,bias}")]


def mlp(config: ViTConfig, layout: Layout, b: str, ours: str) -> list[Rule]:
    """The feed-forward block; DINOv2's old SwiGLU packs gate and up in one layer."""
    v3 = layout.kind == "dinov3_vit"
    if config.mlp == "swiglu" and layout.old and not v3:
        packed = (ours + "mlp.gate.{weight,bias}", ours + "mlp.up.{weight,bias}")
        return [
            rule(b + "mlp.weights_in.{weight,bias}", packed, PACKED),
            same(b + "mlp.weights_out.{weight,bias}", ours + "mlp.down.{weight,bias}"),
        ]
    if config.mlp == "swiglu":
        return [
            same(f"{b}mlp.{n}_proj.{{weight,bias}}", f"{ours}mlp.{n}.{{weight,bias}}")
            for n in ("gate", "up", "down")
        ]
    if v3:
        names = ("mlp.up_proj", "mlp.down_proj")
    elif layout.old and not layout.kind.startswith("dino"):
        names = ("intermediate.dense", "output.dense")
    else:
        names = ("mlp.fc1", "mlp.fc2")
    pairs = zip(names, ("fc1", "fc2"), strict=True)
    return [same(f"{b}{a}.{{weight,bias}}", f"{ours}mlp.{c}.{{weight,bias}}") for a, c in pairs]


def heads(config: ViTConfig, layout: Layout) -> list[Rule]:
    """Classifiers; the tanh layer of Google's pre-training head is transformers' pooler."""
    rules = []
    if config.head == "mlp" and config.num_classes == 0:
        rules.append(same(layout.prefix + "pooler.dense.{weight,bias}", "head.hidden.{weight,bias}"))
    elif layout.pooler:
        rules.append(drop(layout.prefix + "pooler.*", "no classifier of transformers reads DeiT's pooler"))
    if config.num_classes and config.distill_token:
        rules.append(same("cls_classifier.{weight,bias}", "head.{weight,bias}"))
        rules.append(same("distillation_classifier.{weight,bias}", "head_distill.{weight,bias}"))
    elif config.num_classes:
        rules.append(same("classifier.{weight,bias}", "head.{weight,bias}"))
    return rules


def recognises(names: Names) -> bool:
    if names.any("embeddings.cls_token") and names.any("layer.0.norm1.weight"):
        return True
    block = names.before(".layernorm_before.weight")
    return block is not None and ".blocks." not in block  # which is a Swin's, or of what has one inside


def layout_of(names: Names) -> Layout:
    """Which model and which names, by the names themselves."""
    ending = "embeddings.cls_token"
    prefix = next((name for name in names.shapes if name.endswith(ending)), ending).removesuffix(ending)
    blocks = ("encoder.layer.{i}.", "layers.{i}.", "layer.{i}.", "model.layer.{i}.")
    block = next((b for b in blocks if names.starts(prefix + b.replace("{i}", "0"))), blocks[0])
    if names.any("distillation_token"):
        kind = "deit"
    elif names.any("register_tokens"):
        kind = "dinov2_with_registers" if names.any("position_embeddings") else "dinov3_vit"
    elif names.any(".layer_scale1.lambda1"):
        kind = "dinov2" if names.any("position_embeddings") else "dinov3_vit"
    else:
        kind = "vit"
    old = names.any("attention.attention.query.weight") or kind == "dinov3_vit"
    return Layout(kind, prefix, block, old, names.starts(prefix + "pooler."))


def read(names: Names, hints: Hints) -> Reading:
    layout, settings = layout_of(names), names.settings.get("config", {})
    v3, p = layout.kind == "dinov3_vit", layout.prefix
    e, b = p + "embeddings.", p + layout.block.replace("{i}", "0")
    facts: dict[str, str] = {}
    width, channels, patch, _ = names.shape(
        e + ("patch_embeddings.weight" if v3 else "patch_embeddings.projection.weight"), 4
    )
    if isinstance(settings.get("num_attention_heads"), int):
        heads, facts["num_heads"] = settings["num_attention_heads"], "config.json"
    elif v3:
        heads, facts["num_heads"] = width // 64, "convention: DINOv3's heads of 64 channels"
    else:
        heads, facts["num_heads"] = heads_of(width)
    eps, facts["norm_eps"] = EPS[layout.kind], f"convention: transformers' default {EPS[layout.kind]:g}"
    if isinstance(settings.get("layer_norm_eps"), int | float):
        eps, facts["norm_eps"] = float(settings["layer_norm_eps"]), "config.json"
    activation = settings.get("hidden_act", "gelu")
    swiglu = names.any("mlp.weights_in.weight") or names.any("mlp.gate_proj.weight")
    if layout.kind == "dinov3_vit" and swiglu and settings.get("hidden_act", "silu") not in ("silu", "swish"):
        raise UserError(
            f"{names.path}: config.json says hidden_act {activation!r} for a gated MLP; needed is 'silu'"
        )
    if not swiglu and activation not in ACTIVATIONS:
        raise UserError(
            f"{names.path}: config.json says hidden_act {activation!r}; needed is one of {list(ACTIVATIONS)}"
        )
    facts["mlp"] = "config.json" if "hidden_act" in settings else "convention: the exact GELU"
    distilled = e + "distillation_token" in names
    configured = pair(settings.get("image_size"))
    image_size = hints.image_size or configured or (224, 224)
    if not v3:
        image_size, facts["image_size"] = learned_grid(
            names, e + "position_embeddings", 1 + distilled, patch, configured, hints
        )
    if v3:
        facts["rotary_base"] = "config.json" if "rope_theta" in settings else "convention: DINOv3's 100"
    head = "cls_classifier.weight" if distilled else "classifier.weight"
    classes, inputs = names.shape(head, 2) if head in names else (0, width)
    pooler = layout.kind == "vit" and layout.pooler
    config = ViTConfig(
        image_size=image_size,
        patch_size=patch,
        in_channels=channels,
        embed_dim=width,
        depth=names.count(p + layout.block),
        num_heads=heads,
        mlp_ratio=_hidden(names, b, swiglu, v3) / width,
        num_classes=classes,
        distill_token=distilled,
        num_registers=names.shapes.get(e + "register_tokens", (1, 0))[1],
        position="rotary" if v3 else "learned",
        rotary_base=float(settings.get("rope_theta", 100.0)) if v3 else 100.0,
        pool="token+mean" if inputs == 2 * width else "token",
        head="mlp" if pooler else "linear",
        head_dim=names.shape(p + "pooler.dense.weight", 2)[0] if pooler else 0,
        mlp="swiglu" if swiglu else ACTIVATIONS[activation],  # type: ignore[arg-type]
        qkv_bias=_bias(names, b),
        layer_scale=1e-5 if layout.kind.startswith("dino") else None,
        norm_eps=eps,
    )
    preprocess, facts["preprocess"] = from_processor(names.settings, _convention(layout.kind, image_size))
    labels, facts["classes"] = class_names(classes, from_id2label(settings), "id2label in config.json")
    return Reading(
        "vit", config, table(config, layout), ModelCard(preprocess=preprocess, classes=labels), facts
    )


def _hidden(names: Names, b: str, swiglu: bool, v3: bool) -> int:
    if b + "mlp.weights_in.weight" in names:
        return names.shape(b + "mlp.weights_in.weight", 2)[0] // 2
    kinds = ("mlp.up_proj.weight",) if swiglu or v3 else ("intermediate.dense.weight", "mlp.fc1.weight")
    return names.shape(b + next((k for k in kinds if b + k in names), kinds[0]), 2)[0]


def _bias(names: Names, b: str) -> Any:
    old, new = b + "attention.attention.{}.bias", b + "attention.{}_proj.bias"
    query = old.format("query") in names or new.format("q") in names
    key = old.format("key") in names or new.format("k") in names
    return "qkv" if key else ("qv" if query else "none")


def _convention(kind: str, size: tuple[int, int]) -> Preprocess:
    if kind == "vit":
        return half_style(size, mode="squash", crop=1.0, interpolation="bilinear")
    if kind == "dinov3_vit":
        return Preprocess(size=(224, 224), mode="squash", crop=1.0, interpolation="bilinear")
    return imagenet_style((224, 224) if kind.startswith("dinov2") else size, 0.875, "bicubic")


def draft(net: ViT) -> Draft:
    config = net.config
    kind = hf_config.kind_of(config)
    block = "layer.{i}." if kind == "dinov3_vit" else "encoder.layer.{i}."
    layout = Layout(kind, PREFIX.get(kind, "") if config.num_classes else "", block)
    tensors = to_theirs(table(config, layout), state(net), f"{TITLE} has no place for all of this network")
    beside = {
        "config": hf_config.settings(net, kind),
        "preprocessor_config": to_processor(net.card.preprocess),
    }
    return checked(Draft(tensors, beside), net, read, TITLE)


FORMAT = Format("hf", "vit", TITLE, "folder", recognises, read, draft)
