"""Config of a latent diffusion model: the configs of its parts. Imports no torch."""

from dataclasses import dataclass, field, replace
from typing import Literal

from triptych.config import check
from triptych.diffusion.config import ProcessConfig
from triptych.errors import ConfigError
from triptych.models.configs import autoencoder as autoencoder_config
from triptych.models.configs import dit as dit_config
from triptych.models.configs import text as text_config
from triptych.models.configs import unet as unet_config
from triptych.models.configs.autoencoder import AutoencoderConfig, TinyAutoencoderConfig
from triptych.models.configs.dit import DiTConfig
from triptych.models.configs.image_tokens import ImageTokensConfig
from triptych.models.configs.text import ClassTokenConfig, TextConfig
from triptych.models.configs.unet import UNetConfig

Condition = Literal["text", "class", "boxes", "image", "nothing"]
"""The condition that a model generates from, besides spatial conditions."""
GenerationTask = Literal[
    "text_to_image",
    "image_to_image",
    "inpaint",
    "upscale",
    "unconditional",
    "class_conditional",
    "semantic",
    "layout",
]

ConcatConditioning = Literal["none", "mask+masked_image", "masked_image+mask", "depth", "image", "semantic_map"]

# Concatenated condition -> its channels: multiples of the latents' channels, and others.
CONCAT_CHANNELS: dict[ConcatConditioning, tuple[int, int]] = {
    "none": (0, 0),
    "mask+masked_image": (1, 1),
    "masked_image+mask": (1, 1),
    "depth": (0, 1),
    "image": (0, 3),
    "semantic_map": (0, 0),  # plus the channels of its own config
}

# Condition -> tasks of a model without spatial conditions, the default one first.
_TASKS: dict[Condition, tuple[GenerationTask, ...]] = {
    "text": ("text_to_image", "image_to_image", "inpaint"),
    "class": ("class_conditional",),
    "boxes": ("layout",),
    "image": (),
    "nothing": ("unconditional", "image_to_image", "inpaint"),
}
# Spatial condition -> tasks of a model that has it.
_SPATIAL_TASKS: dict[ConcatConditioning, tuple[GenerationTask, ...]] = {
    "mask+masked_image": ("inpaint",),
    "masked_image+mask": ("inpaint",),
    "depth": ("text_to_image", "image_to_image"),
    "image": ("upscale",),
    "semantic_map": ("semantic",),
}


@dataclass(frozen=True, kw_only=True)
class SemanticMapConfig:
    """Config of a semantic map's encoder, checked on construction."""

    num_classes: int
    channels: int = 3
    """Channels that are concatenated to the latents."""

    def __post_init__(self):
        check(self)
        if not 1 <= self.num_classes <= 255 or self.channels < 1:
            raise ConfigError(
                f"num_classes is {self.num_classes} and channels {self.channels}, which must be 1 to 255, and 1 or more"
            )


@dataclass(frozen=True, kw_only=True)
class LatentDiffusionConfig:
    """The parts of a latent diffusion model (Rombach et al. 2022, Figure 3), checked on construction."""

    autoencoder: AutoencoderConfig | TinyAutoencoderConfig
    network: UNetConfig | DiTConfig
    """The denoising network, a UNet or DiT."""
    text_encoder: TextConfig | ClassTokenConfig | ImageTokensConfig | None = None
    """Encoder of the prompt, the class, or an image as prompt; None in an unconditional model."""
    process: ProcessConfig = field(default_factory=ProcessConfig)
    concat: ConcatConditioning = "none"
    """Condition that is concatenated to the denoiser's input: a mask and the masked image's latents (Stable Diffusion),
    the same in the other order (the paper's inpainting), a depth map, a small image to upscale, or a semantic map."""
    semantic_map: SemanticMapConfig | None = None
    """Of concat="map"."""
    low_res_process: ProcessConfig | None = None
    """Upscaling: the process whose noise is added to the small image; the UNet's label is its time."""

    def __post_init__(self):
        check(self)
        latents = self.autoencoder.latent_channels
        name = "UNet" if isinstance(self.network, UNetConfig) else "DiT"
        times, more = CONCAT_CHANNELS[self.concat]
        if (self.semantic_map is None) != (self.concat != "semantic_map"):
            raise ConfigError(
                f"concat is {self.concat!r} and semantic_map {self.semantic_map}; a map's config goes "
                "with concat='semantic_map'"
            )
        more += 0 if self.semantic_map is None else self.semantic_map.channels
        if self.network.in_channels != latents * (1 + times) + more or self.network.out_channels != latents:
            raise ConfigError(
                f"the {name} takes {self.network.in_channels} channels and gives "
                f"{self.network.out_channels}; latents of "
                f"{latents} with concat={self.concat!r} need {latents * (1 + times) + more} and {latents}"
            )
        width = 0 if self.text_encoder is None else self.text_encoder.embed_dim
        if self.network.context_dim != width:
            raise ConfigError(
                f"the {name} takes tokens of {self.network.context_dim} channels, but the text encoder's have {width}"
            )

    @property
    def classes(self) -> ClassTokenConfig | DiTConfig | None:
        """The config that holds a class-conditional model's classes: class tokens, or a DiT; None for other models."""
        if self.text_encoder is None:
            return self.network if isinstance(self.network, DiTConfig) and self.network.num_classes else None
        return self.text_encoder if isinstance(self.text_encoder, ClassTokenConfig) else None

    @property
    def condition(self) -> Condition:
        """The condition that the model generates from, besides spatial conditions."""
        if self.classes is not None:
            return "class"
        if self.text_encoder is None:
            return "nothing"
        if isinstance(self.text_encoder, ImageTokensConfig):
            return "image"
        return "boxes" if getattr(self.text_encoder, "boxes", False) else "text"

    @property
    def tasks(self) -> tuple[GenerationTask, ...]:
        """The tasks of `DiffusionPipeline` that the model is made for, the default one first."""
        if self.condition in ("text", "nothing") and self.concat != "none":
            return _SPATIAL_TASKS[self.concat]
        return _TASKS[self.condition] if self.concat == "none" else ()

    @property
    def guidable(self) -> bool:
        """Whether the model has an unconditional prediction for classifier-free guidance."""
        return self.condition == "text" or bool(self.classes is not None and self.classes.null_class)

    @property
    def image_size(self) -> tuple[int, int]:
        """Height and width in pixels of the training images."""
        height, width = self.network.latent_size
        return height * self.autoencoder.downsample_factor, width * self.autoencoder.downsample_factor


def replaced_size(config: LatentDiffusionConfig, image_size: tuple[int, int]) -> LatentDiffusionConfig:
    """Return the config for another size of images; weights do not depend on it."""
    factor = config.autoencoder.downsample_factor
    latent = (image_size[0] // factor, image_size[1] // factor)
    return replace(config, network=replace(config.network, latent_size=latent))


def _ldm(stage: str, unet: str, last_beta: float, **more) -> LatentDiffusionConfig:
    """Return a model of the paper: betas start at 0.0015, and the checkpoint holds the scale of KL latents."""
    process = ProcessConfig(beta_start=0.0015, beta_end=last_beta)
    stages, unets = autoencoder_config.SIZES, unet_config.SIZES
    return LatentDiffusionConfig(
        **{"autoencoder": stages[stage], "network": unets[unet], "process": process, **more}
    )


def _sd(unet: str, text: str, prediction: Literal["eps", "v"] = "eps", **more) -> LatentDiffusionConfig:
    """Return a Stable Diffusion model."""
    return LatentDiffusionConfig(
        **{
            "autoencoder": autoencoder_config.SIZES["sd-vae"],
            "network": unet_config.SIZES[unet],
            "text_encoder": text_config.SIZES[text],
            "process": ProcessConfig(prediction=prediction),
            **more,
        }
    )


def _dit(name: str, side: int) -> LatentDiffusionConfig:
    """Return a model of the DiT paper, on Stable Diffusion's latents of square images."""
    return LatentDiffusionConfig(
        autoencoder=autoencoder_config.SIZES["sd-vae"],
        network=replace(dit_config.SIZES[name], latent_size=(side // 8, side // 8)),
        process=ProcessConfig(schedule="linear", beta_start=0.0001, beta_end=0.02),
    )


CLASS_ENCODERS = text_config.CLASS_SIZES

SIZES: dict[str, LatentDiffusionConfig] = {
    "sd1": _sd("sd1", "clip-l"),
    "sd1-inpaint": _sd("sd1-inpaint", "clip-l", concat="mask+masked_image"),
    "sd2": _sd("sd2", "openclip-h", "v"),
    "sd2-base": _sd("sd2-base", "openclip-h"),
    "sd2-inpaint": _sd("sd2-inpaint", "openclip-h", concat="mask+masked_image"),
    "sd2-depth": _sd("sd2-depth", "openclip-h", concat="depth"),
    "sd-x4-upscaler": _sd(
        "x4-upscaler",
        "openclip-h",
        "v",
        autoencoder=autoencoder_config.SIZES["sd-x4-vae"],
        concat="image",
        # Called linear in both places of its CompVis config, and scaled_linear in its diffusers folder.
        process=ProcessConfig(beta_start=0.0001, beta_end=0.02, prediction="v"),
        low_res_process=ProcessConfig(beta_start=0.0001, beta_end=0.02),
    ),
    "ldm-celeba": _ldm("vq-f4", "celeba", 0.0195),
    "ldm-ffhq": _ldm("vq-f4", "ffhq", 0.0195),
    "ldm-bedrooms": _ldm("vq-f4", "bedrooms", 0.0195),
    "ldm-churches": _ldm("kl-f8", "churches", 0.0155),
    "ldm-cin256": _ldm("vq-f8", "cin256", 0.0195, text_encoder=CLASS_ENCODERS["cin256"]),
    "ldm-cin256-v2": _ldm("vq-f4", "cin256-v2", 0.0195, text_encoder=CLASS_ENCODERS["cin256-v2"]),
    "ldm-txt2img-1p4b": _sd("txt2img-1p4B", "ldm-bert"),
    "ldm-layout": _ldm("vq-f4", "layout", 0.0205, text_encoder=text_config.SIZES["ldm-layout-text"]),
    "ldm-semantic": _ldm(
        "vq-f4", "semantic", 0.0205, concat="semantic_map", semantic_map=SemanticMapConfig(num_classes=182)
    ),
    "ldm-inpainting": _ldm("vq-f4-noattn", "inpainting-big", 0.0205, concat="masked_image+mask"),
    "ldm-bsr-sr": _ldm("vq-f4", "bsr-sr", 0.0155, concat="image"),
    "dit-xl2-256": _dit("dit-xl2", 256),
    "dit-xl2-512": _dit("dit-xl2", 512),
}
