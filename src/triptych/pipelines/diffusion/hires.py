"""The second pass over an enlarged image, "hires fix" of AUTOMATIC1111's web UI: a model draws the composition at the
size that it was trained on, then details at a larger one."""

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float
from PIL import Image
from torch import Tensor

from triptych.diffusion.process import Process
from triptych.diffusion.schedule import Levels, spaced_levels
from triptych.errors import ConfigError
from triptych.pipelines.diffusion.latent_codec import LatentCodec
from triptych.pipelines.diffusion.options import GenerationRecord

# Interpolation of latents: mode and antialiasing.
LATENT_MODES = {
    "latent": ("bilinear", False),
    "latent-antialiased": ("bilinear", True),
    "latent-bicubic": ("bicubic", False),
    "latent-bicubic-antialiased": ("bicubic", True),
    "latent-nearest": ("nearest", False),
    "latent-nearest-exact": ("nearest-exact", False),
}
IMAGE_FILTERS = {"lanczos": Image.Resampling.LANCZOS, "nearest": Image.Resampling.NEAREST}


def hires_levels(process: Process, record: GenerationRecord, schedule: str) -> Levels:
    """Return the noise levels of the second pass: the last `hires_steps` of a table with hires_steps / hires_strength
    steps, as the web UI counts them."""
    steps = record.hires_steps or record.num_steps
    total = max(steps, int(steps / min(record.hires_strength, 0.999)))
    levels = spaced_levels(process, total, schedule)
    return Levels(process, levels[total - steps :])


def hires_cells(record: GenerationRecord, cells: int, factor: int) -> int:
    """Return the latents' height or width in the second pass."""
    return int(cells * factor * record.hires_scale) // factor


def enlarge_latents(
    latents: Float[Tensor, "b c h w"], size: tuple[int, int], codec: LatentCodec, record: GenerationRecord
) -> Float[Tensor, "b c H W"]:
    """Return latents of another size: interpolated, or encoded from their enlarged images."""
    name = record.hires_upscaler
    if name in LATENT_MODES:
        mode, antialias = LATENT_MODES[name]
        return F.interpolate(latents, size, mode=mode, antialias=antialias)
    height, width = (cells * codec.factor for cells in size)
    rows = []
    for row in latents:
        pixels = Image.fromarray(codec.decode(row[None], record.tiled_decode, record.tiling).squeeze())
        larger = np.asarray(pixels.resize((width, height), IMAGE_FILTERS[name]))
        image = torch.from_numpy(larger.reshape(height, width, -1).copy()).permute(2, 0, 1)[None]
        encoded = codec.encode(image.float() / 127.5 - 1, record.tiled_decode, record.tiling)
        rows.append(encoded.to(latents.device))
    return torch.cat(rows)


def require_plain_noise(record: GenerationRecord, starts_from_noise: bool, is_dit: bool) -> None:
    """Check that a second pass is possible.

    Raises:
        ConfigError: the image is made from another one, or the network has one size.
    """
    if not starts_from_noise:
        raise ConfigError(
            f"hires_scale is {record.hires_scale:g}, which is for images made from noise alone, not for "
            f"{record.task} of this model; leave it out"
        )
    if is_dit:
        raise ConfigError(
            "hires_scale needs a network for images of any size, which a DiT is not; leave it out"
        )
