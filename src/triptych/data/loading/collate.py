"""Decode examples and collate them into a batch, in the worker processes of a loader.

Training images are squashed to one size, without cropping; the batch holds their aspect ratios, and `augment` crops on
the device. Each image therefore decodes to the same tensor every time, which can be cached, and no part of it is lost
before the random crop.
"""

import math
from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np
import torch
from torch.utils.data import Dataset

from triptych.data.bands import ReadOptions, is_multiband
from triptych.data.example import Batch, Example, SourceChangedError
from triptych.data.images import decode_with_orientation
from triptych.data.loading.test_time_views import ViewOptions, make_views
from triptych.data.masks import mask_dtype, orient_mask, void_label
from triptych.data.resizing import Resize, ResizeLike, flatten_alpha, resize_crop, resize_of
from triptych.data.source import Source
from triptych.errors import DataError, TriptychError


class BatchDataset(Protocol):
    """A dataset that returns batches of examples of `source`."""

    @property
    def source(self) -> Source: ...
    def __getitems__(self, indices: Sequence[int], /) -> Batch: ...


def empty_batch(gone: str | None = None) -> Batch:
    """Return a batch without examples.

    Args:
        gone: why the source can no longer be read; see `Batch`.
    """
    batch: Batch = {
        "image": torch.empty(0), "label": torch.empty(0), "aspect": torch.empty(0),
        "caption": [], "id": [], "row": [], "bad": {},
    }  # fmt: skip
    if gone is not None:
        batch["gone"] = gone
    return batch


class DecodingDataset(Dataset):
    """Decodes the examples of a batch. Runs in the worker processes.

    Args:
        source: the examples.
        resize: how images are resized, and masks with them.
        alpha: return RGBA images.
        fast: decode JPEGs at a reduced size where that suffices. The pixels then differ slightly.
        min_size: height and width; a smaller image counts as damaged.
        max_pixels: as in `ReadOptions`.
    """

    def __init__(
        self,
        source: Source,
        resize: Resize,
        alpha: bool,
        fast: bool,
        min_size: tuple[int, int] | None = None,
        max_pixels: int | None = None,
    ):
        self.options = ReadOptions(max_pixels=max_pixels, value_range=resize.value_range, bands=resize.bands)
        self.source, self.resize, self.alpha, self.min_size = source, resize, alpha, min_size
        classes = source.mask_classes
        self.has_masks = classes is not None
        self.mask_type, self.void = mask_dtype(len(classes or ())), void_label(len(classes or ()))
        # Not with masks: after reduced decoding the original size, which the mask must have, is unknown.
        self.draft_size = resize.size if fast and not self.has_masks else None
        self.multiband = is_multiband(resize.bands)
        channels = len(resize.bands or ()) if self.multiband else 4 if alpha else 3
        self.shape = (channels, *resize.size)
        bytes_per_pixel = self.shape[0] + self.has_masks * np.dtype(self.mask_type).itemsize
        self.nbytes = len(source) * bytes_per_pixel * math.prod(resize.size)

    def __getitems__(self, indices: Sequence[int]) -> Batch:
        """Return the batch of some examples. Damaged images are left out and listed in "bad"."""
        bad: dict[str, str] = {}
        good: list[tuple[int, Example, Any, Any, float]] = []
        for row in map(int, indices):
            name = f"example {row}"
            try:
                example = self.source[row]
                name = example.id
                good.append((row, example, *self._load(example)))
            except SourceChangedError as problem:  # as text: an exception in a worker would add its traceback
                return empty_batch(gone=str(problem))
            except TriptychError as problem:
                bad[name] = str(problem)
        labels = [-1 if e.label is None else e.label for _, e, *_ in good]
        batch: Batch = {
            "image": self._stack([image for _, _, image, _, _ in good], self.shape, np.uint8),
            "label": torch.tensor(labels, dtype=torch.int64),
            "caption": [e.caption for _, e, *_ in good],
            "id": [e.id for _, e, *_ in good],
            "aspect": torch.tensor([aspect for *_, aspect in good], dtype=torch.float32),
            "row": [row for row, *_ in good],
            "bad": bad,
        }
        if self.has_masks:
            masks = [mask for *_, mask, _ in good]
            batch["mask"] = self._stack(masks, self.shape[1:], self.mask_type)
        return batch

    def _stack(self, arrays: list[np.ndarray], shape: tuple[int, ...], dtype: Any) -> Any:
        stacked = np.stack(arrays) if arrays else np.empty((0, *shape), dtype)
        return torch.from_numpy(np.ascontiguousarray(stacked))

    def _load(self, example: Example) -> tuple[Any, Any, float]:
        """Return the resized image, uint8 (C, h, w); its mask (h, w), if the source has masks; and the original width
        over height."""
        array, mask = self._decode(example)
        if self.min_size is not None and any(a < b for a, b in zip(array.shape, self.min_size, strict=False)):
            (height, width), (min_height, min_width) = array.shape[:2], self.min_size
            raise DataError(
                f"{example.id} is {width} x {height} pixels, smaller than the crop of {min_width} x {min_height}; "
                "use larger images, a smaller --image-size, or --enlarge"
            )
        aspect = array.shape[1] / array.shape[0]
        r = self.resize
        array = resize_crop(array, r.size, r.crop, r.mode, r.interpolation, r.background, self.multiband)
        if mask is not None:
            mask = resize_crop(mask, r.size, r.crop, r.mode, "nearest", (self.void,))
        return array.transpose(2, 0, 1), mask, aspect

    def _decode(self, example: Example) -> tuple[np.ndarray, np.ndarray | None]:
        """Return the full image, and its mask if the source has masks."""
        array, orientation = decode_with_orientation(
            example.image, self.alpha, name=example.id, min_size=self.draft_size, options=self.options
        )
        if not self.has_masks:
            return array, None
        if example.mask is None:
            raise DataError(f"{example.id} has no mask; add one or leave the image out")
        return array, orient_mask(example.mask, orientation, (array.shape[0], array.shape[1]), example.id)


class FullImageDataset(DecodingDataset):
    """Prepares full images for a segmenter: the views of each image (`make_views`), and its mask at its own size. Both
    are lists in the batch, because sizes differ."""

    def __init__(
        self,
        source: Source,
        preprocess: ResizeLike,
        views: ViewOptions,
        patch_size: int,
        max_pixels: int | None = None,
    ):
        resize = resize_of(preprocess)
        alpha = tuple(resize.background) != (255, 255, 255)
        super().__init__(source, resize, alpha=alpha, fast=False, max_pixels=max_pixels)
        self.views, self.patch_size = views, patch_size

    def _stack(self, arrays: list[np.ndarray], shape: tuple[int, ...], dtype: Any) -> Any:
        return arrays  # not tensors: each would need an open file to be sent from a worker

    def _load(self, example: Example) -> tuple[Any, Any, float]:
        array, mask = self._decode(example)
        array = array if self.multiband else flatten_alpha(array, self.resize.background)
        return (
            make_views(array, self.resize, self.views, self.patch_size),
            mask,
            array.shape[1] / array.shape[0],
        )
