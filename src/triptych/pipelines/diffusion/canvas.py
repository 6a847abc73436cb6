"""Pictures that are painted over: brought to a size that the network takes, and back, with what was kept put back."""

import hashlib
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, UInt8
from PIL import Image, ImageFilter
from torch import Tensor

from triptych.data.images import decode, resize_crop
from triptych.data.masks import VOID, read_mask
from triptych.errors import UserError
from triptych.model_card import Preprocess
from triptych.pipelines.image_input import ImageInput, name_of, normalized, read_full

HALF = (0.5, 0.5, 0.5)
SIGNED = Preprocess(mean=HALF, std=HALF)  # what every first stage takes: [-1, 1]


@dataclass(frozen=True)
class Canvas:
    """A picture to start from, and where to paint on it."""

    original: UInt8[np.ndarray, "H W 3"]
    """The picture as it was."""
    pixels: UInt8[np.ndarray, "h w 3"]
    """What the network works on: sides are multiples of the autoencoder's factor."""
    mask: Bool[np.ndarray, "H W"] | None = None
    """True where to paint."""
    fitted_mask: Bool[np.ndarray, "h w"] | None = None
    fit: Literal["padded", "squashed", "cropped"] = "padded"
    feather: float = 0.0

    @property
    def size(self) -> tuple[int, int]:
        """Height and width of what the network works on."""
        return (self.pixels.shape[0], self.pixels.shape[1])

    def images(self, channels: int = 3) -> Float[Tensor, "1 channels h w"]:
        """The picture in [-1, 1]."""
        return normalized(self.pixels, SIGNED, channels)[None]

    def pixel_mask(self) -> Float[Tensor, "1 1 h w"]:
        """1 where to paint, pixel by pixel."""
        assert self.fitted_mask is not None
        return torch.from_numpy(self.fitted_mask.astype(np.float32))[None, None]

    def latent_mask(self, factor: int) -> Float[Tensor, "1 1 rows columns"]:
        """1 for each latent any of whose pixels is to be painted.

        Its other pixels are put back afterwards. diffusers takes one pixel for the whole latent, so that thin masks
        are lost; for masks along the grid of latents it is the same.
        """
        return F.max_pool2d(self.pixel_mask(), factor)

    def composite(self, painted: UInt8[np.ndarray, "_ _ C"]) -> UInt8[np.ndarray, "_ _ C"]:
        """What was painted, at the picture's own size; outside the mask the picture's own pixels, exactly."""
        H, W = self.original.shape[:2]
        if self.fit == "padded":
            painted = painted[:H, :W]
        elif self.fit == "squashed" and painted.shape[:2] != (H, W):
            painted = np.asarray(Image.fromarray(painted).resize((W, H), Image.Resampling.LANCZOS))
        if self.mask is None:
            return painted
        if not self.feather:
            return np.where(self.mask[..., None], painted, self.original)
        share = _feathered(self.mask, self.feather)[..., None]
        blend = share * painted.astype(np.float32) + (1 - share) * self.original.astype(np.float32)
        return np.where(share > 0, np.rint(blend).astype(np.uint8), self.original)


def make_canvas(
    image: ImageInput,
    factor: int,
    size: tuple[int, int] | None = None,
    mask: ImageInput | None = None,
    feather: float = 0.0,
) -> Canvas:
    """A picture made ready to be painted over.

    Args:
        image: any picture; what is transparent is laid on white.
        factor: of the autoencoder; sides are to be multiples of it.
        size: height and width to work at. Without a mask the picture is resized and its centre taken; with one all of
            it is stretched, and what is painted is stretched back. None, or its own size rounded up to multiples: its
            edges are repeated up to them, and cut off again.
        mask: white where to paint, black where to keep, as large as the image.
        feather: pixels inside the mask's edge over which old and new are blended.

    Raises:
        UserError: a picture cannot be read, or the mask is of another size than the image.
    """
    given = read_full(image, SIGNED)
    H, W = given.shape[:2]
    painted = None if mask is None else _read_mask(mask, (H, W), name_of(image))
    if size in (None, (H + -H % factor, W + -W % factor)):
        pads = ((0, -H % factor), (0, -W % factor))
        pixels = np.pad(given, (*pads, (0, 0)), mode="edge")
        fitted = None if painted is None else np.pad(painted, pads, mode="edge")
        return Canvas(given, pixels, painted, fitted, "padded", feather)
    assert size is not None
    if painted is None:
        return Canvas(given, resize_crop(given, size, interpolation="lanczos"), fit="cropped")
    pixels = resize_crop(given, size, mode="squash", interpolation="lanczos")
    shrunk = Image.fromarray(painted.astype(np.uint8) * 255).resize((size[1], size[0]), Image.Resampling.BOX)
    return Canvas(given, pixels, painted, np.asarray(shrunk) > 0, "squashed", feather)


def grayscale(image: ImageInput) -> UInt8[np.ndarray, "H W"]:
    """The mean of a picture's colors."""
    return np.rint(decode(image, name=name_of(image)).mean(axis=2)).astype(np.uint8)


def normalized_depth(depth: UInt8[np.ndarray, "H W"], size: tuple[int, int]) -> Float[Tensor, "1 1 h w"]:
    """A grey picture of depth (near is bright) at the latents' size, stretched to [-1, 1] as in training."""
    pixels = torch.from_numpy(depth.astype(np.float32))[None, None]
    small = F.interpolate(pixels, size, mode="bicubic", align_corners=False)
    low, high = small.min(), small.max()
    return 2 * (small - low) / (high - low).clamp(min=1e-6) - 1


def read_class_map(
    picture: ImageInput, classes: int, size: tuple[int, int] | None = None
) -> UInt8[np.ndarray, "H W"]:
    """The classes of a map's pixels, one number each, 255 for none; stretched to a size if one is given.

    Raises:
        UserError: it holds colors, or a number that is no class.
    """
    name = name_of(picture)
    if isinstance(picture, np.ndarray):
        numbers = picture
    elif isinstance(picture, Image.Image):
        numbers = np.asarray(picture)
    else:
        numbers = read_mask(picture, name)
    if numbers.ndim != 2 or numbers.dtype.kind not in "ui":
        raise UserError(f"{name} holds no map: needed is one whole number a pixel (height, width)")
    wrong = (numbers != VOID) & ((numbers < 0) | (numbers >= classes))
    if wrong.any():
        raise UserError(
            f"{name} holds {int(numbers[wrong][0])}, and the classes are 0..{classes - 1} (255: none)"
        )
    small = numbers.astype(np.uint8)
    if size is None or size == small.shape:
        return small
    return np.array(Image.fromarray(small).resize((size[1], size[0]), Image.Resampling.NEAREST))


def digest(pixels: np.ndarray) -> str:
    """The first 16 digits of the SHA-256 of an array: its shape and its numbers."""
    words = f"{pixels.dtype}{pixels.shape}".encode()
    return hashlib.sha256(words + np.ascontiguousarray(pixels).tobytes()).hexdigest()[:16]


def _read_mask(mask: ImageInput, size: tuple[int, int], image: str) -> Bool[np.ndarray, "H W"]:
    pixels = grayscale(mask)
    if pixels.shape != size:
        raise UserError(
            f"the mask {name_of(mask)} is {pixels.shape[1]}x{pixels.shape[0]} and {image} {size[1]}x{size[0]} pixels "
            "(width x height); make the mask as large as the image"
        )
    return pixels >= 128


def _feathered(mask: Bool[np.ndarray, "H W"], radius: float) -> Float[np.ndarray, "H W"]:
    """The share of the new: 0 outside, rising inside from the mask's edge. Half of a blurred edge lies inside it."""
    blurred = Image.fromarray(mask.astype(np.uint8) * 255).filter(ImageFilter.GaussianBlur(radius / 2))
    share = (2 * np.asarray(blurred, dtype=np.float32) / 255 - 1).clip(0, 1)
    return np.where(mask, share, 0.0).astype(np.float32)
