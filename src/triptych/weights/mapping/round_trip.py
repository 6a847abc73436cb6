"""Which configs mean the same network, and which fields a file of weights alone does not store.

`UNSTORED_FIELDS` lists for each family the fields that a file without a config leaves to its reader's defaults although
no key or shape depends on them. `export` writes those that differ into a small JSON file of ours next to the weights
(the sidecar), which `load` prefers to the defaults. All other differences are refused before anything is written.
"""

import logging
from collections.abc import Callable
from dataclasses import fields, replace
from functools import singledispatch
from pathlib import Path
from typing import Any

from triptych.diffusion.config import ProcessConfig
from triptych.errors import CheckpointError
from triptych.heads.config import SegmenterConfig
from triptych.models.configs.autoencoder import AutoencoderConfig
from triptych.models.configs.dit import DiTConfig
from triptych.models.configs.latent_diffusion import LatentDiffusionConfig
from triptych.models.configs.swin import SwinConfig
from triptych.models.configs.text import TextConfig
from triptych.models.configs.unet import UNetConfig, levels
from triptych.models.configs.vit import ViTConfig
from triptych.network import Network
from triptych.weights.mapping.families import family_of, from_json, to_json
from triptych.weights.mapping.format import (
    Draft,
    Hints,
    LoadPlan,
    StateDictKeys,
    draft_keys,
    hints_from_config,
)

log = logging.getLogger(__name__)

FIRST_STAGE = ("image_size", "scale", "shift", "norm_groups")
UNET = ("num_heads", "head_dim", "latent_size", "norm_groups")
DIT = ("num_heads", "latent_size", "mlp", "norm_eps", "position", "time_frequencies")
TEXT = ("num_heads", "head_dim", "activation", "skip_last_blocks", "pad_token", "norm_eps", "type", "boxes")

# Family -> fields. A dot leads into the config of a part.
UNSTORED_FIELDS: dict[str, tuple[str, ...]] = {
    "vit": ("mlp", "norm_eps", "image_size"),
    "swin": ("norm_eps", "image_size", "window_size", "pretrained_window_size"),
    "segmenter": ("backbone.norm_eps", "backbone.image_size", "backbone.window_size", "head.pool_scales"),
    "autoencoder": FIRST_STAGE,
    "tiny-autoencoder": ("image_size", "scale", "shift"),
    "unet": UNET,
    "dit": DIT,
    "text": TEXT,
    "latent-diffusion": (
        *(f"autoencoder.{name}" for name in FIRST_STAGE),
        *(f"network.{name}" for name in dict.fromkeys(UNET + DIT)),
        *(f"text_encoder.{name}" for name in TEXT),
        *(
            f"{process}.{field.name}"
            for process in ("process", "low_res_process")
            for field in fields(ProcessConfig)
        ),
        "concat",
    ),
}

# Fields that a format has by convention and that change nothing at the network's own size -> what they change.
OTHER_SIZES = {
    "position_resampling": "images of another size",
    "shift_single_windows": "images whose map is one window",
}

SidecarFields = dict[str, Any]
"""Dotted field name -> value as JSON."""


# -------------------------------------------------------------------------------------------------- sidecar


def sidecar_path(weights: Path) -> Path:
    """Return the path of the sidecar: net.npz has net.npz.json."""
    return weights.with_name(weights.name + ".json")


def unstored_fields(config: Any, read_back: Any) -> SidecarFields:
    """Return the unstored fields of `config` whose values differ from those of the config that a file is read back
    as."""
    ours, theirs = to_json(config), to_json(read_back)
    names = UNSTORED_FIELDS.get(family_of(config) or "", ())
    return {
        name: _get_field(ours, name) for name in names if _get_field(ours, name) != _get_field(theirs, name)
    }


def required_hints(config: Any) -> SidecarFields:
    """Return the image size, the windows and the prediction, if the family does not store them.

    A reader may not be able to read the file at all without these.
    """
    data = to_json(config)
    names = UNSTORED_FIELDS.get(family_of(config) or "", ())
    needed = ("image_size", "window_size")
    return {
        name: _get_field(data, name)
        for name in names
        if name.split(".")[-1] in needed or name == "process.prediction"
    }


def hints_from_sidecar(sidecar: SidecarFields) -> Hints:
    """Return the hints that a reader takes from a sidecar."""
    by_last_name = {name.split(".")[-1]: value for name, value in sidecar.items()}
    size = by_last_name.get("image_size")
    heads = tuple(sidecar.get(f"network.{name}", sidecar.get(name, 0)) for name in ("num_heads", "head_dim"))
    return Hints(
        tuple(size) if size else None,
        by_last_name.get("window_size"),
        certain=True,
        prediction=sidecar.get("process.prediction"),
        heads=heads if any(heads) else None,
    )


def with_sidecar(config: Any, sidecar: SidecarFields) -> Any:
    """Return the config with the values of a sidecar. Names that are no unstored fields of the family are ignored.

    Raises:
        ConfigError: a value is invalid.
    """
    family = family_of(config) or ""
    data = to_json(config)
    for name in UNSTORED_FIELDS.get(family, ()):
        if name in sidecar:
            _set_field(data, name, sidecar[name])
    return from_json(family, data)


def _field_path(data: Any, name: str) -> list[str]:
    """Return the keys that lead to a dotted field. A part that may be of any family has its fields under "config"."""
    path: list[str] = []
    for key in name.split("."):
        if path and isinstance(data, dict) and set(data) == {"family", "config"}:
            path.append("config")
            data = data["config"]
        path.append(key)
        data = data.get(key) if isinstance(data, dict) else None
    return path


def _get_field(data: Any, name: str) -> Any:
    for key in _field_path(data, name):
        data = data.get(key) if isinstance(data, dict) else None  # this config lacks the part
    return data


def _set_field(data: Any, name: str, value: Any) -> None:
    *path, last = _field_path(data, name)
    for key in path:
        data = data.get(key) if isinstance(data, dict) else None
    if isinstance(data, dict):
        data[last] = value


# ----------------------------------------------------------------------------------------------- round trip


def require_round_trip(net: Network, read_back: Any, title: str) -> None:
    """Refuse a format from which another network would be read back, except for unstored fields.

    Args:
        read_back: the config that the format's reader gives.
        title: the format, for the message.

    Raises:
        CheckpointError: lists every field that the format cannot store.
    """
    differing = [
        f"{name} (here {ours!r}, read back as {theirs!r})"
        for name, ours, theirs in _differences(canonical(net.config), canonical(read_back), "")
        if not _is_unstored(net.config, name, ours, theirs)
    ]
    for name, ours, theirs in _differences(net.config, read_back, ""):
        if where := OTHER_SIZES.get(name.split(".")[-1]):
            log.warning("%s has %s %r, not %r: results for %s differ", title, name, theirs, ours, where)
    if differing:
        raise CheckpointError(f"{title} cannot store {', '.join(differing)}; choose another format")


def verify_round_trip(
    draft: Draft,
    net: Network,
    read: Callable[[StateDictKeys, Hints], LoadPlan],
    title: str,
    container: str = "pickle",
) -> Draft:
    """Return a draft after checking that its own reader recognizes the same network in it.

    Raises:
        CheckpointError: see `require_round_trip`.
    """
    plan = read(draft_keys(draft, Path(title), container), hints_from_config(net.config))
    require_round_trip(net, plan.config, title)
    return draft


def _differences(ours: Any, theirs: Any, prefix: str) -> list[tuple[str, Any, Any]]:
    differences: list[tuple[str, Any, Any]] = []
    for field in fields(ours):
        a, b = getattr(ours, field.name), getattr(theirs, field.name)
        if a == b:
            continue
        nested = type(a) is type(b) and hasattr(a, "__dataclass_fields__")
        name = prefix + field.name
        differences += _differences(a, b, f"{name}.") if nested else [(name, a, b)]
    return differences


def _is_unstored(config: Any, name: str, ours: Any, theirs: Any) -> bool:
    if name == "mlp" and not {ours, theirs} <= {"gelu", "gelu_tanh", "quick_gelu"}:
        return False  # gated MLPs have weights of their own
    return name in UNSTORED_FIELDS.get(family_of(config) or "", ())


# -------------------------------------------------------------------------------------------- canonical form


@singledispatch
def canonical(config: Any) -> Any:
    """Return the config without what only training uses and what its other fields make irrelevant."""
    return config


@canonical.register
def _(config: ViTConfig) -> ViTConfig:
    has_prefix_positions = config.position == "learned" and (config.class_token or config.distill_token)
    return replace(
        config,
        drop_path_rate=0.0,
        dropout=0.0,
        layer_scale=None if config.layer_scale is None else 1.0,
        head_dim=(config.head_dim or config.embed_dim) if config.head == "mlp" else 0,
        prefix_positions=config.prefix_positions or not has_prefix_positions,
        rotary_base=config.rotary_base if config.position == "rotary" else 100.0,
        position_resampling="antialiased",
    )


@canonical.register
def _(config: SwinConfig) -> SwinConfig:
    # Only the hidden widths matter, which are rounded down.
    ratio = max(int(width * config.mlp_ratio) / width for width in config.widths)
    pretrained = tuple(
        tuple(old or new for old, new in zip(*pair, strict=True))
        for pair in zip(config.pretrained_window_size, config.window_size, strict=False)
    )
    return replace(
        config,
        drop_path_rate=0.0,
        dropout=0.0,
        mlp_ratio=ratio,
        pretrained_window_size=() if config.version == 1 or pretrained == config.window_size else pretrained,
        shift_single_windows=False,
    )


@canonical.register
def _(config: SegmenterConfig) -> SegmenterConfig:
    return replace(config, backbone=canonical(config.backbone), head=replace(config.head, dropout=0.0))


@canonical.register
def _(config: AutoencoderConfig) -> AutoencoderConfig:
    same_as_latents = config.bottleneck_channels == config.latent_channels
    return replace(
        config, dropout=0.0, bottleneck_channels=0 if same_as_latents else config.bottleneck_channels
    )


@canonical.register
def _(config: TextConfig) -> TextConfig:
    head_dim = config.inner // config.num_heads
    default = head_dim * config.num_heads == config.embed_dim
    return replace(
        config,
        depth=config.depth - config.skip_last_blocks,
        skip_last_blocks=0,
        head_dim=0 if default else head_dim,
    )


@canonical.register
def _(config: UNetConfig) -> UNetConfig:
    down, middle, _ = levels(config)
    attending = {level.factor: level for level in (*down, middle) if level.attention}
    widths = {level.channels for level in attending.values()}
    heads, head_dim = config.num_heads, config.head_dim
    if len(widths) <= 1:  # with one width, number and size of the heads determine each other
        heads, head_dim = (heads or widths.pop() // head_dim) if widths else 0, 0
    deep = {factor: level.attention for factor, level in attending.items() if config.context_dim}
    depths = tuple(deep.get(2**i, 1) for i in range(len(down)))
    factors = tuple(level.factor for level in down if level.attention)
    return replace(
        config,
        dropout=0.0,
        attention_downsample_factors=factors,
        cross_only_downsample_factors=tuple(f for f in config.cross_only_downsample_factors if f in factors),
        num_heads=heads,
        head_dim=head_dim,
        transformer_depth=depths,
        projection=config.projection if config.context_dim else "conv",
    )


@canonical.register
def _(config: DiTConfig) -> DiTConfig:
    return replace(config, dropout=0.0, null_class=config.null_class or not config.num_classes)


@canonical.register
def _(config: LatentDiffusionConfig) -> LatentDiffusionConfig:
    text = None if config.text_encoder is None else canonical(config.text_encoder)
    return replace(
        config,
        autoencoder=canonical(config.autoencoder),
        network=canonical(config.network),
        text_encoder=text,
    )
