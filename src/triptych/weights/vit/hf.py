"""transformers: ViT, DeiT with its teacher token, DINOv2 with and without registers, DINOv3.

Files on the hub have the keys of transformers 4, which version 5 renames in memory and may save so. Both are read; the
former are written, which all versions read.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from triptych.errors import CheckpointError
from triptych.model_card import ModelCard, Preprocess
from triptych.models.configs.vit import ViTConfig
from triptych.models.vit import ViT
from triptych.weights.mapping.defaults import (
    class_names,
    default_num_heads,
    from_id2label,
    from_processor,
    half_preprocess,
    imagenet_preprocess,
    parse_size,
    to_processor,
)
from triptych.weights.mapping.format import (
    Draft,
    Format,
    Hints,
    LoadPlan,
    StateDictKeys,
    cpu_state_dict,
    zeros_factory,
)
from triptych.weights.mapping.round_trip import verify_round_trip
from triptych.weights.mapping.rules import (
    FUSE_QKV,
    Operation,
    Rule,
    convert,
    drop,
    expand,
    export_tensors,
    rename,
)
from triptych.weights.vit import hf_config
from triptych.weights.vit.position_grid import learned_grid
from triptych.weights.vit.timm import PACKED

TITLE = "transformers"


@dataclass(frozen=True)
class Layout:
    """The model, and the names of its parts."""

    model_type: str
    """transformers' model_type: vit, deit, dinov2, dinov2_with_registers, dinov3_vit."""
    prefix: str = ""
    """Prefix of the backbone if the file has a classifier too: "vit."."""
    block: str = "encoder.layer.{i}."
    old: bool = True
    pooler: bool = False
    distill_unread: bool = False
    """Whether DeiT's distillation token is there and its only classifier reads the class token: then the token is a
    register, into which its position is added."""


def _only_read(tensors: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    raise NotImplementedError("written files have registers without positions")


UNREAD_TOKEN = Operation(
    lambda t: (t[0] + t[1][:, 1:2], torch.cat([t[1][:, :1], t[1][:, 2:]], dim=1)), _only_read
)

PREFIX = {
    "vit": "vit.",
    "deit": "deit.",
    "dinov2": "dinov2.",
    "dinov2_with_registers": "dinov2_with_registers.",
}
# transformers' defaults, by model_type, for keys that a config.json lacks.
DEFAULT_NUM_HEADS = {"vit": 12, "deit": 12, "dinov2": 12, "dinov2_with_registers": 12, "dinov3_vit": 6}
IMAGE_SIZE = 224
EPS = {"vit": 1e-12, "deit": 1e-12, "dinov2": 1e-6, "dinov2_with_registers": 1e-6, "dinov3_vit": 1e-5}
ACTIVATIONS = {
    "gelu": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
    "quick_gelu": "quick_gelu",
}


def table(config: ViTConfig, layout: Layout) -> list[Rule]:
    """Return the rules, in the order in which the network runs."""
    p, model_type = layout.prefix, layout.model_type
    e, b, ours = p + "embeddings.", p + layout.block, "encoder.{i}."
    dino, v3 = model_type.startswith("dino"), model_type == "dinov3_vit"
    projection = "patch_embeddings" if v3 else "patch_embeddings.projection"
    rules = [
        rename(f"{e}{projection}.{{weight,bias}}", "patch.proj.{weight,bias}"),
        rename(e + "cls_token", "class_token"),
    ]
    if config.distill_token:
        rules.append(rename(e + "distillation_token", "distill_token"))
    if layout.distill_unread:
        rules.append(
            convert(
                (e + "distillation_token", e + "position_embeddings"),
                ("registers", "positions"),
                UNREAD_TOKEN,
            )
        )
    elif config.num_registers:
        rules.append(rename(e + "register_tokens", "registers"))
    elif v3:
        rules.append(drop(e + "register_tokens", "there are none", zeros_factory(1, 0, config.embed_dim)))
    if config.position == "learned" and not layout.distill_unread:
        rules.append(rename(e + "position_embeddings", "positions"))
    if not dino:
        rules.append(drop(e + "mask_token", "only masked pre-training uses it"))
    if dino:
        shape = (1, 1, config.embed_dim) if v3 else (1, config.embed_dim)
        rules.append(drop(e + "mask_token", "only masked pre-training uses it", zeros_factory(*shape)))
    norm1, norm2 = ("norm1", "norm2") if dino else ("layernorm_before", "layernorm_after")
    rules += [
        rename(f"{b}{norm1}.{{weight,bias}}", ours + "norm1.{weight,bias}"),
        *attention(config, layout, b, ours),
        rename(f"{b}{norm2}.{{weight,bias}}", ours + "norm2.{weight,bias}"),
        *mlp(config, layout, b, ours),
    ]
    if config.layer_scale is not None:
        rules.append(rename(b + "layer_scale{1,2}.lambda1", ours + "{scale1,scale2}.gamma"))
    rules.append(rename(p + ("norm" if v3 else "layernorm") + ".{weight,bias}", "norm.{weight,bias}"))
    return expand(rules + heads(config, layout), config.depth)


def attention(config: ViTConfig, layout: Layout, b: str, ours: str) -> list[Rule]:
    """Return the rules of attention: three layers of theirs are one of ours."""
    if layout.old and layout.model_type != "dinov3_vit":
        inside, out = (
            [f"{b}attention.attention.{n}" for n in ("query", "key", "value")],
            f"{b}attention.output.dense",
        )
    else:
        inside, out = [f"{b}attention.{n}_proj" for n in "qkv"], f"{b}attention.o_proj"
    rules = [convert(tuple(f"{n}.weight" for n in inside), ours + "attn.qkv.weight", FUSE_QKV)]
    if config.qkv_bias == "qkv":
        rules.append(convert(tuple(f"{n}.bias" for n in inside), ours + "attn.qkv.bias", FUSE_QKV))
    if config.qkv_bias == "qv":
        rules += [
            rename(f"{inside[0]}.bias", ours + "attn.q_bias"),
            rename(f"{inside[2]}.bias", ours + "attn.v_bias"),
        ]
    return [*rules, rename(out + ".{weight,bias}", ours + "attn.proj.{weight,bias}")]


def mlp(config: ViTConfig, layout: Layout, b: str, ours: str) -> list[Rule]:
    """Return the rules of the MLP. The old SwiGLU of DINOv2 packs gate and up into one layer."""
    v3 = layout.model_type == "dinov3_vit"
    if config.mlp == "swiglu" and layout.old and not v3:
        packed = (ours + "mlp.gate.{weight,bias}", ours + "mlp.up.{weight,bias}")
        return [
            convert(b + "mlp.weights_in.{weight,bias}", packed, PACKED),
            rename(b + "mlp.weights_out.{weight,bias}", ours + "mlp.down.{weight,bias}"),
        ]
    if config.mlp == "swiglu":
        return [
            rename(f"{b}mlp.{n}_proj.{{weight,bias}}", f"{ours}mlp.{n}.{{weight,bias}}")
            for n in ("gate", "up", "down")
        ]
    if v3:
        names = ("mlp.up_proj", "mlp.down_proj")
    elif layout.old and not layout.model_type.startswith("dino"):
        names = ("intermediate.dense", "output.dense")
    else:
        names = ("mlp.fc1", "mlp.fc2")
    pairs = zip(names, ("fc1", "fc2"), strict=True)
    return [rename(f"{b}{a}.{{weight,bias}}", f"{ours}mlp.{c}.{{weight,bias}}") for a, c in pairs]


def heads(config: ViTConfig, layout: Layout) -> list[Rule]:
    """Return the rules of the classifiers. The tanh layer of Google's pre-training head is transformers' pooler."""
    rules = []
    if config.head == "mlp" and config.num_classes == 0:
        rules.append(rename(layout.prefix + "pooler.dense.{weight,bias}", "head.hidden.{weight,bias}"))
    elif layout.pooler:
        rules.append(drop(layout.prefix + "pooler.*", "no classifier of transformers reads DeiT's pooler"))
    if config.num_classes and config.distill_token:
        rules.append(rename("cls_classifier.{weight,bias}", "head.{weight,bias}"))
        rules.append(rename("distillation_classifier.{weight,bias}", "head_distill.{weight,bias}"))
    elif config.num_classes:
        rules.append(rename("classifier.{weight,bias}", "head.{weight,bias}"))
    return rules


def matches(keys: StateDictKeys) -> bool:
    if keys.any_endswith("embeddings.cls_token") and keys.any_endswith("layer.0.norm1.weight"):
        return True
    block = keys.prefix_before(".layernorm_before.weight")
    return block is not None and ".blocks." not in block  # a Swin, or a network that contains one


def layout_of(keys: StateDictKeys) -> Layout:
    """Infer the model and the names of its parts."""
    ending = "embeddings.cls_token"
    prefix = next((name for name in keys.shapes if name.endswith(ending)), ending).removesuffix(ending)
    blocks = ("encoder.layer.{i}.", "layers.{i}.", "layer.{i}.", "model.layer.{i}.")
    block = next((b for b in blocks if keys.any_startswith(prefix + b.replace("{i}", "0"))), blocks[0])
    if keys.any_endswith("distillation_token"):
        model_type = "deit"
    elif keys.any_endswith("register_tokens"):
        model_type = "dinov2_with_registers" if keys.any_endswith("position_embeddings") else "dinov3_vit"
    elif keys.any_endswith(".layer_scale1.lambda1"):
        model_type = "dinov2" if keys.any_endswith("position_embeddings") else "dinov3_vit"
    else:
        model_type = "vit"
    old = keys.any_endswith("attention.attention.query.weight") or model_type == "dinov3_vit"
    unread = model_type == "deit" and "classifier.weight" in keys
    return Layout(model_type, prefix, block, old, keys.any_startswith(prefix + "pooler."), unread)


def read(keys: StateDictKeys, hints: Hints) -> LoadPlan:
    layout, settings = layout_of(keys), keys.settings.get("config", {})
    v3, p = layout.model_type == "dinov3_vit", layout.prefix
    e, b = p + "embeddings.", p + layout.block.replace("{i}", "0")
    facts: dict[str, str] = {}
    width, channels, patch, _ = keys.shape(
        e + ("patch_embeddings.weight" if v3 else "patch_embeddings.projection.weight"), 4
    )
    heads, facts["num_heads"] = _num_heads(layout, settings, width)
    eps, facts["norm_eps"] = _norm_eps(layout, settings)
    swiglu = keys.any_endswith("mlp.weights_in.weight") or keys.any_endswith("mlp.gate_proj.weight")
    activation = _activation(keys, layout, settings, swiglu)
    facts["mlp"] = "config.json" if "hidden_act" in settings else "convention: the exact GELU"
    distilled = e + "distillation_token" in keys and not layout.distill_unread
    configured = parse_size(settings.get("image_size", IMAGE_SIZE if settings else None))
    image_size = hints.image_size or configured or (224, 224)
    if not v3:
        image_size, facts["image_size"] = learned_grid(
            keys, e + "position_embeddings", 1 + distilled + layout.distill_unread, patch, configured, hints
        )
    if v3:
        facts["rotary_base"] = "config.json" if "rope_theta" in settings else "convention: DINOv3's 100"
    head = "cls_classifier.weight" if distilled else "classifier.weight"
    classes, inputs = keys.shape(head, 2) if head in keys else (0, width)
    pooler = layout.model_type == "vit" and layout.pooler
    config = ViTConfig(
        image_size=image_size,
        patch_size=patch,
        in_channels=channels,
        embed_dim=width,
        depth=keys.count_blocks(p + layout.block),
        num_heads=heads,
        mlp_ratio=_hidden(keys, b, swiglu, v3) / width,
        num_classes=classes,
        distill_token=distilled,
        num_registers=1 if layout.distill_unread else keys.shapes.get(e + "register_tokens", (1, 0))[1],
        position="rotary" if v3 else "learned",
        rotary_base=float(settings.get("rope_theta", 100.0)) if v3 else 100.0,
        pool="token+mean" if inputs == 2 * width else "token",
        head="mlp" if pooler else "linear",
        head_dim=keys.shape(p + "pooler.dense.weight", 2)[0] if pooler else 0,
        mlp=activation,  # type: ignore[arg-type]
        position_resampling="antialiased"
        if layout.model_type == "dinov2_with_registers" or v3
        else "bicubic",
        qkv_bias=_bias(keys, b),
        layer_scale=1e-5 if layout.model_type.startswith("dino") else None,
        norm_eps=eps,
    )
    preprocess, facts["preprocess"] = from_processor(
        keys.settings, _convention(layout.model_type, image_size)
    )
    labels, facts["classes"] = class_names(classes, from_id2label(settings), "id2label in config.json")
    return LoadPlan(
        "vit", config, table(config, layout), ModelCard(preprocess=preprocess, classes=labels), facts
    )


def _num_heads(layout: Layout, settings: dict[str, Any], width: int) -> tuple[int, str]:
    """Return the number of heads, and what says so."""
    stored = settings.get("num_attention_heads")
    if isinstance(stored, int):
        return stored, "config.json"
    if settings and stored is None:
        number = DEFAULT_NUM_HEADS[layout.model_type]
        return number, f"convention: transformers' default {number}"
    if layout.model_type == "dinov3_vit":
        return width // 64, "convention: DINOv3's heads of 64 channels"
    return default_num_heads(width)


def _norm_eps(layout: Layout, settings: dict[str, Any]) -> tuple[float, str]:
    """Return the epsilon of the norms, and what says so."""
    stored = settings.get("layer_norm_eps")
    if isinstance(stored, int | float):
        return float(stored), "config.json"
    return EPS[layout.model_type], f"convention: transformers' default {EPS[layout.model_type]:g}"


def _activation(keys: StateDictKeys, layout: Layout, settings: dict[str, Any], swiglu: bool) -> str:
    """Return the MLP of the config.

    Raises:
        CheckpointError: the network has no such activation.
    """
    named = settings.get("hidden_act", "gelu")
    if swiglu:
        gate = settings.get("hidden_act", "gelu" if settings else "silu")
        if layout.model_type == "dinov3_vit" and gate not in ("silu", "swish"):
            raise CheckpointError(
                f"{keys.path}: config.json says hidden_act {named!r} for a gated MLP; needed is 'silu'"
            )
        return "swiglu"
    if named not in ACTIVATIONS:
        raise CheckpointError(
            f"{keys.path}: config.json says hidden_act {named!r}; needed is one of {list(ACTIVATIONS)}"
        )
    return ACTIVATIONS[named]


def _hidden(keys: StateDictKeys, b: str, swiglu: bool, v3: bool) -> int:
    if b + "mlp.weights_in.weight" in keys:
        return keys.shape(b + "mlp.weights_in.weight", 2)[0] // 2
    leaves = ("mlp.up_proj.weight",) if swiglu or v3 else ("intermediate.dense.weight", "mlp.fc1.weight")
    return keys.shape(b + next((k for k in leaves if b + k in keys), leaves[0]), 2)[0]


def _bias(keys: StateDictKeys, b: str) -> Any:
    old, new = b + "attention.attention.{}.bias", b + "attention.{}_proj.bias"
    query = old.format("query") in keys or new.format("q") in keys
    key = old.format("key") in keys or new.format("k") in keys
    return "qkv" if key else ("qv" if query else "none")


def _convention(model_type: str, size: tuple[int, int]) -> Preprocess:
    if model_type == "vit":
        return half_preprocess(size, mode="squash", crop=1.0, interpolation="bilinear")
    if model_type == "dinov3_vit":
        return Preprocess(size=(224, 224), mode="squash", crop=1.0, interpolation="bilinear")
    return imagenet_preprocess((224, 224) if model_type.startswith("dinov2") else size, 0.875, "bicubic")


def draft(net: ViT) -> Draft:
    config = net.config
    model_type = hf_config.model_type_of(config)
    block = "layer.{i}." if model_type == "dinov3_vit" else "encoder.layer.{i}."
    layout = Layout(model_type, PREFIX.get(model_type, "") if config.num_classes else "", block)
    rules = table(config, layout)
    tensors = export_tensors(rules, cpu_state_dict(net), f"{TITLE} has no key for all of this network")
    json_files = {
        "config": hf_config.settings(net, model_type),
        "preprocessor_config": to_processor(net.card.preprocess),
    }
    return verify_round_trip(Draft(tensors, json_files), net, read, TITLE)


FORMAT = Format("hf", "vit", TITLE, "folder", matches, read, draft)
