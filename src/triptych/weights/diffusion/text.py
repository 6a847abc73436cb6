"""Text encoders with keys of transformers' CLIP, OpenCLIP, CompVis' transformer and diffusers' LDMBert."""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch

from triptych.errors import CheckpointError
from triptych.models.configs import text as text_config
from triptych.models.configs.text import ClassTokenConfig, TextConfig
from triptych.weights.diffusion.diffusers_defaults import BERT_HEADS
from triptych.weights.diffusion.rule_helpers import fused, layer
from triptych.weights.mapping.format import StateDictKeys
from triptych.weights.mapping.rules import Rule, drop, rename

QKV = ("q", "k", "v")
CLIP_HEADS = 8
"""transformers' default for a config without num_attention_heads."""


@dataclass(frozen=True, kw_only=True)
class Layout:
    """Names of the parts."""

    type: str
    """Type of the encoder; "clip" may turn out to be an OpenCLIP in transformers' keys."""
    tokens: str
    positions: str
    block: Callable[[int], str]
    """Prefix of a block."""
    norm1: str
    qkv: tuple[str, ...]
    proj: str
    norm2: str
    fc1: str
    fc2: str
    norm: str
    logits: str = ""
    feed_block: Callable[[int], str] | None = None
    """Prefix of a block's MLP, if that is a layer of its own."""
    unread: tuple[tuple[str, str], ...] = ()


POOLED = "only the pooled embedding uses it"
HF = Layout(
    type="clip",
    tokens="embeddings.token_embedding.weight",
    positions="embeddings.position_embedding.weight",
    block=lambda i: f"encoder.layers.{i}.",
    norm1="layer_norm1",
    qkv=tuple(f"self_attn.{part}_proj" for part in QKV),
    proj="self_attn.out_proj",
    norm2="layer_norm2",
    fc1="mlp.fc1",
    fc2="mlp.fc2",
    norm="final_layer_norm",
    unread=(
        ("embeddings.position_ids", "it counts from 0"),
        ("text_projection.*", POOLED),
        ("logit_scale", POOLED),
    ),
)
OPENCLIP = Layout(
    type="openclip",
    tokens="token_embedding.weight",
    positions="positional_embedding",
    block=lambda i: f"transformer.resblocks.{i}.",
    norm1="ln_1",
    qkv=("attn.in_proj",),
    proj="attn.out_proj",
    norm2="ln_2",
    fc1="mlp.c_fc",
    fc2="mlp.c_proj",
    norm="ln_final",
    unread=(
        ("text_projection", POOLED),
        ("logit_scale", POOLED),
        ("attn_mask", "it follows from the length"),
    ),
)
BERT = Layout(
    type="ldm-bert",
    tokens="token_emb.weight",
    positions="pos_emb.emb.weight",
    block=lambda i: f"attn_layers.layers.{2 * i}.",
    feed_block=lambda i: f"attn_layers.layers.{2 * i + 1}.",
    norm1="0",
    qkv=tuple(f"1.to_{part}" for part in QKV),
    proj="1.to_out",
    norm2="0",
    fc1="1.net.0.0",
    fc2="1.net.2",
    norm="norm",
    logits="to_logits",
)
LDM_BERT = Layout(
    type="ldm-bert",
    tokens="model.embed_tokens.weight",
    positions="model.embed_positions.weight",
    block=lambda i: f"model.layers.{i}.",
    norm1="self_attn_layer_norm",
    qkv=tuple(f"self_attn.{part}_proj" for part in QKV),
    proj="self_attn.out_proj",
    norm2="final_layer_norm",
    fc1="fc1",
    fc2="fc2",
    norm="model.layer_norm",
    logits="to_logits",
)
# Layouts and their possible prefixes.
LAYOUTS = ((HF, ("text_model.", "")), (LDM_BERT, ("",)), (OPENCLIP, ("",)), (BERT, ("",)))


def layout_of(keys: StateDictKeys) -> tuple[Layout, str] | None:
    """Return the layout of the keys and their prefix; None if they are not of a text encoder."""
    for layout, prefixes in LAYOUTS:
        for prefix in prefixes:
            if prefix + layout.tokens in keys and prefix + layout.positions in keys:
                return layout, prefix
    return None


def table(config: TextConfig, layout: Layout) -> list[Rule]:
    """Return the rules, in the order in which the network runs."""
    rules = [rename(layout.tokens, "tokens.weight"), rename(layout.positions, "positions")]
    for i in range(config.depth):
        a, ours = layout.block(i), f"encoder.{i}."
        b = layout.feed_block(i) if layout.feed_block else a
        rules += layer(a + layout.norm1, ours + "norm1")
        if len(layout.qkv) == 1:
            pair = a + layout.qkv[0], ours + "attn.qkv."
            rules += [
                rename(f"{pair[0]}_weight", f"{pair[1]}weight"),
                rename(f"{pair[0]}_bias", f"{pair[1]}bias"),
            ]
        else:
            rules += fused(tuple(a + part for part in layout.qkv), ours + "attn.qkv", bias=config.causal)
        rules += layer(a + layout.proj, ours + "attn.proj") + layer(b + layout.norm2, ours + "norm2")
        rules += layer(b + layout.fc1, ours + "mlp.fc1") + layer(b + layout.fc2, ours + "mlp.fc2")
    rules += layer(layout.norm, "norm")
    if config.logits:
        rules += layer(layout.logits, "logits")
    # A strict loader of Stable Diffusion 2 needs what sampling does not read.
    restored = {
        "text_projection": lambda: torch.eye(config.embed_dim),
        "logit_scale": lambda: torch.tensor(math.log(1 / 0.07)),
    }
    restore = restored if layout is OPENCLIP else {}
    return rules + [drop(name, reason, restore.get(name)) for name, reason in layout.unread]


def read(
    keys: StateDictKeys, layout: Layout, config_json: dict[str, Any] | None = None, added: int = 0
) -> tuple[TextConfig, dict[str, str]]:
    """Infer the config of a text encoder from its tensors; also return where values came from.

    Args:
        config_json: its config.json, if there is one.
        added: number of rows of the token embedding that belong to tokens added to the tokenizer.

    Raises:
        CheckpointError: sizes that fit no such encoder, or an activation that it cannot have.
    """
    settings: dict[str, Any] = config_json or {}
    rows, width = keys.shape(layout.tokens, 2)
    depth = _depth(keys, layout)
    first = layout.block(0)
    mlp_dim = keys.shape(f"{layout.feed_block(0) if layout.feed_block else first}{layout.fc1}.weight", 2)[0]
    inner = keys.shape(f"{first}{layout.proj}.weight", 2)[1]
    sizes: dict[str, Any] = {
        "type": layout.type,
        "vocab_size": rows - added,
        "num_added_tokens": added,
        "max_length": keys.shape(layout.positions, 2)[0],
        "embed_dim": width,
        "depth": depth,
        "mlp_ratio": mlp_dim / width,
        "logits": bool(layout.logits) and f"{layout.logits}.weight" in keys,
    }
    facts = {"text_encoder.num_heads": "convention: heads of 64 channels"}
    if layout.type == "ldm-bert":
        heads = settings.get("encoder_attention_heads", BERT_HEADS if settings else None)
        count = heads if isinstance(heads, int) and heads > 0 else max(inner // 64, 1)
        layout_text = text_config.SIZES["ldm-layout-text"]
        boxes = (sizes["vocab_size"], sizes["max_length"]) == (layout_text.vocab_size, layout_text.max_length)
        sizes |= {"num_heads": count, "head_dim": inner // count, "boxes": boxes}
        if "encoder_attention_heads" in settings:
            facts["text_encoder.num_heads"] = "config.json"
        return TextConfig(**sizes), facts
    settings = settings.get("text_config") or settings or {}  # of a CLIP with its image tower
    heads = settings.get("num_attention_heads", CLIP_HEADS if settings else None)
    if isinstance(heads, int):
        facts["text_encoder.num_heads"] = (
            "config.json" if "num_attention_heads" in settings else "convention: transformers' default"
        )
    sizes["num_heads"] = heads if isinstance(heads, int) else max(width // 64, 1)
    act = settings.get(
        "hidden_act",
        "gelu" if layout.type == "openclip" or (width != 768 and not settings) else "quick_gelu",
    )
    if act not in ("gelu", "quick_gelu"):
        raise CheckpointError(
            f"{keys.path}: config.json says hidden_act {act!r}; needed is 'gelu' or 'quick_gelu'"
        )
    sizes["type"] = "clip" if act == "quick_gelu" and layout.type == "clip" else "openclip"
    facts["text_encoder.activation"] = "config.json" if "hidden_act" in settings else f"convention: {act}"
    sizes |= {"activation": act, "norm_eps": float(settings.get("layer_norm_eps", 1e-5))}
    sizes["pad_token"] = min(49407, rows - added - 1) if sizes["type"] == "clip" else 0
    published = text_config.SIZES["openclip-h-whole"]
    if layout is OPENCLIP and (depth, width) == (published.depth, published.embed_dim):
        sizes["skip_last_blocks"] = published.skip_last_blocks
        facts["text_encoder.skip_last_blocks"] = "convention: Stable Diffusion 2 reads the last layer but one"
    return TextConfig(**sizes), facts


def _depth(keys: StateDictKeys, layout: Layout) -> int:
    depth = 0
    while keys.any_startswith(layout.block(depth)):
        depth += 1
    return depth


def read_classes(keys: StateDictKeys, name: str) -> ClassTokenConfig:
    """Return the config of a class embedding: 1,001 rows are ImageNet's 1,000 classes and the null class."""
    rows, width = keys.shape(name, 2)
    null = rows > 1 and rows % 2 == 1
    return ClassTokenConfig(num_classes=rows - null, embed_dim=width, null_class=null)


def shortened(config: TextConfig) -> TextConfig:
    """Return the config without the unused last blocks."""
    return replace(config, depth=config.depth - config.skip_last_blocks, skip_last_blocks=0)
