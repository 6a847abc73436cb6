"""First stages with keys of CompVis (those of taming-transformers) and diffusers; TAESD also with its author's."""

import re
from dataclasses import dataclass, replace
from typing import Any

from triptych.errors import CheckpointError
from triptych.models.configs import autoencoder as autoencoder_config
from triptych.models.configs.autoencoder import AutoencoderConfig, FirstStageConfig, TinyAutoencoderConfig
from triptych.weights.diffusion.diffusers_defaults import NORM_GROUPS, SCALING_FACTOR
from triptych.weights.diffusion.rule_helpers import ONE_BY_ONE, default_groups, fused, layer, matrix
from triptych.weights.mapping.format import StateDictKeys
from triptych.weights.mapping.rules import Rule, drop, rename


@dataclass(frozen=True, kw_only=True)
class Layout:
    """Names that differ between the two. `{l}` is a level from the finest, `{s}` a step of the way up, `{j}` a
    block."""

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


def layout_of(keys: StateDictKeys) -> Layout | None:
    """Return the layout of the keys; None if they are not of a first stage."""
    if "encoder.down.0.block.0.conv1.weight" in keys and "decoder.conv_in.weight" in keys:
        return COMPVIS
    if "encoder.down_blocks.0.resnets.0.conv1.weight" in keys and "decoder.conv_in.weight" in keys:
        return DIFFUSERS_OLD if keys.any_endswith(".attentions.0.query.weight") else DIFFUSERS
    return None


def table(config: AutoencoderConfig, layout: Layout) -> list[Rule]:
    """Return the rules, in the order in which the network runs."""
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
        rules.append(rename(f"{layout.codebook}.weight", "codebook.weight"))
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
        rules.append(drop(f"{name}.*", "only training uses it"))
    return rules


def _level(
    config: AutoencoderConfig,
    layout: Layout,
    theirs: str,
    ours: str,
    level: int,
    in_channels: int,
    depth: int,
) -> list[Rule]:
    out_channels, rules = config.base_channels * config.channel_multipliers[level], []
    for j in range(depth):
        block, skip = f"{theirs}.{layout.block.format(j=j)}", in_channels != out_channels
        rules += _block(layout, block, f"{ours}.blocks.{j}", skip)
        if 2**level in config.attention_downsample_factors:
            rules += _attention(layout, f"{theirs}.{layout.attention.format(j=j)}", f"{ours}.attentions.{j}")
        in_channels = out_channels
    return rules


def _end(config: AutoencoderConfig, layout: Layout, half: str) -> list[Rule]:
    """Return the rules of the middle and the output, which both halves have."""
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
    keys: StateDictKeys, layout: Layout, config_json: dict[str, Any] | None = None
) -> tuple[AutoencoderConfig, dict[str, str]]:
    """Infer the config of a first stage from its tensors; also return where the scale came from.

    Args:
        config_json: its config.json, if there is one.

    Raises:
        CheckpointError: it is no first stage that this package has.
    """
    sizes = _shapes(keys, layout)
    published = next((known for known in autoencoder_config.SIZES.values() if _alike(known, sizes)), None)
    groups = (config_json or {}).get("norm_num_groups", NORM_GROUPS if config_json else None)
    sizes["norm_groups"] = (
        groups if isinstance(groups, int) and groups > 0 else default_groups(sizes["base_channels"])
    )
    if published is not None:
        sizes["image_size"] = published.image_size
    side = (config_json or {}).get("sample_size")
    if isinstance(side, int | list | tuple):
        sizes["image_size"] = (side, side) if isinstance(side, int) else tuple(side)
    facts = {"scale": "convention: 1"}
    if layout is not COMPVIS:
        sizes["scale"], sizes["shift"], facts["scale"] = _diffusers_scale(sizes, config_json or {})
    return AutoencoderConfig(**sizes), facts


def _diffusers_scale(sizes: dict[str, Any], config_json: dict[str, Any]) -> tuple[float, float, str]:
    """Return scale and shift of the latents, and where they came from.

    VQModel has the same default as AutoencoderKL, but every VQ model that was published has latents that are not
    scaled, and diffusers' own pipelines go wrong with it.
    """
    scale = config_json.get("scaling_factor")
    if sizes["regularization"] == "vq" and scale in (None, SCALING_FACTOR):
        return 1.0, 0.0, "convention: latents of VQ models are not scaled"
    shift = config_json.get("shift_factor") or 0.0
    if scale is None:
        return SCALING_FACTOR, shift, f"convention: diffusers' default {SCALING_FACTOR}"
    return scale, shift, "config.json"


def _shapes(keys: StateDictKeys, layout: Layout) -> dict[str, Any]:
    """Return the fields of the config that keys and shapes determine."""
    pattern = layout.down.replace("{l}", "{i}")
    count = keys.count_blocks(f"{pattern}.")
    first = keys.shape("encoder.conv_in.weight", 4)
    width = first[0]
    block = f"{pattern}.{layout.block.format(j=0)}.conv1.weight"
    widths = [keys.shape(block.replace("{i}", str(i)), 4)[0] for i in range(count)]
    if not widths or any(c % width for c in widths):
        raise CheckpointError(
            f"{keys.path} has levels of {widths} channels; needed are multiples of the first {width}"
        )
    attends = f"{pattern}.{layout.attention.format(j=0)}.{layout.attention_norm}.weight"
    ends = keys.shape("encoder.conv_out.weight", 4)[0]
    vq = f"{layout.codebook}.weight"
    quants = "quant_conv.weight" in keys
    entries, latents = keys.shape(vq, 2) if vq in keys else (0, ends // 2)
    if quants and not entries:
        latents = keys.shape("quant_conv.weight", 4)[0] // 2
    bottleneck = keys.shape("decoder.conv_in.weight", 4)[1]
    depth = keys.count_blocks(f"{layout.down.format(l=0)}.{layout.block.replace('{j}', '{i}')}.")
    return {
        "regularization": "vq" if entries else "kl",
        "in_channels": first[1],
        "out_channels": keys.shape(f"decoder.{layout.conv_out}.weight", 4)[0],
        "base_channels": width,
        "channel_multipliers": tuple(c // width for c in widths),
        "num_res_blocks": depth,
        "latent_channels": latents,
        "bottleneck_channels": 0 if bottleneck == latents else bottleneck,
        "codebook_size": entries,
        "attention_downsample_factors": tuple(
            2**i for i in range(count) if attends.replace("{i}", str(i)) in keys
        ),
        "middle_attention": f"encoder.{layout.middle[1]}.{layout.attention_norm}.weight" in keys,
        "quant_convs": quants,
    }


def scaled(config: AutoencoderConfig) -> AutoencoderConfig | None:
    """Return the published first stage of these sizes whose latents are scaled, or None."""
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


def tiny_layout(keys: StateDictKeys) -> str | None:
    """Return "diffusers", or "taesd" (whose decoder counts one layer more); None if it is no TAESD."""
    if "encoder.layers.1.conv.0.weight" in keys and "decoder.layers.0.weight" in keys:
        return "diffusers"
    if "encoder.1.conv.0.weight" in keys and "decoder.1.weight" in keys:
        return "taesd"
    return None


def tiny_table(config: TinyAutoencoderConfig, layout: str) -> list[Rule]:
    """Return the rules."""
    inner, later = (".layers", 0) if layout == "diffusers" else ("", 1)
    rules: list[Rule] = []

    def add(half: str, index: int, shift: int, layer_type: str) -> None:
        theirs, ours = f"{half}{inner}.{index + shift}", f"{half}.{index}"
        if layer_type == "block":
            for mine, other in CONVS.items():
                rules.extend(layer(f"{theirs}.{other}", f"{ours}.{mine}"))
        elif layer_type != "nothing":
            rules.extend(layer(theirs, ours, bias=layer_type == "conv"))

    more = config.num_levels - 1
    encoder = ["conv", "block", *(["step", *["block"] * config.num_res_blocks] * more), "conv"]
    decoder = [
        "conv",
        "nothing",
        *([*["block"] * config.num_res_blocks, "nothing", "step"] * more),
        "block",
        "conv",
    ]
    for half, layers, shift in (("encoder", encoder, 0), ("decoder", decoder, later)):
        for index, layer_type in enumerate(layers):
            add(half, index, shift, layer_type)
    return rules


def read_tiny(
    keys: StateDictKeys, layout: str, config_json: dict[str, Any] | None = None
) -> TinyAutoencoderConfig:
    """Infer the config of a TAESD from its tensors.

    Raises:
        CheckpointError: sizes that a TAESD cannot have.
    """
    inner = "encoder.layers." if layout == "diffusers" else "encoder."
    indices = {int(m[1]) for name in keys.shapes if (m := re.match(rf"{re.escape(inner)}(\d+)\.", name))}
    steps = [i for i in sorted(indices) if f"{inner}{i}.weight" in keys and f"{inner}{i}.bias" not in keys]
    last = max(indices)
    ends = [*steps[1:], last]
    depths = {end - step - 1 for step, end in zip(steps, ends, strict=True)}
    if len(depths) != 1:
        raise CheckpointError(f"{keys.path} is no TAESD: its levels have {sorted(depths)} blocks")
    first = keys.shape(f"{inner}0.weight", 4)
    decoder = "decoder.layers." if layout == "diffusers" else "decoder."
    ways = [int(m[1]) for name in keys.shapes if (m := re.match(rf"{re.escape(decoder)}(\d+)\.weight", name))]
    config_json = config_json or {}
    return TinyAutoencoderConfig(
        in_channels=first[1],
        out_channels=keys.shape(f"{decoder}{max(ways)}.weight", 4)[0],
        base_channels=first[0],
        num_levels=len(steps) + 1,
        num_res_blocks=depths.pop(),
        latent_channels=keys.shape(f"{inner}{last}.weight", 4)[0],
        scale=float(config_json.get("scaling_factor") or 1.0),
        shift=float(config_json.get("shift_factor") or 0.0),
    )
