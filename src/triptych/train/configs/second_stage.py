"""What a run of the second stage is, a latent diffusion model on a frozen autoencoder, as data. No torch here."""

from dataclasses import dataclass, field
from typing import Literal

from triptych.config import check, need
from triptych.data.config import AugmentConfig, DataConfig
from triptych.diffusion.config import NoiseConfig, ProcessConfig
from triptych.errors import UserError
from triptych.train.configs.base import LoopConfig, OptimConfig

FLIP_ONLY = AugmentConfig(crop_scale=(1.0, 1.0), crop_ratio=(1.0, 1.0), flip=0.5, random_background=0.0)
"""Whole pictures, mirrored now and then: what a latent cache can hold."""


@dataclass(frozen=True, kw_only=True)
class CaptionConfig:
    """What reads the captions: a transformer that learns with the rest (Rombach et al. 2022, Section 4.3.1), on byte
    pairs learned from the captions; or a frozen encoder."""

    encoder: str | None = None
    """A frozen text encoder instead: a file, folder or hub id of one, or of a Stable Diffusion that holds one."""
    vocabulary: int = 8192
    """Most entries of the vocabulary; few captions make fewer."""
    length: int = 0
    """Tokens of a caption with its start and end, the rest is cut off; 0 is what the longest needs, at most 77."""
    width: int = 256
    """Width of a token."""
    depth: int = 4
    """Blocks."""
    head_dim: int = 32
    """Width of a head."""
    train: Literal["auto", "on", "off"] = "auto"
    """Whether it learns: auto is that of the paper's kind, and not a CLIP. With `train lora` by low-rank updates."""

    def __post_init__(self) -> None:
        check(self)
        need(self.vocabulary >= 259, self, "vocabulary", "at least 259: the bytes, start, end and padding")
        need(
            self.length == 0 or self.length >= 3, self, "length", "0, or at least 3: a start, a token, an end"
        )
        need(self.depth >= 1, self, "depth", "at least 1")
        need(self.head_dim >= 1, self, "head_dim", "at least 1")
        need(self.width >= 1 and self.width % self.head_dim == 0, self, "width", "a multiple of head_dim")
        need(
            self.encoder is None or self.train != "on",
            self,
            "train",
            "left out where encoder names a frozen one",
        )


@dataclass(frozen=True, kw_only=True)
class LoraConfig:
    """Low-rank updates of the denoiser's attention (Hu et al. 2021), for `train lora`."""

    rank: int = 16
    """Of each update."""
    alpha: float = 16.0
    """Each is multiplied by alpha / rank."""
    feed_forward: bool = False
    """Also update the MLPs between the attentions."""

    def __post_init__(self) -> None:
        check(self)
        need(self.rank >= 1, self, "rank", "at least 1")
        need(self.alpha > 0, self, "alpha", "positive")


@dataclass(frozen=True, kw_only=True)
class WordConfig:
    """A word that a text encoder learns (Gal et al. 2023, textual inversion), for `train words`."""

    name: str = ""
    """What prompts will call it, such as <toy>."""
    like: str = ""
    """A word to start from, such as toy."""
    vectors: int = 1
    """Vectors that it stands for; each takes a token's room in a prompt."""
    templates: tuple[str, ...] = ()
    """What pictures are called whose captions do not name it; {} is the word. None takes `a photo of a {}` and the
    like; of a style that would be `a painting in the style of {}`."""

    def __post_init__(self) -> None:
        check(self)
        need(self.vectors >= 1, self, "vectors", "at least 1")
        need(
            all("{}" in one for one in self.templates),
            self,
            "templates",
            "texts that each hold {} for the word",
        )


@dataclass(frozen=True, kw_only=True)
class LatentCacheConfig:
    """Latents that are encoded once, and kept on disk."""

    use: Literal["auto", "on", "off"] = "auto"
    """auto keeps latents where augmentation does no more than mirror."""
    folder: str | None = None
    """Where; none is the run's own folder. Runs on the same data and first stage may share one."""
    dtype: Literal["fp16", "fp32"] = "fp16"
    """Of the numbers on disk."""
    shard: int = 1024
    """Pictures a file: what is lost at most when it is cut off."""
    batch_size: int = 32
    """Pictures that are encoded at a time."""

    def __post_init__(self) -> None:
        check(self)
        need(self.shard >= 1, self, "shard", "at least 1")
        need(self.batch_size >= 1, self, "batch_size", "at least 1")


@dataclass(frozen=True, kw_only=True)
class SamplesConfig:
    """Pictures painted at each evaluation, into samples/ of the run's folder: the same prompts and noise each time."""

    count: int = 8
    """How many; 0 is off."""
    prompts: tuple[str, ...] = ()
    """What of, in turn; none takes captions (or classes) that were held back."""
    steps: int = 20
    """Of DPM-Solver++."""
    guidance: float = 3.0
    """How closely to follow the prompt; 1 is the prompt alone."""

    def __post_init__(self) -> None:
        check(self)
        need(self.count >= 0, self, "count", "at least 0")
        need(self.steps >= 1, self, "steps", "at least 1")


@dataclass(frozen=True, kw_only=True)
class SecondStageConfig:
    """A run of the second stage (Rombach et al. 2022, Section 3.2 and 3.3): what to learn from, what learns, and how.

    The denoiser and a text encoder of its own learn; the first stage stays as it is.
    """

    data: str = "emoji"
    """`emoji`, a folder (metadata.jsonl, or a .txt beside each picture), tar shards, a parquet file or a hub id."""
    first_stage: str | None = None
    """The autoencoder whose latents are diffused: a RUN, file or hub id of one, or of a model that holds one."""
    condition: Literal["none", "class", "text", "image"] = "text"
    """What tells it what to paint: nothing, the label, the caption, or what a ViT or Swin sees in the picture."""
    image_encoder: str = "vit-emoji"
    """With condition image: the frozen ViT or Swin, a file, RUN, hub id or shipped name."""
    model: str = "unet-s"
    """The denoiser by name, with random weights; not looked at when `init` is given."""
    model_args: tuple[str, ...] = ()
    """Changes to the named denoiser: width=96 multipliers=[1,2,3]."""
    init: str | None = None
    """Start from the denoiser and the text encoder of this latent diffusion model: a RUN, file or hub id. Its process
    is kept, too; `process` can only ask it to end in pure noise."""
    prediction: Literal["eps", "v"] | None = None
    """What the denoiser of `init` predicts, where the file does not say (Stable Diffusion 2)."""
    train: Literal["all", "lora", "words"] = "all"
    """All of the denoiser; low-rank updates of its attention, which go into lora.safetensors; or a word of its text
    encoder alone, which goes into word.safetensors."""
    image_size: tuple[int, int] | None = None
    """Height and width to train at; none means those of `init`, or the first stage's own."""
    buckets: int = 1
    """Shapes that pictures are sorted into by their aspect, each of about the area of image_size; a batch is of one. 1
    cuts the middle out of every picture."""
    drop_condition: float = 0.1
    """Share of pictures whose condition is left out, so that guidance has something to be guided away from (Ho and
    Salimans 2022)."""
    text: CaptionConfig = field(default_factory=CaptionConfig)
    lora: LoraConfig = field(default_factory=LoraConfig)
    word: WordConfig = field(default_factory=WordConfig)
    process: ProcessConfig = field(default_factory=ProcessConfig)
    noise: NoiseConfig = field(default_factory=NoiseConfig)
    cache: LatentCacheConfig = field(default_factory=LatentCacheConfig)
    samples: SamplesConfig = field(default_factory=SamplesConfig)
    loading: DataConfig = field(default_factory=DataConfig)
    augment: AugmentConfig = FLIP_ONLY
    optim: OptimConfig = field(default_factory=OptimConfig)
    loop: LoopConfig = field(default_factory=LoopConfig)

    def __post_init__(self) -> None:
        check(self)
        need(self.buckets >= 1, self, "buckets", "at least 1")
        need(0 <= self.drop_condition < 1, self, "drop_condition", "from 0 to below 1")
        if self.init is None and self.prediction is not None:
            raise UserError(
                "prediction is of a model to start from; --process.prediction says it of a new one"
            )
        if self.text.train == "off" and self.text.encoder is None and self.init is None:
            raise UserError(
                "text.train is off, and a text encoder of random weights has nothing to say; name one with text.encoder"
            )
        if self.train != "all" and self.init is None:
            raise UserError(f"train={self.train} changes a model that is there; name it with init")
        if self.train != "all" and self.loop.compile:
            raise UserError(f"train={self.train} cannot be compiled block by block; leave loop.compile out")
        if self.train == "words" and self.condition != "text":
            raise UserError(
                f"train=words is of what reads captions, and condition is {self.condition!r}; give text"
            )
        if self.cache.use == "on" and not flips_only(self.augment):
            raise UserError(
                "cache.use is on, and latents are kept of pictures that are mirrored at most; leave augmentation out, "
                "or set cache.use to off"
            )
        if self.buckets > 1 and not flips_only(self.augment):
            raise UserError(
                f"buckets is {self.buckets}, and buckets keep pictures whole; leave augmentation out but for flip"
            )


def flips_only(augment: AugmentConfig) -> bool:
    """Whether a picture is no more than mirrored, so that its latents can be kept."""
    same = (
        "image_size",
        "background",
        "mean",
        "std",
        "flip",
        "label_smoothing",
        "mixup",
        "cutmix",
        "mix_probability",
    )
    return all(
        getattr(augment, name) == value
        for name, value in vars(FLIP_ONLY).items()
        if name not in (*same, "rand_augment_magnitude")
    )
