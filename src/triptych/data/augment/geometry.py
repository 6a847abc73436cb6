"""Geometric augmentation: one matrix per sample, and one warp with it.

Crop, flip, zoom, rotation, shear and shift are composed into the matrix, so that an image is interpolated only once and
its mask can be warped by the same matrix with nearest-neighbor sampling.
"""

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float, Integer
from torch import Tensor

from triptych.data.config import AugmentConfig


def draw_geometry(
    count: int, config: AugmentConfig, rng: np.random.Generator, aspect: np.ndarray | None = None
) -> np.ndarray:
    """Draw matrices (B, 2, 3) from the output's normalized (x, y, 1) to the input's normalized (x, y).

    Coordinates run from -1 to 1 between the image's outer edges, as in `torch.nn.functional.affine_grid` with
    `align_corners=False`. With all augmentations turned off in `config` each matrix is the identity.

    Args:
        count: number of samples.
        config: the ranges to draw from.
        rng: generator of all random numbers.
        aspect: width over height of each image before it was squashed to the size of the batch, so that `crop_ratio`
            holds for the original image; None if it was not squashed.
    """
    size = np.array(config.image_size, dtype=float)
    out_aspect = size[1] / size[0]
    if aspect is None:
        aspect = np.full(count, out_aspect)
    crop = _crop(count, config, rng, np.asarray(aspect, dtype=float) / out_aspect)
    affine = _affine(count, config, rng, out_aspect)
    flip = np.tile(np.eye(3), (count, 1, 1))
    flip[:, 0, 0] = np.where(rng.random(count) < config.flip, -1.0, 1.0)
    return (crop @ affine @ flip)[:, :2]


def _crop(count: int, config: AugmentConfig, rng: np.random.Generator, aspect: np.ndarray) -> np.ndarray:
    """Random resized crop (Szegedy et al. 2015, "Going deeper", section 6), in units of the image's height.

    The first of ten draws that fits is used, else the largest centered box whose ratio is in range.
    """
    tries = 10
    (least, most), (narrow, wide) = config.crop_scale, config.crop_ratio
    area = aspect * rng.uniform(least, most, (tries, count))
    ratio = np.exp(rng.uniform(np.log(narrow), np.log(wide), (tries, count)))
    width, height = np.sqrt(area * ratio), np.sqrt(area / ratio)
    fits = (width <= aspect * (1 + 1e-9)) & (height <= 1 + 1e-9)
    first, sample = fits.argmax(0), np.arange(count)
    ratio_in_range = np.clip(aspect, narrow, wide)
    fitted = fits.any(0)
    width = np.where(fitted, width[first, sample], np.minimum(aspect, ratio_in_range))
    height = np.where(fitted, height[first, sample], np.minimum(1.0, aspect / ratio_in_range))

    half_x, half_y = width / aspect, height  # half of a [-1, 1] range is a fraction of the image
    position = rng.uniform(-1, 1, (2, count)) * fitted  # the fallback is centered
    crop = np.tile(np.eye(3), (count, 1, 1))
    crop[:, 0, 0], crop[:, 0, 2] = half_x, position[0] * (1 - half_x)
    crop[:, 1, 1], crop[:, 1, 2] = half_y, position[1] * (1 - half_y)
    return crop


def _affine(count: int, config: AugmentConfig, rng: np.random.Generator, aspect: float) -> np.ndarray:
    """Draw matrices from output to input: the inverse of zoom, then shear, then rotation, then shift of the object."""
    angle = np.radians(rng.uniform(-config.degrees, config.degrees, count))
    shear = np.tan(np.radians(rng.uniform(-config.shear, config.shear, (2, count))))
    zoom = np.exp(rng.uniform(np.log(config.zoom[0]), np.log(config.zoom[1]), count))
    shift = rng.uniform(-2, 2, (count, 2)) * np.array(config.translate)

    turn = _linear(np.cos(angle), np.sin(angle), -np.sin(angle), np.cos(angle))
    skew = _linear(1.0, shear[0], shear[1], 1 + shear[0] * shear[1])  # along x after y: determinant 1
    inner = turn @ skew / zoom[:, None, None]
    # Rotate in pixel coordinates, not in the [-1, 1] square.
    inner[:, 0, 1] /= aspect
    inner[:, 1, 0] *= aspect
    affine = np.tile(np.eye(3), (count, 1, 1))
    affine[:, :2, :2] = inner
    affine[:, :2, 2] = -(inner @ shift[:, :, None])[:, :, 0]
    return affine


def _linear(a, b, c, d) -> np.ndarray:
    a, b, c, d = np.broadcast_arrays(a, b, c, d)
    return np.stack([np.stack([a, b], -1), np.stack([c, d], -1)], -2).astype(float)


def warp(
    images: Float[Tensor, "B C H W"],
    matrices: Float[Tensor, "B 2 3"],
    size: tuple[int, int],
    mode: str = "bilinear",
    padding: str = "reflection",
) -> Float[Tensor, "B C h w"]:
    """Warp images by the matrices of `draw_geometry` to `size` (height, width).

    Args:
        padding: what lies outside of the input: its "reflection", or "zeros", for premultiplied alpha.
    """
    return F.grid_sample(images, _grid(matrices, size), mode=mode, padding_mode=padding, align_corners=False)


def warp_mask(
    masks: Integer[Tensor, "B H W"],
    matrices: Float[Tensor, "B 2 3"],
    size: tuple[int, int],
    outside: int = 255,
) -> Integer[Tensor, "B h w"]:
    """Warp masks by the matrices of their images: the class of the nearest pixel, and `outside` beyond the input."""
    shifted = masks[:, None].float() - outside  # so that zero padding becomes `outside`
    grid = _grid(matrices, size)
    sampled = F.grid_sample(shifted, grid, mode="nearest", padding_mode="zeros", align_corners=False)
    return (sampled[:, 0] + outside).to(masks.dtype)


def _grid(matrices: Float[Tensor, "B 2 3"], size: tuple[int, int]) -> Float[Tensor, "B h w 2"]:
    """Return the input coordinates of each output pixel, for `grid_sample`."""
    height, width = size
    like = {"dtype": torch.float32, "device": matrices.device}
    y = (torch.arange(height, **like) * 2 + 1) / height - 1
    x = (torch.arange(width, **like) * 2 + 1) / width - 1
    # affine_grid multiplies (H*W, 3) by (3, 2), which took 8 ms for 256 images of 64x64 on 2 cores; the sum of a
    # function of x and a function of y took 2 ms.
    m = matrices
    along_x = m[:, None, :, 0] * x[None, :, None]  # (B, w, 2)
    along_y = m[:, None, :, 1] * y[None, :, None] + m[:, None, :, 2]  # (B, h, 2)
    return along_x[:, None] + along_y[:, :, None]
