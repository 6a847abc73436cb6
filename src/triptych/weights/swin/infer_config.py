"""Infer the config of a Swin from the keys and shapes of its tensors, and from the config next to them."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from triptych.errors import CheckpointError
from triptych.layers.window import relative_index
from triptych.models.configs.swin import SwinConfig, Window, windows_of
from triptych.weights.mapping.format import Hints, StateDictKeys
from triptych.weights.swin.key_layout import Layout, biases, coordinates_of

Windows = tuple[Window, ...]

UNKNOWN = (2**30, 2**30)
"""An image size at which no window is reduced."""

# Published SwinV2s by their window: the size of the images they were trained on.
SIZES_OF_V2 = {8: 256, 12: 192, 14: 224, 16: 256, 24: 384}


Fit = Literal["axis", "square", "rows", "never"]
"""How a publisher's code reduces a window on a smaller map: each side separately, to a square of the map's shorter side
or of its rows, or not at all."""


@dataclass(frozen=True, kw_only=True)
class SwinFileConfig:
    """Values in the config next to the tensors that shapes do not determine."""

    where: str = "config.json"
    image_size: tuple[int, int] | None = None
    window_size: Windows | None = None
    """Before it is reduced to the maps."""
    pretrained: Windows | None = None
    fit: Fit = "square"


def read_sizes(
    keys: StateDictKeys,
    layout: Layout,
    hints: Hints,
    file_config: SwinFileConfig,
    head: str = "head",
    eps: float = 1e-5,
) -> tuple[SwinConfig, dict[str, str]]:
    """Return the network's config, and where each value that shapes do not determine came from.

    Args:
        keys: of the network alone.
        head: prefix of the classifier.
        eps: epsilon of every LayerNorm.
    """
    first = _first(layout, 0)
    width, channels, patch, _ = keys.shape(f"{layout.embed}.weight", 4)
    version = 2 if first + layout.scale in keys else 1
    depths = _depths(keys, layout)
    tables = [_first(layout, stage) + layout.table for stage in range(len(depths))]
    scales = [_first(layout, stage) + layout.scale for stage in range(len(depths))]
    hidden = [keys.shape(f"{_first(layout, stage)}{layout.fc1}.weight", 2)[0] for stage in range(len(depths))]
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
            keys.shape(table, 2)[1] if version == 1 else keys.shape(scale, 3)[0]
            for table, scale in zip(tables, scales, strict=True)
        ),
        # Hidden widths are rounded down; the largest ratio reproduces all of them.
        "mlp_ratio": max(h / (width * 2**stage) for stage, h in enumerate(hidden)) if hidden else 4.0,
        "qkv_bias": _bias(keys, layout, first, version),
        "map_norms": layout.map_norm is not None and f"{layout.map_norm(0)}.weight" in keys,
        "num_classes": keys.shape(f"{head}.weight", 2)[0] if f"{head}.weight" in keys else 0,
        "norm_eps": eps,
    }
    strides = [patch * 2**stage for stage in range(len(depths))]
    window, facts["window_size"] = (
        _windows_of_tables(keys, layout, tables, strides, hints, file_config)
        if version == 1
        else _windows_of_v2(keys, layout, strides, hints, file_config)
    )
    windows_known = version == 1 or first + layout.coordinates in keys
    size, facts["image_size"] = _image_size(keys, layout, window, windows_known, strides, hints, file_config)
    sizes |= {"window_size": window, "image_size": size}
    if version == 2:
        sizes["pretrained_window_size"], facts["pretrained_window_size"] = _pretrained(
            keys, layout, window, hints, file_config
        )
    return SwinConfig(**sizes), facts


def num_stages(keys: StateDictKeys, layout: Layout) -> int:
    """Return the number of stages."""
    return len(_depths(keys, layout))


def fit_windows(windows: Windows, sides: tuple[int, int], strides: Sequence[int], fit: Fit) -> Windows:
    """Return the window of each stage as a publisher's code builds it for images of `sides`."""
    sizes = []
    for (h, w), stride in zip(windows, strides, strict=True):
        rows, columns = (max(side // stride, 1) for side in sides)
        if fit in ("square", "rows"):
            rows = columns = rows if fit == "rows" else min(rows, columns)
        sizes.append((h, w) if fit == "never" else (min(h, rows), min(w, columns)))
    return tuple(sizes)


def single_window(config: SwinConfig, title: str, fit: Fit = "square") -> int:
    """Return the single window size that a publisher's config can store.

    Raises:
        CheckpointError: windows that are rectangular, differ, or would be reduced by its code.
    """
    side = max(max(pair) for pair in config.window_size)
    everywhere = windows_of(side, len(config.depths))
    if fit_windows(everywhere, config.image_size, config.strides, fit) != config.window_size:
        shown = sorted(set(config.window_size))
        raise CheckpointError(
            f"{title} cannot store windows {' and '.join(f'{h}x{w}' for h, w in shown)} for images of "
            f"{config.image_size[0]}x{config.image_size[1]}: it has one square window, no larger than a map; "
            "choose triptych's own format"
        )
    return side


def _first(layout: Layout, stage: int) -> str:
    """Return the prefix of a stage's first block."""
    return layout.block(stage).replace("{i}", "0")


def _depths(keys: StateDictKeys, layout: Layout) -> tuple[int, ...]:
    depths: list[int] = []
    while depth := keys.count_blocks(layout.block(len(depths))):
        depths.append(depth)
    return tuple(depths)


def _bias(keys: StateDictKeys, layout: Layout, first: str, version: int) -> Literal["qkv", "qv", "none"]:
    if version == 2:
        return "qv" if biases(first, layout)[0] in keys else "none"
    return "qkv" if f"{first}{layout.qkv[0]}.bias" in keys else "none"


# ----------------------------------------------------------------------------------------------- windows


def _windows_of_tables(
    keys: StateDictKeys,
    layout: Layout,
    tables: list[str],
    strides: list[int],
    hints: Hints,
    file_config: SwinFileConfig,
) -> tuple[Windows, str]:
    """Version 1: a table has (2 M_h - 1)(2 M_w - 1) rows."""
    rows = [keys.shape(table, 2)[0] for table in tables]
    stages = len(rows)
    if file_config.window_size is not None:
        windows = fit_windows(
            file_config.window_size, file_config.image_size or UNKNOWN, strides, file_config.fit
        )
        if not _match_tables(windows, rows):
            raise CheckpointError(
                f"{keys.path}: {file_config.where} says windows {windows}, whose bias tables do not have the rows "
                f"of the tensors, {rows}; put the config that belongs to the weights beside them"
            )
        return windows, file_config.where
    sides = [math.isqrt(count) for count in rows]
    if all(side * side == count and side % 2 for side, count in zip(sides, rows, strict=True)):
        return tuple(((side + 1) // 2,) * 2 for side in sides), "shape of the bias tables"  # type: ignore[return-value]
    indexed = [_window_of_index(keys, _first(layout, i) + layout.index, rows[i]) for i in range(stages)]
    if all(indexed):
        return tuple(indexed), "the index of relative positions"  # type: ignore[arg-type]
    if hints.window_size is not None and _match_tables(windows_of(hints.window_size, stages), rows):
        return windows_of(hints.window_size, stages), "window of the call"
    raise CheckpointError(
        f"{keys.path} has bias tables of {rows} rows, of no square windows; give window_size=(height, width)"
    )


def _match_tables(windows: Windows, rows: list[int]) -> bool:
    return [(2 * h - 1) * (2 * w - 1) for h, w in windows] == rows


def _window_of_index(keys: StateDictKeys, name: str, rows: int) -> Window | None:
    """Return the window whose relative position index is in the file, or None."""
    index = keys.read_small(name, 2**22)
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
    keys: StateDictKeys, layout: Layout, strides: list[int], hints: Hints, file_config: SwinFileConfig
) -> tuple[Windows, str]:
    """Version 2: no weight depends on the window, but older code saved a table of coordinates."""
    tables = [_first(layout, stage) + layout.coordinates for stage in range(len(strides))]
    if all(table in keys for table in tables):
        sides = [keys.shape(table, 4)[1:3] for table in tables]
        return tuple(((h + 1) // 2, (w + 1) // 2) for h, w in sides), "shape of the tables of coordinates"
    if file_config.window_size is not None:
        return fit_windows(
            file_config.window_size, file_config.image_size or UNKNOWN, strides, file_config.fit
        ), file_config.where
    if hints.window_size is not None:
        windows = windows_of(hints.window_size, len(strides))
        side = SIZES_OF_V2.get(hints.window_size) if isinstance(hints.window_size, int) else None
        size = hints.image_size or (UNKNOWN if side is None else (side, side))
        return fit_windows(windows, size, strides, "never" if hints.certain else "axis"), "window of the call"
    raise CheckpointError(
        f"{keys.path} is a SwinV2 whose windows no tensor determines; put its config.json next to it, or load it with "
        'window_size=8 (or 12, 16, 24: the number after "window" in the model\'s name)'
    )


def _pretrained(
    keys: StateDictKeys, layout: Layout, window: Windows, hints: Hints, file_config: SwinFileConfig
) -> tuple[Windows, str]:
    """Version 2: the windows that scale the coordinates; empty if they are the windows themselves."""
    pretrained = [
        _pretrained_window(keys.read_small(_first(layout, stage) + layout.coordinates), here)
        for stage, here in enumerate(window)
    ]
    if all(pretrained):
        where, before = "values of the coordinate tables", tuple(pretrained)
    elif file_config.pretrained is not None:
        where, before = file_config.where, file_config.pretrained
    elif window[0] == (24, 24) and hints.window_size == 24:
        # The published ones were trained with windows of 12 on images of 192 pixels, which the last map's is half of.
        where, before = (
            "convention: windows of 12, then of 24",
            tuple((min(h, 12), min(w, 12)) for h, w in window),
        )
    else:
        return (), "convention: the windows themselves"
    before = tuple((h or here[0], w or here[1]) for (h, w), here in zip(before, window, strict=True))  # type: ignore[misc]
    return (() if before == window else before), where


def _pretrained_window(coordinates: Tensor | None, window: Window) -> Window | None:
    """Return the window of pre-training, from the largest coordinates: log2(1 + 8 (M - 1) / (before - 1)) / 3."""
    if coordinates is None or coordinates.numel() != 2 * (2 * window[0] - 1) * (2 * window[1] - 1):
        return None
    largest = coordinates.double().reshape(-1, 2)[-1].tolist()
    sides = []
    for side, value in zip(window, largest, strict=True):
        span = 2 ** (3 * value) - 1 if math.isfinite(value) and 0.001 < value < 20 else 0.0
        sides.append(round(8 * (side - 1) / span) + 1 if side > 1 and span else side)
    before = (sides[0], sides[1])
    expected = coordinates_of(window, before).view(coordinates.shape)
    return before if torch.allclose(expected, coordinates.float(), atol=2e-2) else None


def _image_size(
    keys: StateDictKeys,
    layout: Layout,
    window: Windows,
    windows_known: bool,
    strides: list[int],
    hints: Hints,
    file_config: SwinFileConfig,
) -> tuple[tuple[int, int], str]:
    """Return the training image size. In all published networks the last map is one window."""
    if hints.certain and hints.image_size is not None:
        return hints.image_size, "image_size of the call"
    if file_config.image_size is not None:
        return file_config.image_size, file_config.where
    for stage, stride in enumerate(strides):
        mask = keys.shapes.get(layout.block(stage).replace("{i}", "1") + layout.mask, ())
        side = math.isqrt(mask[0]) if len(mask) == 3 else 0
        if side and side * side == mask[0]:
            return (side * window[stage][0] * stride, side * window[stage][1] * stride), "the shift's mask"
    if not windows_known and hints.image_size is not None:
        return hints.image_size, "image_size of the call"
    height, width = (side * strides[-1] for side in window[-1])
    return (height, width), "convention: the last map is one window"
