"""When two configs mean the same network, and what a bare file of weights cannot say of one.

Every family lists here the fields that a file without a config leaves to its reader's conventions though no
tensor's place depends on them. `export` puts those that differ into a small JSON of ours beside the file, which
`load` prefers to the conventions. All other differences are refused before a byte is written.
"""

from collections.abc import Callable
from dataclasses import fields, replace
from functools import singledispatch
from pathlib import Path
from typing import Any

from triptych.diffusion.config import ProcessConfig
from triptych.errors import UserError
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
from triptych.weights.mapping.format import Draft, Hints, Names, Reading, drafted, hints_of

FIRST_STAGE = ("image_size", "scale", "shift", "norm_groups")
UNET = ("num_heads", "head_dim", "latent_size", "norm_groups")
DIT = ("num_heads", "latent_size", "mlp", "norm_eps", "position", "time_frequencies")
TEXT = ("num_heads", "head_dim", "activation", "skip_last_blocks", "pad_token", "norm_eps", "type", "boxes")

# A dot leads into a part: its fields are those of the part's own config.
UNSAID: dict[str, tuple[str, ...]] = {
    "vit": ("mlp", "norm_eps", "image_size"),
    "swin": ("norm_eps", "image_size", "window_size", "pretrained_window_size"),
    "segmenter": ("backbone.norm_eps", "backbone.image_size", "backbone.window", "head.pool_scales"),
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

Said = dict[str, Any]


def aside(weights: Path) -> Path:
    """Where that JSON lies: net.npz has net.npz.json."""
    return weights.with_name(weights.name + ".json")


def unsaid(config: Any, back: Any) -> Said:
    """The fields of `UNSAID` that a file would be read back with other values of, and ours, as JSON."""
    ours, theirs = to_json(config), to_json(back)
    names = UNSAID.get(family_of(config) or "", ())
    return {name: _at(ours, name) for name in names if _at(ours, name) != _at(theirs, name)}


def shapes_to_tell(config: Any) -> Said:
    """The image size and the windows, whichever the family leaves unsaid: a reader may need them to begin with."""
    data = to_json(config)
    names = UNSAID.get(family_of(config) or "", ())
    needed = ("image_size", "window_size")
    return {n: _at(data, n) for n in names if n.split(".")[-1] in needed or n == "process.prediction"}


def hints_in(said: Said) -> Hints:
    """What of it a reader needs to begin with."""
    by_end = {name.split(".")[-1]: value for name, value in said.items()}
    size = by_end.get("image_size")
    prediction = said.get("process.prediction")
    heads = tuple(said.get(f"network.{name}", said.get(name, 0)) for name in ("num_heads", "head_dim"))
    return Hints(
        tuple(size) if size else None,
        by_end.get("window_size"),
        certain=True,
        prediction=prediction,
        heads=heads if any(heads) else None,
    )


def told(config: Any, said: Said) -> Any:
    """The config with what was said beside the file; names that the family does not leave unsaid are passed over.

    Raises:
        UserError: a value that no such config can have.
    """
    family = family_of(config) or ""
    data = to_json(config)
    for name in UNSAID.get(family, ()):
        if name in said:
            _put(data, name, said[name])
    return from_json(family, data)


def _steps(name: str, data: Any) -> list[str]:
    """The keys that lead to a field; a part of another family has its fields under "config"."""
    steps: list[str] = []
    for key in name.split("."):
        if steps and isinstance(data, dict) and set(data) == {"family", "config"}:
            steps.append("config")
            data = data["config"]
        steps.append(key)
        data = data.get(key) if isinstance(data, dict) else None
    return steps


def _at(data: Any, name: str) -> Any:
    for key in _steps(name, data):
        data = data.get(key) if isinstance(data, dict) else None  # a part that this one lacks
    return data


def _put(data: Any, name: str, value: Any) -> None:
    *way, last = _steps(name, data)
    for key in way:
        data = data.get(key) if isinstance(data, dict) else None
    if isinstance(data, dict):
        data[last] = value


def require_same(net: Network, back: Any, title: str) -> None:
    """Refuse to write a format that would be read back as another network, but for what `unsaid` says.

    Raises:
        UserError: names every field that the format has no way to say.
    """
    differing = [
        f"{name} (here {here!r}, read back as {there!r})"
        for name, here, there in _differences(comparable(net.config), comparable(back), "")
        if not _left_to_conventions(net.config, name, here, there)
    ]
    if differing:
        raise UserError(f"{title} cannot say {', '.join(differing)}; choose another format")


def checked(
    draft: Draft, net: Network, read: Callable[[Names, Hints], Reading], title: str, container: str = "pickle"
) -> Draft:
    """A draft, once its own reader takes it for the same network.

    Raises:
        UserError: see `require_same`.
    """
    back = read(drafted(draft, Path(title), container), hints_of(net.config))
    require_same(net, back.config, title)
    return draft


def _differences(ours: Any, theirs: Any, prefix: str) -> list[tuple[str, Any, Any]]:
    found: list[tuple[str, Any, Any]] = []
    for field in fields(ours):
        here, there = getattr(ours, field.name), getattr(theirs, field.name)
        if here == there:
            continue
        deeper = type(here) is type(there) and hasattr(here, "__dataclass_fields__")
        name = prefix + field.name
        found += _differences(here, there, f"{name}.") if deeper else [(name, here, there)]
    return found


def _left_to_conventions(config: Any, name: str, here: Any, there: Any) -> bool:
    if name == "mlp" and not {here, there} <= {"gelu", "gelu_tanh"}:
        return False  # gates have weights of their own
    return name in UNSAID.get(family_of(config) or "", ())


@singledispatch
def comparable(config: Any) -> Any:
    """The config less what only training reads and what its other fields make meaningless."""
    return config


@comparable.register
def _(config: ViTConfig) -> ViTConfig:
    placed = config.position == "learned" and (config.class_token or config.distill_token)
    return replace(
        config,
        drop_path_rate=0.0,
        dropout=0.0,
        layer_scale=None if config.layer_scale is None else 1.0,
        head_dim=(config.head_dim or config.embed_dim) if config.head == "mlp" else 0,
        prefix_positions=config.prefix_positions or not placed,
        rotary_base=config.rotary_base if config.position == "rotary" else 100.0,
    )


@comparable.register
def _(config: SwinConfig) -> SwinConfig:
    # The ratio counts as far as it gives hidden widths, which are rounded down.
    ratio = max(int(width * config.mlp_ratio) / width for width in config.widths)
    before = tuple(
        tuple(old or new for old, new in zip(*pair, strict=True))
        for pair in zip(config.pretrained_window_size, config.window_size, strict=False)
    )
    return replace(
        config,
        drop_path_rate=0.0,
        dropout=0.0,
        mlp_ratio=ratio,
        pretrained_window_size=() if config.version == 1 or before == config.window_size else before,
    )


@comparable.register
def _(config: SegmenterConfig) -> SegmenterConfig:
    return replace(config, backbone=comparable(config.backbone), head=replace(config.head, dropout=0.0))


@comparable.register
def _(config: AutoencoderConfig) -> AutoencoderConfig:
    as_latents = config.bottleneck_channels == config.latent_channels
    return replace(config, dropout=0.0, bottleneck_channels=0 if as_latents else config.bottleneck_channels)


@comparable.register
def _(config: TextConfig) -> TextConfig:
    each = config.inner // config.num_heads
    whole = each * config.num_heads == config.embed_dim
    return replace(
        config,
        depth=config.depth - config.skip_last_blocks,
        skip_last_blocks=0,
        head_dim=0 if whole else each,
    )


@comparable.register
def _(config: UNetConfig) -> UNetConfig:
    down, middle, _ = levels(config)
    attending = {level.factor: level for level in (*down, middle) if level.attention}
    widths = {level.channels for level in attending.values()}
    heads, head_dim = config.num_heads, config.head_dim
    if len(widths) <= 1:  # one width: heads are their number and their size at once
        heads, head_dim = (heads or widths.pop() // head_dim) if widths else 0, 0
    deep = {factor: level.attention for factor, level in attending.items() if config.context_dim}
    depths = tuple(deep.get(2**i, 1) for i in range(len(down)))
    seen = tuple(level.factor for level in down if level.attention)
    return replace(
        config,
        dropout=0.0,
        attention_downsample_factors=seen,
        cross_only_downsample_factors=tuple(f for f in config.cross_only_downsample_factors if f in seen),
        num_heads=heads,
        head_dim=head_dim,
        transformer_depth=depths,
        projection=config.projection if config.context_dim else "conv",
    )


@comparable.register
def _(config: DiTConfig) -> DiTConfig:
    return replace(config, dropout=0.0, null_class=config.null_class or not config.num_classes)


@comparable.register
def _(config: LatentDiffusionConfig) -> LatentDiffusionConfig:
    text = config.text_encoder if config.text_encoder is None else comparable(config.text_encoder)
    return replace(
        config,
        autoencoder=comparable(config.autoencoder),
        network=comparable(config.network),
        text_encoder=text,
    )
