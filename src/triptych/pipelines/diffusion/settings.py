"""What makes a picture of a latent diffusion model, as plain values that travel in its file. Imports no torch."""

import math
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, TypedDict

from triptych.config import check
from triptych.diffusion.config import SAMPLERS, SPACINGS
from triptych.errors import UserError, require_known

Task = Literal[
    "text_to_image",
    "image_to_image",
    "inpaint",
    "upscale",
    "unconditional",
    "class_conditional",
    "semantic",
    "layout",
]
Tiling = Literal["", "x", "y", "xy"]

SEEDS = 2**32  # torch's generator on the processor reads 32 bits
APG = ("eta", "threshold", "momentum")
DTYPES = ("fp32", "bf16", "fp16")


class How(TypedDict, total=False):
    """What every task of `DiffusionPipeline` takes besides its own arguments."""

    spacing: str | None
    """Which levels the sampler visits, a name in `triptych.diffusion.config.SPACINGS`; None: the sampler's usual."""
    rescale: float
    """How much of the growth in contrast that guidance brings to take back, 0 to 1 (Lin et al. 2023; 0.7 there)."""
    interval: tuple[float, float] | None
    """Guide only where sigma / alpha is above the first and up to the second (Kynkäänniemi et al. 2024)."""
    apg: bool | Mapping[str, float] | None
    """Adaptive projected guidance (Sadat et al. 2024): True, or its `eta`, `threshold` and `momentum`."""
    merge_tokens: float
    """Share of the finest self-attention's tokens to merge, 0 to 0.75 (token merging, Bolya and Hoffman 2023): faster
    on large maps, and another picture. 0.5 is the paper's usual; see `triptych.models.unet_acceleration`."""
    deep_cache: int
    """Compute the deep part of the UNet at each n-th pass only (DeepCache, Ma et al. 2023): faster, and another
    picture; 3 is a good start."""
    decoder: str | os.PathLike[str]
    """File of another autoencoder on the same latents, such as TAESD's, that decodes in place of the model's own."""
    tiling: str | tuple[bool, bool]
    """Seamless pictures: "x" joins left to right, "y" top to bottom, "xy" both; or a pair of booleans."""
    loras: Mapping[str, float]
    """LoRAs' files, or names of them in the pipeline's `lora_dir`, each with its weight (1 is as it was trained)."""
    embeddings: Mapping[str, str]
    """Words that prompts may use -> files of textual inversion."""
    tiled_decode: bool | Literal["auto"]
    """Encode and decode in tiles, in bounded memory; "auto" does so above a megapixel."""
    batch_size: int
    """Pictures in one pass of the network."""
    preview: Callable[[Any], object] | None
    """Called with a `Preview` after each step."""
    progress: bool | Callable[[int, int], object]
    """True: a bar on stderr, where that is a terminal. Or a function, called with the steps done and all steps."""
    cancel: Callable[[], bool] | None
    """Called after each step: True stops there, and what there is so far is returned."""
    finished: Callable[[Any], object] | None
    """Called with each picture once it is there, so that it can be kept whatever happens to the next ones."""


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What makes one picture. Checked when made.

    Where None is allowed the pipeline fills in what goes with the model; a finished picture's settings are complete.
    """

    task: Task = "text_to_image"
    prompt: str = ""
    negative: str = ""
    label: int | None = None
    """The class, by index; class_conditional only."""
    class_name: str | None = None
    boxes: tuple[tuple[int, float, float, float, float], ...] = ()
    """Of layout: class, left, top, right and bottom of each, from 0 to 1."""
    seed: int = 0
    """Of this picture: picture k of a call with seed s has s + k."""
    steps: int = 30
    guidance: float | None = None
    """1 is the prompt alone; None is the task's usual."""
    size: tuple[int, int] | None = None
    """Height and width in pixels of what is sampled; None is the model's own, or that of the picture given."""
    sampler: str = "dpm++2m"
    spacing: str | None = None
    strength: float = 1.0
    """Of image_to_image and inpaint: the share of the steps that is done, 0 the picture as it is, 1 all new."""
    noise_level: int = 20
    """Of upscale: the time whose noise the small picture gets."""
    rescale: float = 0.0
    interval: tuple[float, float] | None = None
    apg: dict[str, float] | None = None
    merge_tokens: float = 0.0
    deep_cache: int = 1
    decoder: str = ""
    """File of the autoencoder that decoded; "" is the model's own."""
    tiling: Tiling = ""
    tiled_decode: bool | Literal["auto"] = "auto"
    feather: float = 0.0
    """Of inpaint: pixels inside the mask's edge over which old and new are blended."""
    loras: dict[str, float] = field(default_factory=dict)
    """Files of LoRAs -> their weights; of a finished picture those that its prompt asked for too."""
    embeddings: dict[str, str] = field(default_factory=dict)
    """Words of textual inversion -> their files."""
    inputs: dict[str, str] = field(default_factory=dict)
    """Pictures it was made from: image, mask, depth, map -> file."""
    hashes: dict[str, str] = field(default_factory=dict)
    """Of their pixels and of latents that were given the first 16 digits of the SHA-256; of LoRAs and words 12."""
    dtype: str = ""
    model: str = ""
    """The model's file, folder, hub id or name."""
    model_hash: str = ""
    weights: str = ""
    """A fingerprint of the model's numbers."""
    stopped_at: int | None = None
    """The step at which it was cancelled."""
    made_by: str = ""

    def __post_init__(self):
        check(self)
        for name in ("prompt", "negative"):
            if any("\ud800" <= letter <= "\udfff" for letter in getattr(self, name)):
                raise UserError(f"{name} holds bytes that are no UTF-8 text; write it in UTF-8")
        require_known(self.sampler, SAMPLERS, "sampler")
        if self.spacing is not None:
            require_known(self.spacing, SPACINGS, "spacing")
        if self.steps < 1:
            raise UserError(f"steps is {self.steps}, which must be at least 1")
        if not 0 <= self.seed < SEEDS:
            raise UserError(f"seed is {self.seed}, which must be from 0 to {SEEDS - 1}")
        if self.size is not None and min(self.size) < 1:
            raise UserError(
                f"size is {self.size}, which must be two positive numbers of pixels, height and width"
            )
        if self.guidance is not None and not math.isfinite(self.guidance):
            raise UserError(f"guidance is {self.guidance}, which must be a number such as 7.5")
        self._check_guidance()
        if not 0 <= self.merge_tokens <= 0.75:
            raise UserError(f"merge_tokens is {self.merge_tokens}, which must be from 0 (off) to 0.75")
        if self.deep_cache < 1:
            raise UserError(f"deep_cache is {self.deep_cache}, which must be at least 1 (off)")
        if not 0 <= self.strength <= 1:
            raise UserError(
                f"strength is {self.strength}, which must be from 0 (the picture as it is) to 1 (all new)"
            )
        if self.noise_level < 0:
            raise UserError(f"noise_level is {self.noise_level}, which must be 0 or more")
        if not 0 <= self.feather < 10_000:
            raise UserError(f"feather is {self.feather}, which must be 0 or a number of pixels")

    def _check_guidance(self) -> None:
        if not 0 <= self.rescale <= 1:
            raise UserError(f"rescale is {self.rescale}, which must be from 0 (off) to 1")
        if self.interval is not None and not 0 <= self.interval[0] < self.interval[1]:
            raise UserError(
                f"interval is {self.interval}, which must be two rising values of sigma / alpha such as (0.3, 5.5)"
            )
        for name, value in (self.apg or {}).items():
            if name not in APG or not math.isfinite(value):
                raise UserError(f"apg has {name}={value}; it takes the numbers {', '.join(APG)}")
        if self.apg is not None and self.rescale:
            raise UserError("rescale and apg are two cures for one thing; give one of them")


def sized(size: int | Sequence[int] | None) -> tuple[int, int] | None:
    """Height and width; one number stands for a square."""
    if size is None:
        return None
    pair = (size, size) if isinstance(size, int) else tuple(size)
    if len(pair) != 2:
        raise UserError(f"size is {size!r}, which must be (height, width) in pixels, or one number")
    return (pair[0], pair[1])


def tiling_of(tiling: str | Sequence[bool]) -> Tiling:
    """The directions that wrap, as letters."""
    if not isinstance(tiling, str):
        tiling = "".join(letter for letter, wraps in zip("xy", tiling, strict=False) if wraps)
    known_tilings: dict[str, Tiling] = {"": "", "x": "x", "y": "y", "xy": "xy", "yx": "xy", "none": ""}
    if tiling not in known_tilings:
        raise UserError(f"tiling is {tiling!r}, which must be 'x', 'y', 'xy' or nothing")
    return known_tilings[tiling]


def apg_of(apg: bool | Mapping[str, float] | None) -> dict[str, float] | None:
    """Adaptive projected guidance as its numbers; True takes the paper's projection alone."""
    if apg is None or apg is False:
        return None
    return {"eta": 0.0} if apg is True else dict(apg)
