"""transformers' UperNetForSemanticSegmentation on a SwinBackbone."""

from typing import Any

from triptych.errors import UserError
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
from triptych.weights.mapping.format import Draft, Format, Hints, Names, Reading, state
from triptych.weights.mapping.round_trip import checked
from triptych.weights.mapping.rules import to_theirs, within
from triptych.weights.segmenter import upernet
from triptych.weights.segmenter.upernet import Layout, read_head, swin_in, table
from triptych.weights.swin import hf
from triptych.weights.swin.key_layout import inside
from triptych.weights.swin.key_layout import table as backbone_table

TITLE = "transformers (UperNet)"
HEAD = Layout(norm="batch_norm", classifier="classifier")
BACKBONE = hf.with_norms_at(inside(hf.OLD, "backbone."), "backbone.")


def read(names: Names, hints: Hints) -> Reading:
    settings: dict[str, Any] = names.settings.get("config", {})
    beside = settings.get("backbone_config")
    beside = beside if isinstance(beside, dict) else {}
    layout = hf.layout_of(names)
    backbone, facts = hf.read_backbone(names, layout, beside, hints)
    if not backbone.map_norms:
        raise UserError(
            f"{names.path} lacks backbone.hidden_states_norms; needed is a SwinBackbone's checkpoint"
        )
    head, more = read_head(names, HEAD, settings.get("pool_scales"), "config.json")
    config = SegmenterConfig(backbone=backbone, head=head)
    rules = within(backbone_table(backbone, layout), "backbone.")
    rules += [*hf.unread(names, backbone, layout), *table(head, len(backbone.depths), HEAD)]
    whole = Preprocess(size=(512, 512), mode="squash", crop=1.0, interpolation="bilinear")
    preprocess, facts["preprocess"] = from_processor(names.settings, whole)
    labels, facts["classes"] = class_names(
        head.num_classes, from_id2label(settings), "id2label in config.json"
    )
    return Reading("segmenter", config, rules, ModelCard(preprocess=preprocess, classes=labels), facts | more)


def draft(net: Segmenter) -> Draft:
    backbone, head = swin_in(net, TITLE), net.config.head
    if head.aux_channels and len(backbone.depths) != 4:
        raise UserError(
            f"{TITLE} puts the auxiliary head on the third map, here the last but one of {len(backbone.depths)}; "
            "choose another format"
        )
    rules = within(backbone_table(backbone, BACKBONE), "backbone.") + table(head, len(backbone.depths), HEAD)
    tensors = to_theirs(rules, state(net), f"{TITLE} has no place for all of this network")
    found = {
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
    made = Draft(tensors, {"config": found, "preprocessor_config": processor})
    return checked(made, net, read, TITLE)


def recognises(names: Names) -> bool:
    return upernet.recognises(names) and names.any("encoder.layers.0.blocks.0.layernorm_before.weight")


FORMAT = Format("hf", "segmenter", TITLE, "folder", recognises, read, draft)
