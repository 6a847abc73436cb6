"""mmsegmentation's UPerNet on Swin, .pth: {"state_dict": tensors, "meta": classes and more}, and that of the older
Swin-Transformer-Semantic-Segmentation, whose backbone has Swin's own names.

mmsegmentation merges patches with nn.Unfold, so that its norm and reduction have their channels in another order.
"""

from dataclasses import replace
from typing import Any

from triptych.heads.config import SegmenterConfig
from triptych.heads.segmenter import Segmenter
from triptych.model_card import ModelCard, Preprocess
from triptych.weights.mapping.defaults import class_names, describe
from triptych.weights.mapping.format import Draft, Format, Hints, Names, Reading, state
from triptych.weights.mapping.round_trip import checked
from triptych.weights.mapping.rules import to_theirs, within
from triptych.weights.segmenter.upernet import Layout, read_head, recognises, swin_in, table
from triptych.weights.swin.infer_config import Said, read_sizes, single
from triptych.weights.swin.key_layout import Layout as BackboneLayout
from triptych.weights.swin.key_layout import inside
from triptych.weights.swin.key_layout import table as backbone_table
from triptych.weights.swin.microsoft import MICROSOFT

HEAD = Layout(norm="bn", classifier="conv_seg")
MMSEG = BackboneLayout(
    embed="backbone.patch_embed.projection",
    embed_norm="backbone.patch_embed.norm",
    block=lambda stage: f"backbone.stages.{stage}.blocks.{{i}}.",
    merge=lambda stage: f"backbone.stages.{stage - 1}.downsample",
    map_norm=lambda stage: f"backbone.norm{stage}",
    qkv=("attn.w_msa.qkv",),
    proj="attn.w_msa.proj",
    table="attn.w_msa.relative_position_bias_table",
    index="attn.w_msa.relative_position_index",
    fc1="ffn.layers.0.0",
    fc2="ffn.layers.1",
    unfolded=True,
    saved=("index",),
)
SWIN_SEG = replace(
    inside(MICROSOFT, "backbone."), map_norm=lambda stage: f"backbone.norm{stage}", saved=("index",)
)


def _read(names: Names, hints: Hints, layout: BackboneLayout) -> Reading:
    crops = Said(where="convention: ADE20K's crops of 512x512", image_size=(512, 512))
    backbone, facts = read_sizes(names, layout, hints, crops)
    head, more = read_head(names, HEAD, None, "convention")
    config = SegmenterConfig(backbone=backbone, head=head)
    rules = within(backbone_table(backbone, layout), "backbone.") + table(head, len(backbone.depths), HEAD)
    # Short side to 512, aspect kept.
    preprocess = Preprocess(size=backbone.image_size, crop=1.0, interpolation="bilinear")
    facts["preprocess"] = f"convention: {describe(preprocess)}"
    labels, facts["classes"] = class_names(head.num_classes, _classes(names), "meta in the file")
    return Reading("segmenter", config, rules, ModelCard(preprocess=preprocess, classes=labels), facts | more)


def _classes(names: Names) -> tuple[str, ...] | None:
    """meta["CLASSES"], since version 1.0 meta["dataset_meta"]["classes"]."""
    inside_file = names.settings.get("inside")
    meta: Any = inside_file.get("meta") if isinstance(inside_file, dict) else None
    if not isinstance(meta, dict):
        return None
    newer = meta.get("dataset_meta")
    found = meta.get("CLASSES") or (newer.get("classes") if isinstance(newer, dict) else None)
    return tuple(map(str, found)) if isinstance(found, list | tuple) else None


def _draft(net: Segmenter, layout: BackboneLayout, title: str) -> Draft:
    backbone, head = swin_in(net, title), net.config.head
    single(backbone, title, "never")
    rules = within(backbone_table(backbone, layout), "backbone.") + table(head, len(backbone.depths), HEAD)
    tensors = to_theirs(rules, state(net), f"{title} has no place for all of this network")
    classes = net.card.classes
    # Both of its ages find them.
    meta = {"CLASSES": classes, "dataset_meta": {"classes": classes}} if classes else {}
    made = Draft(tensors, nest="state_dict", beside={"meta": meta})
    return checked(made, net, lambda names, hints: _read(names, hints, layout), title)


def _format(name: str, title: str, layout: BackboneLayout) -> Format:
    first = layout.block(0).replace("{i}", "0") + layout.qkv[0] + ".weight"
    return Format(
        name,
        "segmenter",
        title,
        "torch",
        lambda names: recognises(names) and first in names,
        lambda names, hints: _read(names, hints, layout),
        lambda net: _draft(net, layout, title),
    )


MMSEG_FORMAT = _format("mmseg", "mmsegmentation (.pth)", MMSEG)
SWIN_SEG_FORMAT = _format("swin_seg", "Swin-Transformer-Semantic-Segmentation (.pth)", SWIN_SEG)
