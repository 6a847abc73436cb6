"""UPerNet as mmsegmentation wrote it first: its names, which transformers took over with other ones for the norms."""

from dataclasses import dataclass
from typing import Any

from triptych.errors import UserError
from triptych.heads.config import HeadConfig, SegmenterConfig
from triptych.heads.segmenter import Segmenter
from triptych.models.configs.swin import SwinConfig
from triptych.weights.mapping.format import Names
from triptych.weights.mapping.rules import Rule, expand, same

USUAL = (1, 2, 3, 6)
"""Sides of the pooled grids, which no tensor tells."""


@dataclass(frozen=True)
class Layout:
    """What the two call differently."""

    norm: str
    classifier: str


NORM = "{weight,bias,running_mean,running_var,num_batches_tracked}"


def table(config: HeadConfig, levels: int, layout: Layout) -> list[Rule]:
    """Theirs <-> ours: pyramid pooling, the feature pyramid, all levels fused, and the auxiliary head.

    Args:
        levels: number of maps.
    """
    head = "decode_head."
    pairs = [
        (f"{head}psp_modules.{k}.1", f"decoder.pooling.pools.{k}") for k in range(len(config.pool_scales))
    ]
    pairs.append((f"{head}bottleneck", "decoder.pooling.join"))
    for level in range(levels - 1):
        pairs.append((f"{head}lateral_convs.{level}", f"decoder.lateral.{level}"))
        pairs.append((f"{head}fpn_convs.{level}", f"decoder.smooth.{level}"))
    pairs.append((f"{head}fpn_bottleneck", "decoder.join"))
    rules = [same(f"{head}{layout.classifier}.{{weight,bias}}", "classifier.{weight,bias}")]
    if config.aux_channels:
        pairs.append(("auxiliary_head.convs.0", "aux.0"))
        rules.append(same(f"auxiliary_head.{layout.classifier}.{{weight,bias}}", "aux.1.{weight,bias}"))
    for theirs, ours in pairs:
        rules.append(same(f"{theirs}.conv.weight", f"{ours}.conv.weight"))
        rules.append(same(f"{theirs}.{layout.norm}.{NORM}", f"{ours}.norm.{NORM}"))
    return expand(rules, 1)


def recognises(names: Names) -> bool:
    return (
        "decode_head.fpn_bottleneck.conv.weight" in names
        and "decode_head.psp_modules.0.1.conv.weight" in names
    )


def read_head(names: Names, layout: Layout, scales: Any, where: str) -> tuple[HeadConfig, dict[str, str]]:
    """The head's config, and where the sides of its pooled grids came from.

    Args:
        scales: these sides, from a config called `where`; none if it does not say.

    Raises:
        UserError: they are not as many as the tensors have grids.
    """
    count = names.count("decode_head.psp_modules.{i}.")
    facts = {"pool_scales": where if scales is not None else "convention: 1, 2, 3 and 6"}
    if scales is None:
        scales = USUAL if count == len(USUAL) else tuple(range(1, count + 1))
    if not isinstance(scales, list | tuple) or len(scales) != count:
        raise UserError(
            f"{names.path}: {where} says pool_scales {scales!r}, the tensors have {count}; put the config that "
            "belongs to them beside them"
        )
    aux = "auxiliary_head.convs.0.conv.weight"
    return HeadConfig(
        type="upernet",
        num_classes=names.shape(f"decode_head.{layout.classifier}.weight", 4)[0],
        channels=names.shape("decode_head.fpn_bottleneck.conv.weight", 4)[0],
        pool_scales=tuple(scales),
        aux_channels=names.shape(aux, 4)[0] if aux in names else 0,
    ), facts


def swin_in(net: Segmenter, title: str) -> SwinConfig:
    """The backbone's config of a network that these formats have a place for.

    Raises:
        UserError: another head, another backbone, a SwinV2, which none of their codes has so, or one whose maps are not
            normed.
    """
    config: SegmenterConfig = net.config
    backbone = config.backbone
    if config.head.type != "upernet" or not isinstance(backbone, SwinConfig) or not backbone.map_norms:
        raise UserError(
            f"{title} holds UPerNet on a Swin with norms on its maps, not {config.head.type} on "
            f"{type(backbone).__name__.removesuffix('Config')}; choose triptych's own format"
        )
    if backbone.version == 2:
        raise UserError(f"{title} has no SwinV2 with norms on its maps; choose triptych's own format")
    return backbone
