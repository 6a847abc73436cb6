"""Resize, crop and pad decoded images, and put transparent ones on a background."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

import numpy as np
from jaxtyping import Integer, UInt8
from PIL import Image

from triptych.errors import ConfigError

RESAMPLING_FILTERS = {
    "nearest": Image.Resampling.NEAREST,
    "bilinear": Image.Resampling.BILINEAR,
    "bicubic": Image.Resampling.BICUBIC,
    "lanczos": Image.Resampling.LANCZOS,
    "box": Image.Resampling.BOX,
}


ResizeMode = Literal["crop", "squash", "pad"]


class ResizeLike(Protocol):
    """Settings of `resize_crop`, which see. The `Preprocess` of a model card has them."""

    @property
    def size(self) -> tuple[int, int]: ...
    @property
    def crop(self) -> float: ...
    @property
    def mode(self) -> ResizeMode: ...
    @property
    def interpolation(self) -> str: ...
    @property
    def background(self) -> Sequence[float]: ...
    @property
    def bands(self) -> Sequence[int] | None: ...


@dataclass(frozen=True, kw_only=True)
class Resize:
    """The settings of `resize_crop` without a model."""

    size: tuple[int, int]
    crop: float = 1.0
    mode: ResizeMode = "squash"
    interpolation: str = "bicubic"
    background: tuple[float, float, float] = (255, 255, 255)
    bands: tuple[int, ...] | None = None
    value_range: tuple[float, float] | None = None


def resize_of(preprocess: ResizeLike) -> Resize:
    """Return the settings of a model card's preprocessing that the loader needs."""
    names = Resize.__dataclass_fields__
    return Resize(**{name: getattr(preprocess, name) for name in names if hasattr(preprocess, name)})


def map_channels(array: np.ndarray, change: Callable[[Image.Image], Image.Image]) -> np.ndarray:
    """Apply a function of gray images to each channel of an array (H, W, C)."""
    bands = [
        np.asarray(change(Image.fromarray(np.ascontiguousarray(band)))) for band in np.moveaxis(array, 2, 0)
    ]
    return np.stack(bands, axis=2)


def resize_pixels(
    array: Integer[np.ndarray, "H W *C"], size: tuple[int, int], interpolation: str, multiband: bool = False
) -> Integer[np.ndarray, "h w *C"]:
    """Resize an image or a mask to a height and width.

    Args:
        multiband: each channel is resized for itself; otherwise a fourth one is alpha, which weights the others.
    """
    height, width = size

    def resized(image: Image.Image) -> Image.Image:
        return image.resize((width, height), RESAMPLING_FILTERS[interpolation])

    return map_channels(array, resized) if multiband else np.asarray(resized(Image.fromarray(array)))


def flatten_alpha(
    pixels: UInt8[np.ndarray, "H W C"], background: Sequence[float]
) -> UInt8[np.ndarray, "H W 3"]:
    """Composite RGBA over a background color, RGB from 0 to 255. RGB images are returned unchanged."""
    if pixels.shape[2] == 3:
        return pixels
    alpha = pixels[..., 3:].astype(np.float32) / 255
    color = np.asarray(background, np.float32)
    return np.rint(pixels[..., :3] * alpha + color * (1 - alpha)).astype(np.uint8)


def resize_crop(
    array: Integer[np.ndarray, "H W *C"],
    size: tuple[int, int],
    crop: float = 1.0,
    mode: ResizeMode = "crop",
    interpolation: str = "bicubic",
    background: Sequence[float] = (255, 255, 255),
    multiband: bool = False,
) -> Integer[np.ndarray, "h w *C"]:
    """Resize with Pillow's antialiasing filters, then crop or pad around the center.

    Sizes are rounded as by torchvision's Resize and CenterCrop, with which most checkpoints were evaluated.

    Args:
        array: uint8 image (H, W, 3 or 4), in which alpha is kept and taken into account; or a mask (H, W), uint8 or
            int32. For a mask pass the size, crop and mode of its image, "nearest", and its void as the background.
        size: height and width of the result.
        crop: fraction of the resized image that is kept: it is resized to `size / crop` and center-cropped to `size`.
        mode: "crop" keeps the aspect ratio and crops what does not fit, "pad" keeps it and pads, "squash" changes it.
        interpolation: nearest, bilinear, bicubic, lanczos or box.
        background: color of the padding; RGBA images are padded with transparency.
        multiband: the channels are bands (`is_multiband`), which are resized one by one and padded with 0.

    Raises:
        ConfigError: an unknown `mode` or `interpolation`.
    """
    if interpolation not in RESAMPLING_FILTERS:
        raise ConfigError(
            f"interpolation is {interpolation!r}, but must be one of {', '.join(RESAMPLING_FILTERS)}"
        )
    if mode not in ("crop", "squash", "pad"):
        raise ConfigError(f"resize mode is {mode!r}, but must be one of crop, squash, pad")
    full = tuple(math.floor(side / crop) for side in size)
    if mode == "crop":
        array = _crop_extreme_aspect(array, full)
    height, width = array.shape[:2]
    if mode == "squash":
        new = full
    else:
        pick = max if mode == "crop" else min
        if pick(full[0] / height, full[1] / width) == full[0] / height:
            new = (full[0], max(1, int(full[0] * width / height)))
        else:
            new = (max(1, int(full[1] * height / width)), full[1])
        new = tuple(pick(a, b) for a, b in zip(new, full, strict=True))
    if new != (height, width):
        array = resize_pixels(array, (new[0], new[1]), interpolation, multiband)
    return _center_crop_or_pad(array, size, (0,) * array.shape[2] if multiband else background)


def _crop_extreme_aspect(array: np.ndarray, full: tuple[int, ...]) -> np.ndarray:
    """Crop a very long image to 4 times what will be kept, since 1x10000 would be resized to 224x2240000."""
    height, width = array.shape[:2]
    unit = min(height / full[0], width / full[1])
    tall, wide = (
        min(have, math.ceil(4 * unit * need)) for have, need in zip((height, width), full, strict=True)
    )
    top, left = (height - tall) // 2, (width - wide) // 2
    return array[top : top + tall, left : left + wide]


def _center_crop_or_pad(array: np.ndarray, size: tuple[int, int], background: Sequence[float]) -> np.ndarray:
    """Crop or pad around the center, along each axis independently."""
    for axis, need in enumerate(size):
        have = array.shape[axis]
        if have > need:
            start = round((have - need) / 2)
            array = array[start : start + need] if axis == 0 else array[:, start : start + need]
    if array.shape[:2] == tuple(size):
        return np.ascontiguousarray(array)
    fill = np.zeros(4) if array.shape[2:] == (4,) else np.array(background)
    out = np.broadcast_to(fill.round().astype(array.dtype), (*size, *array.shape[2:])).copy()
    top, left = ((need - have) // 2 for need, have in zip(size, array.shape, strict=False))
    out[top : top + array.shape[0], left : left + array.shape[1]] = array
    return out
