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

from triptych.errors import UserError
from triptych.heads.config import SegmenterConfig
from triptych.models.swin_config import SwinConfig
from triptych.models.vit_config import ViTConfig
from triptych.network import Network
from triptych.weights.families import family_of, from_json, to_json
from triptych.weights.formats import Draft, Hints, Names, Reading, drafted, hints_of

# A dot leads into a part: its fields are those of the part's own config.
UNSAID: dict[str, tuple[str, ...]] = {
    "vit": ("mlp", "norm_eps", "image_size"),
    "swin": ("norm_eps", "image_size", "window", "pretrained_window"),
    "segmenter": ("backbone.norm_eps", "backbone.image_size", "backbone.window", "head.pool_scales"),
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
    return {name: _at(data, name) for name in names if name.split(".")[-1] in ("image_size", "window")}


def hints_in(said: Said) -> Hints:
    """What of it a reader needs to begin with."""
    by_end = {name.split(".")[-1]: value for name, value in said.items()}
    size = by_end.get("image_size")
    return Hints(tuple(size) if size else None, by_end.get("window"), certain=True)


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
        data = data[key]
    return steps


def _at(data: Any, name: str) -> Any:
    for key in _steps(name, data):
        data = data[key]
    return data


def _put(data: Any, name: str, value: Any) -> None:
    *way, last = _steps(name, data)
    for key in way:
        data = data[key]
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
        drop_path=0.0,
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
        for pair in zip(config.pretrained_window, config.window, strict=False)
    )
    return replace(
        config,
        drop_path=0.0,
        dropout=0.0,
        mlp_ratio=ratio,
        pretrained_window=() if config.version == 1 or before == config.window else before,
    )


@comparable.register
def _(config: SegmenterConfig) -> SegmenterConfig:
    return replace(config, backbone=comparable(config.backbone), head=replace(config.head, dropout=0.0))
