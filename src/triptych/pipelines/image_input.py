"""From an image of any kind to what a network is fed, as its card says."""

import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TypeAlias

import numpy as np
import torch
from jaxtyping import Float, UInt8
from PIL import Image
from torch import Tensor

from triptych.data.images import decode, flatten_alpha, resize_crop
from triptych.errors import UserError
from triptych.model_card import Preprocess

ImageInput: TypeAlias = str | os.PathLike[str] | bytes | Image.Image | np.ndarray

SUFFIXES = frozenset(
    f".{name}"
    for name in (
        *("avif", "bmp", "dib", "gif", "icns", "ico", "jpe", "jpeg", "jpg", "jp2", "j2k", "pcx"),
        *("pgm", "png", "ppm", "pbm", "pnm", "qoi", "sgi", "tif", "tiff", "webp"),
    )
)


def name_of(image: ImageInput) -> str:
    """The file's name, else what kind of thing it is."""
    if isinstance(image, str | os.PathLike):
        return os.fspath(image)
    if isinstance(image, Image.Image):
        return str(getattr(image, "filename", "")) or "image"
    return "bytes" if isinstance(image, bytes) else "array"


def fitted(image: ImageInput, preprocess: Preprocess) -> UInt8[np.ndarray, "H W 3"]:
    """The image at the network's size, as pixels: decoded, resized and cropped, on the card's background.

    Args:
        image: a path, the bytes of a file, a PIL image, or a uint8 array (H, W), (H, W, 3) or (H, W, 4).

    Raises:
        UserError: no image, or not one that can be read; names it.
    """
    p = preprocess
    pixels = decode(image, alpha=not _white(p), name=name_of(image))
    return flatten_alpha(
        resize_crop(pixels, p.size, p.crop, p.mode, p.interpolation, p.background), p.background
    )


def read_full(image: ImageInput, preprocess: Preprocess) -> UInt8[np.ndarray, "H W 3"]:
    """The image at its own size, upright, on the card's background.

    Raises:
        UserError: as `fitted`.
    """
    return flatten_alpha(
        decode(image, alpha=not _white(preprocess), name=name_of(image)), preprocess.background
    )


def _white(preprocess: Preprocess) -> bool:
    """Whether the background is what `decode` lays alpha on anyway."""
    return tuple(preprocess.background) == (255, 255, 255)


def normalized(
    pixels: UInt8[np.ndarray, "H W 3"], preprocess: Preprocess, channels: int = 3
) -> Float[Tensor, "channels H W"]:
    """Pixels in [0, 255] to floats, mean taken away, divided by the standard deviation."""
    return batched([pixels], preprocess, channels)[0]


def batched(
    pixels: Sequence[UInt8[np.ndarray, "H W 3"]], preprocess: Preprocess, channels: int = 3
) -> Float[Tensor, "b channels H W"]:
    """`normalized` of several images of one size: worked on together, small ones take a twentieth of the time."""
    x = torch.from_numpy(np.stack(pixels)).permute(0, 3, 1, 2)
    x = x.to(torch.float32, memory_format=torch.contiguous_format).div_(255)
    if channels == 1:  # a network of gray images: ITU-R 601 luma
        x = (x * x.new_tensor([0.299, 0.587, 0.114])[:, None, None]).sum(1, keepdim=True)
    elif channels != 3:
        raise UserError(f"the network takes images of {channels} channels; pipelines feed 3, or 1 for gray")
    mean, std = (
        x.new_tensor(values[:channels])[:, None, None] for values in (preprocess.mean, preprocess.std)
    )
    return x.sub_(mean).div_(std)


def images_below(folder: str | os.PathLike[str]) -> Iterator[Path]:
    """Every image file below `folder` by its suffix, in order of names; hidden ones are left out.

    One folder's names are held at a time, so that a folder of millions costs no memory.
    """
    for entry in sorted(os.scandir(folder), key=lambda entry: entry.name):
        if entry.name.startswith("."):
            continue
        if entry.is_dir():
            yield from images_below(entry.path)
        elif Path(entry.name).suffix.lower() in SUFFIXES:
            yield Path(entry.path)
