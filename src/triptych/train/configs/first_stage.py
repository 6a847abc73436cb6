"""What a training run of a first stage is, as data. No torch here."""

from dataclasses import dataclass, field
from typing import Literal

from triptych.config import check, need
from triptych.data.config import AugmentConfig, DataConfig
from triptych.evaluation.config import PerceptualConfig
from triptych.train.configs.base import LoopConfig, OptimConfig


@dataclass(frozen=True, kw_only=True)
class DiscriminatorConfig:
    """The patch discriminator that reconstructions learn to pass (Rombach et al. 2022, Section G)."""

    weight: float = 0.5
    """Times its gradient, made as long as that of the other losses, is added; 0 is off."""
    loss: Literal["hinge", "non_saturating"] = "hinge"
    """max(0, 1 - logit) and -logit (Lim and Ye 2017), or logistic losses for both (Goodfellow et al. 2014)."""
    adaptive: bool = True
    """Make both gradients as long at the decoder's last layer (Esser et al. 2021, Equation 7); else add as they are."""
    start: float = 0.5
    """Where it comes in: a step, or below 1 a share of the run."""
    channels: int = 64
    """Of its first layer; 64 as published."""
    layers: int = 3
    """Of stride 2; 3 as published, for 70 pixels a logit; 2 for 34."""
    lr: float | None = None
    """Its peak learning rate; none means the autoencoder's."""

    def __post_init__(self) -> None:
        check(self)
        need(self.weight >= 0, self, "weight", "at least 0")
        need(self.start >= 0, self, "start", "at least 0")
        need(self.channels >= 1, self, "channels", "at least 1")
        need(1 <= self.layers <= 6, self, "layers", "from 1 to 6")
        need(self.lr is None or self.lr > 0, self, "lr", "positive")


@dataclass(frozen=True, kw_only=True)
class CodebookConfig:
    """How the codebook of a VQ first stage learns."""

    update: Literal["gradient", "ema"] = "gradient"
    """By the loss's gradient, or as the moving average of the latents nearest to each entry."""
    weight: float = 1.0
    """Times the codebook's loss is added."""
    commitment: float = 0.25
    """Times the latents are pulled to their entries."""
    decay: float = 0.99
    """Of the moving averages."""
    revive_below: float = 0.01
    """An entry that is nearest to fewer latents a batch, on average, is put on one of the batch's; 0 is off."""

    def __post_init__(self) -> None:
        check(self)
        need(self.weight >= 0, self, "weight", "at least 0")
        need(self.commitment >= 0, self, "commitment", "at least 0")
        need(0 <= self.decay < 1, self, "decay", "from 0 to below 1")
        need(self.revive_below >= 0, self, "revive_below", "at least 0")


@dataclass(frozen=True, kw_only=True)
class CompressConfig:
    """Perceptual compression, the first stage of latent diffusion (Rombach et al. 2022, Section 3.1)."""

    data: str = "emoji"
    """Any images: labels are not looked at."""
    model: str = "kl-f8"
    """Autoencoder by name (`triptych list "kl*"`), with random weights; not looked at when `init` is given."""
    model_args: tuple[str, ...] = ()
    """Changes to the named autoencoder: latent_channels=8 multipliers=[1,2,4]."""
    init: str | None = None
    """Start from these weights."""
    image_size: tuple[int, int] | None = None
    """Height and width of the crops to train at; none means the model's own. A multiple of its factor."""
    enlarge: bool = False
    """Enlarge pictures that are smaller than the crop, instead of refusing them."""
    pixels: Literal["l1", "l2"] = "l1"
    """Error of pixels: absolute or squared."""
    kl: float = 1e-6
    """Weight of the KL divergence as published: of its sum over latents, beside the sum of errors over pixels."""
    logvar: bool = False
    """Learn the variance of pixels about their reconstruction, which then weighs their error against the KL term."""
    perceptual: PerceptualConfig = field(default_factory=PerceptualConfig)
    discriminator: DiscriminatorConfig = field(default_factory=DiscriminatorConfig)
    codebook: CodebookConfig = field(default_factory=CodebookConfig)
    features: str | None = "vit-emoji"
    """Whose features the Frechet distance of reconstructions, as a set, is of, at evaluations: as --extractor of
    `evaluate`; none leaves it out."""
    scale_per_channel: bool = False
    """Measure the scale and shift of the latents for each channel by itself."""
    scale_images: int = 50_000
    """Training images that they are measured on, at most."""
    loading: DataConfig = field(default_factory=DataConfig)
    augment: AugmentConfig = field(default_factory=AugmentConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    loop: LoopConfig = field(default_factory=LoopConfig)

    def __post_init__(self) -> None:
        check(self)
        need(self.kl >= 0, self, "kl", "at least 0")
        need(self.scale_images >= 1, self, "scale_images", "at least 1")
