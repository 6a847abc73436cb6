"""A latent diffusion model on its device, with its codec, prompt encoder and adapters."""

import hashlib
import json
import logging
import os
from collections.abc import Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from triptych.config import to_json
from triptych.device import choose_device, choose_dtype, place_network
from triptych.diffusion.config import Prediction
from triptych.errors import ConfigError
from triptych.models.autoencoder import FirstStage
from triptych.models.latent_diffusion import LatentDiffusion
from triptych.network import Network
from triptych.pipelines.diffusion import image_metadata
from triptych.pipelines.diffusion.adapters import Adapters
from triptych.pipelines.diffusion.latent_codec import LatentCodec
from triptych.pipelines.diffusion.options import GenerationRecord
from triptych.torch_compile import compile_blocks
from triptych.version import __version__

log = logging.getLogger(__name__)

DTYPE_NAMES = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}


class LoadedModel:
    """A latent diffusion model on its device; arguments as `DiffusionPipeline` takes them."""

    def __init__(
        self,
        ldm: LatentDiffusion | str | Path,
        device: str | torch.device | None = None,
        dtype: str | torch.dtype | None = None,
        low_memory: bool = False,
        preview_decoder: FirstStage | None = None,
        lora_dir: str | Path | None = None,
        prediction: Prediction | None = None,
        compile: bool = False,
    ) -> None:
        self.source = "" if isinstance(ldm, nn.Module) else os.fspath(ldm)
        net: Any = ldm
        if self.source:
            from triptych.weights import load

            net = load(self.source, prediction=prediction)
        elif prediction is not None:
            raise ConfigError(
                "prediction is for files that do not store it; set it in the network's config instead"
            )
        if not isinstance(net, LatentDiffusion):
            raise ConfigError(
                f"{self.source or 'the network'} is a {type(net).__name__}, which generates no images; give a latent "
                "diffusion model"
            )
        self.weights_hash = weights_fingerprint(net)
        self.device = choose_device(device)
        self.dtype = choose_dtype(dtype, self.device)
        self.net: Any = place_network(net, self.device, self.dtype, shared=not self.source)
        self.low_memory, self.compiled = low_memory, compile
        if compile:
            compile_blocks(self.net)
        self.codec = self.preview_codec = LatentCodec(self.net.autoencoder)
        if preview_decoder is not None:
            small: Any = place_network(preview_decoder, self.device, self.dtype)
            self.preview_codec = LatentCodec(small)
        self.adapters = Adapters(self.net, Path(lora_dir) if lora_dir is not None else self._folder())
        self._decoders: dict[str, tuple[str, LatentCodec]] = {}  # by file
        self._contexts: dict[tuple[int | None, tuple[str, ...]], Tensor] = {}  # by clip_skip and prompts

    def _folder(self) -> Path:
        """The model's folder; the working folder for a network that was passed in."""
        path = Path(self.source or ".")
        return path.parent if path.is_file() else path if path.is_dir() else Path()

    @cached_property
    def model_hash(self) -> str:
        """The file's hash as AUTOMATIC1111's web UI names it; without a single file the start of `weights_hash`."""
        return image_metadata.model_hash(self.source) or self.weights_hash[:10]

    @property
    def dtype_name(self) -> str:
        """fp32, bf16 or fp16."""
        return DTYPE_NAMES.get(self.dtype, str(self.dtype))

    def with_provenance(self, record: GenerationRecord) -> GenerationRecord:
        """Return the record with the model, precision and program that generate its image."""
        return replace(
            record,
            dtype=self.dtype_name,
            model=self.source,
            model_hash=self.model_hash,
            weights_hash=self.weights_hash,
            software=f"triptych {__version__}",
        )

    def apply_adapters(self, records: Sequence[GenerationRecord]) -> list[GenerationRecord]:
        """Apply the LoRAs and embeddings that records ask for; return the records with their files in place of names.

        Raises:
            ConfigError: the records ask for different LoRAs, or for an unknown one.
            CheckpointError: a file does not fit the network.
        """
        resolved = {record.prompt: self.adapters.resolve(record) for record in records}
        first = resolved[records[0].prompt]
        if any(record.loras != first.loras for record in resolved.values()):
            raise ConfigError(
                "prompts that ask for different LoRAs cannot share a batch; generate them one by one"
            )
        if self.adapters.apply(first):
            self._contexts = {}
        return [replace(one, prompt=resolved[one.prompt].prompt, loras=first.loras) for one in records]

    def file_hashes(self, record: GenerationRecord) -> dict[str, str]:
        """Return hashes of the LoRAs, embeddings and decoder that a record uses."""
        digest, _ = self.decoder(record.decoder)
        return self.adapters.hashes(record) | ({"decoder": digest} if digest else {})

    def decoder(self, file: str) -> tuple[str, LatentCodec]:
        """Return the hash and codec of an autoencoder's file; "" stands for the model's own.

        Raises:
            CheckpointError: the file cannot be read.
            ConfigError: it holds no autoencoder, or one of other latents.
        """
        if not file:
            return "", self.codec
        if file not in self._decoders:
            from triptych.weights import load

            net: Any = load(file)
            if not isinstance(net, FirstStage):
                raise ConfigError(
                    f"the decoder {file} is a {type(net).__name__}; give an autoencoder, such as TAESD's"
                )
            own, other = self.net.config.autoencoder, net.config
            if (own.latent_channels, own.downsample_factor) != (
                other.latent_channels,
                other.downsample_factor,
            ):
                raise ConfigError(
                    f"the decoder {file} takes latents of {other.latent_channels} channels at "
                    f"1/{other.downsample_factor}, "
                    f"the model's have {own.latent_channels} at 1/{own.downsample_factor}; give one "
                    "that was made for them"
                )
            codec = LatentCodec(place_network(net, self.device, self.dtype))
            self._decoders[file] = weights_fingerprint(net)[:12], codec
        return self._decoders[file]

    def encode(self, groups: Sequence[tuple[str, ...]], clip_skip: int | None = None) -> list[Tensor]:
        """Return the contexts of groups of prompts, one row for each prompt; those of a group are equally long.

        Raises:
            ConfigError: the text encoder was freed, or has fewer blocks than `clip_skip`.
        """
        missing = [group for group in dict.fromkeys(groups) if (clip_skip, group) not in self._contexts]
        encoder = self.net.text_encoder
        if missing and encoder is None:
            raise ConfigError(
                "the text encoder was freed after the first prompts (low_memory=True); make a new pipeline for others"
            )
        if missing and clip_skip is not None and clip_skip > encoder.config.depth:
            raise ConfigError(
                f"clip_skip is {clip_skip}, which must be from 1 to {encoder.config.depth} with this model's text "
                "encoder"
            )
        skip = None if clip_skip is None else clip_skip - 1
        contexts = self._contexts | {
            (clip_skip, group): encoder.encode_prompts(group, skip) for group in missing
        }
        if missing and self.low_memory:
            self._contexts = contexts
            self.net.drop_text()
        return [contexts[clip_skip, group] for group in groups]

    def place_latents(self, latents: Tensor | None, count: int) -> Tensor | None:
        """Check the initial latents of `count` images and move them to the device, in fp32.

        Raises:
            ConfigError: wrong channels or number.
        """
        if latents is None:
            return None
        channels, factor = self.net.config.autoencoder.latent_channels, self.codec.factor
        if latents.ndim != 4 or latents.shape[1] != channels or len(latents) not in (1, count):
            raise ConfigError(
                f"latents are {tuple(latents.shape)}, which must be (1 or {count}, {channels}, height / {factor}, "
                f"width / {factor})"
            )
        return latents.to(self.device, torch.float32)

    def warn_of_differences(self, requested: GenerationRecord, actual: GenerationRecord) -> None:
        """Log which of the model and files differ from those of an earlier image."""
        for role, known in requested.hashes.items():
            if actual.hashes.get(role) != known:
                log.warning("the %s is not the one that the image was made from", role)
        if requested.weights_hash and requested.weights_hash != self.weights_hash:
            log.warning("the image was made with another model (%s)", requested.model or "unnamed")
        if requested.dtype and requested.dtype != self.dtype_name:
            log.warning(
                "the image was made in %s, this is %s: pixels may differ", requested.dtype, self.dtype_name
            )


def weights_fingerprint(net: Network) -> str:
    """Return hexadecimal digits that identify a network: SHA-256 of its config and of the names, shapes and first 256
    numbers of its parameters. Takes milliseconds, where hashing the file takes seconds."""
    digest = hashlib.sha256(json.dumps(to_json(net.config), sort_keys=True).encode())
    for name, parameter in net.named_parameters():
        digest.update(f"{name}{tuple(parameter.shape)}".encode())
        digest.update(parameter.detach().reshape(-1)[:256].float().cpu().numpy().tobytes())
    return digest.hexdigest()
