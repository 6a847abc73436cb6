"""The denoising UNet in the names of CompVis and of diffusers: its sizes from the shapes, and its table."""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any, ClassVar

from triptych.errors import UserError
from triptych.models.configs import unet as unet_config
from triptych.models.configs.unet import UNetConfig, UNetLevel, levels
from triptych.weights.diffusion.rule_helpers import (
    ALONG,
    ONE_BY_ONE,
    by_head,
    fused,
    halves_of,
    layer,
    matrix,
)
from triptych.weights.mapping.format import Hints, Names
from triptych.weights.mapping.rules import Rule, same, then


class Layout(ABC):
    """How a publisher calls the parts of a UNet of a known number of levels and blocks."""

    time: tuple[str, str]
    label: str
    vector: tuple[str, str]
    input: str
    norm: str
    out: str
    middle: tuple[str, str, str]
    res: ClassVar[dict[str, str]]
    """Our names of a residual block's layers -> theirs."""

    def __init__(self, count: int, depth: int):
        self.levels, self.depth = count, depth

    @classmethod
    @abstractmethod
    def of(cls, names: Names) -> "Layout":
        """The layout of a file of this publisher."""

    @abstractmethod
    def down(self, level: int, block: int) -> tuple[str, str]:
        """A residual block on the way down, and the attention behind it; levels count from the first."""

    @abstractmethod
    def up(self, step: int, block: int) -> tuple[str, str]:
        """The same on the way up, which counts from the deepest level."""

    @abstractmethod
    def downsample(self, level: int, by_block: bool) -> str: ...

    @abstractmethod
    def upsample(self, step: int, by_block: bool, attention: bool) -> str: ...

    @abstractmethod
    def attention(self, theirs: str, ours: str, heads: int) -> list[Rule]:
        """Self-attention without a prompt."""


class CompVis(Layout):
    time = ("time_embed.0", "time_embed.2")
    label = "label_emb"
    vector = ("label_emb.0.0", "label_emb.0.2")
    input = "input_blocks.0.0"
    norm = "out.0"
    out = "out.2"
    middle = ("middle_block.0", "middle_block.1", "middle_block.2")
    res: ClassVar = {
        "norm1": "in_layers.0",
        "conv1": "in_layers.2",
        "time": "emb_layers.1",
        "norm2": "out_layers.0",
        "conv2": "out_layers.3",
        "skip": "skip_connection",
    }

    @classmethod
    def of(cls, names: Names) -> "CompVis":
        steps = names.count("output_blocks.{i}.")
        ups = [
            i
            for i in range(steps)
            if any(
                f"output_blocks.{i}.{k}.{e}" in names
                for k in (1, 2)
                for e in ("conv.weight", "in_layers.2.weight")
            )
        ]
        count = len(ups) + 1
        if not steps or steps % count or steps // count < 2:
            raise UserError(
                f"{names.path} has {steps} output blocks in {count} levels; needed are as many in each"
            )
        return cls(count, steps // count - 1)

    def down(self, level: int, block: int) -> tuple[str, str]:
        place = f"input_blocks.{1 + level * (self.depth + 1) + block}"
        return f"{place}.0", f"{place}.1"

    def up(self, step: int, block: int) -> tuple[str, str]:
        place = f"output_blocks.{step * (self.depth + 1) + block}"
        return f"{place}.0", f"{place}.1"

    def downsample(self, level: int, by_block: bool) -> str:
        return f"input_blocks.{(level + 1) * (self.depth + 1)}.0" + ("" if by_block else ".op")

    def upsample(self, step: int, by_block: bool, attention: bool) -> str:
        place = f"output_blocks.{step * (self.depth + 1) + self.depth}"
        return f"{place}.{1 + attention}" + ("" if by_block else ".conv")

    def attention(self, theirs: str, ours: str, heads: int) -> list[Rule]:
        rows = by_head(heads)
        return [
            *layer(f"{theirs}.norm", f"{ours}.norm"),
            Rule((f"{theirs}.qkv.weight",), (f"{ours}.attn.qkv.weight",), then(ALONG, rows)),
            Rule((f"{theirs}.qkv.bias",), (f"{ours}.attn.qkv.bias",), rows),
            *matrix(f"{theirs}.proj_out", f"{ours}.attn.proj", ALONG),
        ]


class Diffusers(Layout):
    time = ("time_embedding.linear_1", "time_embedding.linear_2")
    label = "class_embedding"
    vector = ("class_embedding.linear_1", "class_embedding.linear_2")
    input = "conv_in"
    norm = "conv_norm_out"
    out = "conv_out"
    middle = ("mid_block.resnets.0", "mid_block.attentions.0", "mid_block.resnets.1")
    res: ClassVar = {
        "norm1": "norm1",
        "conv1": "conv1",
        "time": "time_emb_proj",
        "norm2": "norm2",
        "conv2": "conv2",
        "skip": "conv_shortcut",
    }
    old = False
    """Whether self-attention has its first names."""

    @classmethod
    def of(cls, names: Names) -> "Diffusers":
        made = cls(names.count("down_blocks.{i}."), names.count("down_blocks.0.resnets.{i}."))
        made.old = "mid_block.attentions.0.query.weight" in names
        return made

    def down(self, level: int, block: int) -> tuple[str, str]:
        return f"down_blocks.{level}.resnets.{block}", f"down_blocks.{level}.attentions.{block}"

    def up(self, step: int, block: int) -> tuple[str, str]:
        return f"up_blocks.{step}.resnets.{block}", f"up_blocks.{step}.attentions.{block}"

    def downsample(self, level: int, by_block: bool) -> str:
        return f"down_blocks.{level}.downsamplers.0" + ("" if by_block else ".conv")

    def upsample(self, step: int, by_block: bool, attention: bool) -> str:
        return f"up_blocks.{step}.upsamplers.0" + ("" if by_block else ".conv")

    def attention(self, theirs: str, ours: str, heads: int) -> list[Rule]:
        parts = ("query", "key", "value") if self.old else ("to_q", "to_k", "to_v")
        return [
            *layer(f"{theirs}.group_norm", f"{ours}.norm"),
            *fused(tuple(f"{theirs}.{part}" for part in parts), f"{ours}.attn.qkv", bias=True),
            *layer(f"{theirs}.{'proj_attn' if self.old else 'to_out.0'}", f"{ours}.attn.proj"),
        ]


def table(config: UNetConfig, layout: Layout) -> list[Rule]:
    """Theirs <-> ours, as the network runs."""
    down, middle, up = levels(config)
    by_block = config.resample == "resnet"
    rules = [*layer(layout.time[0], "time.fc1"), *layer(layout.time[1], "time.fc2")]
    if config.num_classes:
        rules.append(same(f"{layout.label}.weight", "label.weight"))
    if config.vector_dim:
        rules += layer(layout.vector[0], "vector.fc1") + layer(layout.vector[1], "vector.fc2")
    rules += layer(layout.input, "input")
    for i, level in enumerate(down):
        for j, taken in enumerate(level.blocks):
            res, attention = layout.down(i, j)
            rules += _block(config, layout, level, taken, res, attention, f"down.{i}.blocks.{j}")
        if level.resampled:
            c, ours = level.channels, f"down.{i}.downsample"
            theirs = layout.downsample(i, by_block)
            rules += _res(layout, theirs, ours, c, c) if by_block else layer(theirs, f"{ours}.conv")
    c, (first, attention, last) = middle.channels, layout.middle
    if not middle.attention and isinstance(layout, CompVis):
        last = attention
    rules += _block(config, layout, middle, c, first, attention, "middle")
    rules += _res(layout, last, "middle.res2", c, c)
    for k, level in enumerate(up):
        for j, taken in enumerate(level.blocks):
            res, attention = layout.up(k, j)
            rules += _block(config, layout, level, taken, res, attention, f"up.{k}.blocks.{j}")
        if level.resampled:
            c, ours = level.channels, f"up.{k}.upsample"
            theirs = layout.upsample(k, by_block, level.attention > 0)
            rules += _res(layout, theirs, ours, c, c) if by_block else layer(theirs, f"{ours}.conv")
    return rules + layer(layout.norm, "norm") + layer(layout.out, "out")


def _block(
    config: UNetConfig, layout: Layout, level: UNetLevel, taken: int, res: str, attention: str, ours: str
) -> list[Rule]:
    rules = _res(layout, res, f"{ours}.res", taken, level.channels)
    if level.attention and config.context_dim:
        rules += _transformer(config, level, attention, f"{ours}.transformer")
    elif level.attention:
        heads = config.num_heads or level.channels // config.head_dim
        rules += layout.attention(attention, f"{ours}.attention", heads)
    return rules


def _res(layout: Layout, theirs: str, ours: str, taken: int, given: int) -> list[Rule]:
    parts = [part for part in layout.res if part != "skip" or taken != given]
    return [one for part in parts for one in layer(f"{theirs}.{layout.res[part]}", f"{ours}.{part}")]


def _transformer(config: UNetConfig, level: UNetLevel, theirs: str, ours: str) -> list[Rule]:
    """Both publishers call its parts alike."""
    ends = [[], []]
    for k, name in enumerate(("proj_in", "proj_out")):
        pair = f"{theirs}.{name}", f"{ours}.{name}"
        ends[k] = layer(*pair) if config.projection == "linear" else matrix(*pair, ONE_BY_ONE)
    rules = layer(f"{theirs}.norm", f"{ours}.norm") + ends[0]
    for k in range(level.attention):
        a, b = f"{theirs}.transformer_blocks.{k}", f"{ours}.blocks.{k}"
        rules += layer(f"{a}.norm1", f"{b}.norm1")
        if level.cross_only:
            rules += _cross(f"{a}.attn1", f"{b}.attn")
        else:
            parts = (f"{a}.attn1.to_q", f"{a}.attn1.to_k", f"{a}.attn1.to_v")
            rules += fused(parts, f"{b}.attn.qkv", bias=False) + layer(
                f"{a}.attn1.to_out.0", f"{b}.attn.proj"
            )
        rules += layer(f"{a}.norm2", f"{b}.norm2") + _cross(f"{a}.attn2", f"{b}.cross")
        rules += layer(f"{a}.norm3", f"{b}.norm3")
        rules += layer(f"{a}.ff.net.0.proj", f"{b}.mlp.fc1") + layer(f"{a}.ff.net.2", f"{b}.mlp.fc2")
    return rules + ends[1]


def _cross(theirs: str, ours: str) -> list[Rule]:
    return [
        same(f"{theirs}.to_q.weight", f"{ours}.q.weight"),
        *fused((f"{theirs}.to_k", f"{theirs}.to_v"), f"{ours}.kv", bias=False),
        *layer(f"{theirs}.to_out.0", f"{ours}.proj"),
    ]


@dataclass(frozen=True)
class Said:
    """What a config beside the file says and shapes do not."""

    heads: int = 0
    head_dim: int = 0
    latent_size: tuple[int, int] | None = None
    groups: int = 0
    cross_only_downsample_factors: tuple[int, ...] | None = None
    where: str = ""


def hinted(hints: Hints) -> Said:
    """What was written beside the file, or is known of the network."""
    heads = hints.heads or (0, 0)
    if not all(isinstance(n, int) and n >= 0 for n in heads):
        raise UserError(f"heads and head_dim beside the file are {heads}, which must be whole numbers")
    return Said(heads=heads[0], head_dim=heads[1], where="the JSON beside the file")


def read(names: Names, layout: Layout, said: Said = Said()) -> tuple[UNetConfig, dict[str, str]]:
    """The config of a UNet from its tensors, and where what they do not tell came from.

    Raises:
        UserError: it is no UNet that this package has, or its heads cannot be told.
    """
    sizes = _shapes(names, layout)
    published = next((known for known in unet_config.SIZES.values() if _alike(known, sizes)), None)
    facts = {"num_heads": said.where}
    width = sizes["base_channels"]
    conv = names.shape(f"{layout.norm}.weight", 1)
    sizes["norm_groups"] = said.groups or halves_of(min(conv[0], width))
    if said.cross_only_downsample_factors is not None:
        sizes["cross_only_downsample_factors"] = said.cross_only_downsample_factors
    elif published is not None:
        sizes["cross_only_downsample_factors"] = published.cross_only_downsample_factors
    attends = bool(sizes["attention_downsample_factors"]) or sizes["middle_attention"]
    if said.heads or said.head_dim:
        sizes["num_heads"], sizes["head_dim"] = said.heads, said.head_dim
    elif published is not None:
        sizes["num_heads"], sizes["head_dim"] = published.num_heads, published.head_dim
        facts["num_heads"] = "convention: those of the published network of these sizes"
    elif attends:
        sizes["num_heads"], sizes["head_dim"] = _usual_heads(names, sizes)
        facts["num_heads"] = f"convention: {sizes['num_heads'] or 'as many as 64 channels each'} heads"
    if said.latent_size is not None:
        sizes["latent_size"], facts["latent_size"] = said.latent_size, said.where
    elif published is not None:
        sizes["latent_size"], facts["latent_size"] = published.latent_size, "convention"
    return UNetConfig(**sizes), facts


def _usual_heads(names: Names, sizes: dict[str, Any]) -> tuple[int, int]:
    """SD 2 has heads of 64 channels, all else of its kind 8 heads."""
    widths = {sizes["base_channels"] * m for m in sizes["channel_multipliers"]}
    if sizes["projection"] == "linear" and sizes["context_dim"] and all(c % 64 == 0 for c in widths):
        return 0, 64
    if any(c % 8 for c in widths):
        raise UserError(
            f"{names.path}: the heads of attention over {sorted(widths)} channels cannot be told; add its config"
        )
    return 8, 0


def _shapes(names: Names, layout: Layout) -> dict[str, Any]:
    """All that names and shapes tell."""
    first = names.shape(f"{layout.input}.weight", 4)
    width, count = first[0], layout.levels
    if count < 1 or layout.depth < 1:
        raise UserError(f"{names.path} has no residual blocks on the way down; give a whole checkpoint")
    conv1 = layout.res["conv1"]
    widths = [names.shape(f"{layout.down(i, 0)[0]}.{conv1}.weight", 4)[0] for i in range(count)]
    if any(c % width for c in widths):
        raise UserError(
            f"{names.path} has levels of {widths} channels; needed are multiples of the first {width}"
        )
    places = [layout.down(i, 0)[1] for i in range(count)] + [layout.middle[1]]
    depths = [names.count(f"{place}.transformer_blocks.{{i}}.") for place in places]
    plain = [
        f"{place}.{'qkv' if isinstance(layout, CompVis) else 'group_norm'}.weight" in names
        for place in places
    ]
    context = next(
        (
            names.shape(f"{place}.transformer_blocks.0.attn2.to_k.weight", 2)[1]
            for place, d in zip(places, depths, strict=True)
            if d
        ),
        0,
    )
    found = [bool(d) or p for d, p in zip(depths, plain, strict=True)]
    if not context and any(depths):
        raise UserError(f"{names.path} has transformers that look at no prompt; it is another kind of UNet")
    attended = [d for d in depths if d] or [1]
    per_level = tuple(d or depths[-1] or attended[-1] for d in depths[:-1])
    per_level = (*per_level[:-1], depths[-1] or per_level[-1])
    projection = next(
        (
            len(names.shapes.get(f"{place}.proj_in.weight", ()))
            for place, d in zip(places, depths, strict=True)
            if d
        ),
        4,
    )
    only = tuple(
        2**i
        for i, place in enumerate(places[:-1])
        if depths[i]
        and names.shape(f"{place}.transformer_blocks.0.attn1.to_k.weight", 2)[1]
        == context
        != width * (widths[i] // width)
    )
    by_block = count > 1 and f"{layout.downsample(0, True)}.{conv1}.weight" in names
    time = names.shape(f"{layout.down(0, 0)[0]}.{layout.res['time']}.weight", 2)
    return {
        "in_channels": first[1],
        "out_channels": names.shape(f"{layout.out}.weight", 4)[0],
        "base_channels": width,
        "channel_multipliers": tuple(c // width for c in widths),
        "num_res_blocks": layout.depth,
        "attention_downsample_factors": tuple(2**i for i in range(count) if found[i]),
        "middle_attention": found[-1],
        "context_dim": context,
        "transformer_depth": per_level[0] if len(set(per_level)) == 1 else per_level,
        "cross_only_downsample_factors": only,
        "projection": "linear" if projection == 2 else "conv",
        "num_classes": names.shape(f"{layout.label}.weight", 2)[0]
        if f"{layout.label}.weight" in names
        else 0,
        "vector_dim": names.shape(f"{layout.vector[0]}.weight", 2)[1]
        if f"{layout.vector[0]}.weight" in names
        else 0,
        "resample": "resnet" if by_block else "conv",
        "scale_shift": time[0] == 2 * widths[0],
    }


def _alike(known: UNetConfig, sizes: dict[str, Any]) -> bool:
    """Whether a published network has these shapes, as far as they tell."""
    for name, value in sizes.items():
        mine: Any = getattr(known, name)
        if name == "attention_downsample_factors":
            mine = tuple(f for f in mine if f <= known.downsample_factor)
        elif name == "cross_only_downsample_factors":
            widths = {2**i: known.base_channels * m for i, m in enumerate(known.channel_multipliers)}
            mine = tuple(
                f for f in mine if f in known.attention_downsample_factors and widths[f] != known.context_dim
            )
        elif name == "projection" and not known.context_dim:
            continue
        if mine != value:
            return False
    return True
