"""One table for every publisher of Swins: they name the same parts, and a layout says how each of them does."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Literal

import torch
from einops import rearrange
from torch import Tensor

from triptych.layers.window import relative_index, shift_mask
from triptych.models.configs.swin import SwinConfig, maps_at
from triptych.weights.mapping.rules import CONCATENATE, WITHOUT_KEYS, Rule, drop, each, expand, rule, same

Stage = Callable[[int], str]
Computed = Literal["index", "coordinates", "mask"]


@dataclass(frozen=True, kw_only=True)
class Layout:
    """Names of the parts. Those that a stage has are functions of its number, from 0."""

    embed: str
    embed_norm: str
    block: Stage
    """What names in a stage's blocks begin with; `{i}` stands for the block."""
    merge: Stage
    """The merging that leads into a stage."""
    norm: str = "norm"
    map_norm: Stage | None = None
    """Of a stage's map, where dense heads read it."""
    norm1: str = "norm1"
    norm2: str = "norm2"
    qkv: tuple[str, ...] = ("attn.qkv",)
    """One layer, or three."""
    whole_bias: bool = False
    """torchvision's version 2 has a bias of all three, and makes the keys' third zero when it runs."""
    proj: str = "attn.proj"
    table: str = "attn.relative_position_bias_table"
    scale: str = "attn.logit_scale"
    bias_mlp: tuple[str, str] = ("attn.cpb_mlp.0", "attn.cpb_mlp.2")
    fc1: str = "mlp.fc1"
    fc2: str = "mlp.fc2"
    unfolded: bool = False
    """Whether merging takes its four cells as nn.Unfold gives them: channels first, and rows before columns."""
    index: str = "attn.relative_position_index"
    coordinates: str = "attn.relative_coords_table"
    mask: str = "attn_mask"
    saved: tuple[Computed, ...] = ()
    """What the publisher saves though it follows from the sizes."""
    flat_index: bool = False


# Ours has the four cells as Swin's own code concatenates them: both rows of the left column, then of the right one.
FROM_UNFOLD = each(
    lambda t: rearrange(t, "... (d row column) -> ... (column row d)", row=2, column=2),
    lambda t: rearrange(t, "... (column row d) -> ... (d row column)", row=2, column=2),
)


def inside(layout: Layout, prefix: str) -> Layout:
    """The layout of a network that is a part of another, as its names say; those of map norms are left as they are."""
    return replace(
        layout,
        embed=prefix + layout.embed,
        embed_norm=prefix + layout.embed_norm,
        block=lambda stage: prefix + layout.block(stage),
        merge=lambda stage: prefix + layout.merge(stage),
        norm=prefix + layout.norm,
    )


def table(config: SwinConfig, layout: Layout) -> list[Rule]:
    """Theirs <-> ours, top to bottom as the network runs, without the classifier."""
    rules = expand(
        [
            same(f"{layout.embed}.{{weight,bias}}", "patch.proj.{weight,bias}"),
            same(f"{layout.embed_norm}.{{weight,bias}}", "patch_norm.{weight,bias}"),
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
            rules += expand([same(f"{name}.{{weight,bias}}", f"norms.{stage}.{{weight,bias}}")], 1)
    if not config.map_norms:
        rules += expand([same(f"{layout.norm}.{{weight,bias}}", "norm.{weight,bias}")], 1)
    return rules


def classifier(config: SwinConfig, name: str = "head") -> list[Rule]:
    """The head, if there is one."""
    return expand([same(f"{name}.{{weight,bias}}", "head.{weight,bias}")], 1) if config.num_classes else []


def merging(config: SwinConfig, layout: Layout, stage: int) -> list[Rule]:
    """The step into a stage."""
    theirs, ours = layout.merge(stage), f"stages.{stage}.merge"
    if not layout.unfolded:
        return [
            same(f"{theirs}.norm.{{weight,bias}}", f"{ours}.norm.{{weight,bias}}"),
            same(f"{theirs}.reduction.weight", f"{ours}.reduction.weight"),
        ]
    return [
        rule(f"{theirs}.norm.{{weight,bias}}", f"{ours}.norm.{{weight,bias}}", FROM_UNFOLD),
        rule(f"{theirs}.reduction.weight", f"{ours}.reduction.weight", FROM_UNFOLD),
    ]


def block(config: SwinConfig, layout: Layout, stage: int) -> list[Rule]:
    """The blocks of a stage."""
    b, ours = layout.block(stage), f"stages.{stage}.blocks.{{i}}."
    rules = [
        same(f"{b}{layout.norm1}.{{weight,bias}}", ours + "norm1.{weight,bias}"),
        *attention(config, layout, b, ours + "attn."),
        same(f"{b}{layout.norm2}.{{weight,bias}}", ours + "norm2.{weight,bias}"),
        same(f"{b}{layout.fc1}.{{weight,bias}}", ours + "mlp.fc1.{weight,bias}"),
        same(f"{b}{layout.fc2}.{{weight,bias}}", ours + "mlp.fc2.{weight,bias}"),
    ]
    window = config.window_size[stage]
    made = partial(index_of, window, layout.flat_index)
    follows = "it follows from the windows"
    rules.append(drop(b + layout.index, follows, made if "index" in layout.saved else None))
    if config.version == 2:
        before = config.pretrained_window_size[stage] if config.pretrained_window_size else (0, 0)
        made = partial(coordinates_of, window, before)
        rules.append(drop(b + layout.coordinates, follows, made if "coordinates" in layout.saved else None))
    return rules


def attention(config: SwinConfig, layout: Layout, b: str, ours: str) -> list[Rule]:
    """W-MSA, with the bias of either version."""
    three = [b + name for name in layout.qkv]
    whole = partial(rule, operation=CONCATENATE) if len(three) == 3 else _single
    rules = [
        whole(tuple(f"{name}.weight" for name in three), ours + "qkv.weight"),
        same(f"{b}{layout.proj}.{{weight,bias}}", ours + "proj.{weight,bias}"),
    ]
    if config.version == 1:
        if config.qkv_bias == "qkv":
            rules.append(whole(tuple(f"{name}.bias" for name in three), ours + "qkv.bias"))
        return [*rules, same(b + layout.table, ours + "bias_table")]
    apart = biases(b, layout)
    if config.qkv_bias == "qv" and len(apart) == 1:
        rules.append(rule(apart[0], (ours + "q_bias", ours + "v_bias"), WITHOUT_KEYS))
    elif config.qkv_bias == "qv":
        rules += [same(apart[0], ours + "q_bias"), same(apart[1], ours + "v_bias")]
    first, second = (b + name for name in layout.bias_mlp)
    return [
        *rules,
        same(b + layout.scale, ours + "scale"),
        same(f"{first}.{{weight,bias}}", ours + "bias_mlp.fc1.{weight,bias}"),
        same(f"{second}.weight", ours + "bias_mlp.fc2.weight"),
    ]


def _single(theirs: tuple[str, ...], ours: str) -> Rule:
    return same(theirs[0], ours)


def biases(b: str, layout: Layout) -> list[str]:
    """Where version 2 keeps the biases of queries and values; one name where the keys' are among them."""
    if layout.whole_bias:
        return [f"{b}{layout.qkv[0]}.bias"]
    if len(layout.qkv) == 3:
        return [f"{b}{layout.qkv[0]}.bias", f"{b}{layout.qkv[2]}.bias"]
    beside = b + layout.qkv[0].removesuffix("qkv")
    return [f"{beside}q_bias", f"{beside}v_bias"]


def masks(config: SwinConfig, layout: Layout, stage: int) -> list[Rule]:
    """The shift's mask, which older code keeps in each block that shifts."""
    b, made = layout.block(stage), None
    (rows, columns), window = maps_at(config, config.image_size)[stage], config.window_size[stage]
    if "mask" in layout.saved and rows > window[0] and columns > window[1]:
        made = partial(mask_of, (rows // window[0], columns // window[1]), window)
    return [
        drop(
            b.replace("{i}", str(i)) + layout.mask, "it follows from the map's size", made if i % 2 else None
        )
        for i in range(config.depths[stage])
    ]


def index_of(window: tuple[int, int], flat: bool) -> Tensor:
    """Row of the table for each pair of cells."""
    index = relative_index(window)
    return index.flatten() if flat else index


def coordinates_of(window: tuple[int, int], before: tuple[int, int]) -> Tensor:
    """Log-spaced differences (`layers.window.log_spaced`) as their code keeps them, (1, 2 M_h - 1, 2 M_w - 1, 2): to
    the last bit, it computes them in fp32."""
    axes = []
    for side, old in zip(window, before, strict=True):
        d = torch.arange(1 - side, side, dtype=torch.float32) / max((old or side) - 1, 1) * 8
        axes.append(d.sign() * (d.abs() + 1).log2() / 3)
    return torch.stack(torch.meshgrid(*axes, indexing="ij"), dim=-1)[None]


def mask_of(windows: tuple[int, int], window: tuple[int, int]) -> Tensor:
    """The mask of a shift by half a window as Swin's own code keeps it, (windows, cells, cells): -100 for no."""
    shift = (window[0] // 2, window[1] // 2)
    mask = shift_mask(*windows, window, shift, torch.device("cpu"), torch.float32)
    return mask[:, 0].clamp(min=-100.0)
