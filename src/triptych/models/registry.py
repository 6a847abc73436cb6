"""Networks by name. Imports torch only when a network is built."""

import fnmatch
import importlib
import numbers
from dataclasses import fields, replace
from typing import TYPE_CHECKING, Any

from triptych.errors import ConfigError, did_you_mean, near_names
from triptych.models.configs import autoencoder as autoencoder_config
from triptych.models.configs import convnet as convnet_config
from triptych.models.configs import dit as dit_config
from triptych.models.configs import latent_diffusion as latent_diffusion_config
from triptych.models.configs import swin as swin_config
from triptych.models.configs import text as text_config
from triptych.models.configs import vit as vit_config
from triptych.models.configs.autoencoder import AutoencoderConfig, TinyAutoencoderConfig
from triptych.models.configs.convnet import ConvNetConfig
from triptych.models.configs.dit import DiTConfig
from triptych.models.configs.latent_diffusion import LatentDiffusionConfig
from triptych.models.configs.swin import SwinConfig, fitting, windows_of
from triptych.models.configs.text import ClassTokenConfig, TextConfig
from triptych.models.configs.unet import UNetConfig
from triptych.models.configs.vit import ViTConfig

if TYPE_CHECKING:
    from triptych.network import Network

Config = (
    ViTConfig
    | SwinConfig
    | ConvNetConfig
    | AutoencoderConfig
    | TinyAutoencoderConfig
    | UNetConfig
    | DiTConfig
    | TextConfig
    | ClassTokenConfig
    | LatentDiffusionConfig
)

SIZES: dict[str, Config] = {
    **vit_config.SIZES,
    **swin_config.SIZES,
    **convnet_config.SIZES,
    **autoencoder_config.SIZES,
    **text_config.SIZES,
    **dit_config.SIZES,
    **latent_diffusion_config.SIZES,
}

# Type of config -> the module and the class of its network.
NETWORKS: dict[type, tuple[str, str]] = {
    ViTConfig: ("vit", "ViT"),
    SwinConfig: ("swin", "Swin"),
    ConvNetConfig: ("convnet", "ConvNet"),
    AutoencoderConfig: ("autoencoder", "Autoencoder"),
    TinyAutoencoderConfig: ("tiny_autoencoder", "TinyAutoencoder"),
    UNetConfig: ("unet", "UNet"),
    DiTConfig: ("dit", "DiT"),
    TextConfig: ("text", "TextEncoder"),
    ClassTokenConfig: ("text", "ClassToken"),
    LatentDiffusionConfig: ("latent_diffusion", "LatentDiffusion"),
}


def list_models(pattern: str = "*") -> list[str]:
    """Return the names that `create` takes and a shell pattern such as "vit-b*" matches, by family and size."""
    return [name for name in SIZES if fnmatch.fnmatchcase(name, pattern)]


def config_for(name: str, **changes: Any) -> Config:
    """Return the config of a named size with some fields changed.

    `image_size` and `window_size` may be one number for a square.

    Raises:
        ConfigError: the name (near names are listed) or a field is unknown.
    """
    if name not in SIZES:
        near = near_names(name, SIZES, limit=4)
        hint = f"near names: {', '.join(near)}; " if near else ""
        raise ConfigError(f"no model is called {name!r}; {hint}`triptych list` shows all")
    if isinstance(changes.get("image_size"), numbers.Integral):
        changes["image_size"] = (changes["image_size"], changes["image_size"])
    known = [field.name for field in fields(SIZES[name])]
    for key in changes:
        if key not in known:
            hint = did_you_mean(key, known) or f"; it has {', '.join(known)}"
            raise ConfigError(f"{name} has no field {key!r}{hint}")
    base = SIZES[name]
    depths = changes.get("depths", getattr(base, "depths", None))
    if "window_size" in changes and isinstance(base, SwinConfig) and isinstance(depths, tuple | list):
        window = changes["window_size"]
        config = replace(base, **{**changes, "window_size": windows_of(window, len(depths))})
        return replace(config, window_size=fitting(config, window))
    return replace(base, **changes)


def build(config: Config) -> "Network":
    """Return the network of a config, with random weights."""
    module, name = NETWORKS[type(config)]
    return getattr(importlib.import_module(f"triptych.models.{module}"), name)(config)


def create(name: str, **changes: Any) -> "Network":
    """Return a named network with random weights, such as `create("vit-b16", num_classes=10, image_size=384)`.

    Args:
        name: one of `list_models()`.
        **changes: fields of the family's config, such as `ViTConfig`. `window_size` may be one number or (height,
            width) for all stages, reduced where a stage's map at the image size is smaller, as `load` does; or one
            for each stage, which is not changed.

    Raises:
        ConfigError: unknown name (near names are listed) or field, or sizes that do not fit together.
    """
    return build(config_for(name, **changes))
