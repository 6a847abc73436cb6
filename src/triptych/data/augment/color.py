"""Brightness, contrast, saturation and hue as a single affine map of the colors of each sample."""

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from triptych.data.config import AugmentConfig
from triptych.device import copy_to_device

LUMA = (0.299, 0.587, 0.114)  # ITU-R BT.601, as in Pillow's "L"
YIQ = (LUMA, (0.596, -0.274, -0.322), (0.211, -0.523, 0.312))


def draw_color(count: int, config: AugmentConfig, rng: np.random.Generator) -> np.ndarray:
    """Draw (B, 4): the factors of brightness, contrast and saturation, and the hue shift in radians."""
    factors = [
        rng.uniform(max(0.0, 1 - strength), 1 + strength, count)
        for strength in (config.brightness, config.contrast, config.saturation)
    ]
    angle = rng.uniform(-2 * np.pi * config.hue, 2 * np.pi * config.hue, count)
    factors[2] *= rng.random(count) >= config.grayscale
    return np.stack([*factors, angle], -1)


def color_jitter(x: Float[Tensor, "B C H W"], color: Float[Tensor, "B 4"]) -> Float[Tensor, "B C H W"]:
    """Jitter the colors of RGB or premultiplied RGBA from 0 to 1, and clamp the result.

    The maps are composed as by Karras et al. 2020, "Training GANs with limited data", appendix B. Brightness, contrast
    and saturation are those of torchvision without the clamp after each step; hue rotates the chroma plane of YIQ. In
    premultiplied RGBA the offset of the map is multiplied by alpha, so that the map is one 3x4 matrix.

    Args:
        color: the factors and angles that `draw_color` drew.
    """
    b, f, s, angle = color[:, :, None, None].unbind(1)  # each (B, 1, 1)
    count, has_alpha = len(x), x.shape[1] == 4
    luma = copy_to_device(torch.tensor(LUMA), x.device)
    pixels = x.flatten(2)  # (B, C, N)
    total = pixels.sum(-1)  # (B, C)
    weight = total[:, 3].clamp_min(1e-6) if has_alpha else pixels.shape[-1]
    mean_gray = (total[:, :3] @ luma / weight)[:, None, None]  # mean luma, weighted by alpha

    saturate = s * torch.eye(3, device=x.device) + (1 - s) * luma.expand(3, 3)
    m = _hue(angle) @ saturate * (b * f)  # (B, 3, 3)
    offset = ((1 - f) * b * mean_gray).expand(count, 3, 1)  # a gray, which saturation and hue do not change
    if has_alpha:
        alpha = pixels[:, 3:]
        rgb = torch.bmm(torch.cat([m, offset], -1), pixels).clamp_min_(0)
        return torch.cat([torch.minimum(rgb, alpha), alpha], 1).view(x.shape)
    return torch.baddbmm(offset, m, pixels).clamp_(0, 1).view(x.shape)


def _hue(angle: Float[Tensor, "B 1 1"]) -> Float[Tensor, "B 3 3"]:
    """Return the matrix that rotates the (I, Q) plane by the angle and keeps luma."""
    to_yiq = copy_to_device(torch.tensor(YIQ, dtype=torch.float32), angle.device)
    to_rgb, _ = torch.linalg.inv_ex(to_yiq)  # `inv` would synchronize to check that the inverse exists
    cos, sin, zero = angle.cos(), angle.sin(), torch.zeros_like(angle)
    rows = [[zero + 1, zero, zero], [zero, cos, -sin], [zero, sin, cos]]
    turn = torch.cat([torch.cat(row, -1) for row in rows], -2)
    return to_rgb @ turn @ to_yiq
