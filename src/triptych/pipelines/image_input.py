"""From an image of any type to the network's input, by the preprocessing of the model card."""

import logging
import os
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TypeAlias

import numpy as np
import torch
from jaxtyping import Float, UInt8
from PIL import Image
from torch import Tensor

from triptych.data.bands import ReadOptions, is_multiband
from triptych.data.image_formats import describe_left_out, is_image_name, is_unreadable_image
from triptych.data.images import decode
from triptych.data.resizing import flatten_alpha, resize_crop
from triptych.errors import ConfigError
from triptych.model_card import Preprocess

ImageInput: TypeAlias = str | os.PathLike[str] | bytes | Image.Image | np.ndarray

log = logging.getLogger(__name__)


def name_of(image: ImageInput) -> str:
    """Return the file's name, else the type of the object."""
    if isinstance(image, str | os.PathLike):
        return os.fspath(image)
    if isinstance(image, Image.Image):
        return str(getattr(image, "filename", "")) or "image"
    return "bytes" if isinstance(image, bytes) else "array"


def fitted(
    image: ImageInput, preprocess: Preprocess, max_pixels: int | None = None
) -> UInt8[np.ndarray, "H W C"]:
    """Return an image as pixels of the network's size: decoded, resized and cropped, on the card's background.

    Args:
        image: a path, the bytes of a file, a PIL image, or a uint8 array (H, W), (H, W, 3) or (H, W, 4).
        max_pixels: largest number of pixels; None is 178 million.

    Raises:
        DataError: the image cannot be read; the message names it.
    """
    p = preprocess
    options = _read_options(p, max_pixels)
    pixels = decode(image, alpha=not _white(p), name=name_of(image), options=options)
    multiband = is_multiband(p.bands)
    pixels = resize_crop(pixels, p.size, p.crop, p.mode, p.interpolation, p.background, multiband)
    return pixels if multiband else flatten_alpha(pixels, p.background)


def read_full(
    image: ImageInput, preprocess: Preprocess, max_pixels: int | None = None
) -> UInt8[np.ndarray, "H W C"]:
    """Return an image as pixels of its own size, upright, on the card's background.

    Raises:
        DataError: as `fitted`.
    """
    options = _read_options(preprocess, max_pixels)
    pixels = decode(image, alpha=not _white(preprocess), name=name_of(image), options=options)
    return pixels if is_multiband(preprocess.bands) else flatten_alpha(pixels, preprocess.background)


def _read_options(preprocess: Preprocess, max_pixels: int | None) -> ReadOptions:
    return ReadOptions(max_pixels=max_pixels, value_range=preprocess.value_range, bands=preprocess.bands)


def _white(preprocess: Preprocess) -> bool:
    """Return whether the background is white, on which `decode` composites transparent pixels anyway."""
    return tuple(preprocess.background) == (255, 255, 255)


def normalized(
    pixels: UInt8[np.ndarray, "H W C"], preprocess: Preprocess, channels: int = 3
) -> Float[Tensor, "channels H W"]:
    """Return pixels in [0, 255] as floats in [0, 1], minus the mean, divided by the standard deviation."""
    return batched([pixels], preprocess, channels)[0]


def batched(
    pixels: Sequence[UInt8[np.ndarray, "H W C"]], preprocess: Preprocess, channels: int = 3
) -> Float[Tensor, "b channels H W"]:
    """Return `normalized` of several images of one size; for small ones one call takes a twentieth of the time."""
    x = torch.from_numpy(np.stack(pixels)).permute(0, 3, 1, 2)
    x = x.to(torch.float32, memory_format=torch.contiguous_format).div_(255)
    if channels == 1:  # a network for grayscale images: ITU-R 601 luma
        x = (x * x.new_tensor([0.299, 0.587, 0.114])[:, None, None]).sum(1, keepdim=True)
    elif x.shape[1] != channels or len(preprocess.mean) not in (3, channels):
        raise ConfigError(
            f"the network takes images of {channels} channels, and the preprocessing of its model card gives "
            f"{x.shape[1]}; name its bands there, with a mean for each"
        )
    mean, std = (
        x.new_tensor(values[:channels])[:, None, None] for values in (preprocess.mean, preprocess.std)
    )
    return x.sub_(mean).div_(std)


def images_below(folder: str | os.PathLike[str]) -> Iterator[Path]:
    """Yield every image file below a folder by its suffix, in order of names; hidden ones are left out.

    One folder's names are held at a time, so that a folder of millions costs no memory. At the end it logs how many
    images cannot be read, and of which format they are.
    """
    left_out: Counter[str] = Counter()
    yield from _images_below(folder, left_out)
    if left_out:
        log.warning("%s: images are left out: %s", os.fspath(folder), describe_left_out(left_out))


def _images_below(folder: str | os.PathLike[str], left_out: Counter[str]) -> Iterator[Path]:
    for entry in sorted(os.scandir(folder), key=lambda entry: entry.name):
        if entry.name.startswith("."):
            continue
        if entry.is_dir():
            yield from _images_below(entry.path, left_out)
        elif is_image_name(entry.name):
            yield Path(entry.path)
        elif is_unreadable_image(entry.name):
            left_out[os.path.splitext(entry.name)[1].lower()] += 1
