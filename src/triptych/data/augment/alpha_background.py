"""Backgrounds of images with alpha: a random color, a gradient or smooth noise, or the configured color."""

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from triptych.data.config import AugmentConfig

WAVES = 16  # cosine waves of the noise along each axis


def draw_background(
    count: int, config: AugmentConfig, rng: np.random.Generator
) -> tuple[np.ndarray, np.ndarray]:
    """Draw the backgrounds of a batch.

    A background blends two colors by a field, which is a constant, a gradient in any direction, or noise whose energy
    falls with frequency. Each field is a sum of products of a function of y and a function of x (see
    `render_background`).

    Returns:
        The two colors of each sample (B, 2, 3), from 0 to 1, and the coefficients of its field
        (B, WAVES + 1, WAVES + 1).
    """
    colors = rng.random((count, 2, 3))
    pattern = rng.integers(3, size=count)
    plain = rng.random(count) >= config.random_background
    colors[pattern == 0, 1] = colors[pattern == 0, 0]
    colors[plain] = np.array(config.background) / 255

    waves = np.arange(WAVES)
    smoothness = rng.uniform(0.5, 2.0, (count, 1, 1))
    noise = rng.standard_normal((count, WAVES, WAVES)) / (1 + np.hypot(waves[:, None], waves)) ** smoothness
    noise *= 0.3 / np.sqrt((noise**2).sum((1, 2), keepdims=True))
    angle = rng.uniform(0, 2 * np.pi, count)
    field = np.zeros((count, WAVES + 1, WAVES + 1))
    field[pattern == 2, :-1, :-1] = noise[pattern == 2]
    field[pattern == 1, -1, 0] = 0.7 * np.sin(angle[pattern == 1])
    field[pattern == 1, 0, -1] = 0.7 * np.cos(angle[pattern == 1])
    field[:, 0, 0] += 0.5
    return colors, field


def render_background(
    colors: Float[Tensor, "B 2 3"], field: Float[Tensor, "B k k"], size: tuple[int, int]
) -> Float[Tensor, "B 3 H W"]:
    """Return the backgrounds that `draw_background` drew, at `size` (height, width), from 0 to 1."""
    by_y, by_x = (_basis(length, field.device) for length in size)
    t = (by_y @ field @ by_x.T).clamp_(0, 1)  # (B, H, W)
    first, second = colors[..., None, None].unbind(1)  # each (B, 3, 1, 1)
    return torch.lerp(first, second, t[:, None])


def _basis(length: int, device: torch.device) -> Float[Tensor, "n k"]:
    """Return WAVES cosine waves, the first of which is constant, and a straight line from -1/2 to 1/2."""
    place = (torch.arange(length, device=device, dtype=torch.float32) + 0.5) / length
    waves = torch.arange(WAVES, device=device)
    return torch.cat([torch.cos(torch.pi * waves * place[:, None]), place[:, None] - 0.5], -1)


def composite_over(x: Float[Tensor, "B 4 H W"], background: Float[Tensor, "..."]) -> Float[Tensor, "B 3 H W"]:
    """Composite premultiplied RGBA over a background (Porter and Duff 1984): c + (1 - alpha) b."""
    return torch.addcmul(x[:, :3], 1 - x[:, 3:], background)
