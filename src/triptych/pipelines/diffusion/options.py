"""The options that determine a generated image, and the record of them in its file. Imports no torch."""

import math
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, TypedDict

from triptych.config import check
from triptych.diffusion.config import NUM_SEEDS, SAMPLERS, SPACINGS
from triptych.errors import ConfigError, did_you_mean, require_known
from triptych.models.configs.latent_diffusion import GenerationTask
from triptych.pipelines.diffusion.sampler_names import find_schedule, split_sampler

Tiling = Literal["", "x", "y", "xy"]

APG = ("eta", "threshold", "momentum")
HIRES_UPSCALERS = (
    *("latent", "latent-antialiased", "latent-bicubic", "latent-bicubic-antialiased", "latent-nearest"),
    *("latent-nearest-exact", "lanczos", "nearest"),
)
IMAGE_ROLES = ("init_image", "mask_image", "depth_map", "class_map")


@dataclass(frozen=True, kw_only=True)
class SamplingOptions:
    """The options of a generated image. Values are checked on construction; `to_json` and `from_json` store them.

    Arguments of `DiffusionPipeline`'s tasks, flags of `triptych generate` (with hyphens) and keys of an image's
    metadata have these names. None stands for a default that depends on the model or the task.
    """

    prompt: str = ""
    """Text to generate from, of any length; `(word:1.3)` changes a word's weight, `[a:b:0.5]` switches and `[a|b]`
    alternates between steps, `a :1.2 AND b` composes, and `BREAK` starts a new chunk."""
    negative_prompt: str = ""
    """Text to steer away from."""
    num_steps: int = 30
    """Sampler steps, at least 1."""
    guidance_scale: float | None = None
    """Classifier-free guidance; 1 is off, and twice as fast. Default: the model's own, else 7.5, 1.5 for classes."""
    seed: int = 0
    """Random seed of the first image, 0 to 2^32 - 1; each further image adds one."""
    height: int | None = None
    """Height in pixels, a multiple of the autoencoder's downsampling factor (usually 8). Default: the model's own."""
    width: int | None = None
    """Width in pixels, as for the height."""
    sampler: str = "dpm++2m"
    """ddpm, ddim, plms, euler, euler-ancestral, heun, heun++2, restart, lms, dpm2, dpm2-ancestral, dpm-fast,
    dpm-fast-ancestral, dpm-adaptive, dpm-adaptive-ancestral, dpm++2s-ancestral, dpm++sde, dpm++2m, dpm++2m-sde,
    dpm++2m-sde-heun, dpm++3m-sde, deis, unipc or lcm."""
    schedule: str | None = None
    """Noise levels that the sampler visits, such as karras, trailing or uniform. Default: that of the sampler."""
    clip_skip: int | None = None
    """Read the prompt from the text encoder's n-th last block, through the final norm: 1 is the last, 2 is usual for
    models trained so. Default: the model's own."""
    rng: Literal["cpu", "cuda"] = "cpu"
    """Noise of sampling: cpu, as diffusers and ComfyUI draw it, or cuda, what PyTorch draws on an NVIDIA GPU, as
    AUTOMATIC1111's web UI does by default. It is computed on the CPU in either case."""
    variation_seed: int = 0
    """Seed of the noise that `variation_strength` mixes in; each further image adds one to it instead of to `seed`."""
    variation_strength: float = 0.0
    """Share of the variation seed's noise in the initial noise, 0 to 1, mixed as in AUTOMATIC1111's web UI."""
    hires_scale: float = 1.0
    """Enlarge the image by this factor and sample a second time at that size (hires fix); 1 is off."""
    hires_steps: int | None = None
    """Steps of the second pass. Default: those of the first."""
    hires_strength: float = 0.7
    """How much the second pass changes, above 0 (nothing) to 1 (all)."""
    hires_upscaler: str = "latent"
    """How the first pass is enlarged: latent, latent-antialiased, latent-bicubic, latent-bicubic-antialiased,
    latent-nearest, latent-nearest-exact, or as an image by lanczos or nearest."""
    init_image: str = ""
    """Image file to start from, for image-to-image, inpainting or upscaling."""
    strength: float | None = None
    """How much to change the initial image, from 0 (nothing) to 1 (everything). Default: 0.6; with a mask, 1."""
    mask_image: str = ""
    """Mask file of the size of the initial image: white areas are generated, black areas are kept."""
    mask_feather: float = 0.0
    """Width in pixels of the blend between old and new, inside the edge of the mask."""
    depth_map: str = ""
    """Grayscale depth image (near is bright), for depth-conditioned models."""
    class_map: str = ""
    """Image with a class index in each pixel (255: none), for models conditioned on segmentation maps."""
    boxes: tuple[tuple[int, float, float, float, float], ...] = ()
    """Class, left, top, right and bottom of each object, corners from 0 to 1, for layout-conditioned models."""
    noise_level: int = 20
    """Timestep of the noise added to the image to upscale, for upscalers trained with it."""
    guidance_rescale: float = 0.0
    """Fraction of the contrast added by guidance to remove, 0 to 1; 0.7 is usual (Lin et al. 2023)."""
    guidance_interval: tuple[float, float] | None = None
    """Apply guidance only for sigma / alpha between these two (Kynkäänniemi et al. 2024)."""
    apg: dict[str, float] | None = None
    """Adaptive projected guidance (Sadat et al. 2024): its eta, threshold and momentum."""
    merge_tokens: float = 0.0
    """Fraction of the tokens of the finest self-attention to merge, 0 to 0.75 (Bolya and Hoffman 2023); less exact."""
    deep_cache: int = 1
    """Compute the deep part of the UNet only at every n-th step (DeepCache, Ma et al. 2023); less exact; 1 is off."""
    decoder: str = ""
    """File of a smaller autoencoder for the same latents (TAESD) to decode with: faster, with less detail."""
    tiling: Tiling = ""
    """Make the image seamless from left to right (x), top to bottom (y) or both (xy)."""
    tiled_decode: bool | Literal["auto"] = "auto"
    """Encode and decode in tiles, in bounded memory; auto uses tiles above one megapixel."""
    loras: dict[str, float | tuple[float, float]] = field(default_factory=dict)
    """LoRA files, or names in the pipeline's LoRA folder, each with its weight (1 is as trained), or with one for the
    text encoder and one for the UNet."""
    embeddings: dict[str, str] = field(default_factory=dict)
    """Words that prompts may use, each with its textual inversion file."""

    def __post_init__(self):
        check(self)
        for name in ("prompt", "negative_prompt"):
            if any("\ud800" <= letter <= "\udfff" for letter in getattr(self, name)):
                raise ConfigError(f"{name} holds bytes that are not UTF-8 text; write it in UTF-8")
        self._require_known_names()
        require_known(self.hires_upscaler, HIRES_UPSCALERS, "hires_upscaler")
        for name, fine, needed in self._ranges():
            if not fine:
                raise ConfigError(f"{name} is {getattr(self, name)}, which must be {needed}")
        for name, value in (self.apg or {}).items():
            if name not in APG or not math.isfinite(value):
                raise ConfigError(f"apg has {name}={value}; it takes the numbers {', '.join(APG)}")
        if self.apg is not None and self.guidance_rescale:
            raise ConfigError("guidance_rescale and apg both reduce oversaturation; give one of the two")

    def _require_known_names(self) -> None:
        """Raise an error for an unknown sampler or schedule, with ours where another program calls it so."""
        if self.sampler not in SAMPLERS:
            name, levels = split_sampler(self.sampler)
            if name is not None:
                schedule = find_schedule(levels) if levels else None
                with_levels = f" with the schedule {schedule}" if schedule else ""
                raise ConfigError(f"no sampler is called {self.sampler!r}; near names: {name}{with_levels}")
            require_known(self.sampler, SAMPLERS, "sampler")
        if self.schedule is not None and self.schedule not in SPACINGS:
            if schedule := find_schedule(self.schedule):
                raise ConfigError(f"no schedule is called {self.schedule!r}; near names: {schedule}")
            require_known(self.schedule, SPACINGS, "schedule")

    def _ranges(self) -> list[tuple[str, bool, str]]:
        """Yield (field, whether it is in range, the range in words)."""
        scale, interval, strength = self.guidance_scale, self.guidance_interval, self.strength
        return [
            ("num_steps", self.num_steps >= 1, "at least 1"),
            ("seed", 0 <= self.seed < NUM_SEEDS, f"from 0 to {NUM_SEEDS - 1}"),
            ("clip_skip", self.clip_skip is None or self.clip_skip >= 1, "at least 1 (the last block)"),
            ("variation_seed", 0 <= self.variation_seed < NUM_SEEDS, f"from 0 to {NUM_SEEDS - 1}"),
            ("variation_strength", 0 <= self.variation_strength <= 1, "from 0 (off) to 1"),
            ("hires_scale", 1 <= self.hires_scale <= 16, "from 1 (off) to 16"),
            ("hires_steps", self.hires_steps is None or self.hires_steps >= 1, "at least 1"),
            ("hires_strength", 0 < self.hires_strength <= 1, "above 0 and at most 1"),
            ("height", self.height is None or self.height >= 1, "a positive number of pixels"),
            ("width", self.width is None or self.width >= 1, "a positive number of pixels"),
            ("guidance_scale", scale is None or math.isfinite(scale), "a finite number such as 7.5"),
            ("guidance_rescale", 0 <= self.guidance_rescale <= 1, "from 0 (off) to 1"),
            (
                "guidance_interval",
                interval is None or 0 <= interval[0] < interval[1],
                "two rising values of sigma / alpha such as (0.3, 5.5)",
            ),
            ("merge_tokens", 0 <= self.merge_tokens <= 0.75, "from 0 (off) to 0.75"),
            ("deep_cache", self.deep_cache >= 1, "at least 1 (off)"),
            (
                "strength",
                strength is None or 0 <= strength <= 1,
                "from 0 (the image as it is) to 1 (all new)",
            ),
            ("noise_level", self.noise_level >= 0, "0 or more"),
            ("mask_feather", 0 <= self.mask_feather < 10_000, "0 or a number of pixels below 10,000"),
        ]

    @property
    def size(self) -> tuple[int, int] | None:
        """Height and width; None if either is missing."""
        return None if self.height is None or self.width is None else (self.height, self.width)


@dataclass(frozen=True, kw_only=True)
class GenerationRecord(SamplingOptions):
    """All settings of one image: its options, and the task, model and files they were used with.

    A generated image's record is complete: the pipeline has filled in each None and the model.
    """

    task: GenerationTask = "text_to_image"
    label: int | None = None
    """Class index; class_conditional only."""
    class_name: str | None = None
    hashes: dict[str, str] = field(default_factory=dict)
    """SHA-256 of what the options name: of images and latents the first 16 digits, of LoRAs and embeddings 12."""
    dtype: str = ""
    """Precision of the network: fp32, bf16 or fp16."""
    model: str = ""
    """The model's file, folder, hub id or name."""
    model_hash: str = ""
    """The model's file as AUTOMATIC1111's web UI identifies it."""
    weights_hash: str = ""
    """Fingerprint of the model's config and parameters, wherever it lies."""
    stopped_at: int | None = None
    """Steps done before the call was canceled; None if all were done."""
    software: str = ""
    """Program and version."""


class SamplingArguments(TypedDict, total=False):
    """`SamplingOptions` as keyword arguments of every task; the rest of its fields are arguments of single tasks."""

    num_steps: int
    guidance_scale: float | None
    seed: int
    height: int | None
    width: int | None
    sampler: str
    schedule: str | None
    clip_skip: int | None
    rng: Literal["cpu", "cuda"]
    variation_seed: int
    variation_strength: float
    hires_scale: float
    hires_steps: int | None
    hires_strength: float
    hires_upscaler: str
    guidance_rescale: float
    guidance_interval: tuple[float, float] | None
    apg: bool | Mapping[str, float] | None
    """True is the paper's projection alone."""
    merge_tokens: float
    deep_cache: int
    decoder: str | os.PathLike[str]
    tiling: str | tuple[bool, bool]
    """Letters ("x", "y", "xy"), or a pair of booleans."""
    tiled_decode: bool | Literal["auto"]
    loras: Mapping[str, float | tuple[float, float]]
    embeddings: Mapping[str, str]


class RunArguments(TypedDict, total=False):
    """Keyword arguments of every task that its images' records do not hold."""

    latents: Any
    """Standard normal noise (1 or num_images, c, height / f, width / f) to start from instead of the seed's."""

    batch_size: int
    """Images per forward pass of the network, 1 by default. Above 1, a pixel may differ by 1 of 255."""
    preview: Callable[[Any], object] | None
    """Called with a `Preview` after each step."""
    progress: bool | Callable[[int, int], object]
    """True shows a progress bar where stderr is a terminal; a function is called with the steps done and all steps."""
    cancel: Callable[[], bool] | None
    """Called after each step; True stops there, and the images so far are returned."""
    on_image: Callable[[Any], object] | None
    """Called with each image as soon as it is finished."""


class GenerationArguments(SamplingArguments, RunArguments, total=False):
    """Keyword arguments of every task of `DiffusionPipeline`."""

    num_images: int
    """How many images (of each class), 1 by default; image k uses seed + k."""


class LoopArguments(RunArguments, total=False):
    """Keyword arguments of `DiffusionPipeline.generate`."""

    should_generate: Callable[[Any], bool] | None
    """Whether to generate an image, given its complete `GenerationRecord`."""
    return_images: bool
    """True by default; False passes images to `on_image` only, in constant memory."""


def sampling_fields(arguments: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Split a task's keyword arguments into fields of `SamplingOptions`, in their plain types, and the others.

    Raises:
        TypeError: an unknown argument; a near name is suggested.
    """
    for name in arguments:
        if name not in GenerationArguments.__annotations__:
            names = GenerationArguments.__annotations__
            hint = did_you_mean(name, names) or f"; there are {', '.join(names)}"
            raise TypeError(f"no argument is called {name!r}{hint}")
    sampling = {name: arguments[name] for name in SamplingArguments.__annotations__ if name in arguments}
    others = {name: value for name, value in arguments.items() if name not in sampling}
    plain: dict[str, Callable[[Any], Any]] = {
        "tiling": parse_tiling,
        "apg": parse_apg,
        "decoder": os.fspath,
        "loras": lambda loras: {os.fspath(file): weight for file, weight in loras.items()},
        "embeddings": lambda words: {word: os.fspath(file) for word, file in words.items()},
    }
    return {n: plain[n](value) if n in plain else value for n, value in sampling.items()}, others


def parse_tiling(tiling: str | Sequence[bool]) -> Tiling:
    """Return the directions that wrap as letters, from letters in any order, "none", or a pair of booleans."""
    if not isinstance(tiling, str):
        tiling = "".join(letter for letter, wraps in zip("xy", tiling, strict=False) if wraps)
    known_tilings: dict[str, Tiling] = {"": "", "x": "x", "y": "y", "xy": "xy", "yx": "xy", "none": ""}
    if tiling not in known_tilings:
        raise ConfigError(f"tiling is {tiling!r}, which must be 'x', 'y', 'xy' or nothing")
    return known_tilings[tiling]


def parse_apg(apg: bool | Mapping[str, float] | None) -> dict[str, float] | None:
    """Return the numbers of adaptive projected guidance; True is the paper's projection alone."""
    if apg is None or apg is False:
        return None
    return {"eta": 0.0} if apg is True else dict(apg)
