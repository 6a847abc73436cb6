"""The config of a Swin, from the names and shapes of its tensors and from what lies beside them."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from triptych.errors import UserError
from triptych.layers.window import relative_index
from triptych.models.configs.swin import SwinConfig, Window, windows_of
from triptych.weights.mapping.format import Hints, Names
from triptych.weights.swin.key_layout import Layout, biases, coordinates_of

Windows = tuple[Window, ...]

UNKNOWN = (2**30, 2**30)
"""An image size that makes no window smaller."""

# Published SwinV2s by their window: the size of the images they were trained on.
SIZES_OF_V2 = {8: 256, 12: 192, 14: 224, 16: 256, 24: 384}


Fit = Literal["axis", "square", "rows", "never"]
"""How a publisher's code makes a window smaller where a map is: each side by its own, to a square of the map's
shorter side or of its rows, or not at all."""


@dataclass(frozen=True, kw_only=True)
class Said:
    """What a config beside the tensors says of what no shape can."""

    where: str = "config.json"
    image_size: tuple[int, int] | None = None
    window_size: Windows | None = None
    """Before it is fitted to the maps."""
    pretrained: Windows | None = None
    fit: Fit = "square"


def read_sizes(
    names: Names, layout: Layout, hints: Hints, said: Said, head: str = "head", eps: float = 1e-5
) -> tuple[SwinConfig, dict[str, str]]:
    """The network's config, and where each thing that shapes cannot tell came from.

    Args:
        names: those of the network alone; `head` is the classifier's.
        eps: of every LayerNorm.
    """
    first = _first(layout, 0)
    width, channels, patch, _ = names.shape(f"{layout.embed}.weight", 4)
    version = 2 if first + layout.scale in names else 1
    depths = _depths(names, layout)
    tables = [_first(layout, stage) + layout.table for stage in range(len(depths))]
    scales = [_first(layout, stage) + layout.scale for stage in range(len(depths))]
    hidden = [
        names.shape(f"{_first(layout, stage)}{layout.fc1}.weight", 2)[0] for stage in range(len(depths))
    ]
    facts = {
        "num_heads": "shape of the bias tables" if version == 1 else "shape of the scales",
        "norm_eps": f"convention: {eps:g}",
        "mlp": "convention: the exact GELU",
    }
    sizes: dict[str, Any] = {
        "version": version,
        "patch_size": patch,
        "in_channels": channels,
        "embed_dim": width,
        "depths": depths,
        "num_heads": tuple(
            names.shape(table, 2)[1] if version == 1 else names.shape(scale, 3)[0]
            for table, scale in zip(tables, scales, strict=True)
        ),
        # Hidden widths are rounded down: the largest share is one that gives them all.
        "mlp_ratio": max(h / (width * 2**stage) for stage, h in enumerate(hidden)) if hidden else 4.0,
        "qkv_bias": _bias(names, layout, first, version),
        "map_norms": layout.map_norm is not None and f"{layout.map_norm(0)}.weight" in names,
        "num_classes": names.shape(f"{head}.weight", 2)[0] if f"{head}.weight" in names else 0,
        "norm_eps": eps,
    }
    strides = [patch * 2**stage for stage in range(len(depths))]
    window, facts["window_size"] = (
        _windows_of_tables(names, layout, tables, strides, hints, said)
        if version == 1
        else _windows_of_v2(names, layout, strides, hints, said)
    )
    shown = version == 1 or first + layout.coordinates in names
    size, facts["image_size"] = _image_size(names, layout, window, shown, strides, hints, said)
    sizes |= {"window_size": window, "image_size": size}
    if version == 2:
        sizes["pretrained_window_size"], facts["pretrained_window_size"] = _pretrained(
            names, layout, window, said
        )
    return SwinConfig(**sizes), facts


def stages_of(names: Names, layout: Layout) -> int:
    """How many stages there are."""
    return len(_depths(names, layout))


def fitted(windows: Windows, sides: tuple[int, int], strides: Sequence[int], fit: Fit) -> Windows:
    """Each stage's window as a publisher's code builds it for images of such sides."""
    made = []
    for (h, w), stride in zip(windows, strides, strict=True):
        rows, columns = (max(side // stride, 1) for side in sides)
        if fit in ("square", "rows"):
            rows = columns = rows if fit == "rows" else min(rows, columns)
        made.append((h, w) if fit == "never" else (min(h, rows), min(w, columns)))
    return tuple(made)


def single(config: SwinConfig, title: str, fit: Fit = "square") -> int:
    """The one number that a publisher's config says the windows with.

    Raises:
        UserError: rectangular windows, several, or one that its code would build smaller.
    """
    found = max(max(pair) for pair in config.window_size)
    everywhere = windows_of(found, len(config.depths))
    if fitted(everywhere, config.image_size, config.strides, fit) != config.window_size:
        shown = sorted(set(config.window_size))
        raise UserError(
            f"{title} cannot say windows {' and '.join(f'{h}x{w}' for h, w in shown)} for images of "
            f"{config.image_size[0]}x{config.image_size[1]}: it has one square window, no larger than a map; "
            "choose triptych's own format"
        )
    return found


def _first(layout: Layout, stage: int) -> str:
    """What names of a stage's first block begin with."""
    return layout.block(stage).replace("{i}", "0")


def _depths(names: Names, layout: Layout) -> tuple[int, ...]:
    depths: list[int] = []
    while depth := names.count(layout.block(len(depths))):
        depths.append(depth)
    return tuple(depths)


def _bias(names: Names, layout: Layout, first: str, version: int) -> Literal["qkv", "qv", "none"]:
    if version == 2:
        return "qv" if biases(first, layout)[0] in names else "none"
    return "qkv" if f"{first}{layout.qkv[0]}.bias" in names else "none"


# ----------------------------------------------------------------------------------------------- windows


def _windows_of_tables(
    names: Names, layout: Layout, tables: list[str], strides: list[int], hints: Hints, said: Said
) -> tuple[Windows, str]:
    """Version 1: a table has (2 M_h - 1)(2 M_w - 1) rows."""
    rows = [names.shape(table, 2)[0] for table in tables]
    stages = len(rows)
    if said.window_size is not None:
        told = fitted(said.window_size, said.image_size or UNKNOWN, strides, said.fit)
        if not _agree(told, rows):
            raise UserError(
                f"{names.path}: {said.where} says windows {told}, whose bias tables do not have the rows of the "
                f"tensors, {rows}; put the config that belongs to the weights beside them"
            )
        return told, said.where
    sides = [math.isqrt(count) for count in rows]
    if all(side * side == count and side % 2 for side, count in zip(sides, rows, strict=True)):
        return tuple(((side + 1) // 2,) * 2 for side in sides), "shape of the bias tables"  # type: ignore[return-value]
    found = [_window_of_index(names, _first(layout, i) + layout.index, rows[i]) for i in range(stages)]
    if all(found):
        return tuple(found), "the index of relative positions"  # type: ignore[arg-type]
    if hints.window is not None and _agree(windows_of(hints.window, stages), rows):
        return windows_of(hints.window, stages), "window of the call"
    raise UserError(
        f"{names.path} has bias tables of {rows} rows, of no square windows; give window_size=(height, width)"
    )


def _agree(windows: Windows, rows: list[int]) -> bool:
    return [(2 * h - 1) * (2 * w - 1) for h, w in windows] == rows


def _window_of_index(names: Names, name: str, rows: int) -> Window | None:
    """The window whose index of relative positions a file holds."""
    index = names.numbers(name, 2**22)
    if index is None:
        return None
    cells = math.isqrt(index.numel())
    for height in range(1, cells + 1):
        window = (height, cells // height)
        fits = cells % height == 0 and (2 * height - 1) * (2 * window[1] - 1) == rows
        if fits and torch.equal(relative_index(window).flatten(), index.flatten().long()):
            return window
    return None


def _windows_of_v2(
    names: Names, layout: Layout, strides: list[int], hints: Hints, said: Said
) -> tuple[Windows, str]:
    """Version 2: no weight has the window's size, but older code saved a table of coordinates."""
    tables = [_first(layout, stage) + layout.coordinates for stage in range(len(strides))]
    if all(table in names for table in tables):
        sides = [names.shape(table, 4)[1:3] for table in tables]
        return tuple(((h + 1) // 2, (w + 1) // 2) for h, w in sides), "shape of the tables of coordinates"
    if said.window_size is not None:
        return fitted(said.window_size, said.image_size or UNKNOWN, strides, said.fit), said.where
    if hints.window is not None:
        given = windows_of(hints.window, len(strides))
        side = SIZES_OF_V2.get(hints.window) if isinstance(hints.window, int) else None
        size = hints.image_size or (UNKNOWN if side is None else (side, side))
        return fitted(given, size, strides, "never" if hints.certain else "axis"), "window of the call"
    usual = fitted(windows_of(8, len(strides)), (256, 256), strides, "axis")
    return usual, "convention: 8, as no tensor tells; give window_size= to correct it"


def _pretrained(names: Names, layout: Layout, window: Windows, said: Said) -> tuple[Windows, str]:
    """Version 2: the windows that the scale of coordinates belongs to; none if they are the windows themselves."""
    found = [
        _before(names.numbers(_first(layout, stage) + layout.coordinates), here)
        for stage, here in enumerate(window)
    ]
    if all(found):
        where, before = "numbers of the tables of coordinates", tuple(found)
    elif said.pretrained is not None:
        where, before = said.where, said.pretrained
    else:
        return (), "convention: the windows themselves"
    before = tuple((h or here[0], w or here[1]) for (h, w), here in zip(before, window, strict=True))  # type: ignore[misc]
    return (() if before == window else before), where


def _before(coordinates: Tensor | None, window: Window) -> Window | None:
    """The window of pre-training, from the largest coordinates: log2(1 + 8 (M - 1) / (before - 1)) / 3."""
    if coordinates is None or coordinates.numel() != 2 * (2 * window[0] - 1) * (2 * window[1] - 1):
        return None
    largest = coordinates.double().reshape(-1, 2)[-1].tolist()
    sides = []
    for side, value in zip(window, largest, strict=True):
        span = 2 ** (3 * value) - 1 if math.isfinite(value) and 0.001 < value < 20 else 0.0
        sides.append(round(8 * (side - 1) / span) + 1 if side > 1 and span else side)
    before = (sides[0], sides[1])
    made = coordinates_of(window, before).view(coordinates.shape)
    return before if torch.allclose(made, coordinates.float(), atol=2e-2) else None


def _image_size(
    names: Names,
    layout: Layout,
    window: Windows,
    shown: bool,
    strides: list[int],
    hints: Hints,
    said: Said,
) -> tuple[tuple[int, int], str]:
    """What it was trained at. All published networks end in a map of one window, if tensors show the windows."""
    if hints.certain and hints.image_size is not None:
        return hints.image_size, "image_size of the call"
    if said.image_size is not None:
        return said.image_size, said.where
    for stage, stride in enumerate(strides):
        mask = names.shapes.get(layout.block(stage).replace("{i}", "1") + layout.mask, ())
        side = math.isqrt(mask[0]) if len(mask) == 3 else 0
        if side and side * side == mask[0]:
            return (side * window[stage][0] * stride, side * window[stage][1] * stride), "the shift's mask"
    if not shown and hints.image_size is not None:
        return hints.image_size, "image_size of the call"
    height, width = (side * strides[-1] for side in window[-1])
    return (height, width), "convention: the last map is one window"
