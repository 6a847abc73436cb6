"""Config of a run that trains the second stage of latent diffusion, on a frozen autoencoder."""

from dataclasses import dataclass, field
from typing import Literal

from triptych.config import check, need, need_at_least, need_fraction
from triptych.data.config import AugmentConfig
from triptych.diffusion.config import NoiseConfig, ProcessConfig
from triptych.errors import ConfigError
from triptych.training.configs.base import DataAndModel

FLIP_ONLY = AugmentConfig(crop_scale=(1.0, 1.0), crop_ratio=(1.0, 1.0), flip=0.5, random_background=0.0)
"""Full images, flipped at random: what a latent cache can hold."""


@dataclass(frozen=True, kw_only=True)
class CaptionConfig:
    """The text encoder: a transformer that is trained with the denoiser (Rombach et al. 2022, Section 4.3.1), on byte
    pairs of the captions; or a pretrained one."""

    encoder: str | None = None
    """Pretrained text encoder to use: a file, folder or hub id of one, or of a Stable Diffusion model."""
    vocabulary: int = 8192
    """Maximum size of the vocabulary; few captions have fewer byte pairs."""
    max_length: int = 0
    """Tokens per caption with start and end token, longer ones are cut; 0 is as many as the longest has, at most 77."""
    embed_dim: int = 256
    """Channels of a token."""
    depth: int = 4
    """Number of blocks."""
    head_dim: int = 32
    """Channels of an attention head."""
    train: Literal["auto", "on", "off"] = "auto"
    """Whether it is trained; auto is yes unless it is a CLIP text encoder. With `train lora`, by low-rank updates."""

    def __post_init__(self) -> None:
        check(self)
        need(self.vocabulary >= 259, self, "vocabulary", "at least 259: the bytes, start, end and padding")
        need(
            self.max_length == 0 or self.max_length >= 3,
            self,
            "max_length",
            "0, or at least 3: a start, a token, an end",
        )
        need_at_least(self, 1, "depth", "head_dim")
        need(
            self.embed_dim >= 1 and self.embed_dim % self.head_dim == 0,
            self,
            "embed_dim",
            "a multiple of head_dim",
        )
        need(
            self.encoder is None or self.train != "on",
            self,
            "train",
            "left out if encoder names a pretrained one",
        )


@dataclass(frozen=True, kw_only=True)
class LoraConfig:
    """Low-rank updates of the denoiser's attention (Hu et al. 2021), for `train lora`."""

    rank: int = 16
    """Rank of each update."""
    alpha: float = 16.0
    """Each update is multiplied by alpha / rank."""
    feed_forward: bool = False
    """Also update the MLPs of the transformer blocks."""

    def __post_init__(self) -> None:
        check(self)
        need_at_least(self, 1, "rank")
        need(self.alpha > 0, self, "alpha", "positive")


@dataclass(frozen=True, kw_only=True)
class WordConfig:
    """A new word of the text encoder: textual inversion (Gal et al. 2023), for `train words`."""

    name: str = ""
    """The word in prompts, such as <toy>."""
    like: str = ""
    """Word to initialize it from, such as toy."""
    vectors: int = 1
    """Number of vectors; each takes the place of a token in a prompt."""
    templates: tuple[str, ...] = ()
    """Captions for images whose own does not contain the word; {} is the word. None uses `a photo of a {}` and similar
    ones; for a style, use `an image in the style of {}`."""

    def __post_init__(self) -> None:
        check(self)
        need_at_least(self, 1, "vectors")
        need(
            all("{}" in template for template in self.templates),
            self,
            "templates",
            "texts that each contain {} for the word",
        )


@dataclass(frozen=True, kw_only=True)
class LatentCacheConfig:
    """Latents that are encoded once and cached on disk."""

    use: Literal["auto", "on", "off"] = "auto"
    """auto caches latents if images are not augmented, or only flipped."""
    folder: str | None = None
    """Folder of the cache; none is in the run's folder. Runs with the same data and first stage can share one."""
    dtype: Literal["fp16", "fp32"] = "fp16"
    """Data type on disk."""
    shard: int = 1024
    """Images per file; encoding resumes at a whole file."""
    batch_size: int = 32
    """Images that are encoded at a time."""

    def __post_init__(self) -> None:
        check(self)
        need_at_least(self, 1, "shard", "batch_size")


@dataclass(frozen=True, kw_only=True)
class SamplesConfig:
    """Images generated at each evaluation into samples/ of the run's folder, with the same prompts and noise."""

    num_images: int = 8
    """Number of images; 0 is off."""
    prompts: tuple[str, ...] = ()
    """Prompts, used in turn; none takes held-out captions (or classes)."""
    num_steps: int = 20
    """Steps of DPM-Solver++."""
    guidance_scale: float = 3.0
    """Scale of classifier-free guidance; 1 is off."""

    def __post_init__(self) -> None:
        check(self)
        need_at_least(self, 0, "num_images")
        need_at_least(self, 1, "num_steps")


@dataclass(frozen=True, kw_only=True)
class SecondStageConfig(DataAndModel):
    """A run that trains the denoiser of a latent diffusion model (Rombach et al. 2022, Section 3.2 and 3.3), and its
    own text encoder; the first stage is frozen."""

    data: str = "emoji"
    """`emoji`, a folder (metadata.jsonl, or a .txt beside each image), tar shards, a parquet file or a hub id."""
    model: str = "unet-s"
    """Denoiser by name, with random weights; ignored if `init` is given."""
    model_args: tuple[str, ...] = ()
    """Changes to the named denoiser, such as base_channels=96 channel_multipliers=[1,2,3]."""
    init: str | None = None
    """Start from the denoiser and text encoder of this latent diffusion model: a RUN, file or hub id. Its diffusion
    process is used as well; `process` can only set zero terminal SNR."""
    image_size: tuple[int, int] | None = None
    """Height and width in pixels to train at; none is that of `init`, or of the first stage."""
    first_stage: str | None = None
    """Autoencoder: a RUN, file or hub id of one, or of a model that contains one."""
    condition: Literal["none", "class", "text", "image"] = "text"
    """Condition of the denoiser: none, the class label, the caption, or features of a ViT or Swin for the image."""
    image_encoder: str = "vit-emoji"
    """With condition image: the frozen ViT or Swin; a file, RUN, hub id or shipped name."""
    prediction: Literal["eps", "v"] | None = None
    """What the denoiser of `init` predicts, if its file does not say (Stable Diffusion 2)."""
    train: Literal["all", "lora", "words"] = "all"
    """Train all of the denoiser; low-rank updates of its attention, saved in lora.safetensors; or only a new word of
    the text encoder, saved in word.safetensors."""
    buckets: int = 1
    """Number of aspect ratios that images are sorted into, each with about the area of image_size; a batch has one of
    them. 1 crops every image to image_size."""
    drop_condition: float = 0.1
    """Fraction of images that are trained without condition, for classifier-free guidance (Ho and Salimans 2022)."""
    text: CaptionConfig = field(default_factory=CaptionConfig)
    lora: LoraConfig = field(default_factory=LoraConfig)
    word: WordConfig = field(default_factory=WordConfig)
    process: ProcessConfig = field(default_factory=ProcessConfig)
    noise: NoiseConfig = field(default_factory=NoiseConfig)
    cache: LatentCacheConfig = field(default_factory=LatentCacheConfig)
    samples: SamplesConfig = field(default_factory=SamplesConfig)
    augment: AugmentConfig = FLIP_ONLY

    def __post_init__(self) -> None:
        super().__post_init__()
        need_at_least(self, 1, "buckets")
        need_fraction(self, "drop_condition", below_one=True)
        if self.init is None and self.prediction is not None:
            raise ConfigError(
                "prediction is that of a model to start from; use --process.prediction for a new model"
            )
        if self.text.train == "off" and self.text.encoder is None and self.init is None:
            raise ConfigError(
                "text.train is off, and a text encoder with random weights is of no use; name one with text.encoder"
            )
        if self.train != "all" and self.init is None:
            raise ConfigError(f"train={self.train} changes an existing model; name it with init")
        if self.train != "all" and self.loop.compile:
            raise ConfigError(f"train={self.train} cannot be compiled block by block; leave loop.compile out")
        if self.train == "words" and self.condition != "text":
            raise ConfigError(
                f"train=words needs captions, and condition is {self.condition!r}; use condition text"
            )
        if self.cache.use == "on" and not flips_only(self.augment):
            raise ConfigError(
                "cache.use is on, and only latents of images that are at most flipped can be cached; leave "
                "augmentation out, or set cache.use to off"
            )
        if self.buckets > 1 and not flips_only(self.augment):
            raise ConfigError(
                f"buckets is {self.buckets}, and buckets use full images; leave augmentation out, except flip"
            )


def flips_only(augment: AugmentConfig) -> bool:
    """Return whether images are at most flipped, so that their latents can be cached."""
    harmless = {"image_size", "background", "mean", "std", "flip", "label_smoothing", "mixup", "cutmix"}
    harmless |= {"mix_probability", "rand_augment_magnitude"}
    return all(
        getattr(augment, name) == value for name, value in vars(FLIP_ONLY).items() if name not in harmless
    )
