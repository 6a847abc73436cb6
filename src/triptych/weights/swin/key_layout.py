"""One table of rules for all publishers of Swins, which differ only in names. A `Layout` holds the names of one."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Literal

import torch
from einops import rearrange
from torch import Tensor

from triptych.layers.window import relative_index, shift_mask
from triptych.models.configs.swin import SwinConfig, maps_at
from triptych.weights.mapping.rules import (
    DROP_KEY_BIAS,
    FUSE_QKV,
    Rule,
    convert,
    drop,
    expand,
    per_tensor,
    rename,
)

Stage = Callable[[int], str]
Computed = Literal["index", "coordinates", "mask"]


@dataclass(frozen=True, kw_only=True)
class Layout:
    """Keys of the parts. Those of a stage are functions of its number, from 0."""

    embed: str
    embed_norm: str
    block: Stage
    """Prefix of a stage's blocks; `{i}` stands for the block."""
    merge: Stage
    """The patch merging in front of a stage."""
    norm: str = "norm"
    map_norm: Stage | None = None
    """The norm of a stage's map, for dense heads."""
    norm1: str = "norm1"
    norm2: str = "norm2"
    qkv: tuple[str, ...] = ("attn.qkv",)
    """One fused layer, or three."""
    fused_qkv_bias: bool = False
    """Whether version 2 has a fused bias whose keys' third is set to zero in forward, as in torchvision."""
    proj: str = "attn.proj"
    table: str = "attn.relative_position_bias_table"
    scale: str = "attn.logit_scale"
    bias_mlp: tuple[str, str] = ("attn.cpb_mlp.0", "attn.cpb_mlp.2")
    fc1: str = "mlp.fc1"
    fc2: str = "mlp.fc2"
    unfolded: bool = False
    """Whether merging orders its four patches as nn.Unfold does: channels first, and rows before columns."""
    index: str = "attn.relative_position_index"
    coordinates: str = "attn.relative_coords_table"
    mask: str = "attn_mask"
    saved: tuple[Computed, ...] = ()
    """Tensors that the publisher saves although they follow from the sizes."""
    flat_index: bool = False


# Ours concatenates the four patches as Swin's own code does: both rows of the left column, then of the right one.
FROM_UNFOLD = per_tensor(
    lambda t: rearrange(t, "... (d row column) -> ... (column row d)", row=2, column=2),
    lambda t: rearrange(t, "... (column row d) -> ... (d row column)", row=2, column=2),
)


def prefix_layout(layout: Layout, prefix: str) -> Layout:
    """Return the layout of a network that is a part of another. The norms of maps are unchanged."""
    return replace(
        layout,
        embed=prefix + layout.embed,
        embed_norm=prefix + layout.embed_norm,
        block=lambda stage: prefix + layout.block(stage),
        merge=lambda stage: prefix + layout.merge(stage),
        norm=prefix + layout.norm,
    )


def table(config: SwinConfig, layout: Layout) -> list[Rule]:
    """Return the rules without the classifier, in the order in which the network runs."""
    rules = expand(
        [
            rename(f"{layout.embed}.{{weight,bias}}", "patch.proj.{weight,bias}"),
            rename(f"{layout.embed_norm}.{{weight,bias}}", "patch_norm.{weight,bias}"),
        ],
        1,
    )
    for stage, depth in enumerate(config.depths):
        if stage:
            rules += expand(merging(config, layout, stage), 1)
        rules += expand(block(config, layout, stage), depth)
        rules += expand(masks(config, layout, stage), depth)
        if config.map_norms and layout.map_norm is not None:
            name = layout.map_norm(stage)
            rules += expand([rename(f"{name}.{{weight,bias}}", f"norms.{stage}.{{weight,bias}}")], 1)
    if not config.map_norms:
        rules += expand([rename(f"{layout.norm}.{{weight,bias}}", "norm.{weight,bias}")], 1)
    return rules


def classifier(config: SwinConfig, name: str = "head") -> list[Rule]:
    """Return the rules of the head, if there is one."""
    return expand([rename(f"{name}.{{weight,bias}}", "head.{weight,bias}")], 1) if config.num_classes else []


def merging(config: SwinConfig, layout: Layout, stage: int) -> list[Rule]:
    """Return the rules of the patch merging in front of a stage."""
    theirs, ours = layout.merge(stage), f"stages.{stage}.merge"
    if not layout.unfolded:
        return [
            rename(f"{theirs}.norm.{{weight,bias}}", f"{ours}.norm.{{weight,bias}}"),
            rename(f"{theirs}.reduction.weight", f"{ours}.reduction.weight"),
        ]
    return [
        convert(f"{theirs}.norm.{{weight,bias}}", f"{ours}.norm.{{weight,bias}}", FROM_UNFOLD),
        convert(f"{theirs}.reduction.weight", f"{ours}.reduction.weight", FROM_UNFOLD),
    ]


def block(config: SwinConfig, layout: Layout, stage: int) -> list[Rule]:
    """Return the rules of a stage's blocks."""
    b, ours = layout.block(stage), f"stages.{stage}.blocks.{{i}}."
    rules = [
        rename(f"{b}{layout.norm1}.{{weight,bias}}", ours + "norm1.{weight,bias}"),
        *attention(config, layout, b, ours + "attn."),
        rename(f"{b}{layout.norm2}.{{weight,bias}}", ours + "norm2.{weight,bias}"),
        rename(f"{b}{layout.fc1}.{{weight,bias}}", ours + "mlp.fc1.{weight,bias}"),
        rename(f"{b}{layout.fc2}.{{weight,bias}}", ours + "mlp.fc2.{weight,bias}"),
    ]
    window = config.window_size[stage]
    restore_index = partial(index_of, window, layout.flat_index)
    follows = "it follows from the windows"
    rules.append(drop(b + layout.index, follows, restore_index if "index" in layout.saved else None))
    if config.version == 2:
        before = config.pretrained_window_size[stage] if config.pretrained_window_size else (0, 0)
        restore_table = partial(coordinates_of, window, before)
        rules.append(
            drop(b + layout.coordinates, follows, restore_table if "coordinates" in layout.saved else None)
        )
    return rules


def attention(config: SwinConfig, layout: Layout, b: str, ours: str) -> list[Rule]:
    """Return the rules of window attention, with the position bias of either version."""
    three = [b + name for name in layout.qkv]
    qkv_rule = partial(convert, operation=FUSE_QKV) if len(three) == 3 else _single
    rules = [
        qkv_rule(tuple(f"{name}.weight" for name in three), ours + "qkv.weight"),
        rename(f"{b}{layout.proj}.{{weight,bias}}", ours + "proj.{weight,bias}"),
    ]
    if config.version == 1:
        if config.qkv_bias == "qkv":
            rules.append(qkv_rule(tuple(f"{name}.bias" for name in three), ours + "qkv.bias"))
        return [*rules, rename(b + layout.table, ours + "bias_table")]
    apart = biases(b, layout)
    if config.qkv_bias == "qv" and len(apart) == 1:
        rules.append(convert(apart[0], (ours + "q_bias", ours + "v_bias"), DROP_KEY_BIAS))
    elif config.qkv_bias == "qv":
        rules += [rename(apart[0], ours + "q_bias"), rename(apart[1], ours + "v_bias")]
    first, second = (b + name for name in layout.bias_mlp)
    return [
        *rules,
        rename(b + layout.scale, ours + "scale"),
        rename(f"{first}.{{weight,bias}}", ours + "bias_mlp.fc1.{weight,bias}"),
        rename(f"{second}.weight", ours + "bias_mlp.fc2.weight"),
    ]


def _single(theirs: tuple[str, ...], ours: str) -> Rule:
    return rename(theirs[0], ours)


def biases(b: str, layout: Layout) -> list[str]:
    """Return the keys of version 2's biases of queries and values; one key if the bias is fused."""
    if layout.fused_qkv_bias:
        return [f"{b}{layout.qkv[0]}.bias"]
    if len(layout.qkv) == 3:
        return [f"{b}{layout.qkv[0]}.bias", f"{b}{layout.qkv[2]}.bias"]
    prefix = b + layout.qkv[0].removesuffix("qkv")
    return [f"{prefix}q_bias", f"{prefix}v_bias"]


def masks(config: SwinConfig, layout: Layout, stage: int) -> list[Rule]:
    """Return the rules of the shift's mask, which older code saves in each shifted block."""
    b, restore = layout.block(stage), None
    (rows, columns), window = maps_at(config, config.image_size)[stage], config.window_size[stage]
    if "mask" in layout.saved and rows > window[0] and columns > window[1]:
        restore = partial(mask_of, (rows // window[0], columns // window[1]), window)
    return [
        drop(
            b.replace("{i}", str(i)) + layout.mask,
            "it follows from the map's size",
            restore if i % 2 else None,
        )
        for i in range(config.depths[stage])
    ]


def index_of(window: tuple[int, int], flat: bool) -> Tensor:
    """Return the row of the bias table for each pair of positions."""
    index = relative_index(window)
    return index.flatten() if flat else index


def coordinates_of(window: tuple[int, int], before: tuple[int, int]) -> Tensor:
    """Return log-spaced differences (`layers.window.log_spaced`) as their code saves them, (1, 2M_h-1, 2M_w-1, 2).

    Computed in fp32 as there, equal to the last bit.
    """
    axes = []
    for side, old in zip(window, before, strict=True):
        d = torch.arange(1 - side, side, dtype=torch.float32) / max((old or side) - 1, 1) * 8
        axes.append(d.sign() * (d.abs() + 1).log2() / 3)
    return torch.stack(torch.meshgrid(*axes, indexing="ij"), dim=-1)[None]


def mask_of(windows: tuple[int, int], window: tuple[int, int]) -> Tensor:
    """Return the mask of a shift by half a window as Swin's own code saves it, (windows, M*M, M*M): -100 if masked."""
    shift = (window[0] // 2, window[1] // 2)
    mask = shift_mask(*windows, window, shift, torch.device("cpu"), torch.float32)
    return mask[:, 0].clamp(min=-100.0)
