"""Base of the image pipelines: a network on its device, images read ahead in order, unreadable ones skipped."""

import itertools
import logging
import os
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, Literal, TypeVar

import numpy as np
import torch
from PIL import Image
from torch import nn

from triptych.data.loading.workers import prefetch_map
from triptych.device import choose_device, choose_dtype, place_network
from triptych.errors import ConfigError, DataError, TriptychError
from triptych.pipelines.image_input import ImageInput, images_below, name_of
from triptych.torch_compile import compile_blocks

log = logging.getLogger(__name__)

A = TypeVar("A")
B = TypeVar("B")


class ImagePipeline:
    """A network on its device, and the images that are read for it.

    Args:
        net: a network with `config` and `card`, or what `tp.load` takes.
        device: None picks CUDA, then MPS, then CPU.
        dtype: "fp32", "bf16", "fp16"; None picks bf16 where the hardware multiplies it natively, and logs it
            once.
        batch_size: images per forward pass.
        workers: worker processes that read and resize ahead; 0 reads in this process.
        on_bad_image: "fail" raises at the first image that cannot be read; "skip" leaves it out of the
            results, logs it and lists it in `skipped`. A single image always raises.
        compile: `torch.compile` each block at the first images; see `triptych.torch_compile` for when it pays.

        max_pixels: largest number of pixels of an image; None is 178 million.

    Raises:
        TriptychError: an argument is out of its range.
    """

    def __init__(
        self,
        net: nn.Module | str | Path,
        device: str | torch.device | None = None,
        dtype: str | torch.dtype | None = None,
        batch_size: int = 16,
        workers: int = 0,
        on_bad_image: Literal["skip", "fail"] = "fail",
        compile: bool = False,
        max_pixels: int | None = None,
    ) -> None:
        if batch_size < 1 or workers < 0:
            raise ConfigError(f"batch_size {batch_size} must be at least 1 and workers {workers} at least 0")
        if on_bad_image not in ("skip", "fail"):
            raise ConfigError(f"on_bad_image is {on_bad_image!r}, which must be 'skip' or 'fail'")
        self.source = "" if isinstance(net, nn.Module) else os.fspath(net)
        if not isinstance(net, nn.Module):
            from triptych.weights import load

            net = load(net)
        self.check(net)
        self.device = choose_device(device)
        self.dtype = choose_dtype(dtype, self.device)
        self.net: Any = place_network(net, self.device, self.dtype, shared=not self.source)
        if compile:
            compile_blocks(self.net)
        self.card = self.net.card
        self.config = self.net.config
        self.batch_size, self.workers, self.on_bad_image = batch_size, workers, on_bad_image
        self.max_pixels = max_pixels
        self.skipped: list[str] = []

    def check(self, net: Any) -> None:
        """Raise a `ConfigError` if the network is not for this pipeline."""

    @property
    def classes(self) -> tuple[str, ...]:
        """Name of each class, by index; "class 3" where the card has no names."""
        count, names = self.config.num_classes, self.card.classes
        return names if names and len(names) == count else tuple(f"class {i}" for i in range(count))

    def answer(
        self, images: Any, one: Callable[[ImageInput], A], many: Callable[[Iterable[ImageInput]], Iterator[A]]
    ):
        """Return `one(image)` for a single image, a list for a list or tuple, and an iterator for the path of a
        folder or any other iterable.

        Raises:
            DataError: a folder has no images.
        """
        if isinstance(images, str | os.PathLike) and os.path.isdir(images):
            return many(
                _require_some(images_below(images), f"{images} contains no images; give a folder of images")
            )
        if isinstance(images, str | os.PathLike | bytes | Image.Image | np.ndarray):
            return one(images)
        results = many(images)
        return list(results) if isinstance(images, list | tuple) else results

    def readable(
        self, images: Iterable[ImageInput], read: Callable[[ImageInput], A], size: int
    ) -> Iterator[tuple[str, A]]:
        """Yield name and `read` of each image in order; worker processes read ahead, `size` images per request, and no
        further than needed."""
        attempt = _ReadAttempt(read)
        # Paths and bytes are read in the workers; opened images and arrays stay in this process.
        requests = (
            image if isinstance(image, str | os.PathLike | bytes) else attempt(image) for image in images
        )
        self.skipped = []
        for name, result in prefetch_map(attempt, requests, size, self.workers):
            if not isinstance(result, TriptychError):
                yield name, result
            elif self.on_bad_image == "fail":
                raise result
            else:
                log.warning("skipped: %s", result)
                self.skipped.append(name)


@dataclass(frozen=True)
class _ReadAttempt(Generic[A]):
    """Return an image's name and the result of reading it, or the error. Such a pair is returned unchanged. Runs in
    worker processes."""

    read: Callable[[ImageInput], A]

    def __call__(self, image: ImageInput | tuple[str, A | TriptychError]) -> tuple[str, A | TriptychError]:
        if isinstance(image, tuple):
            return image
        try:
            return name_of(image), self.read(image)
        except TriptychError as problem:
            return name_of(image), problem


def batches(items: Iterable[A], size: int) -> Iterator[list[A]]:
    """Yield lists of `size` items, the last one shorter."""
    items = iter(items)
    while batch := list(itertools.islice(items, size)):
        yield batch


def _require_some(items: Iterator[A], otherwise: str) -> Iterator[A]:
    """Return the same items. If there are none, raise a `DataError` now instead of at the first `next`."""
    try:
        first = next(items)
    except StopIteration:
        raise DataError(otherwise) from None
    return itertools.chain([first], items)
