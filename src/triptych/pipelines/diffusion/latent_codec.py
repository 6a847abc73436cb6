"""Latents to pixels and back: in tiles for large images, in fp32 where a smaller type overflows; previews."""

import copy
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float, UInt8
from PIL import Image
from torch import Tensor

from triptych.errors import ConfigError
from triptych.layers.resnet import seamless
from triptych.models.autoencoder import FirstStage
from triptych.pipelines.diffusion.options import Tiling

log = logging.getLogger(__name__)

TILED_FROM = 2**20  # pixels above which "auto" encodes and decodes in tiles
LARGEST_LATENT = 1e4  # no autoencoder's latents are that large

Tiles = bool | Literal["auto"]


class LatentCodec:
    """Encodes and decodes images one at a time, so that neither memory nor the last bit depends on their number.

    Args:
        autoencoder: on its device, in its precision.
    """

    def __init__(self, autoencoder: FirstStage):
        self.autoencoder = autoencoder
        self._exact: FirstStage | None = None  # a copy in fp32, made when first needed

    @property
    def factor(self) -> int:
        return self.autoencoder.config.downsample_factor

    def encode(
        self, images: Float[Tensor, "1 c h w"], tiles: Tiles = "auto", tiling: Tiling = ""
    ) -> Float[Tensor, "1 k rows columns"]:
        """Return scaled latents in fp32 of an image in [-1, 1]: the posterior's mean."""
        net = self.autoencoder
        first = next(net.parameters())
        images = images.to(first.device, first.dtype)
        with seamless(net, x="x" in tiling, y="y" in tiling):
            tiled = tiles is True or (tiles == "auto" and images.shape[-2] * images.shape[-1] > TILED_FROM)
            return (net.encode_tiled(images) if tiled else net.encode(images)).float()

    def decode(
        self, latents: Float[Tensor, "1 k rows columns"], tiles: Tiles = "auto", tiling: Tiling = ""
    ) -> UInt8[np.ndarray, "h w c"]:
        """Return the pixels of scaled latents. If half precision gives NaN, decode again in fp32.

        Raises:
            ConfigError: the decoder gives NaN in fp32 too.
        """
        decoded = self._decode(self.autoencoder, latents, tiles, tiling)
        dtype = next(self.autoencoder.parameters()).dtype
        if not decoded.isfinite().all() and dtype != torch.float32:
            # The next image starts in half precision again: it must not depend on this one.
            if self._exact is None:
                log.warning(
                    "the decoder overflows in %s; decoding in fp32", str(dtype).removeprefix("torch.")
                )
                self._exact = copy.deepcopy(self.autoencoder).float()
            decoded = self._decode(self._exact, latents, tiles, tiling)
        if not decoded.isfinite().all():
            largest = float(latents.abs().max())
            cause = "the autoencoder's weights are damaged; load it from another file"
            if largest > LARGEST_LATENT:
                cause = f"the latents reach {largest:.3g}; lower guidance_scale"
            raise ConfigError(f"the decoder gives NaN in fp32 too: {cause}")
        return np.asarray(
            (decoded[0].float() * 127.5 + 127.5).clamp(0, 255).round().byte().permute(1, 2, 0).cpu()
        )

    def _decode(self, net: FirstStage, latents: Tensor, tiles: Tiles, tiling: Tiling) -> Tensor:
        first = next(net.parameters())
        latents = latents.to(first.device, first.dtype)
        pixels = latents.shape[-2] * latents.shape[-1] * self.factor**2
        with seamless(net, x="x" in tiling, y="y" in tiling):
            tiled = tiles is True or (tiles == "auto" and pixels > TILED_FROM)
            return net.decode_tiled(latents) if tiled else net.decode(latents)


@dataclass(frozen=True)
class Preview:
    """The images of a batch after a sampler step."""

    step: int
    """Steps done, from 1."""
    num_steps: int
    """Total number of steps."""
    level: tuple[float, float]
    """alpha and sigma of the network's last input."""
    seeds: Sequence[int]
    """The images' seeds."""
    latents: Float[Tensor, "b k rows columns"]
    """The network's last estimate of the clean latents (x_0)."""
    codec: LatentCodec
    tiling: Tiling = ""

    def images(self, longest: int | None = 256) -> list[Image.Image]:
        """Decode the estimate.

        Args:
            longest: longest side in pixels; larger latents are averaged before decoding, which is fast and a little
                soft. None decodes them at full size.
        """
        latents, factor = self.latents, self.codec.factor
        side = max(latents.shape[-2:]) * factor
        if longest is not None and side > longest:
            scale = longest / side
            size = [max(1, round(cells * scale)) for cells in latents.shape[-2:]]
            latents = F.interpolate(latents, size, mode="area")
        return [to_image(self.codec.decode(one[None], tiling=self.tiling)) for one in latents]


def to_image(pixels: UInt8[np.ndarray, "h w c"]) -> Image.Image:
    """Return a grayscale, RGB or RGBA image, by the number of channels."""
    return Image.fromarray(pixels[..., 0] if pixels.shape[2] == 1 else pixels)
