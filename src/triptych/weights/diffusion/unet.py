"""The denoising UNet with keys of CompVis and of diffusers: sizes inferred from shapes, and the table of rules."""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any, ClassVar

from triptych.errors import CheckpointError
from triptych.models.configs import unet as unet_config
from triptych.models.configs.unet import UNetConfig, UNetLevel, levels
from triptych.weights.diffusion.rule_helpers import (
    ALONG,
    ONE_BY_ONE,
    by_head,
    default_groups,
    fused,
    layer,
    matrix,
)
from triptych.weights.mapping.format import Hints, StateDictKeys
from triptych.weights.mapping.rules import Rule, compose, rename


class Layout(ABC):
    """Names of the parts of a UNet with a given number of levels and blocks."""

    time: tuple[str, str]
    label: str
    vector: tuple[str, str]
    input: str
    norm: str
    out: str
    middle: tuple[str, str, str]
    res: ClassVar[dict[str, str]]
    """Names of a residual block's layers: ours -> theirs."""

    def __init__(self, count: int, depth: int):
        self.levels, self.depth = count, depth

    @classmethod
    @abstractmethod
    def of(cls, keys: StateDictKeys) -> "Layout":
        """Infer the layout of a publisher's file."""

    @abstractmethod
    def down(self, level: int, block: int) -> tuple[str, str]:
        """Return the prefixes of a residual block on the way down and of its attention; levels count from the
        finest."""

    @abstractmethod
    def up(self, step: int, block: int) -> tuple[str, str]:
        """Return the prefixes of a residual block on the way up and of its attention; steps count from the deepest
        level."""

    @abstractmethod
    def downsample(self, level: int, by_block: bool) -> str: ...

    @abstractmethod
    def upsample(self, step: int, by_block: bool, attention: bool) -> str: ...

    @abstractmethod
    def attention(self, theirs: str, ours: str, heads: int) -> list[Rule]:
        """Return the rules of self-attention in a UNet without a context."""


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
    def of(cls, keys: StateDictKeys) -> "CompVis":
        steps = keys.count_blocks("output_blocks.{i}.")
        ups = [
            i
            for i in range(steps)
            if any(
                f"output_blocks.{i}.{k}.{e}" in keys
                for k in (1, 2)
                for e in ("conv.weight", "in_layers.2.weight")
            )
        ]
        count = len(ups) + 1
        if not steps or steps % count or steps // count < 2:
            raise CheckpointError(
                f"{keys.path} has {steps} output blocks in {count} levels; needed are as many in each"
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
            Rule((f"{theirs}.qkv.weight",), (f"{ours}.attn.qkv.weight",), compose(ALONG, rows)),
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
    """Whether self-attention has the names of early versions."""

    @classmethod
    def of(cls, keys: StateDictKeys) -> "Diffusers":
        layout = cls(keys.count_blocks("down_blocks.{i}."), keys.count_blocks("down_blocks.0.resnets.{i}."))
        layout.old = "mid_block.attentions.0.query.weight" in keys
        return layout

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
    """Return the rules, in the order in which the network runs."""
    down, middle, up = levels(config)
    by_block = config.resample == "resnet"
    rules = [*layer(layout.time[0], "time.fc1"), *layer(layout.time[1], "time.fc2")]
    if config.num_classes:
        rules.append(rename(f"{layout.label}.weight", "label.weight"))
    if config.vector_dim:
        rules += layer(layout.vector[0], "vector.fc1") + layer(layout.vector[1], "vector.fc2")
    rules += layer(layout.input, "input")
    for i, level in enumerate(down):
        for j, in_channels in enumerate(level.blocks):
            res, attention = layout.down(i, j)
            rules += _block(config, layout, level, in_channels, res, attention, f"down.{i}.blocks.{j}")
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
        for j, in_channels in enumerate(level.blocks):
            res, attention = layout.up(k, j)
            rules += _block(config, layout, level, in_channels, res, attention, f"up.{k}.blocks.{j}")
        if level.resampled:
            c, ours = level.channels, f"up.{k}.upsample"
            theirs = layout.upsample(k, by_block, level.attention > 0)
            rules += _res(layout, theirs, ours, c, c) if by_block else layer(theirs, f"{ours}.conv")
    return rules + layer(layout.norm, "norm") + layer(layout.out, "out")


def _block(
    config: UNetConfig,
    layout: Layout,
    level: UNetLevel,
    in_channels: int,
    res: str,
    attention: str,
    ours: str,
) -> list[Rule]:
    rules = _res(layout, res, f"{ours}.res", in_channels, level.channels)
    if level.attention and config.context_dim:
        rules += _transformer(config, level, attention, f"{ours}.transformer")
    elif level.attention:
        heads = config.num_heads or level.channels // config.head_dim
        rules += layout.attention(attention, f"{ours}.attention", heads)
    return rules


def _res(layout: Layout, theirs: str, ours: str, in_channels: int, out_channels: int) -> list[Rule]:
    parts = [part for part in layout.res if part != "skip" or in_channels != out_channels]
    return [one for part in parts for one in layer(f"{theirs}.{layout.res[part]}", f"{ours}.{part}")]


def _transformer(config: UNetConfig, level: UNetLevel, theirs: str, ours: str) -> list[Rule]:
    """Return the rules of a transformer, which both publishers name alike."""
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
        rename(f"{theirs}.to_q.weight", f"{ours}.q.weight"),
        *fused((f"{theirs}.to_k", f"{theirs}.to_v"), f"{ours}.kv", bias=False),
        *layer(f"{theirs}.to_out.0", f"{ours}.proj"),
    ]


@dataclass(frozen=True)
class UNetFileConfig:
    """Values in the config next to the file that shapes do not determine."""

    heads: int = 0
    head_dim: int = 0
    latent_size: tuple[int, int] | None = None
    groups: int = 0
    cross_only_downsample_factors: tuple[int, ...] | None = None
    where: str = ""


def hinted(hints: Hints) -> UNetFileConfig:
    """Return the values of a sidecar, or of the network that is exported."""
    heads = hints.heads or (0, 0)
    if not all(isinstance(n, int) and n >= 0 for n in heads):
        raise CheckpointError(f"heads and head_dim beside the file are {heads}, which must be whole numbers")
    return UNetFileConfig(heads=heads[0], head_dim=heads[1], where="the JSON beside the file")


def read(
    keys: StateDictKeys, layout: Layout, file_config: UNetFileConfig = UNetFileConfig()
) -> tuple[UNetConfig, dict[str, str]]:
    """Infer the config of a UNet from its tensors; also return where what they do not determine came from.

    Raises:
        CheckpointError: it is no UNet that this package has, or its heads cannot be determined.
    """
    sizes = _sizes_from_shapes(keys, layout)
    published = next((known for known in unet_config.SIZES.values() if _sizes_match(known, sizes)), None)
    facts = {"num_heads": file_config.where}
    width = sizes["base_channels"]
    conv = keys.shape(f"{layout.norm}.weight", 1)
    sizes["norm_groups"] = file_config.groups or default_groups(min(conv[0], width))
    if file_config.cross_only_downsample_factors is not None:
        sizes["cross_only_downsample_factors"] = file_config.cross_only_downsample_factors
    elif published is not None:
        sizes["cross_only_downsample_factors"] = published.cross_only_downsample_factors
    attends = bool(sizes["attention_downsample_factors"]) or sizes["middle_attention"]
    if file_config.heads or file_config.head_dim:
        sizes["num_heads"], sizes["head_dim"] = file_config.heads, file_config.head_dim
    elif published is not None:
        sizes["num_heads"], sizes["head_dim"] = published.num_heads, published.head_dim
        facts["num_heads"] = "convention: those of the published network of these sizes"
    elif attends:
        sizes["num_heads"], sizes["head_dim"] = _usual_heads(keys, sizes)
        facts["num_heads"] = _origin_of_heads(sizes)
    if file_config.latent_size is not None:
        sizes["latent_size"], facts["latent_size"] = file_config.latent_size, file_config.where
    elif published is not None:
        sizes["latent_size"], facts["latent_size"] = published.latent_size, "convention"
    return UNetConfig(**sizes), facts


def _origin_of_heads(sizes: dict[str, Any]) -> str:
    """Return the origin of the default heads in words. Who changes Stable Diffusion keeps its heads; others seldom have
    the same."""
    number = f"{sizes['num_heads']} heads" if sizes["num_heads"] else "heads of 64 channels"
    if sizes["base_channels"] == 320 and sizes["context_dim"]:
        return f"convention: {number}, as in Stable Diffusion"
    return f"guess: {number}; put the YAML or config.json of the model next to the file, which says how many it has"


def _usual_heads(keys: StateDictKeys, sizes: dict[str, Any]) -> tuple[int, int]:
    """Return the default heads: 64 channels per head for SD 2, 8 heads for all others."""
    widths = {sizes["base_channels"] * m for m in sizes["channel_multipliers"]}
    if sizes["projection"] == "linear" and sizes["context_dim"] and all(c % 64 == 0 for c in widths):
        return 0, 64
    if any(c % 8 for c in widths):
        raise CheckpointError(
            f"{keys.path}: the heads of attention over {sorted(widths)} channels cannot be determined; add its config"
        )
    return 8, 0


def _sizes_from_shapes(keys: StateDictKeys, layout: Layout) -> dict[str, Any]:
    """Return the fields of the config that keys and shapes determine."""
    first = keys.shape(f"{layout.input}.weight", 4)
    width, count = first[0], layout.levels
    if count < 1 or layout.depth < 1:
        raise CheckpointError(
            f"{keys.path} has no residual blocks on the way down; give a complete checkpoint"
        )
    conv1 = layout.res["conv1"]
    widths = [keys.shape(f"{layout.down(i, 0)[0]}.{conv1}.weight", 4)[0] for i in range(count)]
    if any(c % width for c in widths):
        raise CheckpointError(
            f"{keys.path} has levels of {widths} channels; needed are multiples of the first {width}"
        )
    label, vector = f"{layout.label}.weight", f"{layout.vector[0]}.weight"
    time = keys.shape(f"{layout.down(0, 0)[0]}.{layout.res['time']}.weight", 2)
    by_block = count > 1 and f"{layout.downsample(0, True)}.{conv1}.weight" in keys
    return {
        "in_channels": first[1],
        "out_channels": keys.shape(f"{layout.out}.weight", 4)[0],
        "base_channels": width,
        "channel_multipliers": tuple(c // width for c in widths),
        "num_res_blocks": layout.depth,
        **_attention_from_shapes(keys, layout, widths),
        "num_classes": keys.shape(label, 2)[0] if label in keys else 0,
        "vector_dim": keys.shape(vector, 2)[1] if vector in keys else 0,
        "resample": "resnet" if by_block else "conv",
        "scale_shift": time[0] == 2 * widths[0],
    }


def _attention_from_shapes(keys: StateDictKeys, layout: Layout, widths: list[int]) -> dict[str, Any]:
    """Return which levels have attention or transformers, of which depth and form."""
    prefixes = [layout.down(i, 0)[1] for i in range(layout.levels)] + [layout.middle[1]]
    depths = [keys.count_blocks(f"{prefix}.transformer_blocks.{{i}}.") for prefix in prefixes]
    with_transformer = [prefix for prefix, depth in zip(prefixes, depths, strict=True) if depth]
    attention_key = "qkv" if isinstance(layout, CompVis) else "group_norm"
    has_attention = [
        depth > 0 or f"{prefix}.{attention_key}.weight" in keys
        for prefix, depth in zip(prefixes, depths, strict=True)
    ]
    context, projection_ndim = 0, 4
    if with_transformer:
        first = with_transformer[0]
        context = keys.shape(f"{first}.transformer_blocks.0.attn2.to_k.weight", 2)[1]
        projection_ndim = len(keys.shapes.get(f"{first}.proj_in.weight", ()))
        if not context:
            raise CheckpointError(
                f"{keys.path} has transformers without a context; it is another kind of UNet"
            )
    # A level without transformers gets the depth of the middle, else of the deepest level that has some.
    fallback = depths[-1] or ([d for d in depths if d] or [1])[-1]
    per_level = tuple(d or fallback for d in depths[:-1])
    per_level = (*per_level[:-1], depths[-1] or per_level[-1])
    cross_only = tuple(
        2**i
        for i, prefix in enumerate(prefixes[:-1])
        if depths[i]
        and keys.shape(f"{prefix}.transformer_blocks.0.attn1.to_k.weight", 2)[1] == context != widths[i]
    )
    return {
        "attention_downsample_factors": tuple(2**i for i in range(layout.levels) if has_attention[i]),
        "middle_attention": has_attention[-1],
        "context_dim": context,
        "transformer_depth": per_level[0] if len(set(per_level)) == 1 else per_level,
        "cross_only_downsample_factors": cross_only,
        "projection": "linear" if projection_ndim == 2 else "conv",
    }


def _sizes_match(known: UNetConfig, sizes: dict[str, Any]) -> bool:
    """Return whether a published network has these sizes, as far as shapes determine them."""
    for name, value in sizes.items():
        expected: Any = getattr(known, name)
        if name == "attention_downsample_factors":
            expected = tuple(f for f in expected if f <= known.downsample_factor)
        elif name == "cross_only_downsample_factors":
            widths = {2**i: known.base_channels * m for i, m in enumerate(known.channel_multipliers)}
            expected = tuple(
                f
                for f in expected
                if f in known.attention_downsample_factors and widths[f] != known.context_dim
            )
        elif name == "projection" and not known.context_dim:
            continue
        if expected != value:
            return False
    return True
