"""Views of a full image for a segmenter: size, sliding window, scales and flip. No part of the image is cropped off."""

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import UInt8

from triptych.data.bands import is_multiband
from triptych.data.resizing import ResizeLike, resize_pixels
from triptych.errors import ConfigError

MAX_VIEW_ASPECT = 8
"""Largest ratio of the longer side to the shorter if the preprocessing crops; longer images are squashed to it."""

View = tuple[UInt8[np.ndarray, "_ _ 3"], tuple[slice, slice]]
"""Pixels, and the rows and columns that hold the image; the rest is padding."""


@dataclass(frozen=True, kw_only=True)
class ViewOptions:
    """Size, sliding window and test-time augmentation of a segmenter."""

    size: int | tuple[int, int] | None = None
    """Size that the image is resized to, its aspect ratio kept: the shorter side, or a height and width to fit into.
    None means the size in the model card, or with a window the image's own size."""
    window: int | tuple[int, int] | None = None
    """Height and width in pixels of a window that slides over the image; one number for a square."""
    overlap: float = 0.5
    """Least overlap of adjacent windows, as a fraction of the window."""
    scales: tuple[float, ...] = (1.0,)
    """Factors of the size. The image is segmented at each of them, and the probabilities are averaged."""
    flip: bool = False
    """Average over the mirrored image, too."""

    def __post_init__(self):
        if not _pixels(self.size):
            raise ConfigError(
                f"size is {self.size!r}, but must be the shorter side in pixels, or (height, width) to fit into"
            )
        if not _pixels(self.window):
            raise ConfigError(
                f"window is {self.window!r}, but must be (height, width) in pixels, or one number"
            )
        if not _number(self.overlap) or not 0 <= self.overlap < 1:
            raise ConfigError(f"overlap is {self.overlap!r}, but must be at least 0 and below 1")
        several = isinstance(self.scales, tuple | list) and len(self.scales) > 0
        if not several or not all(_number(scale) and 0 < scale <= 16 for scale in self.scales):
            raise ConfigError(
                f"scales is {self.scales!r}, but must be numbers above 0 and up to 16, such as (0.5, 1.0, 1.5)"
            )

    @property
    def count(self) -> int:
        """Number of times that an image is segmented."""
        return len(self.scales) * (2 if self.flip else 1)

    @property
    def window_size(self) -> tuple[int, int] | None:
        """Height and width of the window; None without a window."""
        sides = self.window
        return (sides, sides) if isinstance(sides, int) else sides and (sides[0], sides[1])

    def check_window(self, patch_size: int) -> None:
        """Raise a `ConfigError` if the window is smaller than a patch of `patch_size` pixels."""
        if self.window_size is not None and min(self.window_size) < patch_size:
            raise ConfigError(
                f"window is {self.window}, but must be at least one patch of {patch_size} pixels"
            )


def make_views(
    pixels: UInt8[np.ndarray, "H W C"], preprocess: ResizeLike, options: ViewOptions, patch_size: int
) -> list[View]:
    """Return the views of a full image, one for each scale.

    Args:
        pixels: the image, RGB, or the bands that the preprocessing names.
        preprocess: preprocessing of the model card.
        options: size, window and scales.
        patch_size: smallest side of a view in pixels.
    """
    views = []
    multiband = is_multiband(preprocess.bands)
    for scale in options.scales:
        (h, w), (height, width) = view_sizes(pixels.shape[:2], preprocess, options, scale, patch_size)
        piece = pixels
        if pixels.shape[:2] != (h, w):
            piece = resize_pixels(pixels, (h, w), preprocess.interpolation, multiband)
        top, left = (height - h) // 2, (width - w) // 2
        if (h, w) != (height, width):
            fill = 0 if multiband else preprocess.background
            padded = np.full((height, width, pixels.shape[2]), fill, np.uint8)
            padded[top : top + h, left : left + w] = piece
            piece = padded
        views.append((piece, (slice(top, top + h), slice(left, left + w))))
    return views


def view_sizes(
    image_size: tuple[int, int], preprocess: ResizeLike, options: ViewOptions, scale: float, patch_size: int
) -> tuple[tuple[int, int], tuple[int, int]]:
    """Return the height and width that an image is resized to, and those that it is then padded to, all of them at
    least `patch_size`.

    By default an image gets the size that `size` and `crop` of the preprocessing define before the center crop, which
    is left out because each pixel needs a class.
    """
    H, W = image_size
    padded = None
    if options.size is not None:
        if isinstance(options.size, int):
            factor = options.size / min(H, W)
        else:
            factor = min(options.size[0] / H, options.size[1] / W)
        h, w = H * factor, W * factor
    elif options.window is not None:
        h, w = H, W
    else:
        h, w = (math.floor(side / preprocess.crop) for side in preprocess.size)
        if preprocess.mode == "crop":
            factor = max(h / H, w / W)
            h, w = min(H * factor, MAX_VIEW_ASPECT * h), min(W * factor, MAX_VIEW_ASPECT * w)
        elif preprocess.mode == "pad":
            padded, factor = (h, w), min(h / H, w / W)
            h, w = H * factor, W * factor
    inner = _side(h * scale, patch_size), _side(w * scale, patch_size)
    if padded is None:
        return inner, inner
    outer = tuple(max(_side(side * scale, patch_size), n) for side, n in zip(padded, inner, strict=True))
    return inner, (outer[0], outer[1])


def _side(side: float, patch_size: int) -> int:
    return max(round(side), patch_size)


def _pixels(sides: Any) -> bool:
    """Return whether this is None, a side in pixels, or two sides."""
    if sides is None:
        return True
    pair = sides if isinstance(sides, tuple | list) else (sides, sides)
    return len(pair) == 2 and all(isinstance(s, int) and not isinstance(s, bool) and s >= 1 for s in pair)


def _number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
