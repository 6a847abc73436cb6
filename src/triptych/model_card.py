"""What a checkpoint says besides its tensors: how pictures are prepared, class names, scores."""

from dataclasses import dataclass, field
from typing import Literal

from triptych.errors import UserError

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)

Interpolation = Literal["nearest", "bilinear", "bicubic", "lanczos", "box"]


@dataclass(frozen=True, kw_only=True)
class Preprocess:
    """From a picture to what the network is fed. The network itself never sees any of it."""

    size: tuple[int, int] = (224, 224)
    """Height and width in pixels that the network is fed."""
    crop: float = 0.875
    """Share of the resized picture's side that the centre crop keeps, in (0, 1]."""
    mode: Literal["crop", "squash", "pad"] = "crop"
    """Resize the short side and crop the centre, stretch to the size, or fit inside and pad."""
    interpolation: Interpolation = "bicubic"
    mean: tuple[float, float, float] = IMAGENET_MEAN
    """Subtracted from pixels in [0, 1]."""
    std: tuple[float, float, float] = IMAGENET_STD
    """Then divided by."""
    background: tuple[int, int, int] = (255, 255, 255)
    """Red, green, blue (0 to 255) under transparent pixels."""

    def __post_init__(self):
        if min(self.size) < 1:
            raise UserError(f"size is {self.size}, which must be two positive numbers of pixels")
        if not 0 < self.crop <= 1:
            raise UserError(f"crop is {self.crop}, which must be above 0 and at most 1")
        if min(self.std) <= 0:
            raise UserError(f"std is {self.std}, which must be positive")


@dataclass(frozen=True, kw_only=True)
class Card:
    """A model's card. It travels in the checkpoint's metadata; pipelines read it, networks do not."""

    preprocess: Preprocess = field(default_factory=Preprocess)
    classes: tuple[str, ...] | None = None
    """Name of each class, by index."""
    colours: tuple[tuple[int, int, int], ...] | None = None
    """Red, green and blue (0 to 255) that each class is drawn in, by index; none leaves the choice to the pipeline."""
    groupings: dict[str, tuple[str, ...]] = field(default_factory=dict)
    """Coarser namings: {"group": the group of each class}; scored beside the classes."""
    guidance: float | None = None
    """How closely a painter follows its prompt if nobody says; none is 7.5, of classes 1.5."""
    source: str = ""
    """Where preprocessing and names come from: the file itself, or the convention that stood in."""
    license: str | None = None
    figures: dict[str, float] = field(default_factory=dict)
    """Measured scores by name."""
    notes: str = ""
