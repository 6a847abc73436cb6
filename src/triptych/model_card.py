"""Metadata of a checkpoint: preprocessing, class names, scores, license."""

from dataclasses import dataclass, field
from typing import Literal

from triptych.config import need

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)

Interpolation = Literal["nearest", "bilinear", "bicubic", "lanczos", "box"]


@dataclass(frozen=True, kw_only=True)
class Preprocess:
    """How an image becomes the input of a network. Pipelines apply it; networks see only the result."""

    size: tuple[int, int] = (224, 224)
    """Height and width of the network's input, in pixels."""
    crop: float = 0.875
    """Fraction of the resized image's shorter side that the center crop keeps, in (0, 1]."""
    mode: Literal["crop", "squash", "pad"] = "crop"
    """crop: resize the shorter side, then crop the center. squash: resize to the size, ignoring the aspect ratio. pad:
    fit inside the size, then pad."""
    interpolation: Interpolation = "bicubic"
    mean: tuple[float, ...] = IMAGENET_MEAN
    """Mean of each channel, of pixels in [0, 1]; subtracted. One number for a network of gray images."""
    std: tuple[float, ...] = IMAGENET_STD
    """Standard deviation of each channel; divided by."""
    background: tuple[int, int, int] = (255, 255, 255)
    """Color (RGB, 0 to 255) behind transparent pixels."""

    bands: tuple[int, ...] | None = None
    """Indices of the three bands of an image that are red, green and blue, of one that is gray, or of those of a
    network with another number of channels; None is the first three."""
    value_range: tuple[float, float] | None = None
    """Values that are black and white, in images of other depths than 8 bits; None is the range of the image's
    depth."""

    def __post_init__(self):
        need(min(self.size) >= 1, self, "size", "two positive numbers of pixels")
        need(0 < self.crop <= 1, self, "crop", "above 0 and at most 1")
        need(min(self.std) > 0, self, "std", "positive")


@dataclass(frozen=True, kw_only=True)
class ModelCard:
    """A model card, stored in the checkpoint's metadata. Pipelines read it; networks do not."""

    preprocess: Preprocess = field(default_factory=Preprocess)
    classes: tuple[str, ...] | None = None
    """Name of each class, by index."""
    colors: tuple[tuple[int, int, int], ...] | None = None
    """Color (RGB, 0 to 255) of each class in overlays, by index; None leaves the choice to the pipeline."""
    groupings: dict[str, tuple[str, ...]] = field(default_factory=dict)
    """Coarser labels: {"group": the group of each class}. Evaluation scores them in addition to the classes."""
    guidance_scale: float | None = None
    """Default guidance scale of a generator; None means 7.5 for prompts and 1.5 for classes."""
    source: str = ""
    """Where preprocessing and class names come from: the file itself, or a publisher's convention."""
    license: str | None = None
    figures: dict[str, float] = field(default_factory=dict)
    """Scores by name, such as top-1 accuracy."""
    notes: str = ""
