"""The DiT with keys of its authors and of diffusers: sizes inferred from shapes, and tables of rules."""

import math
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from triptych.errors import CheckpointError
from triptych.layers.position import sincos_positions
from triptych.model_card import ModelCard
from triptych.models.configs.dit import SIZES, DiTConfig
from triptych.models.dit import DiT
from triptych.weights.diffusion.diffusers_defaults import DIT_DEFAULTS as SUPPORTED
from triptych.weights.diffusion.diffusers_defaults import DIT_HEADS, DIT_SAMPLE_SIZE, require_supported
from triptych.weights.diffusion.rule_helpers import fused, layer
from triptych.weights.mapping.format import (
    Draft,
    Format,
    Hints,
    LoadPlan,
    Settings,
    StateDictKeys,
    cpu_state_dict,
)
from triptych.weights.mapping.round_trip import verify_round_trip
from triptych.weights.mapping.rules import (
    Operation,
    Rule,
    concatenate,
    convert,
    drop,
    expand,
    export_tensors,
    rename,
)

AUTHORS, DIFFUSERS = "the authors' DiT", "diffusers (a DiT)"


# -------------------------------------------------------------------------------------------------- tables


def _modulation(config: DiTConfig, blocks: list[str], last: str) -> list[Rule]:
    """Return the rules of the modulations: those of all blocks and of the last norm are one linear layer of ours.

    Raises:
        CheckpointError: all blocks share one modulation.
    """
    if config.modulation == "single":
        raise CheckpointError(
            "this DiT has one modulation for all blocks, published files one each; choose another format"
        )
    sizes = [6 * config.embed_dim] * config.depth + [2 * config.embed_dim]
    operation = Operation(concatenate, lambda fused: fused[0].split(sizes))
    return [
        convert(tuple(f"{name}.{leaf}" for name in (*blocks, last)), f"modulation.{leaf}", operation)
        for leaf in ("weight", "bias")
    ]


def authors_table(config: DiTConfig) -> list[Rule]:
    block, ours = "blocks.{i}", "encoder.{i}"
    places = [f"blocks.{i}.adaLN_modulation.1" for i in range(config.depth)]
    rules = [
        *layer("x_embedder.proj", "patch.proj"),
        *layer("t_embedder.mlp.{0,2}", "time.{fc1,fc2}"),
        *([rename("y_embedder.embedding_table.weight", "label.weight")] if config.num_classes else []),
        drop("pos_embed", "it is a fixed table", lambda: _positions(config)),
        *layer(f"{block}.attn.qkv", f"{ours}.attn.qkv"),
        *layer(f"{block}.attn.proj", f"{ours}.attn.proj"),
        *layer(f"{block}.mlp.{{fc1,fc2}}", f"{ours}.mlp.{{fc1,fc2}}"),
        *_modulation(config, places, "final_layer.adaLN_modulation.1"),
        *layer("final_layer.linear", "out"),
    ]
    return expand(rules, config.depth)


def diffusers_table(config: DiTConfig) -> list[Rule]:
    """Return the rules. diffusers stores a copy of the time and class embeddings in every block."""
    block, ours = "transformer_blocks.{i}", "encoder.{i}"
    numbered = [f"transformer_blocks.{i}.norm1" for i in range(config.depth)]
    alike = Operation(_alike, lambda one: one * config.depth)

    def copies(theirs: str, ours: str) -> Rule:
        return convert(tuple(f"{name}.emb.{theirs}" for name in numbered), ours, alike)

    rules = [
        *layer("pos_embed.proj", "patch.proj"),
        *(
            copies(f"timestep_embedder.linear_{k}.{leaf}", f"time.fc{k}.{leaf}")
            for k in (1, 2)
            for leaf in ("weight", "bias")
        ),
        copies("class_embedder.embedding_table.weight", "label.weight"),
        *fused(tuple(f"{block}.attn1.to_{x}" for x in "qkv"), f"{ours}.attn.qkv", bias=True),
        *layer(f"{block}.attn1.to_out.0", f"{ours}.attn.proj"),
        *layer(f"{block}.ff.net.{{0.proj,2}}", f"{ours}.mlp.{{fc1,fc2}}"),
        *_modulation(config, [f"{name}.linear" for name in numbered], "proj_out_1"),
        *layer("proj_out_2", "out"),
    ]
    return expand(rules, config.depth)


def _alike(copies: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """Return one of several equal tensors.

    Raises:
        CheckpointError: they differ.
    """
    if len({copy.shape for copy in copies}) > 1:
        raise ValueError("copies of different shapes")
    if not copies[0].is_meta and not all(torch.equal(copies[0], copy) for copy in copies[1:]):
        raise CheckpointError(
            "the blocks of this DiT have different time and class embeddings, which diffusers allows; a DiT has one "
            "embedding for all"
        )
    return copies[:1]


def _positions(config: DiTConfig) -> Tensor:
    return sincos_positions(config.grid, config.embed_dim, closed=False)


# --------------------------------------------------------------------------------------------------- sizes


def _sizes(keys: StateDictKeys, patch: str, label: str, out: str, fc1: str, depth: int) -> dict[str, Any]:
    """Return the fields of the config that shapes determine, with either's keys."""
    width, channels, side, _ = keys.shape(patch, 4)
    predicted = keys.shape(out, 2)[0] // side**2
    learned_variance = predicted == 2 * channels
    classes = keys.shape(label, 2)[0] - 1 if label in keys else 0
    return {
        "in_channels": channels,
        "out_channels": channels if learned_variance else predicted,
        "learn_sigma": learned_variance,
        "patch_size": side,
        "embed_dim": width,
        "depth": depth,
        "mlp_ratio": keys.shape(fc1, 2)[0] / width,
        "num_classes": classes,
    }


def _usual_heads(width: int) -> int:
    """Return the heads of the published networks, else 64 channels per head."""
    known = [size.num_heads for size in SIZES.values() if size.embed_dim == width]
    return known[0] if known else max(width // 64, 1)


# ----------------------------------------------------------------------------------------- the authors' file


def matches_authors(keys: StateDictKeys) -> bool:
    return "t_embedder.mlp.0.weight" in keys and "final_layer.adaLN_modulation.1.weight" in keys


def read_authors(keys: StateDictKeys, hints: Hints) -> LoadPlan:
    label, out = "y_embedder.embedding_table.weight", "final_layer.linear.weight"
    depth = keys.count_blocks("blocks.{i}.")
    sizes = _sizes(keys, "x_embedder.proj.weight", label, out, "blocks.0.mlp.fc1.weight", depth)
    facts = {"num_heads": "convention", "latent_size": "convention", "classes": "the last is none of them"}
    config = DiTConfig(**sizes, num_heads=_usual_heads(sizes["embed_dim"]))
    if "pos_embed" in keys:
        cells = keys.shape("pos_embed", 3)[1]
        rows = math.isqrt(cells)
        if rows**2 != cells:
            raise CheckpointError(f"{keys.path} has positions for {cells} patches, which are no square")
        config = replace(config, latent_size=(rows * config.patch_size,) * 2)
        facts["latent_size"] = "pos_embed in the file"
        table = keys.read_small("pos_embed")
        if table is not None and not torch.allclose(table.float(), _positions(config), atol=1e-2):
            raise CheckpointError(
                f"{keys.path} has a pos_embed that is not the fixed table of a DiT; it is another network"
            )
    facts |= {"mlp": "convention: gelu_tanh", "preprocess": "none"}
    return LoadPlan("dit", config, authors_table(config), ModelCard(), facts)


def draft_authors(net: DiT) -> Draft:
    tensors = export_tensors(
        authors_table(net.config), cpu_state_dict(net), f"{AUTHORS} has no key for all of this network"
    )
    return verify_round_trip(Draft(tensors), net, read_authors, AUTHORS)


# ------------------------------------------------------------------------------------------------ diffusers


def matches_diffusers(keys: StateDictKeys) -> bool:
    return (
        "transformer_blocks.0.norm1.emb.timestep_embedder.linear_1.weight" in keys
        and "proj_out_2.weight" in keys
    )


def read_diffusers(keys: StateDictKeys, hints: Hints) -> LoadPlan:
    config, facts = of_diffusers(keys, keys.settings.get("config", {}))
    return LoadPlan("dit", config, diffusers_table(config), ModelCard(), facts | {"preprocess": "none"})


def of_diffusers(keys: StateDictKeys, config_json: Settings) -> tuple[DiTConfig, dict[str, str]]:
    """Infer the config of a DiT from diffusers' keys and config.json; also return where each value came from."""
    first = "transformer_blocks.0"
    label, fc1 = f"{first}.norm1.emb.class_embedder.embedding_table.weight", f"{first}.ff.net.0.proj.weight"
    depth = keys.count_blocks("transformer_blocks.{i}.")
    sizes = _sizes(keys, "pos_embed.proj.weight", label, "proj_out_2.weight", fc1, depth)
    require_supported(keys, config_json, SUPPORTED)
    side = config_json.get("sample_size", DIT_SAMPLE_SIZE)
    heads = (
        config_json.get("num_attention_heads", DIT_HEADS) if config_json else _usual_heads(sizes["embed_dim"])
    )
    config = DiTConfig(
        **sizes,
        num_heads=heads,
        latent_size=(side, side),
        mlp="gelu" if config_json.get("activation_fn") == "gelu" else "gelu_tanh",
        time_frequencies="closed",
    )
    where = "config.json" if config_json else "convention"
    return config, {
        "num_heads": where,
        "latent_size": where,
        "time_frequencies": "convention: as diffusers runs it, which is not as it was trained",
        "classes": "the last is none of them",
    }


def settings_of(config: DiTConfig) -> Settings:
    """Return a DiT's config.json.

    Raises:
        CheckpointError: diffusers has no such DiT.
    """
    if not config.num_classes or config.context_dim:
        raise CheckpointError(
            f"{DIFFUSERS} is conditioned on a class, and on nothing else; choose another format"
        )
    if config.time_frequencies != "closed" or config.position != "stretched" or config.norm_eps != 1e-6:
        raise CheckpointError(
            f"{DIFFUSERS} runs with closed frequencies of the time, stretched positions and epsilon 1e-6; this has "
            f"{config.time_frequencies} ones, {config.position} ones and {config.norm_eps:g}; choose another format"
        )
    if config.mlp_dim != 4 * config.embed_dim:
        raise CheckpointError(
            f"{DIFFUSERS} has MLPs of 4 x {config.embed_dim}, not {config.mlp_dim}; choose another format"
        )
    if len(set(config.latent_size)) > 1:
        raise CheckpointError(
            f"{DIFFUSERS} has square latents, not {config.latent_size}; choose another format"
        )
    return {
        "_class_name": "DiTTransformer2DModel",
        "_diffusers_version": "0.32.0",
        "num_attention_heads": config.num_heads,
        "attention_head_dim": config.embed_dim // config.num_heads,
        "in_channels": config.in_channels,
        "out_channels": config.predicted,
        "num_layers": config.depth,
        "sample_size": config.latent_size[0],
        "patch_size": config.patch_size,
        "activation_fn": "gelu" if config.mlp == "gelu" else "gelu-approximate",
        "num_embeds_ada_norm": config.num_classes,
        "norm_type": "ada_norm_zero",
        "norm_elementwise_affine": False,
        "norm_eps": config.norm_eps,
        "attention_bias": config.bias,
    }


def draft_diffusers(net: DiT) -> Draft:
    settings = settings_of(net.config)
    tensors = export_tensors(
        diffusers_table(net.config), cpu_state_dict(net), f"{DIFFUSERS} has no key for all of this network"
    )
    return verify_round_trip(Draft(tensors, {"config": settings}), net, read_diffusers, DIFFUSERS)


STEM = "diffusion_pytorch_model"
FORMATS = (
    Format("dit", "dit", AUTHORS, "torch", matches_authors, read_authors, draft_authors),
    Format("diffusers", "dit", DIFFUSERS, "folder", matches_diffusers, read_diffusers, draft_diffusers, STEM),
)
