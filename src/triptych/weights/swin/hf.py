"""transformers: Swin and Swinv2, as classifiers, models, masked pre-training and (version 1) SwinBackbone.

Files keep the names of transformers 4, which version 5 renames when it loads version 1's. Both are read, the first is
written, which every version reads.
"""

from dataclasses import replace
from typing import Any

from triptych.errors import UserError
from triptych.model_card import ModelCard, Preprocess
from triptych.models.configs.swin import SwinConfig, windows_of
from triptych.models.swin import Swin
from triptych.weights.mapping.defaults import (
    class_names,
    from_id2label,
    from_processor,
    pair,
    to_id2label,
    to_processor,
)
from triptych.weights.mapping.format import Draft, Format, Hints, Names, Reading, state
from triptych.weights.mapping.round_trip import checked
from triptych.weights.mapping.rules import Rule, drop, to_theirs
from triptych.weights.swin.infer_config import Said, read_sizes, single, stages_of
from triptych.weights.swin.key_layout import Layout, classifier, inside, table

TITLE = "transformers"
HEAD = "classifier"
EPS = 1e-5
OLD = Layout(
    embed="embeddings.patch_embeddings.projection",
    embed_norm="embeddings.norm",
    block=lambda stage: f"encoder.layers.{stage}.blocks.{{i}}.",
    merge=lambda stage: f"encoder.layers.{stage - 1}.downsample",
    norm="layernorm",
    map_norm=lambda stage: f"hidden_states_norms.stage{stage + 1}",
    norm1="layernorm_before",
    norm2="layernorm_after",
    qkv=("attention.self.query", "attention.self.key", "attention.self.value"),
    proj="attention.output.dense",
    table="attention.self.relative_position_bias_table",
    scale="attention.self.logit_scale",
    bias_mlp=(
        "attention.self.continuous_position_bias_mlp.0",
        "attention.self.continuous_position_bias_mlp.2",
    ),
    fc1="intermediate.dense",
    fc2="output.dense",
    index="attention.self.relative_position_index",
    coordinates="attention.self.relative_coords_table",
    saved=("index",),
)
NEW = replace(
    OLD,
    qkv=("attention.q_proj", "attention.k_proj", "attention.v_proj"),
    proj="attention.o_proj",
    table="attention.relative_position_bias.relative_position_bias_table",
    fc1="mlp.fc1",
    fc2="mlp.fc2",
    index="attention.relative_position_bias.relative_position_index",
)
# Version 2 does not save the index.
OLD_V2 = replace(OLD, saved=())


def recognises(names: Names) -> bool:
    first = OLD.block(0).replace("{i}", "0")
    return names.before(f"{first}{OLD.norm1}.weight") in ("", "swin.", "swinv2.")


def layout_of(names: Names) -> Layout:
    """The names, by themselves: of which version, and of what they are a part ("swin.", "backbone.")."""
    prefix = names.before(OLD.embed + ".weight") or ""
    new = names.any(".attention.q_proj.weight")
    layout = inside(NEW if new else OLD, prefix)
    return with_norms_at(layout, names.before("hidden_states_norms.stage1.weight") or "")


def with_norms_at(layout: Layout, prefix: str) -> Layout:
    """The layout where the norms of the maps stand elsewhere than the network: beside it, not inside."""
    return replace(layout, map_norm=lambda stage: f"{prefix}hidden_states_norms.stage{stage + 1}")


def read(names: Names, hints: Hints) -> Reading:
    layout, settings = layout_of(names), names.settings.get("config", {})
    config, facts = read_backbone(names, layout, settings, hints)
    rules = [*table(config, layout), *classifier(config, HEAD), *unread(names, config, layout)]
    whole = Preprocess(size=config.image_size, mode="squash", crop=1.0)
    preprocess, facts["preprocess"] = from_processor(names.settings, whole)
    labels, facts["classes"] = class_names(
        config.num_classes, from_id2label(settings), "id2label in config.json"
    )
    return Reading("swin", config, rules, ModelCard(preprocess=preprocess, classes=labels), facts)


def read_backbone(
    names: Names, layout: Layout, settings: dict[str, Any], hints: Hints
) -> tuple[SwinConfig, dict[str, str]]:
    """The config of a Swin from its tensors and its own part of config.json.

    Raises:
        UserError: the config says what this network cannot be.
    """
    if settings.get("hidden_act", "gelu") != "gelu":
        raise UserError(
            f"{names.path}: config.json says hidden_act {settings['hidden_act']!r}; needed is 'gelu'"
        )
    eps = settings.get("layer_norm_eps", EPS)
    if eps != EPS:
        # The norms of the embedding and of merging do not heed it: a network with two epsilons.
        raise UserError(f"{names.path}: config.json says layer_norm_eps {eps!r}; needed is {EPS:g}")
    stages, version = stages_of(names, layout), 2 if names.any(f".{OLD.scale}") else 1
    window, before = settings.get("window_size"), settings.get("pretrained_window_sizes")
    # Its default has four, whatever the number of stages.
    before = before[:stages] if isinstance(before, list) else before
    said = Said(
        image_size=pair(settings.get("image_size")),
        window_size=None if window is None else windows_of(window, stages),
        pretrained=None if before is None else windows_of(before, stages),
        fit="rows" if version == 2 else "never",
    )
    return read_sizes(names, layout, hints, said, HEAD, EPS)


def unread(names: Names, config: SwinConfig, layout: Layout) -> list[Rule]:
    """What masked pre-training has besides, and the last norm that a backbone for dense heads saves without use."""
    prefix = layout.norm.removesuffix(OLD.norm)
    if not config.map_norms:
        reason = "only masked pre-training reads it"
        return [drop(f"{prefix}embeddings.mask_token", reason), drop("decoder.*", reason)]
    beside = names.before("hidden_states_norms.stage1.weight") or ""
    norms = dict.fromkeys((layout.norm, f"{beside}swin.layernorm"))
    return [drop(f"{norm}.*", "maps are normed each by its own") for norm in norms]


def settings(config: SwinConfig) -> dict[str, Any]:
    """A Swin's config.json, or its part of one.

    Raises:
        UserError: windows that transformers cannot say or run.
    """
    version_2 = config.version == 2
    window = single(config, TITLE, "rows" if version_2 else "never")
    if not version_2 and not config.map_norms:
        single(config, TITLE)  # its classifiers break on a map smaller than the window
    if config.norm_eps != EPS:
        raise UserError(
            f"{TITLE} cannot say norm_eps {config.norm_eps:g}: part of its norms have {EPS:g}; choose another"
        )
    height, width = config.image_size
    found: dict[str, Any] = {
        "model_type": "swinv2" if version_2 else "swin",
        "image_size": height if height == width else [height, width],
        "patch_size": config.patch_size,
        "num_channels": config.in_channels,
        "embed_dim": config.embed_dim,
        "hidden_size": config.widths[-1],
        "depths": list(config.depths),
        "num_heads": list(config.num_heads),
        "window_size": window,
        "mlp_ratio": config.mlp_ratio,
        "qkv_bias": config.qkv_bias != "none",
        "drop_path_rate": config.drop_path_rate,
        "hidden_act": "gelu",
        "layer_norm_eps": EPS,
        "use_absolute_embeddings": False,
    }
    if version_2:
        before = config.pretrained_window_size or ((0, 0),) * len(config.depths)
        if any(h != w for h, w in before):
            raise UserError(
                f"{TITLE} cannot say pretrained windows {before}, which are not square; choose another"
            )
        found["pretrained_window_sizes"] = [h for h, _ in before]
    if config.map_norms:
        found["out_features"] = [f"stage{i + 1}" for i in range(len(config.depths))]
    return found


def draft(net: Swin) -> Draft:
    config = net.config
    kind = "Swinv2" if config.version == 2 else "Swin"
    if config.map_norms and config.version == 2:
        raise UserError(f"{TITLE}' Swinv2Backbone has no norms of its maps; choose triptych's own format")
    layout = OLD_V2 if config.version == 2 else OLD
    if config.num_classes:
        layout = inside(layout, f"{kind.lower()}.")
    tensors = to_theirs(
        [*table(config, layout), *classifier(config, HEAD)],
        state(net),
        f"{TITLE} has no place for all of this network",
    )
    role = "Backbone" if config.map_norms else ("ForImageClassification" if config.num_classes else "Model")
    found = {
        "architectures": [kind + role],
        **settings(config),
        "dtype": str(next(net.parameters()).dtype).removeprefix("torch."),
        **to_id2label(net.card.classes, config.num_classes),
    }
    beside = {"config": found, "preprocessor_config": to_processor(net.card.preprocess)}
    return checked(Draft(tensors, beside), net, read, TITLE)


FORMAT = Format("hf", "swin", "transformers (Swin)", "folder", recognises, read, draft)
