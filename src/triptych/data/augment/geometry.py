"""Where each pixel of an augmented image comes from: one matrix a sample, and one warp with it.

Crop, flip, zoom, rotation, shear and shift are composed before any pixel is touched, so that an image is
interpolated once, and so that a mask can follow its image: same matrices, nearest neighbour.
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
    """Random matrices (B, 2, 3) from the output's normalised (x, y, 1) to the input's normalised (x, y).

    Both run from -1 to 1 between the image's outer edges, as in `torch.nn.functional.affine_grid` with
    `align_corners=False`. With everything off in `config` each is the identity.

    Args:
        count: how many samples.
        config: the ranges to draw from.
        rng: the only source of chance.
        aspect: width over height that each image had before it was squashed to the batch's size, so that
            crops have the asked-for ratio on the original picture; None where nothing was squashed.
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

    Ten draws a sample, the first that fits wins, else the largest centred box whose ratio is in range.
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

    half_x, half_y = width / aspect, height  # halves of a [-1, 1] range are shares of the whole
    position = rng.uniform(-1, 1, (2, count)) * fitted  # the fallback stays in the centre
    crop = np.tile(np.eye(3), (count, 1, 1))
    crop[:, 0, 0], crop[:, 0, 2] = half_x, position[0] * (1 - half_x)
    crop[:, 1, 1], crop[:, 1, 2] = half_y, position[1] * (1 - half_y)
    return crop


def _affine(count: int, config: AugmentConfig, rng: np.random.Generator, aspect: float) -> np.ndarray:
    """Output to input, so the inverse of what the object does: shift back, turn back, unshear, unzoom."""
    angle = np.radians(rng.uniform(-config.degrees, config.degrees, count))
    shear = np.tan(np.radians(rng.uniform(-config.shear, config.shear, (2, count))))
    zoom = np.exp(rng.uniform(np.log(config.zoom[0]), np.log(config.zoom[1]), count))
    shift = rng.uniform(-2, 2, (count, 2)) * np.array(config.translate)

    turn = _linear(np.cos(angle), np.sin(angle), -np.sin(angle), np.cos(angle))
    skew = _linear(1.0, shear[0], shear[1], 1 + shear[0] * shear[1])  # along x after y: determinant 1
    inner = turn @ skew / zoom[:, None, None]
    # Turn where a pixel is square, not in the [-1, 1] square.
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
    """Images seen through the matrices of `geometry`, at `size` (height, width).

    Outside of the input lies its reflection ("reflection") or nothing ("zeros", for premultiplied alpha).
    """
    return F.grid_sample(images, _grid(matrices, size), mode=mode, padding_mode=padding, align_corners=False)


def warp_mask(
    masks: Integer[Tensor, "B H W"],
    matrices: Float[Tensor, "B 2 3"],
    size: tuple[int, int],
    outside: int = 255,
) -> Integer[Tensor, "B h w"]:
    """Masks that follow their images through the same matrices: the class of the nearest pixel, and `outside`."""
    shifted = masks[:, None].float() - outside  # so that the zeros outside become it
    grid = _grid(matrices, size)
    seen = F.grid_sample(shifted, grid, mode="nearest", padding_mode="zeros", align_corners=False)
    return (seen[:, 0] + outside).to(masks.dtype)


def _grid(matrices: Float[Tensor, "B 2 3"], size: tuple[int, int]) -> Float[Tensor, "B h w 2"]:
    """Where each pixel of the output comes from."""
    height, width = size
    like = {"dtype": torch.float32, "device": matrices.device}
    y = (torch.arange(height, **like) * 2 + 1) / height - 1
    x = (torch.arange(width, **like) * 2 + 1) / width - 1
    # affine_grid multiplies (H*W, 3) by (3, 2), which took 8 ms for 256 images of 64x64 on 2 cores; x and y
    # apart are a row and a column to add, 2 ms.
    m = matrices
    along_x = m[:, None, :, 0] * x[None, :, None]  # (B, w, 2)
    along_y = m[:, None, :, 1] * y[None, :, None] + m[:, None, :, 2]  # (B, h, 2)
    return along_x[:, None] + along_y[:, :, None]
