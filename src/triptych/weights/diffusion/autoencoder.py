"""First stages in the names of CompVis (those of taming-transformers) and of diffusers; TAESD in its author's too."""

import re
from dataclasses import dataclass, replace
from typing import Any

from triptych.errors import UserError
from triptych.models.configs import autoencoder as autoencoder_config
from triptych.models.configs.autoencoder import AutoencoderConfig, FirstStageConfig, TinyAutoencoderConfig
from triptych.weights.diffusion.rule_helpers import ONE_BY_ONE, fused, halves_of, layer, matrix
from triptych.weights.mapping.format import Names
from triptych.weights.mapping.rules import Rule, drop, same


@dataclass(frozen=True, kw_only=True)
class Layout:
    """What the two call differently. `{l}` is a level from the finest, `{s}` a step of the way up, `{j}` a block."""

    down: str
    up: str
    block: str
    attention: str
    downsample: str
    upsample: str
    middle: tuple[str, str, str]
    norm: str
    conv_out: str
    skip: str
    attention_norm: str
    qkv: tuple[str, str, str]
    proj: str
    kernels: bool
    """Whether attention's matrices are 1x1 convolutions."""
    codebook: str


COMPVIS = Layout(
    down="encoder.down.{l}",
    up="decoder.up.{l}",
    block="block.{j}",
    attention="attn.{j}",
    downsample="downsample.conv",
    upsample="upsample.conv",
    middle=("mid.block_1", "mid.attn_1", "mid.block_2"),
    norm="norm_out",
    conv_out="conv_out",
    skip="nin_shortcut",
    attention_norm="norm",
    qkv=("q", "k", "v"),
    proj="proj_out",
    kernels=True,
    codebook="quantize.embedding",
)
DIFFUSERS = Layout(
    down="encoder.down_blocks.{l}",
    up="decoder.up_blocks.{s}",
    block="resnets.{j}",
    attention="attentions.{j}",
    downsample="downsamplers.0.conv",
    upsample="upsamplers.0.conv",
    middle=("mid_block.resnets.0", "mid_block.attentions.0", "mid_block.resnets.1"),
    norm="conv_norm_out",
    conv_out="conv_out",
    skip="conv_shortcut",
    attention_norm="group_norm",
    qkv=("to_q", "to_k", "to_v"),
    proj="to_out.0",
    kernels=False,
    codebook="quantize.embedding",
)
DIFFUSERS_OLD = replace(DIFFUSERS, qkv=("query", "key", "value"), proj="proj_attn")


def layout_of(names: Names) -> Layout | None:
    """Whose names these are; none if they are no first stage's."""
    if "encoder.down.0.block.0.conv1.weight" in names and "decoder.conv_in.weight" in names:
        return COMPVIS
    if "encoder.down_blocks.0.resnets.0.conv1.weight" in names and "decoder.conv_in.weight" in names:
        return DIFFUSERS_OLD if names.any(".attentions.0.query.weight") else DIFFUSERS
    return None


def table(config: AutoencoderConfig, layout: Layout) -> list[Rule]:
    """Theirs <-> ours, as the network runs."""
    count = len(config.channel_multipliers)
    rules = layer("encoder.conv_in", "encoder.conv_in")
    widths = [config.base_channels * m for m in config.channel_multipliers]
    x = widths[0]
    for i, width in enumerate(widths):
        theirs, ours = layout.down.format(l=i), f"encoder.down.{i}"
        rules += _level(config, layout, theirs, ours, i, x, config.num_res_blocks)
        if i < count - 1:
            rules += layer(f"{theirs}.{layout.downsample}", f"{ours}.resample.conv")
        x = width
    rules += _end(config, layout, "encoder")
    if config.quant_convs:
        rules += layer("quant_conv", "quant") + layer("post_quant_conv", "post_quant")
    if config.regularization == "vq":
        rules.append(same(f"{layout.codebook}.weight", "codebook.weight"))
    rules += layer("decoder.conv_in", "decoder.conv_in")
    for step in range(count):
        level = count - 1 - step
        theirs, ours = layout.up.format(l=level, s=step), f"decoder.up.{step}"
        rules += _level(config, layout, theirs, ours, level, x, config.num_res_blocks + 1)
        x = widths[level]
        if level:
            rules += layer(f"{theirs}.{layout.upsample}", f"{ours}.resample.conv")
    rules += _end(config, layout, "decoder")
    for name in ("loss", "model_ema", "discriminator", "perceptual_loss"):
        rules.append(drop(f"{name}.*", "only training reads it"))
    return rules


def _level(
    config: AutoencoderConfig, layout: Layout, theirs: str, ours: str, level: int, taken: int, depth: int
) -> list[Rule]:
    given, rules = config.base_channels * config.channel_multipliers[level], []
    for j in range(depth):
        rules += _block(layout, f"{theirs}.{layout.block.format(j=j)}", f"{ours}.blocks.{j}", taken != given)
        if 2**level in config.attention_downsample_factors:
            rules += _attention(layout, f"{theirs}.{layout.attention.format(j=j)}", f"{ours}.attentions.{j}")
        taken = given
    return rules


def _end(config: AutoencoderConfig, layout: Layout, half: str) -> list[Rule]:
    """The middle and the output, which both halves have."""
    first, attention, last = (f"{half}.{name}" for name in layout.middle)
    rules = _block(layout, first, f"{half}.middle.block1", skip=False)
    if config.middle_attention:
        rules += _attention(layout, attention, f"{half}.middle.attention")
    rules += _block(layout, last, f"{half}.middle.block2", skip=False)
    rules += layer(f"{half}.{layout.norm}", f"{half}.norm")
    return rules + layer(f"{half}.{layout.conv_out}", f"{half}.conv_out")


def _block(layout: Layout, theirs: str, ours: str, skip: bool) -> list[Rule]:
    rules = [
        one
        for part in ("norm1", "conv1", "norm2", "conv2")
        for one in layer(f"{theirs}.{part}", f"{ours}.{part}")
    ]
    return rules + (layer(f"{theirs}.{layout.skip}", f"{ours}.skip") if skip else [])


def _attention(layout: Layout, theirs: str, ours: str) -> list[Rule]:
    parts = tuple(f"{theirs}.{part}" for part in layout.qkv)
    out = f"{theirs}.{layout.proj}", f"{ours}.attn.proj"
    return [
        *layer(f"{theirs}.{layout.attention_norm}", f"{ours}.norm"),
        *fused(parts, f"{ours}.attn.qkv", bias=True, shaped=ONE_BY_ONE if layout.kernels else None),
        *(matrix(*out, ONE_BY_ONE) if layout.kernels else layer(*out)),
    ]


def read(
    names: Names, layout: Layout, said: dict[str, Any] | None = None
) -> tuple[AutoencoderConfig, dict[str, str]]:
    """The config of a first stage from its tensors; `said` is its config.json, where it has one.

    Raises:
        UserError: it is no first stage that this package has.
    """
    said = said or {}
    sizes = _shapes(names, layout)
    published = next((known for known in autoencoder_config.SIZES.values() if _alike(known, sizes)), None)
    facts = {"scale": "convention: 1"}
    groups = said.get("norm_num_groups")
    sizes["norm_groups"] = (
        groups if isinstance(groups, int) and groups > 0 else halves_of(sizes["base_channels"])
    )
    if published is not None:
        sizes["image_size"] = published.image_size
    side = said.get("sample_size")
    if isinstance(side, int | list | tuple):
        sizes["image_size"] = (side, side) if isinstance(side, int) else tuple(side)
    default = (
        sizes["regularization"] == "vq" and said.get("scaling_factor") == 0.18215
    )  # VQModel's own, which no VQ model meant
    if "scaling_factor" in said and not default:
        sizes["scale"], facts["scale"] = said["scaling_factor"], "config.json"
        sizes["shift"] = said.get("shift_factor") or 0.0
    return AutoencoderConfig(**sizes), facts


def _shapes(names: Names, layout: Layout) -> dict[str, Any]:
    """All that names and shapes tell."""
    pattern = layout.down.replace("{l}", "{i}")
    count = names.count(f"{pattern}.")
    first = names.shape("encoder.conv_in.weight", 4)
    width = first[0]
    block = f"{pattern}.{layout.block.format(j=0)}.conv1.weight"
    widths = [names.shape(block.replace("{i}", str(i)), 4)[0] for i in range(count)]
    if not widths or any(c % width for c in widths):
        raise UserError(
            f"{names.path} has levels of {widths} channels; needed are multiples of the first {width}"
        )
    attends = f"{pattern}.{layout.attention.format(j=0)}.{layout.attention_norm}.weight"
    ends = names.shape("encoder.conv_out.weight", 4)[0]
    vq = f"{layout.codebook}.weight"
    quants = "quant_conv.weight" in names
    entries, latents = names.shape(vq, 2) if vq in names else (0, ends // 2)
    if quants and not entries:
        latents = names.shape("quant_conv.weight", 4)[0] // 2
    bottleneck = names.shape("decoder.conv_in.weight", 4)[1]
    depth = names.count(f"{layout.down.format(l=0)}.{layout.block.replace('{j}', '{i}')}.")
    return {
        "regularization": "vq" if entries else "kl",
        "in_channels": first[1],
        "out_channels": names.shape(f"decoder.{layout.conv_out}.weight", 4)[0],
        "base_channels": width,
        "channel_multipliers": tuple(c // width for c in widths),
        "num_res_blocks": depth,
        "latent_channels": latents,
        "bottleneck_channels": 0 if bottleneck == latents else bottleneck,
        "codebook_size": entries,
        "attention_downsample_factors": tuple(
            2**i for i in range(count) if attends.replace("{i}", str(i)) in names
        ),
        "middle_attention": f"encoder.{layout.middle[1]}.{layout.attention_norm}.weight" in names,
        "quant_convs": quants,
    }


def scaled(config: AutoencoderConfig) -> AutoencoderConfig | None:
    """The published first stage of these sizes whose latents are scaled; none if there is no such."""
    for known in autoencoder_config.SIZES.values():
        if isinstance(known, AutoencoderConfig) and known.scale != 1.0:
            same_form = {"scale": config.scale, "shift": config.shift, "image_size": config.image_size}
            if replace(known, **same_form) == config:
                return known
    return None


def _alike(known: FirstStageConfig, sizes: dict[str, Any]) -> bool:
    return isinstance(known, AutoencoderConfig) and all(
        getattr(known, name) == value for name, value in sizes.items()
    )


# ------------------------------------------------------------------------------------------------ TAESD

CONVS = {"conv1": "conv.0", "conv2": "conv.2", "conv3": "conv.4"}


def tiny_layout(names: Names) -> str | None:
    """ "diffusers" or "taesd", whose decoder counts one layer more; none if it is no TAESD."""
    if "encoder.layers.1.conv.0.weight" in names and "decoder.layers.0.weight" in names:
        return "diffusers"
    if "encoder.1.conv.0.weight" in names and "decoder.1.weight" in names:
        return "taesd"
    return None


def tiny_table(config: TinyAutoencoderConfig, layout: str) -> list[Rule]:
    """Theirs <-> ours."""
    inner, later = (".layers", 0) if layout == "diffusers" else ("", 1)
    rules: list[Rule] = []

    def add(half: str, index: int, shift: int, kind: str) -> None:
        theirs, ours = f"{half}{inner}.{index + shift}", f"{half}.{index}"
        if kind == "block":
            for mine, other in CONVS.items():
                rules.extend(layer(f"{theirs}.{other}", f"{ours}.{mine}"))
        elif kind != "nothing":
            rules.extend(layer(theirs, ours, bias=kind == "conv"))

    more = config.num_levels - 1
    encoder = ["conv", "block", *(["step", *["block"] * config.num_res_blocks] * more), "conv"]
    decoder = [
        "conv",
        "nothing",
        *([*["block"] * config.num_res_blocks, "nothing", "step"] * more),
        "block",
        "conv",
    ]
    for half, kinds, shift in (("encoder", encoder, 0), ("decoder", decoder, later)):
        for index, kind in enumerate(kinds):
            add(half, index, shift, kind)
    return rules


def read_tiny(names: Names, layout: str, said: dict[str, Any] | None = None) -> TinyAutoencoderConfig:
    """The config of a TAESD from its tensors.

    Raises:
        UserError: other sizes than a TAESD can have.
    """
    inner = "encoder.layers." if layout == "diffusers" else "encoder."
    found = {int(m[1]) for name in names.shapes if (m := re.match(rf"{re.escape(inner)}(\d+)\.", name))}
    steps = [i for i in sorted(found) if f"{inner}{i}.weight" in names and f"{inner}{i}.bias" not in names]
    last = max(found)
    ends = [*steps[1:], last]
    depths = {end - step - 1 for step, end in zip(steps, ends, strict=True)}
    if len(depths) != 1:
        raise UserError(f"{names.path} is no TAESD: its levels have {sorted(depths)} blocks")
    first = names.shape(f"{inner}0.weight", 4)
    decoder = "decoder.layers." if layout == "diffusers" else "decoder."
    ways = [
        int(m[1]) for name in names.shapes if (m := re.match(rf"{re.escape(decoder)}(\d+)\.weight", name))
    ]
    said = said or {}
    return TinyAutoencoderConfig(
        in_channels=first[1],
        out_channels=names.shape(f"{decoder}{max(ways)}.weight", 4)[0],
        base_channels=first[0],
        num_levels=len(steps) + 1,
        num_res_blocks=depths.pop(),
        latent_channels=names.shape(f"{inner}{last}.weight", 4)[0],
        scale=float(said.get("scaling_factor") or 1.0),
        shift=float(said.get("shift_factor") or 0.0),
    )
