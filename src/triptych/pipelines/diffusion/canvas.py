"""Initial images and masks: fitted to a size that the network takes, and composited with what it generates."""

import hashlib
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, UInt8
from PIL import Image, ImageFilter
from torch import Tensor

from triptych.data.images import decode
from triptych.data.masks import VOID, MaskFormatError, read_mask
from triptych.data.resizing import resize_crop
from triptych.errors import DataError
from triptych.model_card import Preprocess
from triptych.pipelines.image_input import ImageInput, name_of, normalized, read_full

_HALF = (0.5, 0.5, 0.5)
SIGNED = Preprocess(mean=_HALF, std=_HALF)  # what every first stage takes: [-1, 1]


@dataclass(frozen=True)
class Canvas:
    """An image to start from, and the part of it to generate."""

    original: UInt8[np.ndarray, "H W 3"]
    """The image at its own size."""
    pixels: UInt8[np.ndarray, "h w 3"]
    """The image at the size that the network processes: multiples of the autoencoder's downsampling factor."""
    mask: Bool[np.ndarray, "H W"] | None = None
    """True where to generate."""
    fitted_mask: Bool[np.ndarray, "h w"] | None = None
    fit: Literal["padded", "squashed", "cropped"] = "padded"
    feather: float = 0.0

    @property
    def size(self) -> tuple[int, int]:
        """Height and width of `pixels`."""
        return (self.pixels.shape[0], self.pixels.shape[1])

    def images(self, channels: int = 3) -> Float[Tensor, "1 channels h w"]:
        """Return `pixels` in [-1, 1]."""
        return normalized(self.pixels, SIGNED, channels)[None]

    def pixel_mask(self) -> Float[Tensor, "1 1 h w"]:
        """Return 1 where to generate, pixel by pixel."""
        assert self.fitted_mask is not None
        return torch.from_numpy(self.fitted_mask.astype(np.float32))[None, None]

    def latent_mask(self, factor: int) -> Float[Tensor, "1 1 rows columns"]:
        """Return 1 for each latent that covers a pixel to generate.

        Its other pixels are restored afterwards. diffusers samples one pixel per latent, which loses thin masks; for
        masks along the grid of latents both are the same.
        """
        return F.max_pool2d(self.pixel_mask(), factor)

    def composite(self, generated: UInt8[np.ndarray, "_ _ C"]) -> UInt8[np.ndarray, "_ _ C"]:
        """Return generated pixels at the image's own size; outside the mask exactly the image's pixels."""
        H, W = self.original.shape[:2]
        if self.fit == "padded":
            generated = generated[:H, :W]
        elif self.fit == "squashed" and generated.shape[:2] != (H, W):
            generated = np.asarray(Image.fromarray(generated).resize((W, H), Image.Resampling.LANCZOS))
        if self.mask is None:
            return generated
        if not self.feather:
            return np.where(self.mask[..., None], generated, self.original)
        share = _feathered(self.mask, self.feather)[..., None]
        blend = share * generated.astype(np.float32) + (1 - share) * self.original.astype(np.float32)
        return np.where(share > 0, np.rint(blend).astype(np.uint8), self.original)


def make_canvas(
    image: ImageInput,
    factor: int,
    size: tuple[int, int] | None = None,
    mask: ImageInput | None = None,
    feather: float = 0.0,
) -> Canvas:
    """Read an image, and a mask, and fit them to the network.

    Args:
        image: any image; transparent pixels are composited on white.
        factor: downsampling factor of the autoencoder, of which the sides become multiples.
        size: height and width to work at. Without a mask the image is resized and center-cropped; with one it is
            stretched, and the result stretched back. None, or its own size rounded up to multiples, pads it by
            repeating its edges, and crops the result.
        mask: white where to generate, black where to keep, as large as the image.
        feather: pixels inside the mask's edge over which old and new are blended.

    Raises:
        DataError: an image cannot be read, or the mask is not as large as the image.
    """
    original = read_full(image, SIGNED)
    H, W = original.shape[:2]
    region = None if mask is None else _read_mask(mask, (H, W), name_of(image))
    if size in (None, (H + -H % factor, W + -W % factor)):
        pads = ((0, -H % factor), (0, -W % factor))
        pixels = np.pad(original, (*pads, (0, 0)), mode="edge")
        fitted = None if region is None else np.pad(region, pads, mode="edge")
        return Canvas(original, pixels, region, fitted, "padded", feather)
    assert size is not None
    if region is None:
        return Canvas(original, resize_crop(original, size, interpolation="lanczos"), fit="cropped")
    pixels = resize_crop(original, size, mode="squash", interpolation="lanczos")
    shrunk = Image.fromarray(region.astype(np.uint8) * 255).resize((size[1], size[0]), Image.Resampling.BOX)
    return Canvas(original, pixels, region, np.asarray(shrunk) > 0, "squashed", feather)


def grayscale(image: ImageInput) -> UInt8[np.ndarray, "H W"]:
    """Return the mean of an image's color channels."""
    return np.rint(decode(image, name=name_of(image)).mean(axis=2)).astype(np.uint8)


def normalized_depth(depth: UInt8[np.ndarray, "H W"], size: tuple[int, int]) -> Float[Tensor, "1 1 h w"]:
    """Return a depth image (near is bright) at the latents' size, stretched to [-1, 1] as in training."""
    pixels = torch.from_numpy(depth.astype(np.float32))[None, None]
    small = F.interpolate(pixels, size, mode="bicubic", align_corners=False)
    low, high = small.min(), small.max()
    return 2 * (small - low) / (high - low).clamp(min=1e-6) - 1


def read_class_map(
    image: ImageInput, classes: int, size: tuple[int, int] | None = None
) -> UInt8[np.ndarray, "H W"]:
    """Return the class of each pixel of a map, 255 for none; stretched to `size` if there is one.

    Raises:
        DataError: the image has colors, or a number that is no class.
    """
    name = name_of(image)
    if isinstance(image, np.ndarray):
        numbers = image
    elif isinstance(image, Image.Image):
        numbers = np.asarray(image)
    else:
        try:
            numbers = read_mask(image, name)
        except MaskFormatError as problem:
            raise DataError(
                f"{name} holds no map of classes; give one class number per pixel, as a grayscale or palette PNG"
            ) from problem
    if numbers.ndim != 2 or numbers.dtype.kind not in "ui":
        raise DataError(f"{name} holds no map; give one class number per pixel, (height, width)")
    wrong = (numbers != VOID) & ((numbers < 0) | (numbers >= classes))
    if wrong.any():
        raise DataError(
            f"{name} holds {int(numbers[wrong][0])}, which must be a class from 0 to {classes - 1}, or 255 for none"
        )
    small = numbers.astype(np.uint8)
    if size is None or size == small.shape:
        return small
    return np.array(Image.fromarray(small).resize((size[1], size[0]), Image.Resampling.NEAREST))


def digest(pixels: np.ndarray) -> str:
    """Return the first 16 digits of the SHA-256 of an array's dtype, shape and numbers."""
    words = f"{pixels.dtype}{pixels.shape}".encode()
    return hashlib.sha256(words + np.ascontiguousarray(pixels).tobytes()).hexdigest()[:16]


def _read_mask(mask: ImageInput, size: tuple[int, int], image: str) -> Bool[np.ndarray, "H W"]:
    pixels = grayscale(mask)
    if pixels.shape != size:
        raise DataError(
            f"the mask {name_of(mask)} is {pixels.shape[1]}x{pixels.shape[0]} and {image} {size[1]}x{size[0]} pixels "
            "(width x height); make the mask as large as the image"
        )
    return pixels >= 128


def _feathered(mask: Bool[np.ndarray, "H W"], radius: float) -> Float[np.ndarray, "H W"]:
    """Return the weight of generated pixels: 0 outside the mask, rising inside it from the edge."""
    blurred = Image.fromarray(mask.astype(np.uint8) * 255).filter(ImageFilter.GaussianBlur(radius / 2))
    share = (2 * np.asarray(blurred, dtype=np.float32) / 255 - 1).clip(0, 1)
    return np.where(mask, share, 0.0).astype(np.float32)
