"""What loading and augmenting can be told. No torch here, so that `--help` is instantaneous."""

from dataclasses import dataclass
from typing import Any, Literal

from triptych.errors import UserError

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)

RGB = tuple[float, float, float]


@dataclass(frozen=True, kw_only=True)
class AugmentConfig:
    """Augmentation of whole training batches, on the device. Everything at its zero is a plain resize."""

    image_size: tuple[int, int] = (224, 224)
    """Height and width in pixels of what the network sees."""
    crop_scale: tuple[float, float] = (0.35, 1.0)
    """Random resized crop: least and greatest share of the image's area. `1 1` keeps all of it."""
    crop_ratio: tuple[float, float] = (3 / 4, 4 / 3)
    """Least and greatest width over height of the crop, relative to that of `image_size`."""
    flip: float = 0.5
    """Probability of a left-right mirror image."""
    degrees: float = 0.0
    """Rotation, drawn from minus to plus this many degrees."""
    translate: tuple[float, float] = (0.0, 0.0)
    """Shift along x and y, at most these shares of the width and height."""
    zoom: tuple[float, float] = (1.0, 1.0)
    """Factor on the drawn object's size, drawn log-uniformly between the two."""
    shear: float = 0.0
    """Shear along x and y, drawn from minus to plus this many degrees."""
    brightness: float = 0.0
    """Brightness factor, drawn from 1 minus to 1 plus this."""
    contrast: float = 0.0
    """Contrast factor, drawn from 1 minus to 1 plus this."""
    saturation: float = 0.0
    """Saturation factor, drawn from 1 minus to 1 plus this."""
    hue: float = 0.0
    """Turn of the hue, drawn from minus to plus this; 0.5 is half the colour circle."""
    grayscale: float = 0.0
    """Probability of taking all colour away."""
    rand_augment: int = 0
    """RandAugment: how many operations an image gets; 0 is off."""
    rand_augment_magnitude: float = 9.0
    """RandAugment: strength of each operation, above 0 and below 30."""
    erasing: float = 0.0
    """Probability of painting over one random rectangle."""
    mixup: float = 0.0
    """Alpha of mixup's Beta distribution (0.8 is usual); 0 is off."""
    cutmix: float = 0.0
    """Alpha of cutmix's Beta distribution (1.0 is usual); 0 is off. With mixup on, a coin decides."""
    mix_probability: float = 1.0
    """Probability that an image is mixed at all, when mixup or cutmix is on."""
    label_smoothing: float = 0.0
    """Share of the target spread evenly over all classes."""
    random_background: float = 0.8
    """Probability that an image with alpha goes over a random colour, gradient or noise."""
    background: RGB = (255.0, 255.0, 255.0)
    """What an image with alpha is shown on otherwise: red, green, blue from 0 to 255."""
    mean: RGB = IMAGENET_MEAN
    """Mean that normalisation takes away, of values from 0 to 1."""
    std: RGB = IMAGENET_STD
    """Standard deviation that normalisation divides by."""

    def __post_init__(self) -> None:
        probabilities = ("flip", "grayscale", "erasing", "mix_probability", "random_background")
        for name in (*probabilities, "label_smoothing"):
            _need(0 <= getattr(self, name) <= 1, self, name, "from 0 to 1")
        for name in ("degrees", "shear", "brightness", "contrast", "saturation", "mixup", "cutmix"):
            _need(getattr(self, name) >= 0, self, name, "at least 0")
        for name in ("crop_ratio", "zoom"):
            low, high = getattr(self, name)
            _need(0 < low <= high, self, name, "a positive range, the smaller first")
        low, high = self.crop_scale
        _need(0 < low <= high <= 1, self, "crop_scale", "a range within 0 to 1, the smaller first")
        _need(min(self.image_size) >= 1, self, "image_size", "a height and a width of at least 1")
        _need(self.shear < 80, self, "shear", "below 80 degrees")
        _need(0 <= self.hue <= 0.5, self, "hue", "from 0 to 0.5")
        _need(all(0 <= share <= 1 for share in self.translate), self, "translate", "two shares from 0 to 1")
        _need(0 <= self.rand_augment <= 15, self, "rand_augment", "from 0 to 15 operations")
        _need(0 < self.rand_augment_magnitude < 30, self, "rand_augment_magnitude", "between 0 and 30")
        _need(all(0 <= value <= 255 for value in self.background), self, "background", "three from 0 to 255")
        _need(all(value > 0 for value in self.std), self, "std", "three positive values")


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """How files become uint8 batches."""

    batch_size: int = 64
    """Images in a training batch, of all processes together."""
    eval_batch_size: int | None = None
    """Images in an evaluation batch; none means as in training."""
    workers: int = 2
    """Processes that read and decode, at most one a core; 0 does it in this one."""
    load_size: tuple[int, int] | None = None
    """Height and width of training images before the crop; none means 8/7 of the network's."""
    cache: Literal["auto", "on", "off"] = "auto"
    """Keep decoded images in memory; auto does so below 1 GB."""
    on_bad_image: Literal["skip", "fail"] = "skip"
    """A damaged image is left out and listed at the end, or stops the run."""
    keep_alpha: bool = False
    """Keep the alpha of users' images, for random backgrounds; otherwise they are shown on white."""
    stream: bool = False
    """Read tar shards, parquet or a folder of millions in place, nearly in the order in which they lie."""
    shuffle_buffer: int = 8192
    """Of a stream, examples that are shuffled among each other at a time."""
    lanes: int = 32
    """Of a stream, places that are read side by side; a multiple of processes times workers is read best."""
    eval_fraction: float = 0.1
    """Share held back for evaluation where the data has no split of its own."""
    image_column: str | None = None
    """Column that holds the images, where there are several."""
    label_column: str | None = None
    """Column that holds the labels, where there are several."""
    caption_column: str | None = None
    """Column that holds the captions, where there are several."""
    mask_column: str | None = None
    """Column that holds the masks, where its name does not tell."""
    ignore_index: int = 255
    """Number in masks that is no class and is left out, as 255 always is."""
    reduce_zero_label: bool = False
    """In masks 0 is no class and is left out, and 1 is the first."""

    @property
    def columns(self) -> dict[str, Any]:
        """What opening the data is told: which column is what, which numbers of masks are no class, how it is read."""
        names = (
            "image_column",
            "label_column",
            "caption_column",
            "mask_column",
            "ignore_index",
            "reduce_zero_label",
            "stream",
        )
        return {name: getattr(self, name) for name in names}

    def __post_init__(self) -> None:
        _need(self.batch_size >= 1, self, "batch_size", "at least 1")
        _need(self.eval_batch_size is None or self.eval_batch_size > 0, self, "eval_batch_size", "at least 1")
        _need(self.workers >= 0, self, "workers", "at least 0")
        _need(self.load_size is None or min(self.load_size) >= 1, self, "load_size", "a height and a width")
        _need(0 <= self.ignore_index < 2**16, self, "ignore_index", "from 0 to 65535")
        _need(self.shuffle_buffer >= 1, self, "shuffle_buffer", "at least 1")
        _need(self.lanes >= 1, self, "lanes", "at least 1")
        _need(0 < self.eval_fraction < 1, self, "eval_fraction", "between 0 and 1")


def _need(fine: bool, config: AugmentConfig | DataConfig, name: str, what: str) -> None:
    if not fine:
        raise UserError(f"{type(config).__name__}.{name} is {getattr(config, name)}, which must be {what}")
