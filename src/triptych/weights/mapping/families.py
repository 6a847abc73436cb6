"""The families of networks that checkpoints hold: their config classes, construction, and JSON form."""

import functools
import typing
from typing import Any

from triptych import config as config_json
from triptych.errors import CheckpointError
from triptych.heads.config import SegmenterConfig
from triptych.models import registry
from triptych.models.configs.autoencoder import AutoencoderConfig, TinyAutoencoderConfig
from triptych.models.configs.convnet import ConvNetConfig
from triptych.models.configs.dit import DiTConfig
from triptych.models.configs.latent_diffusion import LatentDiffusionConfig
from triptych.models.configs.swin import SwinConfig
from triptych.models.configs.text import ClassTokenConfig, TextConfig
from triptych.models.configs.unet import UNetConfig
from triptych.models.configs.vit import ViTConfig
from triptych.network import Network

FAMILIES: dict[str, type] = {
    "vit": ViTConfig,
    "swin": SwinConfig,
    "convnet": ConvNetConfig,
    "segmenter": SegmenterConfig,
    "autoencoder": AutoencoderConfig,
    "tiny-autoencoder": TinyAutoencoderConfig,
    "unet": UNetConfig,
    "dit": DiTConfig,
    "text": TextConfig,
    "class-token": ClassTokenConfig,
    "latent-diffusion": LatentDiffusionConfig,
}
"""Name in checkpoints -> config class."""

TITLES = {
    "vit": "a ViT",
    "swin": "a Swin",
    "convnet": "a plain ConvNet",
    "segmenter": "a Segmenter",
    "autoencoder": "an autoencoder",
    "tiny-autoencoder": "a tiny autoencoder",
    "unet": "a denoising UNet",
    "dit": "a DiT",
    "text": "a text encoder",
    "class-token": "a table of classes",
    "latent-diffusion": "a latent diffusion model",
}
"""Names for messages."""


def family_of(config: Any) -> str | None:
    """Return the family that a config belongs to, or None."""
    return next((name for name, cls in FAMILIES.items() if isinstance(config, cls)), None)


def build(config: Any) -> Network:
    """Return a network with random weights, of a config of any family."""
    if isinstance(config, SegmenterConfig):
        from triptych.heads.segmenter import Segmenter

        return Segmenter(config, build(config.backbone))
    return registry.build(config)


def to_json(config: Any) -> dict[str, Any]:
    """Return a config as JSON values. A part that may be of any family becomes {"family": name, "config": ...}."""
    data = config_json.to_json(config)
    for name in _parts(type(config)):
        part = getattr(config, name)
        data[name] = {"family": family_of(part), "config": to_json(part)}
    return data


def from_json(family: str, data: Any) -> Any:
    """Return the config that `to_json` gave as `data`.

    Raises:
        CheckpointError: unknown family, or a malformed part.
        ConfigError: unknown or missing fields, wrong types, or sizes that do not fit together.
    """
    if family not in FAMILIES:
        raise CheckpointError(f"family {family!r} is unknown; this triptych knows {', '.join(FAMILIES)}")
    cls = FAMILIES[family]
    if isinstance(data, dict):
        data = data | {name: _part_from_json(data[name]) for name in _parts(cls) if name in data}
    return config_json.from_json(cls, data)


def _part_from_json(data: Any) -> Any:
    if not isinstance(data, dict) or set(data) != {"family", "config"} or not isinstance(data["family"], str):
        raise CheckpointError(f"a part is {str(data)[:60]}, which must be its family and its config")
    return from_json(data["family"], data["config"])


@functools.cache
def _parts(cls: type) -> list[str]:
    """Return the fields that hold a config of any family."""
    return [name for name, hint in typing.get_type_hints(cls).items() if hint is Any]
