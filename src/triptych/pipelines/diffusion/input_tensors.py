"""Conversion of a task's input images to the tensors of its sampling job."""

import logging
import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from triptych.diffusion.noise import seeded_noise
from triptych.diffusion.process import Process
from triptych.errors import ConfigError
from triptych.models.configs.latent_diffusion import LatentDiffusionConfig
from triptych.pipelines.diffusion.canvas import (
    digest,
    grayscale,
    make_canvas,
    normalized_depth,
    read_class_map,
)
from triptych.pipelines.diffusion.loaded_model import LoadedModel
from triptych.pipelines.diffusion.options import GenerationRecord
from triptych.pipelines.image_input import ImageInput

log = logging.getLogger(__name__)

WARN_AREA_RATIO = 6  # warn from this many times the area that a model was trained on


class InputTensors:
    """Converts a task's input images to tensors; see `read`.

    Args:
        record: the first record of the job; its strength is set.
        images: role (`IMAGE_ROLES`) -> image, exactly those that the task needs.
        latents: noise to start from, if the caller passed any.
    """

    def __init__(
        self,
        model: LoadedModel,
        record: GenerationRecord,
        images: Mapping[str, ImageInput],
        latents: Tensor | None,
    ):
        self.net, self.codec, self.record = model.net, model.codec, record
        self.images, self.latents = images, latents
        self.config: LatentDiffusionConfig = model.net.config
        self.hashes: dict[str, str] = {}
        self.tensors: dict[str, Any] = {}

    def read(self) -> tuple[dict[str, Any], dict[str, str]]:
        """Return the job's shape, canvas, init_latents, latent_mask, concat, labels and initial_noise; and hashes."""
        factor = self.codec.factor
        if self.record.task == "upscale":
            rows, columns = self._read_low_resolution()
        elif "init_image" in self.images:
            rows, columns = self._read_canvas()
        elif "class_map" in self.images:
            rows, columns = self._read_class_map()
        else:
            height, width = self.config.image_size
            if self.latents is not None:
                height, width = self.latents.shape[-2] * factor, self.latents.shape[-1] * factor
            size = (self.record.height or height, self.record.width or width)
            _check_size(size, factor)
            rows, columns = size[0] // factor, size[1] // factor
        if "depth_map" in self.images:
            pixels = grayscale(self.images["depth_map"])
            self.hashes["depth_map"] = digest(pixels)
            depth = normalized_depth(pixels, (rows, columns))
            self.tensors["concat"] = lambda seeds: depth
        self.tensors["shape"] = (self.config.autoencoder.latent_channels, rows, columns)
        if self.latents is not None:
            self.hashes["latents"] = digest(self.latents.detach().float().cpu().numpy())
            self.tensors["initial_noise"] = self.latents
        return self.tensors, self.hashes

    def _size(self) -> tuple[int, int] | None:
        """The size to which an image is resized; None is its own."""
        if (self.record.height is None) != (self.record.width is None):
            raise ConfigError("height and width of an input image go together; give both or neither")
        return self.record.size

    def _encode(self, images: Tensor) -> Tensor:
        return self.codec.encode(images, self.record.tiled_decode, self.record.tiling)

    def _read_canvas(self) -> tuple[int, int]:
        """Read the initial image and the mask; return the latents' height and width."""
        record, config, factor = self.record, self.config, self.codec.factor
        size = self._size()
        _check_size(size, factor)
        canvas = make_canvas(
            self.images["init_image"], factor, size, self.images.get("mask_image"), record.mask_feather
        )
        self.hashes["init_image"] = digest(canvas.original)
        if canvas.mask is not None:
            self.hashes["mask_image"] = digest(canvas.mask)
        self.tensors["canvas"] = canvas
        images = canvas.images(config.autoencoder.in_channels)
        if record.task == "image_to_image" or config.concat == "none" or record.strength != 1:
            self.tensors["init_latents"] = self._encode(images)
        if record.task == "inpaint":
            latent_mask, hole = canvas.latent_mask(factor), canvas.pixel_mask()
            if config.concat == "none":
                self.tensors["latent_mask"] = latent_mask
            else:
                masked = self._masked_channels(images, hole, latent_mask)
                self.tensors["concat"] = lambda seeds: masked
        rows, columns = canvas.size[0] // factor, canvas.size[1] // factor
        if size is None and rows * columns > WARN_AREA_RATIO * math.prod(config.network.latent_size):
            height, width = config.image_size
            log.warning(
                "the image is processed at its own %dx%d pixels, but the model was trained on %dx%d: this takes long "
                "and tends to repeat content; height and width make it smaller",
                *(canvas.size[1], canvas.size[0], width, height),
            )
        return rows, columns

    def _masked_channels(self, images: Tensor, hole: Tensor, latent_mask: Tensor) -> Tensor:
        """Return the mask and masked image in the form that the inpainting network takes."""
        if self.config.concat == "mask+masked_image":  # Stable Diffusion: the hole is gray, the mask 0 and 1
            masked = self._encode(images * (1 - hole))
            return torch.cat([latent_mask.to(masked), masked], dim=1)
        # The paper, as CompVis trained it: the hole is black, the mask -1 and 1.
        masked = self._encode((images + 1) * (1 - hole) - 1)
        return torch.cat([masked, 2 * latent_mask.to(masked) - 1], dim=1)

    def _read_low_resolution(self) -> tuple[int, int]:
        """Read the image to upscale; if the model was trained with noise, add noise from each seed."""
        low = make_canvas(self.images["init_image"], 1)
        self.hashes["init_image"] = digest(low.original)
        image, config, noise_level = low.images(), self.config.low_res_process, self.record.noise_level
        if config is None:
            self.tensors["concat"] = lambda seeds: image
            return low.size
        most = min(self.config.network.num_classes, config.num_timesteps) - 1
        if noise_level > most:
            raise ConfigError(f"noise_level is {noise_level}, which must be from 0 to {most}")
        level = Process(config).level(noise_level)
        self.tensors["concat"] = lambda seeds: level.noised(
            image, seeded_noise(seeds, image.shape[1:], "condition")
        )
        self.tensors["labels"] = [noise_level]
        return low.size

    def _read_class_map(self) -> tuple[int, int]:
        """Read and encode the class map; return the latents' height and width."""
        config, encoder, factor = self.config.semantic_map, self.net.semantic_map, self.codec.factor
        assert config is not None
        assert encoder is not None
        classes = read_class_map(self.images["class_map"], config.num_classes, self._size())
        _check_size(classes.shape, factor, "the class map")
        self.hashes["class_map"] = digest(classes)
        encoded = encoder(torch.from_numpy(classes)[None].to(encoder.mix.weight.device), factor)
        self.tensors["concat"] = lambda seeds: encoded
        return classes.shape[0] // factor, classes.shape[1] // factor


def _check_size(size: tuple[int, ...] | None, factor: int, what: str = "size") -> None:
    if size is None:
        return
    height, width = size
    if height % factor or width % factor:
        near = [max(1, round(side / factor)) * factor for side in (width, height)]
        raise ConfigError(
            f"{what} is {width}x{height} (width x height), which must be multiples of {factor}, such as "
            f"{near[0]}x{near[1]}"
        )
