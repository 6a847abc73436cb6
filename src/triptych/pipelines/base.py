"""What every pipeline of pictures has: a network made ready, pictures read ahead in order, bad ones left out."""

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
from triptych.errors import UserError
from triptych.pipelines.image_input import ImageInput, images_below, name_of
from triptych.torch_compile import compile_blocks

log = logging.getLogger(__name__)

A = TypeVar("A")
B = TypeVar("B")


class ImagePipeline:
    """A network on its device in its precision, and pictures that are read for it.

    Args:
        net: a network with `config` and `card`, or what `tp.load` takes.
        device: None takes CUDA, then MPS, then the processor.
        dtype: "fp32", "bf16", "fp16"; None takes bf16 where the hardware multiplies it natively, and logs it
            once.
        batch_size: images a forward pass.
        workers: processes that read and resize ahead; 0 does it in between.
        on_bad_image: "fail" raises at the first image that cannot be read; "skip" leaves it out of the
            results, logs it, and lists it in `skipped`. A single image always raises.
        compile: `torch.compile` each block at the first images; see `triptych.torch_compile` for when it pays.

    Raises:
        UserError: an argument is out of its range.
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
    ) -> None:
        if batch_size < 1 or workers < 0:
            raise UserError(f"batch_size {batch_size} must be at least 1 and workers {workers} at least 0")
        if on_bad_image not in ("skip", "fail"):
            raise UserError(f"on_bad_image is {on_bad_image!r}, which must be 'skip' or 'fail'")
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
        self.skipped: list[str] = []

    def check(self, net: Any) -> None:
        """Raises a `UserError` if the network cannot do what the pipeline is for."""

    @property
    def classes(self) -> tuple[str, ...]:
        """Name of each class, by index; its number where the card has no names."""
        count, names = self.config.num_classes, self.card.classes
        return names if names and len(names) == count else tuple(f"class {i}" for i in range(count))

    def answer(
        self, images: Any, one: Callable[[ImageInput], A], many: Callable[[Iterable[ImageInput]], Iterator[A]]
    ):
        """`one` of a picture, a list of `many` for a list or tuple, and their iterator for the path of a folder
        or any other iterable.

        Raises:
            UserError: a folder has no images.
        """
        if isinstance(images, str | os.PathLike) and os.path.isdir(images):
            return many(
                _some(images_below(images), f"{images} has no images below it; give a folder of images")
            )
        if isinstance(images, str | os.PathLike | bytes | Image.Image | np.ndarray):
            return one(images)
        found = many(images)
        return list(found) if isinstance(images, list | tuple) else found

    def readable(
        self, pictures: Iterable[ImageInput], read: Callable[[ImageInput], A], size: int
    ) -> Iterator[tuple[str, A]]:
        """Name and `read` of each picture in order; `workers` processes read ahead, `size` pictures a request, and no
        further than needed."""
        tried = _Tried(read)
        # Paths and bytes are read in the workers; opened images and arrays are here, and stay.
        asked = (one if isinstance(one, str | os.PathLike | bytes) else tried(one) for one in pictures)
        self.skipped = []
        for name, found in prefetch_map(tried, asked, size, self.workers):
            if not isinstance(found, UserError):
                yield name, found
            elif self.on_bad_image == "fail":
                raise found
            else:
                log.warning("skipped: %s", found)
                self.skipped.append(name)


@dataclass(frozen=True)
class _Tried(Generic[A]):
    """A picture's name with what is read of it, or with why it cannot be; such a pair as it is. Runs in workers."""

    read: Callable[[ImageInput], A]

    def __call__(self, picture: ImageInput | tuple[str, A | UserError]) -> tuple[str, A | UserError]:
        if isinstance(picture, tuple):
            return picture
        try:
            return name_of(picture), self.read(picture)
        except UserError as problem:
            return name_of(picture), problem


def batches(items: Iterable[A], size: int) -> Iterator[list[A]]:
    """Lists of `size` items, the last one shorter."""
    items = iter(items)
    while batch := list(itertools.islice(items, size)):
        yield batch


def _some(items: Iterator[A], otherwise: str) -> Iterator[A]:
    """The same items; a `UserError` now, not at the first `next`, if there are none."""
    try:
        first = next(items)
    except StopIteration:
        raise UserError(otherwise) from None
    return itertools.chain([first], items)
