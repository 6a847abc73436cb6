"""Config of a run that trains a first stage of latent diffusion."""

from dataclasses import dataclass, field
from typing import Literal

from triptych.config import check, need, need_at_least, need_fraction
from triptych.evaluation.config import PerceptualConfig
from triptych.training.configs.base import DataAndModel


@dataclass(frozen=True, kw_only=True)
class DiscriminatorConfig:
    """The patch discriminator that reconstructions are trained against (Rombach et al. 2022, Section G)."""

    weight: float = 0.5
    """Weight of the adversarial loss; 0 is off."""
    loss: Literal["hinge", "non_saturating"] = "hinge"
    """max(0, 1 - logit) and -logit (Lim and Ye 2017), or logistic losses for both (Goodfellow et al. 2014)."""
    adaptive: bool = True
    """Scale the adversarial gradient to the norm of that of the other losses, at the decoder's last layer (Esser et al.
    2021, Equation 7)."""
    start: float = 0.5
    """When it begins: a step, or below 1 a fraction of the run."""
    channels: int = 64
    """Channels of its first layer; 64 as published."""
    layers: int = 3
    """Layers of stride 2: 3 as published, for a receptive field of 70 pixels; 2 for 34."""
    lr: float | None = None
    """Its peak learning rate; none is the autoencoder's."""

    def __post_init__(self) -> None:
        check(self)
        need_at_least(self, 0, "weight", "start")
        need_at_least(self, 1, "channels")
        need(1 <= self.layers <= 6, self, "layers", "from 1 to 6")
        need(self.lr is None or self.lr > 0, self, "lr", "positive")


@dataclass(frozen=True, kw_only=True)
class CodebookConfig:
    """How the codebook of a VQ first stage is trained."""

    update: Literal["gradient", "ema"] = "gradient"
    """By the gradient of its loss, or as the moving average of the latents that are nearest to each entry."""
    weight: float = 1.0
    """Weight of the codebook loss."""
    commitment: float = 0.25
    """Weight of the commitment loss, which pulls latents to their entries."""
    decay: float = 0.99
    """Decay of the moving averages."""
    revive_below: float = 0.01
    """Reset an entry to a latent of the batch if on average fewer latents per batch are nearest to it; 0 is off."""

    def __post_init__(self) -> None:
        check(self)
        need_at_least(self, 0, "weight", "commitment", "revive_below")
        need_fraction(self, "decay", below_one=True)


@dataclass(frozen=True, kw_only=True)
class CompressConfig(DataAndModel):
    """A run that trains an autoencoder, the first stage of latent diffusion (Rombach et al. 2022, Section 3.1)."""

    data: str = "emoji"
    """Any images; labels are not used."""
    model: str = "kl-f8"
    """Autoencoder by name (`triptych list "kl*"`), with random weights; ignored if `init` is given."""
    model_args: tuple[str, ...] = ()
    """Changes to the named autoencoder, such as latent_channels=8 channel_multipliers=[1,2,4]."""
    image_size: tuple[int, int] | None = None
    """Height and width in pixels of the crops to train at, multiples of its factor; none is the model's own."""
    enlarge: bool = False
    """Enlarge images that are smaller than the crop, instead of refusing them."""
    pixels: Literal["l1", "l2"] = "l1"
    """Reconstruction error of pixels: absolute or squared."""
    kl: float = 1e-6
    """Weight of the KL divergence, as published: of its sum over latents, where errors are summed over pixels."""
    logvar: bool = False
    """Train the variance of pixels around their reconstruction, which weighs their error against the KL term."""
    perceptual: PerceptualConfig = field(default_factory=PerceptualConfig)
    discriminator: DiscriminatorConfig = field(default_factory=DiscriminatorConfig)
    codebook: CodebookConfig = field(default_factory=CodebookConfig)
    features: str | None = "vit-emoji"
    """Feature extractor for the Frechet distance of reconstructions at evaluations, as --extractor of `evaluate`; none
    is off."""
    scale_per_channel: bool = False
    """Measure scale and shift of the latents for each channel."""
    scale_images: int = 50_000
    """Maximum number of training images that they are measured on."""

    def __post_init__(self) -> None:
        super().__post_init__()
        need_at_least(self, 0, "kl")
        need_at_least(self, 1, "scale_images")
