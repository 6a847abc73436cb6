"""The families of networks that files hold: a config type each, and how one is built and written down."""

import functools
import typing
from typing import Any

from triptych import config as plain
from triptych.errors import UserError
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
"""Name in files -> config."""

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
"""What a person calls one."""


def family_of(config: Any) -> str | None:
    """The family that a config belongs to; none for anything else."""
    return next((name for name, kind in FAMILIES.items() if isinstance(config, kind)), None)


def build(config: Any) -> Network:
    """The network of a config of any family, with random weights."""
    if isinstance(config, SegmenterConfig):
        from triptych.heads.segmenter import Segmenter

        return Segmenter(config, build(config.backbone))
    return registry.build(config)


def to_json(config: Any) -> dict[str, Any]:
    """A config as plain JSON values. A part of whatever family is {"family": name, "config": its own}."""
    data = plain.to_json(config)
    for name in _parts(type(config)):
        part = getattr(config, name)
        data[name] = {"family": family_of(part), "config": to_json(part)}
    return data


def from_json(family: str, data: Any) -> Any:
    """The inverse of `to_json`.

    Raises:
        UserError: unknown family or fields, missing fields, wrong types, or sizes that do not fit together.
    """
    if family not in FAMILIES:
        raise UserError(f"family {family!r} is unknown; this triptych knows {', '.join(FAMILIES)}")
    kind = FAMILIES[family]
    if isinstance(data, dict):
        data = data | {name: _part_from_json(data[name]) for name in _parts(kind) if name in data}
    return plain.from_json(kind, data)


def _part_from_json(data: Any) -> Any:
    if not isinstance(data, dict) or set(data) != {"family", "config"} or not isinstance(data["family"], str):
        raise UserError(f"a part is {str(data)[:60]}, which must be its family and its config")
    return from_json(data["family"], data["config"])


@functools.cache
def _parts(kind: type) -> list[str]:
    """Fields that hold a config of whatever family."""
    return [name for name, hint in typing.get_type_hints(kind).items() if hint is Any]
