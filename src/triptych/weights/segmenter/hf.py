"""transformers' UperNetForSemanticSegmentation on a SwinBackbone."""

from typing import Any

from triptych.errors import CheckpointError
from triptych.heads.config import SegmenterConfig
from triptych.heads.segmenter import Segmenter
from triptych.model_card import ModelCard, Preprocess
from triptych.weights.mapping.defaults import (
    class_names,
    from_id2label,
    from_processor,
    to_id2label,
    to_processor,
)
from triptych.weights.mapping.format import Draft, Format, Hints, LoadPlan, StateDictKeys, cpu_state_dict
from triptych.weights.mapping.round_trip import verify_round_trip
from triptych.weights.mapping.rules import add_prefixes, export_tensors
from triptych.weights.segmenter import upernet
from triptych.weights.segmenter.upernet import Layout, read_head, swin_in, table
from triptych.weights.swin import hf
from triptych.weights.swin.key_layout import prefix_layout
from triptych.weights.swin.key_layout import table as backbone_table

TITLE = "transformers (UperNet)"
HEAD = Layout(norm="batch_norm", classifier="classifier")
BACKBONE = hf.with_norms_at(prefix_layout(hf.OLD, "backbone."), "backbone.")


def read(keys: StateDictKeys, hints: Hints) -> LoadPlan:
    settings: dict[str, Any] = keys.settings.get("config", {})
    backbone_settings = settings.get("backbone_config")
    backbone_settings = backbone_settings if isinstance(backbone_settings, dict) else {}
    layout = hf.layout_of(keys)
    backbone, facts = hf.read_backbone(keys, layout, backbone_settings, hints)
    if not backbone.map_norms:
        raise CheckpointError(
            f"{keys.path} lacks backbone.hidden_states_norms; needed is a SwinBackbone's checkpoint"
        )
    head, more = read_head(keys, HEAD, settings.get("pool_scales"), "config.json")
    config = SegmenterConfig(backbone=backbone, head=head)
    rules = add_prefixes(backbone_table(backbone, layout), ours="backbone.")
    rules += [*hf.unread(keys, backbone, layout), *table(head, len(backbone.depths), HEAD)]
    default = Preprocess(size=(512, 512), mode="squash", crop=1.0, interpolation="bilinear")
    preprocess, facts["preprocess"] = from_processor(keys.settings, default)
    labels, facts["classes"] = class_names(
        head.num_classes, from_id2label(settings), "id2label in config.json"
    )
    return LoadPlan(
        "segmenter", config, rules, ModelCard(preprocess=preprocess, classes=labels), facts | more
    )


def draft(net: Segmenter) -> Draft:
    backbone, head = swin_in(net, TITLE), net.config.head
    if head.aux_channels and len(backbone.depths) != 4:
        raise CheckpointError(
            f"{TITLE} puts the auxiliary head on the third map, here the last but one of {len(backbone.depths)}; "
            "choose another format"
        )
    rules = add_prefixes(backbone_table(backbone, BACKBONE), ours="backbone.") + table(
        head, len(backbone.depths), HEAD
    )
    tensors = export_tensors(rules, cpu_state_dict(net), f"{TITLE} has no key for all of this network")
    settings = {
        "architectures": ["UperNetForSemanticSegmentation"],
        "model_type": "upernet",
        "backbone_config": hf.settings(backbone),
        "hidden_size": head.channels,
        "pool_scales": list(head.pool_scales),
        "use_auxiliary_head": head.aux_channels > 0,
        "auxiliary_in_channels": backbone.widths[-2],
        "auxiliary_channels": head.aux_channels or 256,
        "auxiliary_num_convs": 1,
        "auxiliary_concat_input": False,
        "loss_ignore_index": 255,
        "dtype": str(next(net.parameters()).dtype).removeprefix("torch."),
        **to_id2label(net.card.classes, head.num_classes),
    }
    processor = {**to_processor(net.card.preprocess), "image_processor_type": "SegformerImageProcessor"}
    result = Draft(tensors, {"config": settings, "preprocessor_config": processor})
    return verify_round_trip(result, net, read, TITLE)


def matches(keys: StateDictKeys) -> bool:
    return upernet.matches(keys) and keys.any_endswith("encoder.layers.0.blocks.0.layernorm_before.weight")


FORMAT = Format("hf", "segmenter", TITLE, "folder", matches, read, draft)
