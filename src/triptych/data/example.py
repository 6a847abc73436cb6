"""Types of data: an `Example` of a source, and a `Batch` of a loader."""

from dataclasses import dataclass
from os import PathLike
from typing import TYPE_CHECKING, NamedTuple, NotRequired, TypeAlias, TypedDict

import numpy as np
from PIL.Image import Image as PILImage

from triptych.errors import DataError

if TYPE_CHECKING:
    from torch import Tensor

    from triptych.distributed import BatchShard

Image: TypeAlias = np.ndarray | PILImage | bytes | str | PathLike[str]
"""An image before decoding: uint8 (H, W, 3 or 4), a PIL image, the bytes of an encoded file, or its path."""


class Box(NamedTuple):
    """Bounding box of an object: the pixels x0 <= x < x1, y0 <= y < y1, and its class."""

    label: int
    x0: int
    y0: int
    x1: int
    y1: int


@dataclass(frozen=True, slots=True)
class Example:
    """One image with its annotations.

    Attributes:
        image: see `Image`; `triptych.data.images.decode` turns any of them into an array.
        label: index into the source's `classes`; None if the source has no labels.
        caption: text that describes the image; None if there is none.
        id: name of the example, unique within its source and the same in every run.
        mask: class of each pixel (H, W): indices into the source's `mask_classes`, and `masks.void_of` that many
            classes where the class is unknown. None if the source has no masks.
        boxes: bounding boxes, whose labels are indices into `mask_classes`; None if there are none.
    """

    image: Image
    label: int | None
    caption: str | None
    id: str
    mask: np.ndarray | None = None
    boxes: tuple[Box, ...] | None = None


class Batch(TypedDict):
    """A batch of b examples: a plain dict, which the loader creates and the training loop extends.

    b is the batch size minus the damaged images; the last batch of an evaluation may be smaller.
    """

    # Set by `triptych.data.loading.loader.Loader`.
    image: "Tensor"
    """uint8 (b, 3 or 4, H, W), RGB or RGBA. In the batches of `make_full_image_loader` a list with the views of each
    image (`triptych.data.loading.test_time_views`); missing from the batches of a latent cache."""
    label: "Tensor"
    """int64 (b,): index into the source's `classes`; -1 if there is no label."""
    caption: list[str | None]
    """Caption of each example."""
    id: list[str]
    """Name of each example."""
    row: list[int]
    """Index of each example in the source."""
    aspect: "Tensor"
    """float32 (b,): width over height of each image before it was resized to the size of the batch."""
    bad: dict[str, str]
    """Damaged images that were left out of this batch: {id: reason}."""
    mask: NotRequired["Tensor"]
    """uint8 or int32 (b, H, W): class of each pixel, and `masks.void_of` where it is unknown or outside of the image;
    only if the source has masks. In the batches of `make_full_image_loader` a list of arrays (H, W)."""
    gone: NotRequired[str]
    """Why a file of the source can no longer be read. From a worker process to the loader, which raises it as an error;
    such a batch has no other key that can be used."""

    # Set by a cache of latents, in place of "image" and "aspect".
    mean: NotRequired["Tensor"]
    """(b, views, c, h, w): scaled latents, of the image and, if there are two views, of its mirror image."""
    std: NotRequired["Tensor"]
    """(b, views, c, h, w): standard deviation of the scaled latents; only of a KL-regularized autoencoder."""

    # Set by the training loop.
    number: NotRequired[int]
    """Number of the batch within an evaluation that is divided among processes."""


class TrainBatch(Batch):
    """A batch as the training loop hands it to the loss of a task."""

    seed: tuple[int, ...]
    """Seed of everything random about this batch: (seed of the run, step, batch of the step)."""
    progress: float
    """Fraction of the training that is done, from 0 to 1."""
    shard: NotRequired["BatchShard"]
    """Which rows of the batch of all processes these are; only with several processes."""


class SourceChangedError(DataError):
    """A file of the source is missing or has changed since it was opened. Unlike a damaged image it cannot be
    skipped."""
