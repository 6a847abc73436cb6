"""transformers: Swin and Swinv2, as classifiers, models, masked pre-training and (version 1) SwinBackbone.

Files keep the names of transformers 4, which version 5 renames when it loads version 1's. Both are read, the first is
written, which every version reads.
"""

from dataclasses import replace
from typing import Any

from triptych.errors import CheckpointError
from triptych.model_card import ModelCard, Preprocess
from triptych.models.configs.swin import SwinConfig, windows_of
from triptych.models.swin import Swin
from triptych.weights.mapping.defaults import (
    class_names,
    from_id2label,
    from_processor,
    parse_size,
    to_id2label,
    to_processor,
)
from triptych.weights.mapping.format import Draft, Format, Hints, LoadPlan, StateDictKeys, cpu_state_dict
from triptych.weights.mapping.round_trip import verify_round_trip
from triptych.weights.mapping.rules import Rule, drop, export_tensors
from triptych.weights.swin.infer_config import SwinFileConfig, num_stages, read_sizes, single_window
from triptych.weights.swin.key_layout import Layout, classifier, prefix_layout, table

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


def matches(keys: StateDictKeys) -> bool:
    first = OLD.block(0).replace("{i}", "0")
    return keys.prefix_before(f"{first}{OLD.norm1}.weight") in ("", "swin.", "swinv2.")


def layout_of(keys: StateDictKeys) -> Layout:
    """The keys, by themselves: of which version, and of what they are a part ("swin.", "backbone.")."""
    prefix = keys.prefix_before(OLD.embed + ".weight") or ""
    new = keys.any_endswith(".attention.q_proj.weight")
    layout = prefix_layout(NEW if new else OLD, prefix)
    return with_norms_at(layout, keys.prefix_before("hidden_states_norms.stage1.weight") or "")


def with_norms_at(layout: Layout, prefix: str) -> Layout:
    """Return the layout in which the norms of the maps have another prefix than the network."""
    return replace(layout, map_norm=lambda stage: f"{prefix}hidden_states_norms.stage{stage + 1}")


def read(keys: StateDictKeys, hints: Hints) -> LoadPlan:
    layout, settings = layout_of(keys), keys.settings.get("config", {})
    config, facts = read_backbone(keys, layout, settings, hints)
    rules = [*table(config, layout), *classifier(config, HEAD), *unread(keys, config, layout)]
    default = Preprocess(size=config.image_size, mode="squash", crop=1.0)
    preprocess, facts["preprocess"] = from_processor(keys.settings, default)
    labels, facts["classes"] = class_names(
        config.num_classes, from_id2label(settings), "id2label in config.json"
    )
    return LoadPlan("swin", config, rules, ModelCard(preprocess=preprocess, classes=labels), facts)


def read_backbone(
    keys: StateDictKeys, layout: Layout, settings: dict[str, Any], hints: Hints
) -> tuple[SwinConfig, dict[str, str]]:
    """Infer the config of a Swin from its tensors and its part of config.json.

    Raises:
        CheckpointError: the config describes a network that this package does not have.
    """
    if settings.get("hidden_act", "gelu") != "gelu":
        raise CheckpointError(
            f"{keys.path}: config.json says hidden_act {settings['hidden_act']!r}; needed is 'gelu'"
        )
    eps = settings.get("layer_norm_eps", EPS)
    if eps != EPS:
        # The norms of the embedding and of merging ignore it: such a network has two epsilons.
        raise CheckpointError(f"{keys.path}: config.json says layer_norm_eps {eps!r}; needed is {EPS:g}")
    stages, version = num_stages(keys, layout), 2 if keys.any_endswith(f".{OLD.scale}") else 1
    # A config without these keys means transformers' defaults; no config at all means nothing.
    defaults = {"window_size": 7, "image_size": 224} if settings else {}
    settings = defaults | settings
    window, before = settings.get("window_size"), settings.get("pretrained_window_sizes")
    # Its default has four entries, regardless of the number of stages.
    before = before[:stages] if isinstance(before, list) else before
    file_config = SwinFileConfig(
        image_size=parse_size(settings.get("image_size")),
        window_size=None if window is None else windows_of(window, stages),
        pretrained=None if before is None else windows_of(before, stages),
        fit="rows" if version == 2 else "never",
    )
    return read_sizes(keys, layout, hints, file_config, HEAD, EPS)


def unread(keys: StateDictKeys, config: SwinConfig, layout: Layout) -> list[Rule]:
    """Drop what only masked pre-training uses, and the last norm that a backbone for dense heads saves without use."""
    prefix = layout.norm.removesuffix(OLD.norm)
    if not config.map_norms:
        reason = "only masked pre-training uses it"
        return [drop(f"{prefix}embeddings.mask_token", reason), drop("decoder.*", reason)]
    prefix_of_norms = keys.prefix_before("hidden_states_norms.stage1.weight") or ""
    norms = dict.fromkeys((layout.norm, f"{prefix_of_norms}swin.layernorm"))
    return [drop(f"{norm}.*", "each map has a norm of its own") for norm in norms]


def settings(config: SwinConfig) -> dict[str, Any]:
    """Return a Swin's config.json, or its part of one.

    Raises:
        CheckpointError: windows that transformers cannot store or run.
    """
    version_2 = config.version == 2
    window = single_window(config, TITLE, "rows" if version_2 else "never")
    if not version_2 and not config.map_norms:
        single_window(config, TITLE)  # its classifiers fail on a map smaller than the window
    if config.norm_eps != EPS:
        raise CheckpointError(
            f"{TITLE} cannot store norm_eps {config.norm_eps:g}: part of its norms have {EPS:g}; choose another"
        )
    height, width = config.image_size
    result: dict[str, Any] = {
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
            raise CheckpointError(
                f"{TITLE} cannot store pretrained windows {before}, which are not square; choose another"
            )
        result["pretrained_window_sizes"] = [h for h, _ in before]
    if config.map_norms:
        result["out_features"] = [f"stage{i + 1}" for i in range(len(config.depths))]
    return result


def draft(net: Swin) -> Draft:
    config = net.config
    model = "Swinv2" if config.version == 2 else "Swin"
    if config.map_norms and config.version == 2:
        raise CheckpointError(
            f"{TITLE}' Swinv2Backbone has no norms of its maps; choose triptych's own format"
        )
    layout = OLD_V2 if config.version == 2 else OLD
    if config.num_classes:
        layout = prefix_layout(layout, f"{model.lower()}.")
    tensors = export_tensors(
        [*table(config, layout), *classifier(config, HEAD)],
        cpu_state_dict(net),
        f"{TITLE} has no key for all of this network",
    )
    role = "Backbone" if config.map_norms else ("ForImageClassification" if config.num_classes else "Model")
    config_json = {
        "architectures": [model + role],
        **settings(config),
        "dtype": str(next(net.parameters()).dtype).removeprefix("torch."),
        **to_id2label(net.card.classes, config.num_classes),
    }
    json_files = {"config": config_json, "preprocessor_config": to_processor(net.card.preprocess)}
    return verify_round_trip(Draft(tensors, json_files), net, read, TITLE)


FORMAT = Format("hf", "swin", "transformers (Swin)", "folder", matches, read, draft)
