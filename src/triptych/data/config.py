"""Configs of loading and augmentation. Imports no torch, so that `--help` is fast."""

from dataclasses import dataclass
from typing import Any, Literal

from triptych.config import need, need_at_least, need_fraction

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)

RGB = tuple[float, float, float]


@dataclass(frozen=True, kw_only=True)
class AugmentConfig:
    """Augmentation of training batches on the device. With everything at its zero it is a plain resize."""

    image_size: tuple[int, int] = (224, 224)
    """Height and width of the network's input in pixels."""
    crop_scale: tuple[float, float] = (0.35, 1.0)
    """Random resized crop: smallest and largest fraction of the image's area. `1 1` does not crop."""
    crop_ratio: tuple[float, float] = (3 / 4, 4 / 3)
    """Random resized crop: smallest and largest width over height, relative to that of `image_size`."""
    flip: float = 0.5
    """Probability of a horizontal flip."""
    degrees: float = 0.0
    """Rotation in degrees, drawn uniformly from [-degrees, degrees]."""
    translate: tuple[float, float] = (0.0, 0.0)
    """Largest shift along x and y, as fractions of the width and height."""
    zoom: tuple[float, float] = (1.0, 1.0)
    """Scale factor of the image, drawn log-uniformly between the two."""
    shear: float = 0.0
    """Shear along x and y in degrees, drawn uniformly from [-shear, shear]."""
    brightness: float = 0.0
    """Brightness factor, drawn uniformly from [1 - brightness, 1 + brightness]."""
    contrast: float = 0.0
    """Contrast factor, drawn uniformly from [1 - contrast, 1 + contrast]."""
    saturation: float = 0.0
    """Saturation factor, drawn uniformly from [1 - saturation, 1 + saturation]."""
    hue: float = 0.0
    """Hue shift, drawn uniformly from [-hue, hue]; 0.5 is half of the color wheel."""
    grayscale: float = 0.0
    """Probability of conversion to grayscale."""
    rand_augment: int = 0
    """RandAugment: number of operations applied to an image; 0 turns it off."""
    rand_augment_magnitude: float = 9.0
    """RandAugment: magnitude of each operation, above 0 and below 30."""
    erasing: float = 0.0
    """Probability of random erasing: one rectangle is filled with a random color."""
    mixup: float = 0.0
    """Alpha of mixup's Beta distribution (0.8 is usual); 0 turns it off."""
    cutmix: float = 0.0
    """Alpha of CutMix's Beta distribution (1.0 is usual); 0 turns it off. If mixup is on, too, one of the two is
    applied to each image, with equal probability."""
    mix_probability: float = 1.0
    """Probability that an image is mixed, if mixup or CutMix is on."""
    label_smoothing: float = 0.0
    """Fraction of the target that is spread evenly over all classes."""
    random_background: float = 0.8
    """Probability that an image with alpha is composited over a random color, gradient or noise."""
    background: RGB = (255.0, 255.0, 255.0)
    """Background of images with alpha otherwise: red, green and blue from 0 to 255."""
    mean: tuple[float, ...] = IMAGENET_MEAN
    """Mean that normalization subtracts, for values from 0 to 1; one number for gray images."""
    std: tuple[float, ...] = IMAGENET_STD
    """Standard deviation that normalization divides by."""

    def __post_init__(self) -> None:
        probabilities = ("flip", "grayscale", "erasing", "mix_probability", "random_background")
        need_fraction(self, *probabilities, "label_smoothing")
        need_at_least(self, 0, "degrees", "shear", "brightness", "contrast", "saturation", "mixup", "cutmix")
        for name in ("crop_ratio", "zoom"):
            low, high = getattr(self, name)
            need(0 < low <= high, self, name, "a positive range, the smaller first")
        low, high = self.crop_scale
        need(0 < low <= high <= 1, self, "crop_scale", "a range within 0 to 1, the smaller first")
        need(min(self.image_size) >= 1, self, "image_size", "a height and a width of at least 1")
        need(self.shear < 80, self, "shear", "below 80 degrees")
        need(0 <= self.hue <= 0.5, self, "hue", "from 0 to 0.5")
        need(
            all(0 <= fraction <= 1 for fraction in self.translate),
            self,
            "translate",
            "two fractions from 0 to 1",
        )
        need(0 <= self.rand_augment <= 15, self, "rand_augment", "from 0 to 15 operations")
        need(0 < self.rand_augment_magnitude < 30, self, "rand_augment_magnitude", "between 0 and 30")
        need(all(0 <= value <= 255 for value in self.background), self, "background", "three from 0 to 255")
        need(len(self.mean) >= 1, self, "mean", "one value for each channel")
        fits = len(self.std) == len(self.mean) and all(value > 0 for value in self.std)
        need(fits, self, "std", "positive, and as many values as mean")


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Loading: from files to uint8 batches."""

    batch_size: int = 64
    """Training batch size, summed over all processes."""
    eval_batch_size: int | None = None
    """Evaluation batch size; none is that of training."""
    workers: int = 2
    """Worker processes that read and decode, at most one per core; 0 decodes in the main process."""
    load_size: tuple[int, int] | None = None
    """Height and width of training images before the crop; none is 8/7 of the network's input."""
    cache: Literal["auto", "on", "off"] = "auto"
    """Keep decoded images in memory; auto does so below 1 GiB."""
    on_bad_image: Literal["skip", "fail"] = "skip"
    """Skip damaged images and list them at the end, or fail at the first."""
    max_pixels: int | None = None
    """Largest number of pixels of an image; none is 178 million."""
    value_range: tuple[float, float] | None = None
    """Values that are black and white, in images of other depths than 8 bits; none is the range of the image's
    depth. Kept in the model card."""
    bands: tuple[int, ...] | None = None
    """Bands (from 0) of an image to take as red, green and blue, or one as gray, or as many as the network has
    channels; none is the first ones. Kept in the model card."""
    keep_alpha: bool = False
    """Keep the alpha channel of image files, for random backgrounds; otherwise they are composited over white."""
    sampling: Literal["shuffled", "balanced"] = "shuffled"
    """Training order. shuffled: each image once an epoch; balanced: as many images of each class, so that those of rare
    classes are repeated."""
    stream: bool = False
    """Read tar shards, parquet files or a folder of images in place, in nearly sequential order, in constant memory."""
    shuffle_buffer: int = 8192
    """Streams: number of examples that are shuffled among each other."""
    lanes: int = 32
    """Streams: number of positions that are read in parallel; best a multiple of processes times workers."""
    eval_fraction: float = 0.1
    """Fraction held out for evaluation if the data has no split of its own."""
    image_column: str | None = None
    """Column that holds the images, if there are several candidates."""
    label_column: str | None = None
    """Column that holds the labels, if there are several candidates."""
    caption_column: str | None = None
    """Column that holds the captions, if there are several candidates."""
    mask_column: str | None = None
    """Column that holds the masks, if its name does not say so."""
    ignore_index: int = 255
    """Mask value that is ignored, as 255 always is."""
    reduce_zero_label: bool = False
    """Ignore 0 in masks and take 1 as the first class."""
    mask_threshold: float | None = None
    """Masks have two classes: pixels brighter than this are the second one. 127 suits JPEG masks and soft edges."""
    mask_palette: str | None = None
    """File with the name and color of each class of colored masks, such as a class_dict.csv (name, r, g, b)."""

    @property
    def columns(self) -> dict[str, Any]:
        """Keyword arguments of `triptych.data.open.open_source`: columns, meaning of mask values, streaming."""
        names = (
            "image_column",
            "label_column",
            "caption_column",
            "mask_column",
            "ignore_index",
            "reduce_zero_label",
            "mask_threshold",
            "mask_palette",
            "stream",
        )
        return {name: getattr(self, name) for name in names}

    def __post_init__(self) -> None:
        need_at_least(self, 0, "workers")
        need_at_least(self, 1, "batch_size", "eval_batch_size", "shuffle_buffer", "lanes")
        need(self.load_size is None or min(self.load_size) >= 1, self, "load_size", "a height and a width")
        need(
            self.sampling == "shuffled" or not self.stream,
            self,
            "sampling",
            "shuffled with stream, which is read in the order of its files",
        )
        need(0 <= self.ignore_index < 2**16, self, "ignore_index", "from 0 to 65535")
        need(0 < self.eval_fraction < 1, self, "eval_fraction", "between 0 and 1")
