"""UPerNet on Swin of mmsegmentation and of the older Swin-Transformer-Semantic-Segmentation, both .pth.

The files hold {"state_dict": tensors, "meta": classes and more}. The older one has the keys of Swin's own code for its
backbone. mmsegmentation merges patches with nn.Unfold, so that the channels of its norm and reduction are permuted.
"""

from dataclasses import replace
from typing import Any

from triptych.heads.config import SegmenterConfig
from triptych.heads.segmenter import Segmenter
from triptych.model_card import ModelCard, Preprocess
from triptych.weights.mapping.defaults import class_names, describe_preprocess
from triptych.weights.mapping.format import Draft, Format, Hints, LoadPlan, StateDictKeys, cpu_state_dict
from triptych.weights.mapping.round_trip import verify_round_trip
from triptych.weights.mapping.rules import add_prefixes, export_tensors
from triptych.weights.segmenter.upernet import Layout, matches, read_head, swin_in, table
from triptych.weights.swin.infer_config import SwinFileConfig, read_sizes, single_window
from triptych.weights.swin.key_layout import Layout as BackboneLayout
from triptych.weights.swin.key_layout import prefix_layout
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
    prefix_layout(MICROSOFT, "backbone."), map_norm=lambda stage: f"backbone.norm{stage}", saved=("index",)
)


def _read(keys: StateDictKeys, hints: Hints, layout: BackboneLayout) -> LoadPlan:
    crops = SwinFileConfig(where="convention: ADE20K's crops of 512x512", image_size=(512, 512))
    backbone, facts = read_sizes(keys, layout, hints, crops)
    backbone = replace(backbone, shift_single_windows=True)
    facts["shift_single_windows"] = "convention: the authors' backbones shift every map"
    head, more = read_head(keys, HEAD, None, "convention")
    config = SegmenterConfig(backbone=backbone, head=head)
    rules = add_prefixes(backbone_table(backbone, layout), ours="backbone.") + table(
        head, len(backbone.depths), HEAD
    )
    # Resizes the shorter side to 512 and keeps the aspect ratio.
    preprocess = Preprocess(size=backbone.image_size, crop=1.0, interpolation="bilinear")
    facts["preprocess"] = f"convention: {describe_preprocess(preprocess)}"
    labels, facts["classes"] = class_names(head.num_classes, _classes(keys), "meta in the file")
    return LoadPlan(
        "segmenter", config, rules, ModelCard(preprocess=preprocess, classes=labels), facts | more
    )


def _classes(keys: StateDictKeys) -> tuple[str, ...] | None:
    """Return meta["CLASSES"]; since version 1.0 meta["dataset_meta"]["classes"]."""
    inside_file = keys.settings.get("inside")
    meta: Any = inside_file.get("meta") if isinstance(inside_file, dict) else None
    if not isinstance(meta, dict):
        return None
    newer = meta.get("dataset_meta")
    classes = meta.get("CLASSES") or (newer.get("classes") if isinstance(newer, dict) else None)
    return tuple(map(str, classes)) if isinstance(classes, list | tuple) else None


def _draft(net: Segmenter, layout: BackboneLayout, title: str) -> Draft:
    backbone, head = swin_in(net, title), net.config.head
    single_window(backbone, title, "never")
    rules = add_prefixes(backbone_table(backbone, layout), ours="backbone.") + table(
        head, len(backbone.depths), HEAD
    )
    tensors = export_tensors(rules, cpu_state_dict(net), f"{title} has no key for all of this network")
    classes = net.card.classes
    # Where versions before and since 1.0 look for them.
    meta = {"CLASSES": classes, "dataset_meta": {"classes": classes}} if classes else {}
    result = Draft(tensors, wrapper_key="state_dict", extras={"meta": meta})
    return verify_round_trip(result, net, lambda keys, hints: _read(keys, hints, layout), title)


def _format(name: str, title: str, layout: BackboneLayout) -> Format:
    first = layout.block(0).replace("{i}", "0") + layout.qkv[0] + ".weight"
    return Format(
        name,
        "segmenter",
        title,
        "torch",
        lambda keys: matches(keys) and first in keys,
        lambda keys, hints: _read(keys, hints, layout),
        lambda net: _draft(net, layout, title),
    )


MMSEG_FORMAT = _format("mmseg", "mmsegmentation (.pth)", MMSEG)
SWIN_SEG_FORMAT = _format("swin_seg", "Swin-Transformer-Semantic-Segmentation (.pth)", SWIN_SEG)
