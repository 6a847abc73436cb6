"""Augmentations that replace rectangles or blend images: random erasing, CutMix, mixup."""

import numpy as np
import torch
from jaxtyping import Float, Int64
from torch import Tensor

from triptych.data.config import AugmentConfig


def draw_erasing(
    count: int, config: AugmentConfig, rng: np.random.Generator
) -> tuple[np.ndarray, np.ndarray]:
    """Draw random erasing (Zhong et al. 2017): 2 to 33% of the area, aspect 0.3 to 1/0.3, entirely inside the image.

    Returns:
        Boxes (B, 4): x0, y0, x1, y1 as fractions of the image, empty if nothing is erased; and the color of each box
        (B, 3), normalized.
    """
    area, ratio = rng.uniform(0.02, 1 / 3, count), np.exp(rng.uniform(np.log(0.3), -np.log(0.3), count))
    extent = np.stack([np.sqrt(area * ratio), np.sqrt(area / ratio)], -1).clip(max=1.0)
    corner = rng.random((count, 2)) * (1 - extent)
    boxes = np.concatenate([corner, corner + extent], -1)
    boxes[rng.random(count) >= config.erasing] = 0
    return boxes, rng.standard_normal((count, 3))


def erase(
    x: Float[Tensor, "B C H W"], boxes: Float[Tensor, "B 4"], colors: Float[Tensor, "B C"]
) -> Float[Tensor, "B C H W"]:
    """Fill each box with its color."""
    return torch.where(inside_boxes(boxes, x.shape[-2:]), colors[..., None, None], x)


def draw_mixing(
    count: int, config: AugmentConfig, rng: np.random.Generator
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Draw mixup and CutMix.

    Mixup (Zhang et al. 2017) blends two images with one weight; CutMix (Yun et al. 2019) replaces a box, which is
    clipped at the edge of the image as in the paper.

    Returns:
        The weight of each image in its mixture (B,), the boxes of CutMix (B, 4), and the index of the image that each
        is mixed with (B,).
    """
    cut = rng.random(count) < (0.5 if config.mixup else 1.0)
    cut &= config.cutmix > 0
    alpha = np.where(cut, config.cutmix or 1.0, config.mixup or 1.0)
    share = np.where(rng.random(count) < config.mix_probability, rng.beta(alpha, alpha), 1.0)
    half = np.sqrt(1 - share)[:, None] / 2  # the box has the image's shape and 1 - share of its area
    center = rng.random((count, 2))
    boxes = np.concatenate([center - half, center + half], -1) * cut[:, None]
    partner = (np.arange(count) + rng.integers(1, max(2, count))) % count
    return np.where(cut, 1.0, share), boxes, partner


def mix_images(
    x: Float[Tensor, "B C H W"],
    share: Float[Tensor, " b"],
    boxes: Float[Tensor, "b 4"],
    partner: Int64[Tensor, " b"],
    rows: slice,
) -> tuple[Float[Tensor, "b C H W"], Float[Tensor, " b"]]:
    """Mix `rows` of the batch with their partners.

    Returns:
        The mixed images, and the exact weight of each image's own target (b,).
    """
    size = x.shape[-2:]
    kept_fraction = share[:, None, None, None] * ~inside_boxes(boxes, size)  # (b, 1, H, W)
    return torch.lerp(x[partner], x[rows], kept_fraction), kept_fraction.mean((1, 2, 3))


def inside_boxes(boxes: Float[Tensor, "B 4"], size: tuple[int, int] | torch.Size) -> Tensor:
    """Return booleans (B, 1, H, W): whether a pixel's center lies in the box x0, y0, x1, y1, as fractions of the
    image."""
    height, width = size
    x0, y0, x1, y1 = boxes[..., None].unbind(1)  # each (B, 1)
    x = (torch.arange(width, device=boxes.device) + 0.5) / width
    y = (torch.arange(height, device=boxes.device) + 0.5) / height
    columns, rows = (x >= x0) & (x < x1), (y >= y0) & (y < y1)
    return (rows[:, :, None] & columns[:, None, :])[:, None]
