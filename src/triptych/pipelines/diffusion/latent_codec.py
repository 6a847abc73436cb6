"""Latents to bytes and back: tiles for large pictures, fp32 where a smaller type overflows, previews."""

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

from triptych.errors import UserError
from triptych.layers.resnet import seamless
from triptych.models.autoencoder import FirstStage
from triptych.pipelines.diffusion.settings import Tiling

log = logging.getLogger(__name__)

WHOLE = 2**20  # pixels that are still encoded and decoded in one piece
FAR = 1e4  # no autoencoder's latents are that large

Tiles = bool | Literal["auto"]


class Rendering:
    """A first stage with what surrounds it. One picture at a time, so that neither memory nor the last bit of a number
    depends on how many there are.

    Args:
        autoencoder: on its device, in its precision.
    """

    def __init__(self, autoencoder: FirstStage):
        self.autoencoder = autoencoder
        self._exact: FirstStage | None = None  # the same in fp32, once it was needed

    @property
    def factor(self) -> int:
        return self.autoencoder.config.factor

    def latents(
        self, images: Float[Tensor, "1 c h w"], tiles: Tiles = "auto", tiling: Tiling = ""
    ) -> Float[Tensor, "1 k rows columns"]:
        """Scaled latents in fp32 of a picture in [-1, 1]: the posterior's mean."""
        net = self.autoencoder
        first = next(net.parameters())
        images = images.to(first.device, first.dtype)
        with seamless(net, x="x" in tiling, y="y" in tiling):
            tiled = tiles is True or (tiles == "auto" and images.shape[-2] * images.shape[-1] > WHOLE)
            return (net.encode_tiled(images) if tiled else net.encode(images)).float()

    def pixels(
        self, latents: Float[Tensor, "1 k rows columns"], tiles: Tiles = "auto", tiling: Tiling = ""
    ) -> UInt8[np.ndarray, "h w c"]:
        """The picture of scaled latents. What is not a number in a smaller type is decoded again in fp32.

        Raises:
            UserError: it is not a number in fp32 either.
        """
        decoded = self._decode(self.autoencoder, latents, tiles, tiling)
        dtype = next(self.autoencoder.parameters()).dtype
        if not decoded.isfinite().all() and dtype != torch.float32:
            # The next picture is tried in the smaller type all the same: it must not depend on this one.
            if self._exact is None:
                log.warning(
                    "the decoder overflows in %s; decoding in fp32", str(dtype).removeprefix("torch.")
                )
                self._exact = copy.deepcopy(self.autoencoder).float()
            decoded = self._decode(self._exact, latents, tiles, tiling)
        if not decoded.isfinite().all():
            largest = float(latents.abs().max())
            cause = "the autoencoder's weights are damaged; load it from another file"
            if largest > FAR:
                cause = f"the latents reach {largest:.3g}; lower guidance"
            raise UserError(f"the decoder gives NaN in fp32 too: {cause}")
        return np.asarray(
            (decoded[0].float() * 127.5 + 127.5).clamp(0, 255).round().byte().permute(1, 2, 0).cpu()
        )

    def _decode(self, net: FirstStage, latents: Tensor, tiles: Tiles, tiling: Tiling) -> Tensor:
        first = next(net.parameters())
        latents = latents.to(first.device, first.dtype)
        pixels = latents.shape[-2] * latents.shape[-1] * self.factor**2
        with seamless(net, x="x" in tiling, y="y" in tiling):
            tiled = tiles is True or (tiles == "auto" and pixels > WHOLE)
            return net.decode_tiled(latents) if tiled else net.decode(latents)


@dataclass(frozen=True)
class Preview:
    """What a run looks like after a step."""

    step: int
    """Steps done, from 1."""
    steps: int
    """Of all."""
    level: tuple[float, float]
    """alpha and sigma of what the network just looked at."""
    seeds: Sequence[int]
    """Of the pictures that are being made."""
    latents: Float[Tensor, "b k rows columns"]
    """The clean latents that the network saw (x_0)."""
    rendering: Rendering
    tiling: Tiling = ""

    def images(self, longest: int | None = 256) -> list[Image.Image]:
        """What the network saw, as pictures.

        Args:
            longest: side in pixels to stay below: latents are averaged before they are decoded, which is quick and a
                little soft. None decodes them as they are.
        """
        latents, factor = self.latents, self.rendering.factor
        side = max(latents.shape[-2:]) * factor
        if longest is not None and side > longest:
            scale = longest / side
            size = [max(1, round(cells * scale)) for cells in latents.shape[-2:]]
            latents = F.interpolate(latents, size, mode="area")
        return [picture(self.rendering.pixels(one[None], tiling=self.tiling)) for one in latents]


def picture(pixels: UInt8[np.ndarray, "h w c"]) -> Image.Image:
    """Grey, RGB or RGBA, by the number of channels."""
    return Image.fromarray(pixels[..., 0] if pixels.shape[2] == 1 else pixels)
