"""UPerNet's keys in mmsegmentation, which transformers adopted with other names for the norms."""

from dataclasses import dataclass
from typing import Any

from triptych.errors import CheckpointError
from triptych.heads.config import HeadConfig, SegmenterConfig
from triptych.heads.segmenter import Segmenter
from triptych.models.configs.swin import SwinConfig
from triptych.weights.mapping.format import StateDictKeys
from triptych.weights.mapping.rules import Rule, expand, rename

USUAL_SCALES = (1, 2, 3, 6)
"""Default sizes of the pooled grids, which no tensor determines."""


@dataclass(frozen=True)
class Layout:
    """Names that differ between the two."""

    norm: str
    classifier: str


NORM = "{weight,bias,running_mean,running_var,num_batches_tracked}"


def table(config: HeadConfig, levels: int, layout: Layout) -> list[Rule]:
    """Return the rules: pyramid pooling, the feature pyramid, the fusion of all levels, and the auxiliary head.

    Args:
        levels: number of feature maps.
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
    rules = [rename(f"{head}{layout.classifier}.{{weight,bias}}", "classifier.{weight,bias}")]
    if config.aux_channels:
        pairs.append(("auxiliary_head.convs.0", "aux.0"))
        rules.append(rename(f"auxiliary_head.{layout.classifier}.{{weight,bias}}", "aux.1.{weight,bias}"))
    for theirs, ours in pairs:
        rules.append(rename(f"{theirs}.conv.weight", f"{ours}.conv.weight"))
        rules.append(rename(f"{theirs}.{layout.norm}.{NORM}", f"{ours}.norm.{NORM}"))
    return expand(rules, 1)


def matches(keys: StateDictKeys) -> bool:
    return (
        "decode_head.fpn_bottleneck.conv.weight" in keys and "decode_head.psp_modules.0.1.conv.weight" in keys
    )


def read_head(
    keys: StateDictKeys, layout: Layout, scales: Any, where: str
) -> tuple[HeadConfig, dict[str, str]]:
    """Return the head's config, and where the sizes of its pooled grids came from.

    Args:
        scales: these sizes, from the config named `where`; None if it does not store them.

    Raises:
        CheckpointError: their number is not that of the grids in the tensors.
    """
    count = keys.count_blocks("decode_head.psp_modules.{i}.")
    facts = {"pool_scales": where if scales is not None else "convention: 1, 2, 3 and 6"}
    if scales is None:
        scales = USUAL_SCALES if count == len(USUAL_SCALES) else tuple(range(1, count + 1))
    if not isinstance(scales, list | tuple) or len(scales) != count:
        raise CheckpointError(
            f"{keys.path}: {where} says pool_scales {scales!r}, the tensors have {count}; put the config that "
            "belongs to them beside them"
        )
    aux = "auxiliary_head.convs.0.conv.weight"
    return HeadConfig(
        type="upernet",
        num_classes=keys.shape(f"decode_head.{layout.classifier}.weight", 4)[0],
        channels=keys.shape("decode_head.fpn_bottleneck.conv.weight", 4)[0],
        pool_scales=tuple(scales),
        aux_channels=keys.shape(aux, 4)[0] if aux in keys else 0,
    ), facts


def swin_in(net: Segmenter, title: str) -> SwinConfig:
    """Return the backbone's config of a network that these formats can represent.

    Raises:
        CheckpointError: another head, another backbone, a SwinV2, or a backbone without norms on its maps.
    """
    config: SegmenterConfig = net.config
    backbone = config.backbone
    if config.head.type != "upernet" or not isinstance(backbone, SwinConfig) or not backbone.map_norms:
        raise CheckpointError(
            f"{title} holds UPerNet on a Swin with norms on its maps, not {config.head.type} on "
            f"{type(backbone).__name__.removesuffix('Config')}; choose triptych's own format"
        )
    if backbone.version == 2:
        raise CheckpointError(f"{title} has no SwinV2 with norms on its maps; choose triptych's own format")
    return backbone
